// Where a cache's rows lie in device memory: contiguous, FlashInfer's pages, vLLM's blocks. Compiles without CUDA.
#include "vattn/macros_push.hpp"
#pragma once

#include <cstdint>

#include "vattn/base/status.hpp"

namespace vattn::VATTN_ABI::cuda {

/// Elements of K, V and Q.
enum class element : std::uint8_t { bf16, f16 };

/// K and V of one layer, strides in elements and the same for both. Token i of sequence b and KV head h is row
///   page(b, i)·page_stride + h·head_stride + (i mod page_size)·row_stride
/// with page(b, i) an entry of `table`, or b where there is none. All pointers are device memory and may not be read by
/// the host: what the tables hold is not checked. Rows begin at multiples of 16 bytes, within 64 GiB
/// of the base.
struct cache_view {
  const void* k = nullptr;
  const void* v = nullptr;
  std::int64_t page_stride = 0, head_stride = 0, row_stride = 0;
  int page_shift = 30;                          ///< log2 of the page's tokens; 30: one page is a sequence
  const std::int32_t* table = nullptr;          ///< block ids; null where contiguous
  const std::int32_t* table_start = nullptr;    ///< [n_batch + 1], a sequence's first entry; null: b·table_stride
  std::int32_t table_stride = 0;                ///< entries
  const std::int32_t* lengths = nullptr;        ///< [n_batch]; null: `max_tokens`, or FlashInfer's rule
  const std::int32_t* last_page_len = nullptr;  ///< [n_batch], FlashInfer's: with table_start gives the lengths
  std::int32_t max_tokens = 0;                  ///< no sequence is longer
};

namespace detail {
[[nodiscard]] constexpr int log2_of(std::int64_t size) noexcept {
  int shift = 0;
  while (shift < 30 && (std::int64_t{1} << shift) < size) ++shift;
  return shift;
}
}  // namespace detail

/// K and V [n_batch, n_kv_heads, capacity, d], of which the first `lengths[b]` (null: all `tokens`) rows are used.
[[nodiscard]] constexpr cache_view contiguous_cache(const void* k, const void* v, std::int64_t n_kv_heads,
                                                    std::int64_t capacity, std::int64_t d, std::int32_t tokens,
                                                    const std::int32_t* lengths = nullptr) noexcept {
  cache_view c;
  c.k = k, c.v = v;
  c.page_stride = n_kv_heads * capacity * d, c.head_stride = capacity * d, c.row_stride = d;
  c.lengths = lengths, c.max_tokens = tokens;
  return c;
}

/// FlashInfer: K and V each [n_pages, page_size, n_kv_heads, d] (nhd) or [n_pages, n_kv_heads, page_size, d] (hnd); one
/// buffer [n_pages, 2, …] with `per_page` = 2, v pointing at its second half. page_size is a power of two.
[[nodiscard]] constexpr cache_view flashinfer_cache(const void* k, const void* v, bool nhd, std::int64_t page_size,
                                                    std::int64_t n_kv_heads, std::int64_t d, const std::int32_t* indptr,
                                                    const std::int32_t* indices, const std::int32_t* last_page_len,
                                                    std::int32_t max_tokens, std::int64_t per_page = 1) noexcept {
  cache_view c;
  c.k = k, c.v = v;
  c.page_stride = per_page * page_size * n_kv_heads * d;
  c.head_stride = nhd ? d : page_size * d;
  c.row_stride = nhd ? n_kv_heads * d : d;
  c.page_shift = detail::log2_of(page_size);
  c.table = indices, c.table_start = indptr, c.last_page_len = last_page_len, c.max_tokens = max_tokens;
  return c;
}

/// vLLM: kv [2, n_blocks, block_size, n_kv_heads, d] (k at kv, v at kv + n_blocks·block_size·n_kv_heads·d elements),
/// block_table [n_batch, table_stride], seq_lens [n_batch]. block_size is a power of two.
[[nodiscard]] constexpr cache_view vllm_cache(const void* k, const void* v, std::int64_t block_size,
                                              std::int64_t n_kv_heads, std::int64_t d, const std::int32_t* block_table,
                                              std::int32_t table_stride, const std::int32_t* seq_lens,
                                              std::int32_t max_tokens) noexcept {
  cache_view c = flashinfer_cache(k, v, true, block_size, n_kv_heads, d, nullptr, block_table, nullptr, max_tokens);
  c.table_stride = table_stride, c.lengths = seq_lens;
  return c;
}

}  // namespace vattn::VATTN_ABI::cuda

#include "vattn/macros_pop.hpp"
