// Known rows as each engine keeps them: FlashInfer's pages, vLLM's blocks, ggml's tensors, gemma.cpp's ring.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

#include "support/layout.hpp"
#include "vattn/kv/flashinfer.hpp"
#include "vattn/kv/gemma_cpp.hpp"
#include "vattn/kv/ggml.hpp"
#include "vattn/kv/vllm.hpp"

namespace vattn::test {

// The page table of a batch in a cache of shuffled pages, some of them unused.
struct pages {
  pages(const std::vector<std::int32_t>& lengths, index_t page_size) : size(page_size) {
    indptr.push_back(0);
    for (const std::int32_t n : lengths) {
      indptr.push_back(indptr.back() + (n + static_cast<std::int32_t>(size) - 1) / static_cast<std::int32_t>(size));
      last.push_back(n == 0 ? 0 : (n - 1) % static_cast<std::int32_t>(size) + 1);
    }
    count = indptr.back() + 5;
    indices = shuffled_pages(count);
  }
  [[nodiscard]] index_t page(index_t b, index_t token) const {
    return indices[static_cast<std::size_t>(indptr[static_cast<std::size_t>(b)] + token / size)];
  }
  [[nodiscard]] flashinfer_pages view(const shape& s) const {
    return {.n_pages = count,
            .page_size = size,
            .n_kv_heads = s.kv_heads,
            .dk = s.dk,
            .dv = s.dv,
            .n_batch = s.batch,
            .indptr = indptr.data(),
            .indices = indices.data(),
            .last_page_len = last.data()};
  }

  index_t size, count = 0;
  std::vector<std::int32_t> indptr, indices, last;
};

// [pages, page, heads, d] or [pages, heads, page, d]; what is not written stays NaN.
template <class T>
std::vector<T> paged(const ragged<T>& r, const pages& t, page_order order, bool keys) {
  const index_t d = keys ? r.p.s.dk : r.p.s.dv, heads = r.p.s.kv_heads;
  std::vector<T> to(static_cast<std::size_t>(t.count * t.size * heads * d), T(not_a_number));
  r.for_each_row([&](index_t b, index_t h, index_t token) {
    const index_t page = t.page(b, token), slot = token % t.size;
    const index_t row =
        order == page_order::nhd ? (page * t.size + slot) * heads + h : (page * heads + h) * t.size + slot;
    std::copy_n(keys ? r.key(b, h, token) : r.value(b, h, token), d, to.data() + row * d);
  });
  return to;
}

// A block table of a cache of shuffled blocks; rows are 3 entries longer than what they say, entries past the
// sequence's end are rubbish.
struct table {
  table(const std::vector<std::int32_t>& lengths, index_t block_size) : size(block_size), seq_lens(lengths) {
    for (const std::int32_t n : lengths) width = std::max<index_t>(width, (n + size - 1) / size);
    const std::vector<std::int32_t> ids = shuffled_pages(width * static_cast<index_t>(lengths.size()) + 3, 8);
    count = static_cast<index_t>(ids.size());
    entries.assign(static_cast<std::size_t>((width + 3) * static_cast<index_t>(lengths.size())), -77);
    std::size_t next = 0;
    for (std::size_t b = 0; b < lengths.size(); ++b) {
      for (index_t i = 0; i < (lengths[b] + size - 1) / size; ++i)
        entries[b * static_cast<std::size_t>(width + 3) + static_cast<std::size_t>(i)] = ids[next++];
    }
  }
  [[nodiscard]] index_t block(index_t b, index_t token) const {
    return entries[static_cast<std::size_t>(b * (width + 3) + token / size)];
  }
  [[nodiscard]] vllm_blocks view(const shape& s) const {
    return {.n_blocks = count,
            .block_size = size,
            .n_kv_heads = s.kv_heads,
            .d = s.dk,
            .n_batch = s.batch,
            .max_blocks = width,
            .block_table = entries.data(),
            .seq_lens = seq_lens.data(),
            .table_stride = width + 3};
  }

