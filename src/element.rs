//! The element types whose sums are ours.
//!
//! The lowest room of the library: nothing is imported here, and settings, routes, kernels and
//! records all name the types. `build.rs` and the simulator include the file, too, for names of
//! kernels.

/// Storage type of the elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ElementType {
    /// IEEE half precision.
    Fp16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision, of which sums are exact only.
    Fp32,
}

impl ElementType {
    /// All of them.
    pub const ALL: [ElementType; 3] = [ElementType::Fp16, ElementType::Bf16, ElementType::Fp32];
    /// Those that have codes.
    pub const CODED: [ElementType; 2] = [ElementType::Fp16, ElementType::Bf16];

    /// As in kernel names and settings.
    pub const fn name(self) -> &'static str {
        match self {
            ElementType::Fp16 => "fp16",
            ElementType::Bf16 => "bf16",
            ElementType::Fp32 => "fp32",
        }
    }

    /// Whether it has codes.
    pub const fn is_coded(self) -> bool {
        !matches!(self, ElementType::Fp32)
    }

    /// Bytes of an element.
    pub const fn n_bytes(self) -> usize {
        match self {
            ElementType::Fp16 | ElementType::Bf16 => 2,
            ElementType::Fp32 => 4,
        }
    }
}
