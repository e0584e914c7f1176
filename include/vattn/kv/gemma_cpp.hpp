// gemma.cpp's cache: float rows that hold all layers' K and V, in a ring over positions.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/kv/places.hpp"

namespace vattn::VATTN_ABI {

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

/// Row p: at (layer·n_kv_heads + h)·2·d the key of head h, at +d its value. Tokens are in order of position, wherever
/// the ring has wrapped.
template <index_t D = dynamic>
class gemma_cpp_view : public placed_kv<ring_sequence, plain_rows<float, D>, plain_rows<float, D>> {
 public:
  using base = placed_kv<ring_sequence, plain_rows<float, D>, plain_rows<float, D>>;

  gemma_cpp_view() = default;
  gemma_cpp_view(const float* cache, const gemma_cpp_layer& l) noexcept
      : base(ring_sequence(l.n_rows, l.first_position, l.n_tokens), l.n_kv_heads, l.d, l.d, rows(cache, l, 0),
             rows(cache, l, 1)),
        layer_(l) {}

  /// As base's, over the same layer.
  [[nodiscard]] gemma_cpp_view with_norms(const row_norms& norms, index_t room = 0) const noexcept {
    gemma_cpp_view copy = *this;
    static_cast<base&>(copy) = base::with_norms(norms, room);
    return copy;
  }

  [[nodiscard]] status validate() const noexcept {
    const gemma_cpp_layer& l = layer_;
    const bool counted = l.layer >= 0 && l.layer < detail::widest_buffer;
    if (counted) {
      if (status s = base::validate(); !s) return s;
    }
    const index_t layers = counted ? l.layer + 1 : l.layer;  // to the end of this one
    const index_t end = saturated_product(2 * element, saturated_product(saturated_product(layers, l.n_kv_heads), l.d));
    if (!counted || (l.n_tokens > 0 && l.n_rows > 1 && end > l.row_stride)) {
      return status::error(
          errc::invalid_argument,
          "layer %lld of %lld heads of %lld ends at byte %lld of a row, and rows are %lld bytes apart: "
          "give a layer that the rows hold, and row_stride in bytes",
          static_cast<long long>(l.layer), static_cast<long long>(l.n_kv_heads), static_cast<long long>(l.d),
          static_cast<long long>(end), static_cast<long long>(l.row_stride));
    }
    return {};
  }

 private:
  static constexpr index_t element = sizeof(float);

  // Keys (part 0) or values (1).
  [[nodiscard]] static row_store<plain_rows<float, D>> rows(const float* cache, const gemma_cpp_layer& l,
                                                            index_t part) noexcept {
    const index_t head = saturated_product(2 * element, l.d);
    const index_t first = saturated_product(saturated_product(l.layer, l.n_kv_heads), head);
    const float* k = detail::rows_after(cache, first);
    return {part == 0 ? k : detail::rows_after(k, head / 2), {.page = 0, .cell = l.row_stride, .head = head}, {}};
  }

  gemma_cpp_layer layer_{};
};

template <index_t D = dynamic>
[[nodiscard]] gemma_cpp_view<D> gemma_cpp_kv(const float* cache, const gemma_cpp_layer& l) noexcept {
  return {cache, l};
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
