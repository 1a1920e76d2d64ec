//! Bare jumps: the functions that the shim has nothing to say about go to the real library through the jump table,
//! with every register and the stack as they came. They cost one indirect jump.
//!
//! A function that the real NCCL lacks is here nevertheless, and answers `ncclInvalidUsage` ([`crate::real::table`]): a
//! program that looks a name up to learn whether NCCL has it is told yes. It should ask `ncclGetVersion`, which is the
//! real one's. No way was found to make `dlsym` fail for some names only; each was tried with glibc:
//!
//! * Indirect functions (`STT_GNU_IFUNC`) whose resolver answers NULL: `dlsym` answers NULL, but `dlerror` then says nothing or
//!   holds a dangling string. Python's ctypes, by which vLLM and SGLang look NCCL up, crashes at that. And where a program is
//!   linked and bound at its start, the resolver runs before the environment is there, so that it cannot find the
//!   real NCCL; a NULL bound then is a crash at the call.
//! * Symbol versions: NCCL's names have none, and a lookup without one finds any.
//! * A `dlsym` of our own would stand before that of every library of the process, and would change what its
//!   `RTLD_NEXT` means.

use std::arch::naked_asm;

use crate::nccl::Symbol;
use crate::nccl::symbols::for_each_symbol;
use crate::real::table::TABLE;

macro_rules! define_jumps {
    ($($how:ident $name:ident $twin:ident $kind:ident $major:literal $minor:literal $patch:literal;)*) => {
        $(
            define_jumps!(@$how $name);
            define_jumps!(@$how $twin);
        )*
    };
    (@own $name:ident) => {};
    (@jump $name:ident) => {
        #[doc = concat!("`", stringify!($name), "` of the real library.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[cfg(target_arch = "x86_64")]
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name() {
            naked_asm!(
                "endbr64",
                "jmp qword ptr [rip + {table} + {offset}]",
                table = sym TABLE,
                offset = const Symbol::$name as usize * 8,
            )
        }

        #[doc = concat!("`", stringify!($name), "` of the real library.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[cfg(target_arch = "aarch64")]
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name() {
            naked_asm!(
                "hint #34",
                "adrp x16, {table} + {offset}",
                "ldr x16, [x16, :lo12:{table} + {offset}]",
                "br x16",
                table = sym TABLE,
                offset = const Symbol::$name as usize * 8,
            )
        }
    };
}
for_each_symbol!(define_jumps);