  index_t size, width = 0, count = 0;
  std::vector<std::int32_t> seq_lens, entries;
};

// [2, blocks, block_size, heads, d]
template <class T>
std::vector<T> flash_layout(const ragged<T>& r, const table& t) {
  const index_t d = r.p.s.dk, heads = r.p.s.kv_heads;
  std::vector<T> to(static_cast<std::size_t>(2 * t.count * t.size * heads * d));
  r.for_each_row([&](index_t b, index_t h, index_t token) {
    const index_t row = (t.block(b, token) * t.size + token % t.size) * heads + h;
    std::copy_n(r.key(b, h, token), d, to.data() + row * d);
    std::copy_n(r.value(b, h, token), d, to.data() + (t.count * t.size * heads + row) * d);
  });
  return to;
}

// [blocks, heads, block_size, 2d]
template <class T>
std::vector<T> fused_layout(const ragged<T>& r, const table& t) {
  const index_t d = r.p.s.dk, heads = r.p.s.kv_heads;
  std::vector<T> to(static_cast<std::size_t>(2 * t.count * t.size * heads * d));
  r.for_each_row([&](index_t b, index_t h, index_t token) {
    T* row = to.data() + ((t.block(b, token) * heads + h) * t.size + token % t.size) * 2 * d;
    std::copy_n(r.key(b, h, token), d, row);
    std::copy_n(r.value(b, h, token), d, row + d);
  });
  return to;
}

// K [blocks, heads, d/x, block_size, x], V [blocks, heads, d, block_size]
template <class T>
std::pair<std::vector<T>, std::vector<T>> x_packed_layout(const ragged<T>& r, const table& t) {
  const index_t d = r.p.s.dk, heads = r.p.s.kv_heads, x = 16 / static_cast<index_t>(sizeof(T));
  std::vector<T> k(static_cast<std::size_t>(t.count * t.size * heads * d), T(not_a_number)), v = k;
  r.for_each_row([&](index_t b, index_t h, index_t token) {
    const index_t head = t.block(b, token) * heads + h, slot = token % t.size;
    for (index_t j = 0; j < d; ++j) {
      k[static_cast<std::size_t>(((head * (d / x) + j / x) * t.size + slot) * x + j % x)] = r.key(b, h, token)[j];
      v[static_cast<std::size_t>((head * d + j) * t.size + slot)] = r.value(b, h, token)[j];
    }
  });
  return {k, v};
}

// Rows of T, and the floats that they hold.
template <class T>
void store_row(const float* x, index_t width, std::byte* to, float* known) {
  if constexpr (kernel::quantised_block<T>) {
    auto* blocks = reinterpret_cast<T*>(to);
    kernel::quantise(x, static_cast<std::size_t>(width), blocks);
    load(kernel::block_row<T>(blocks, static_cast<std::size_t>(width)), known);
  } else {
    for (index_t j = 0; j < width; ++j) {
      reinterpret_cast<T*>(to)[j] = T(x[j]);
      known[j] = static_cast<float>(reinterpret_cast<T*>(to)[j]);
    }
  }
}

template <class T>
index_t row_bytes(index_t width) {
  return rows_of<T>{}.extent(width);
}

// A layer's cache: per token one row of heads·d elements, and `pad` bytes; streams one after the other. As attention
// sees it: [d, n_kv, heads, streams].
template <class T>
struct tensor {
  tensor(ragged<float>& r, bool keys, index_t pad = 0) {
    const shape& s = r.p.s;
    const index_t d = keys ? s.dk : s.dv, row = row_bytes<T>(d), token = row * s.kv_heads + pad;
    bytes.resize(static_cast<std::size_t>(token * s.n * s.batch));
    layout = {bytes.data(),
              {d, s.n, s.kv_heads, s.batch},
              {row_bytes<T>(kernel::quantised_block<T> ? 32 : 1), token, row, token * s.n}};
    r.for_each_row([&](index_t b, index_t h, index_t t) {
      auto* known = const_cast<float*>(keys ? r.key(b, h, t) : r.value(b, h, t));
      const std::vector<float> x(known, known + d);
      store_row<T>(x.data(), d, bytes.data() + b * layout.nb[3] + t * layout.nb[1] + h * layout.nb[2], known);
    });
  }
  std::vector<std::byte> bytes;
  ggml_layout layout;
};

// [rows, layers·heads·2d + padding]
[[nodiscard]] inline std::vector<float> ring(const ragged<float>& r, const gemma_cpp_layer& l) {
  const index_t stride = l.row_stride / 4;
  std::vector<float> to(static_cast<std::size_t>(l.n_rows * stride), not_a_number);
  r.for_each_row([&](index_t b, index_t h, index_t t) {
    float* at = to.data() + (l.first_position + t) % l.n_rows * stride + (l.layer * l.n_kv_heads + h) * 2 * l.d;
    std::copy_n(r.key(b, h, t), l.d, at);
    std::copy_n(r.value(b, h, t), l.d, at + l.d);
  });
  return to;
}

}  // namespace vattn::test
