// FlashInfer's paged caches: NHD and HND, K and V apart or in one tensor.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/kv/places.hpp"

namespace vattn::VATTN_ABI {

/// Order of the axes of a page: tokens then heads, or heads then tokens.
enum class page_order : std::uint8_t {
  nhd,  ///< [n_pages, page_size, n_kv_heads, d]
  hnd,  ///< [n_pages, n_kv_heads, page_size, d]
};

/// The paged batch: int32 indptr [n_batch + 1], indices [indptr[n_batch]], last_page_len [n_batch] (1 to page_size).
struct flashinfer_pages {
  index_t n_pages = 0;  ///< of the cache
  index_t page_size = 0;
  index_t n_kv_heads = 1;
  index_t dk = 0, dv = 0;
  index_t n_batch = 1;
  const std::int32_t* indptr = nullptr;
  const std::int32_t* indices = nullptr;
  const std::int32_t* last_page_len = nullptr;
};

template <row_format K, row_format V>
using flashinfer_kv = placed_kv<page_lists, K, V>;

/// Rows wherever the strides say: for padded pages, and for a cache of which this is one layer.
template <index_t DK = dynamic, index_t DV = DK, stored TK, stored TV>
[[nodiscard]] flashinfer_kv<rows_of<TK, DK>, rows_of<TV, DV>> flashinfer_paged_kv(
    const TK* k, const cell_strides& k_strides, const TV* v, const cell_strides& v_strides, const flashinfer_pages& p,
    const row_scales& scales = {}) noexcept {
  return {page_lists(p.indptr, p.indices, p.last_page_len, p.n_batch, p.n_pages, p.page_size),
          p.n_kv_heads,
          p.dk,
          p.dv,
          {k, k_strides, make_format<TK, DK>(scales.k)},
          {v, v_strides, make_format<TV, DV>(scales.v)}};
}

namespace detail {
/// Strides of dense pages of rows of `row` bytes, with `per_page` such pages from one page to the next.
[[nodiscard]] inline cell_strides page_strides(page_order order, index_t page_size, index_t heads, index_t row,
                                               index_t per_page = 1) noexcept {
  const index_t cell = saturated_product(heads, row);  // of all heads
  const index_t page = saturated_product(saturated_product(page_size, cell), per_page);
  if (order == page_order::nhd) return {.page = page, .cell = cell, .head = row};
  return {.page = page, .cell = row, .head = saturated_product(page_size, row)};
}
}  // namespace detail

/// K and V apart, each dense in `order`.
template <index_t DK = dynamic, index_t DV = DK, stored TK, stored TV>
[[nodiscard]] auto flashinfer_paged_kv(const TK* k, const TV* v, page_order order, const flashinfer_pages& p,
                                       const row_scales& scales = {}) noexcept {
  const auto strides = [&](index_t row) { return detail::page_strides(order, p.page_size, p.n_kv_heads, row); };
  return flashinfer_paged_kv<DK, DV>(k, strides(rows_of<TK>{}.extent(p.dk)), v, strides(rows_of<TV>{}.extent(p.dv)), p,
                                     scales);
}

/// K and V in one: [n_pages, 2, page_size, n_kv_heads, d] or [n_pages, 2, n_kv_heads, page_size, d]; dk = dv = d.
template <index_t D = dynamic, stored T>
[[nodiscard]] auto flashinfer_paged_kv(const T* kv, page_order order, const flashinfer_pages& p,
                                       const row_scales& scales = {}) noexcept {
  const index_t row = rows_of<T>{}.extent(p.dk);
  const cell_strides strides = detail::page_strides(order, p.page_size, p.n_kv_heads, row, 2);
  return flashinfer_paged_kv<D>(kv, strides, detail::rows_after(kv, strides.page / 2), strides, p, scales);
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
