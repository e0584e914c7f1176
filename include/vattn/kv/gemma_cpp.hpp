// gemma.cpp's cache: float rows that hold all layers' K and V, in a ring over positions.
#pragma once

#include "vattn/kv/places.hpp"

namespace vattn {

/// One layer of the ring. Positions first_position ... first_position + n_tokens − 1 are held by cells
/// position mod n_rows.
struct gemma_cpp_layer {
  index_t n_rows = 0;      ///< cells of the ring
  index_t row_stride = 0;  ///< BYTES from one row to the next; rows are padded
  index_t layer = 0;
  index_t n_kv_heads = 1;
  index_t d = 0;
  index_t first_position = 0;
  index_t n_tokens = 0;
};

template <index_t D = dynamic>
using gemma_cpp_view = placed_kv<ring_sequence, plain_rows<float, D>, plain_rows<float, D>>;

/// Row p: at (layer·n_kv_heads + h)·2·d the key of head h, at +d its value. Tokens are in order of position, wherever
/// the ring has wrapped.
template <index_t D = dynamic>
[[nodiscard]] gemma_cpp_view<D> gemma_cpp_kv(const float* cache, const gemma_cpp_layer& l) noexcept {
  const cell_strides strides{.page = 0, .cell = l.row_stride, .head = 2 * l.d * static_cast<index_t>(sizeof(float))};
  const float* k = cache == nullptr ? nullptr : cache + l.layer * l.n_kv_heads * 2 * l.d;
  return {ring_sequence(l.n_rows, l.first_position, l.n_tokens), l.n_kv_heads, l.d, l.d, {k, strides, {}},
          {k == nullptr ? nullptr : k + l.d, strides, {}}};
}

}  // namespace vattn
