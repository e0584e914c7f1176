// vLLM's paged caches behind a block table, and the x-packed ones.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/kv/flashinfer.hpp"

namespace vattn::VATTN_ABI {

/// int32 block_table [n_batch, max_blocks] (rows `table_stride` entries apart, 0 = max_blocks), seq_lens [n_batch].
struct vllm_blocks {
  index_t n_blocks = 0;  ///< of the cache
  index_t block_size = 0;
  index_t n_kv_heads = 1;
  index_t d = 0;
  index_t n_batch = 1;
  index_t max_blocks = 0;
  const std::int32_t* block_table = nullptr;
  const std::int32_t* seq_lens = nullptr;
  index_t table_stride = 0;

  [[nodiscard]] vattn::block_table places() const noexcept {
    return {block_table, seq_lens, n_batch, max_blocks, n_blocks, block_size, table_stride};
  }
};

template <row_format K, row_format V = K>
using vllm_view = placed_kv<block_table, K, V>;

/// Rows wherever the strides say: V at `v`, for padded blocks or layers in one buffer.
template <index_t D = dynamic, stored T>
[[nodiscard]] vllm_view<rows_of<T, D>> vllm_kv(const T* k, const cell_strides& k_strides, const T* v,
                                               const cell_strides& v_strides, const vllm_blocks& b,
                                               const row_scales& scales = {}) noexcept {
  return {b.places(),
          b.n_kv_heads,
          b.d,
          b.d,
          {k, k_strides, make_format<T, D>(scales.k)},
          {v, v_strides, make_format<T, D>(scales.v)}};
}

/// [2, n_blocks, block_size, n_kv_heads, d]: all of K, then all of V. T = kernel::e4m3 for fp8 caches, with k_scale and
/// v_scale.
template <index_t D = dynamic, stored T>
[[nodiscard]] auto vllm_kv(const T* kv, const vllm_blocks& b, const row_scales& scales = {}) noexcept {
  const index_t row = rows_of<T>{}.extent(b.d);
  const cell_strides strides = detail::page_strides(page_order::nhd, b.block_size, b.n_kv_heads, row);
  return vllm_kv<D>(kv, strides, detail::rows_after(kv, saturated_product(b.n_blocks, strides.page)), strides, b,
                    scales);
}

/// [n_blocks, n_kv_heads, block_size, 2·d]: each row a key, then its value. For a buffer that is permuted or padded
/// give `strides`; the default is dense in this order.
template <index_t D = dynamic, stored T>
[[nodiscard]] auto vllm_fused_kv(const T* kv, const vllm_blocks& b, const cell_strides& strides = {},
                                 const row_scales& scales = {}) noexcept {
  const index_t row = rows_of<T>{}.extent(b.d);
  const bool dense = strides.page == 0 && strides.cell == 0 && strides.head == 0;
  const cell_strides used =
      dense ? detail::page_strides(page_order::hnd, b.block_size, b.n_kv_heads, saturated_product(2, row)) : strides;
  return vllm_kv<D>(kv, used, detail::rows_after(kv, row), used, b, scales);
}

/// K [n_blocks, n_kv_heads, d/x, block_size, x], V [n_blocks, n_kv_heads, d, block_size]; x = 16/sizeof(T). The
/// elements of a value are block_size apart, each on a cache line of its own: slow to gather.
template <kernel::element T>
[[nodiscard]] vllm_view<grouped_rows<T>> vllm_x_packed_kv(const T* k, const T* v, const vllm_blocks& b) noexcept {
  constexpr auto element = static_cast<index_t>(sizeof(T)), x = 16 / element;
  const index_t head = saturated_product(saturated_product(b.d, b.block_size), element);
  const index_t page = saturated_product(b.n_kv_heads, head), line = saturated_product(b.block_size, element);
  return {b.places(),
          b.n_kv_heads,
          b.d,
          b.d,
          {k, {.page = page, .cell = x * element, .head = head}, {.group = x, .stride = saturated_product(line, x)}},
          {v, {.page = page, .cell = element, .head = head}, {.group = 1, .stride = line}}};
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
