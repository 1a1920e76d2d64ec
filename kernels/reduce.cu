// Decode, sum, requantize: the payloads of hop 1 and the owner's own input to the owner's payload of hop 2.
//
//   grid   (tiles of the slice)    block  128 threads, one tile
//   reads  input    the owner's count elements of T, of which its chunk is used, unquantized
//          incoming slots of the ranks in order, slot_bytes apart: their tiles of this chunk (not the owner's own slot)
//   writes outgoing the tiles of the sum
//
// Where the result is to be batch invariant, the owner's input is quantized first, to its slot of incoming, and added as
// the others' are.
//
// The sum is taken in fp32 in rank order, whatever order the payloads came in, so that every exchange and every run
// gives the same bits. Past the
// end of a short tile the repeated inputs are summed like any others.
//
// Bytes through memory per element of the chunk: 2 + world * (b/8 + 4/g).

#include "codec.cuh"

namespace flashcomm {

template <class T, Code kCode, int kReduceBits, int kGatherBits>
__device__ __forceinline__ void reduce(const ReduceArgs& args) {
  using In = Codec<T, kCode, kReduceBits>;
  using Out = Codec<T, kCode, kGatherBits>;
  const Tile tile = tile_of(args.slice, args.rank, blockIdx.x);
  if (tile.n_elems == 0) return;

  const unsigned shift = args.slice.group_shift;
  const T* input = static_cast<const T*>(args.input) + tile.start;
  uint8_t* incoming = args.incoming + blockIdx.x * payload_bytes<In>(shift);
  if (args.batch_invariant != 0) {
    ThreadVecs own;
    load_vecs(input, tile.n_elems, own);
    store_payload<In>(incoming + args.rank * args.slot_bytes, shift, In::encode_input(own, shift));
    __syncwarp();  // a warp reads no more of a payload than it has written
  }
  ThreadElems sum;
  start_sum(sum);
#pragma unroll 1  // unrolled, the senders' quants would take 150 registers
  for (unsigned rank = 0; rank < args.world; ++rank) {
    if (rank == args.rank && args.batch_invariant == 0) {
      ThreadVecs own;
      load_vecs(input, tile.n_elems, own);
#pragma unroll
      for (int row = 0; row < kRows; ++row) In::add_input(own[row], sum[row]);
    } else {
      In::add(load_payload<In>(incoming + rank * args.slot_bytes, shift), sum);
    }
  }
  scale_sum(args.scale, sum);
  store_payload<Out>(args.outgoing + blockIdx.x * payload_bytes<Out>(shift), shift, Out::encode(sum, shift));
}

// One entry for each pair of widths.
#define FLASHCOMM_ENTRY(name, T, code, in, out)                                                              \
  extern "C" __global__ void __launch_bounds__(kTileThreads) name(const __grid_constant__ ReduceArgs args) { \
    reduce<T, Code::code, in, out>(args);                                                                    \
  }
FLASHCOMM_EACH_REDUCE(FLASHCOMM_ENTRY)
#undef FLASHCOMM_ENTRY

}  // namespace flashcomm
