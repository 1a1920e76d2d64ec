// What orders the copies of an all-reduce whose payloads copy engines carry through host memory: src/exchange/copies.rs has
// the protocol. A count means the same whether eager calls or replays of a graph gave the ones before it.
//
// Memory order: what a copy has written is there when the kernel behind it on its stream begins. fence.acq_rel, st.relaxed of
// the word; ld.acquire until it is there; the copies behind that kernel.
#include "shared.cuh"
#include "signals.cuh"

namespace flashcomm {

// A lane for each rank that is told.
__device__ __forceinline__ void signal(const SignalArgs& args) {
  const unsigned rank = threadIdx.x;
  const uint32_t count = *args.count + args.step;
  __syncwarp();
  if (rank < kMaxWorld && args.words[rank] != nullptr) {
    fence_acq_rel_sys();
    st_relaxed_sys(args.words[rank], count);
  }
  if (rank == 0) *args.count = count;
}

// A lane for each rank that is waited for.
__device__ __forceinline__ void wait(const WaitArgs& args) {
  const unsigned rank = threadIdx.x;
  const uint32_t count = *args.count + args.step, least = count - args.lag;
  __syncwarp();
  if (rank < kMaxWorld && args.words[rank] != nullptr) {
    uint64_t start = 0;
    for (unsigned spins = 1; int32_t(ld_acquire_sys(args.words[rank]) - least) < 0; ++spins) {
      if (spins % 1024 == 0 && gives_up(args, rank, 0, count, start)) break;
    }
  }
  __syncwarp();
  if (rank == 0) *args.count = count;
}

#define FLASHCOMM_ENTRY(name, T) \
  extern "C" __global__ void __launch_bounds__(32, 1) name(const __grid_constant__ SignalArgs args) { signal(args); }
FLASHCOMM_EACH_SIGNAL(FLASHCOMM_ENTRY)
#undef FLASHCOMM_ENTRY

#define FLASHCOMM_ENTRY(name, T) \
  extern "C" __global__ void __launch_bounds__(32, 1) name(const __grid_constant__ WaitArgs args) { wait(args); }
FLASHCOMM_EACH_WAIT(FLASHCOMM_ENTRY)
#undef FLASHCOMM_ENTRY

}  // namespace flashcomm
