// Signals: how a channel of the fused kernel tells its peers what is done, hears them, and gives up
// waiting.
//
// A channel speaks only to the channels of its own number on the other ranks. A signal is one
// 32-bit word that stays: it holds how often the sender's channel has ever signalled. So a count
// means the same whether eager calls or replays of a graph gave the ones before it, and nobody ever
// resets a word.
//
//   word          where                      who writes            who reads
//   signal        the receiver's area: a row  the sender's channel  the receiver's channel of
//                 a channel, a word a sender                        that number
//   args.signals  this GPU, a word a channel  thread 0, at the end  the same channel of the next
//                                                                   operation on the stream
//   args.abort    host memory                 the host              channels that wait
//   args.gave_up  host memory                 one channel that      the host, and channels that
//                                             gives up              wait
//
// Memory order, all of it at system scope, for sender and receiver may be on two GPUs and the words
// in memory of the host:
//
//   tell   the channel's stores; a barrier of the channel; then for each peer one lane:
//          fence.acq_rel, st.relaxed of the signal
//   hear   for each peer one lane: ld.acquire of the signal until it is there; then a barrier of
//          the channel; the channel's loads
//
// The fence and the acquiring load synchronize; the barriers carry that to the channel's other
// threads. Telling and hearing are different warps' work, so that the fence of one does not hold up
// the other.
//
// What a lane writes to args.gave_up is in order, too: the fields, a fence, why. Whoever reads why
// may read the rest.
#pragma once

#include "layout.cuh"
#include "ptx.cuh"

namespace flashcomm {

constexpr unsigned kHearingWarp = 0, kTellingWarp = 3;

// The calling thread's channel's barrier; whether all of its threads brought true.
__device__ __forceinline__ bool channel_barrier(bool value) {
  return barrier_and(1 + threadIdx.y, kTileThreads, value);
}

// Whether a thread that waits for a peer shall stop: the communicator was aborted, the deadline passed, or another thread gave
// up before. (Whoever has given up once does not wait again: work queued behind it ends at once.)
// start: 0 at first; when the wait was first looked at.
template <class Args>
__device__ __forceinline__ bool gives_up(const Args& args, unsigned peer, unsigned channel, unsigned iteration,
                                         uint64_t& start) {
  unsigned why = ld_relaxed_sys(args.abort) != 0 ? kAborted : ld_relaxed_sys(&args.gave_up->why);
  if (args.timeout_ns != 0) {
    const uint64_t now = globaltimer();
    if (start == 0) start = now;
    if (now - start > args.timeout_ns) why = kDeadlinePassed;
  }
  if (why == 0) return false;
  if (atomicExch_system(&args.gave_up->claimed, 1u) == 0) {
    args.gave_up->peer = peer;
    args.gave_up->channel = channel;
    args.gave_up->iteration = iteration;
    fence_acq_rel_sys();
    st_relaxed_sys(&args.gave_up->why, why);
  }
  return true;
}

// One channel's signals. A struct of what its owner has anyway, so it takes no register.
struct Signals {
  const AllReduceArgs& args;
  unsigned channel;

  // Tells each peer that what this channel did so far is done.
  // n_signals: how often it has signalled, this time included.
  __device__ __forceinline__ void tell(uint32_t n_signals) const {
    channel_barrier(true);
    signal(n_signals);
  }

  // Waits until each peer has signalled so often. False where the channel gives up.
  __device__ __forceinline__ bool hear(uint32_t n_signals, unsigned iteration) const {
    return channel_barrier(wait(n_signals, iteration));
  }

  // Hears what belongs to the iteration before, and tells of this one if there is something to tell:
  // one barrier for both. n_signals: given so far.
  __device__ __forceinline__ bool hear_and_tell(bool hears, bool tells, uint32_t n_signals,
                                                unsigned iteration) const {
    if (!channel_barrier(!hears || wait(n_signals, iteration))) return false;
    if (tells) signal(n_signals + 1);
    return true;
  }

 private:
  __device__ void signal(uint32_t n_signals) const {
    const unsigned peer = threadIdx.x % 32;
    if (threadIdx.x / 32 == kTellingWarp && peer < args.world && peer != args.rank) {
      fence_acq_rel_sys();
      st_relaxed_sys(word(peer, args.rank), n_signals);
    }
  }

  __device__ bool wait(uint32_t n_signals, unsigned iteration) const {
    const unsigned peer = threadIdx.x % 32;
    bool is_heard = true;
    if (threadIdx.x / 32 == kHearingWarp && peer < args.world && peer != args.rank) {
      const uint32_t* from = word(args.rank, peer);
      uint64_t start = 0;
      for (unsigned spins = 1; is_heard && int32_t(ld_acquire_sys(from) - n_signals) < 0; ++spins) {
        if (spins % 1024 == 0) is_heard = !gives_up(args, peer, channel, iteration, start);
      }
    }
    return is_heard;
  }

  // An area begins with a row of signals for each channel, one from each sender.
  __device__ uint32_t* word(unsigned at_rank, unsigned from) const {
    return reinterpret_cast<uint32_t*>(args.areas[at_rank]) + channel * kSignalWords + from;
  }
};

}  // namespace flashcomm
