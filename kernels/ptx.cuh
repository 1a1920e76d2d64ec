// The instructions that CUDA C++ has no portable name for, each as op_modifiers. Inline assembly lives only here.
#pragma once

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

}  // namespace flashcomm
