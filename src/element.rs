//! The element types whose sums are compressed.
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
}

impl ElementType {
    /// Both types.
    pub const ALL: [ElementType; 2] = [ElementType::Fp16, ElementType::Bf16];

    /// As in kernel names and settings.
    pub const fn name(self) -> &'static str {
        match self {
            ElementType::Fp16 => "fp16",
            ElementType::Bf16 => "bf16",
        }
    }

    /// Bytes of an element.
    pub const fn n_bytes(self) -> usize {
        2
    }
}
