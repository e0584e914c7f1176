// Dense caches whose sequences differ in length.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/kv/places.hpp"

namespace vattn::VATTN_ABI {

/// K [n_batch, n_kv_heads, n_tokens, dk] and V [.., dv], dense, of which sequence b uses its first lengths[b] tokens,
/// int32 [n_batch], 0 to n_tokens. As contiguous_kv otherwise.
template <index_t DK = dynamic, index_t DV = DK, stored TK, stored TV>
[[nodiscard]] placed_kv<padded_sequences, rows_of<TK, DK>, rows_of<TV, DV>> padded_kv(
    const TK* k, const TV* v, const kv_shape& s, const std::int32_t* lengths, const row_scales& scales = {}) noexcept {
  const auto strides = [&](index_t row) {
    const index_t head = saturated_product(row, s.n_tokens);
    return cell_strides{.page = saturated_product(head, s.n_kv_heads), .cell = row, .head = head};
  };
  return {padded_sequences(s.n_batch, s.n_tokens, lengths),
          s.n_kv_heads,
          s.dk,
          s.dv,
          {k, strides(rows_of<TK>{}.extent(s.dk)), make_format<TK, DK>(scales.k)},
          {v, strides(rows_of<TV>{}.extent(s.dv)), make_format<TV, DV>(scales.v)}};
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
