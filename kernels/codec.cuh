// The codecs of one tile: 128 threads, 32 elements each, four rows of 8. Bit for bit the same as the scalar
// specification in wire/src/codec.rs and the files beside that, where the formulas and the layout are written down.
//
// A codec has
//
//   Thread                          what one thread holds of an encoded tile
//   kQuantsBytes, params_bytes(shift)   of the two parts of a payload: quants, and behind them what there is for each group
//   encode_input(x, shift)          x: this thread's elements as they are stored; may be overwritten
//   add_input(row, sum)             adds a row of them to a row of a sum, as they would be if they were not quantized
//   encode(sum, shift)              sum: may be overwritten
//   add(thread, sum)                adds what they decode to
//   decode_row(thread, row)         a row as the output has it
//   decode_both_row(first, second, row, scale)   the same of the sum of two ranks' tiles (where elements are coded)
//   load_quants(payload, thread), store_quants(payload, thread)
//   load_params(params, shift, thread), store_params(params, shift, thread)   where either part is: 16-byte aligned
//
// where shift is log2 of the lanes that hold one quantization group in a row. A warp needs no other: its rows hold whole
// groups. All its lanes call alike. Nothing here synchronizes a block.
#pragma once

#include "codec/blocks.cuh"
#include "codec/plain.cuh"
#include "codec/stored.cuh"

namespace flashcomm {

// As kernel names have them.
enum class Code { plain, blocks };

template <class T, Code kCode, int kBits>
struct CodecOf;
template <class T, int kBits>
struct CodecOf<T, Code::plain, kBits> {
  using Type = Plain<T, kBits>;
};
template <class T>
struct CodecOf<T, Code::plain, 16> {
  using Type = Stored<T>;
};
template <class T, int kBits>
struct CodecOf<T, Code::blocks, kBits> {
  using Type = Blocks<T, kBits>;
};
template <class T, Code kCode, int kBits>
using Codec = typename CodecOf<T, kCode, kBits>::Type;

template <class C>
__device__ __forceinline__ unsigned payload_bytes(unsigned group_shift) {
  return C::kQuantsBytes + C::params_bytes(group_shift);
}

template <class C>
__device__ __forceinline__ typename C::Thread load_payload(const uint8_t* payload, unsigned group_shift) {
  typename C::Thread t;
  C::load_quants(payload, t);
  C::load_params(payload + C::kQuantsBytes, group_shift, t);
  return t;
}

template <class C>
__device__ __forceinline__ void store_payload(uint8_t* payload, unsigned group_shift, const typename C::Thread& t) {
  C::store_quants(payload, t);
  C::store_params(payload + C::kQuantsBytes, group_shift, t);
}

}  // namespace flashcomm
