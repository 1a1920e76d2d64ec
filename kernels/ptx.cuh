// The instructions that CUDA C++ has no portable name for, each as op_modifiers. Inline assembly lives only here.
#pragma once

#include <cstdint>

namespace flashcomm {

// Minimum of a and b; NaN if either is NaN (fminf would drop the NaN).
__device__ __forceinline__ float min_nan(float a, float b) {
  float m;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}

// Maximum of a and b; NaN if either is NaN.
__device__ __forceinline__ float max_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}

// ---- memory that other GPUs and the host see -------------------------------------------------------------------

__device__ __forceinline__ uint32_t ld_acquire_sys(const uint32_t* ptr) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(ptr) : "memory");
  return v;
}

__device__ __forceinline__ uint32_t ld_relaxed_sys(const uint32_t* ptr) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(ptr) : "memory");
  return v;
}

__device__ __forceinline__ void st_relaxed_sys(uint32_t* ptr, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(ptr), "r"(v) : "memory");
}

__device__ __forceinline__ void st_relaxed_sys(uint64_t* ptr, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(ptr), "l"(v) : "memory");
}

// 16 aligned bytes, which are there or not as a whole: PTX has them as one access of 128 bits, not as a vector of smaller ones.
__device__ __forceinline__ uint4 ld_relaxed_sys_b128(const uint4* ptr) {
  unsigned __int128 v;
  asm volatile("ld.relaxed.sys.global.b128 %0, [%1];" : "=q"(v) : "l"(ptr) : "memory");
  return make_uint4(uint32_t(v), uint32_t(v >> 32), uint32_t(v >> 64), uint32_t(v >> 96));
}

__device__ __forceinline__ void st_relaxed_sys_b128(uint4* ptr, const uint4& v) {
  const uint64_t low = uint64_t(v.y) << 32 | v.x, high = uint64_t(v.w) << 32 | v.z;
  asm volatile("st.relaxed.sys.global.b128 [%0], %1;" ::"l"(ptr), "q"(static_cast<unsigned __int128>(high) << 64 | low)
               : "memory");
}

__device__ __forceinline__ void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Nanoseconds of a clock that all SMs share.
__device__ __forceinline__ uint64_t globaltimer() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// ---- barriers of some of a block's threads ----------------------------------------------------------------------

// Waits for n_threads of the block at barrier id, a multiple of 32; whether all of them brought true.
__device__ __forceinline__ bool barrier_and(unsigned id, unsigned n_threads, bool value) {
  int all;
  asm volatile(
      "{\n"
      "  .reg .pred p, q;\n"
      "  setp.ne.s32 p, %3, 0;\n"
      "  barrier.cta.red.and.aligned.pred q, %1, %2, p;\n"
      "  selp.s32 %0, 1, 0, q;\n"
      "}"
      : "=r"(all)
      : "r"(id), "r"(n_threads), "r"(int(value))
      : "memory");
  return all;
}

// ---- copies to shared memory that go on while the thread does -------------------------------------------------

// For what nobody reads again: the first to leave the L2. (Volatile: made anew where needed, it takes no registers elsewhere.)
__device__ __forceinline__ uint64_t policy_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes, past the L1 cache.
__device__ __forceinline__ void cp_async_16(void* shared_ptr, const void* global_ptr, uint64_t policy) {
  const unsigned to = __cvta_generic_to_shared(shared_ptr);
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(global_ptr), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace flashcomm
