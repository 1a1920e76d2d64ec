// Decode, sum, requantize: the payloads of hop 1 and the owner's own input to the owner's payload of hop 2.
//
//   grid   (tiles of the slice)    block  128 threads, one tile
//   reads  input    the owner's count elements of T, of which its chunk is used, unquantized
//          incoming slots of the ranks in order, slot_bytes apart: their tiles of this chunk (not the owner's own slot)
//   writes outgoing the tiles of the sum
//
// The sum is taken in fp32 in rank order, whatever order the payloads came in, so that every exchange and every run
// gives the same bits. Past the
// end of a short tile the repeated inputs are summed like any others.
//
// Bytes through memory per element of the chunk: 2 + world * (b/8 + 4/g).

#include "codec.cuh"

namespace flashcomm {

// Mirrors ReduceArgs in src/kernels.rs.
struct ReduceArgs {
  const void* input;
  const uint8_t* incoming;
  uint8_t* outgoing;
  uint64_t slot_bytes;
  uint32_t rank;
  uint32_t world;
  Slice slice;
};

template <class T, int kReduceBits, int kGatherBits>
__device__ __forceinline__ void reduce(const ReduceArgs& args) {
  using In = Codec<T, kReduceBits>;
  using Out = Codec<T, kGatherBits>;
  const Tile tile = tile_of(args.slice, args.rank, blockIdx.x);
  if (tile.n_elems == 0) return;

  const unsigned shift = args.slice.group_shift;
  const T* input = static_cast<const T*>(args.input) + tile.start;
  const uint8_t* incoming = args.incoming + blockIdx.x * In::bytes(shift);
  ThreadElems sum;
#pragma unroll 1  // unrolled, the senders' codes would take 150 registers
  for (unsigned rank = 0; rank < args.world; ++rank) {
    ThreadElems term;
    if (rank == args.rank) {
      load_elems(input, tile.n_elems, term);
    } else {
      const typename In::Thread theirs = In::load(incoming + rank * args.slot_bytes, shift);
#pragma unroll
      for (int row = 0; row < kRows; ++row) In::decode_row(theirs, row, term[row]);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int e = 0; e < kLaneElems; ++e) {
        // Rank 0 starts the sum: 0 + term would lose the sign of -0.
        sum[row][e] = rank == 0 ? term[row][e] : __fadd_rn(sum[row][e], term[row][e]);
      }
    }
  }
  Out::store(args.outgoing + blockIdx.x * Out::bytes(shift), shift, Out::encode(sum, shift));
}

// One entry for each pair of widths.
#define FLASHCOMM_DEFINE(suffix, T, in, out)                                                  \
  extern "C" __global__ void __launch_bounds__(kTileThreads)                                  \
      flashcomm_reduce_##suffix##_int##in##_int##out(const __grid_constant__ ReduceArgs args) { \
    reduce<T, in, out>(args);                                                                 \
  }
FLASHCOMM_EACH_PAIR(FLASHCOMM_DEFINE)
#undef FLASHCOMM_DEFINE

}  // namespace flashcomm
