// What is kept beside ggml's cache: for each layer codes by cell, and which of them say what the cache holds now.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "attention.hpp"
#include "ggml-backend-impl.h"

namespace vattn_ggml {

/// Sets of cells, a bit each.
class cell_set {
 public:
  void resize(index_t cells) { words_.resize(static_cast<std::size_t>((cells + 63) / 64)); }
  [[nodiscard]] std::span<std::uint64_t> words() noexcept { return words_; }
  [[nodiscard]] std::span<const std::uint64_t> words() const noexcept { return words_; }
  void clear() noexcept { std::fill(words_.begin(), words_.end(), std::uint64_t{0}); }
  /// Removes [first, last).
  void remove(index_t first, index_t last) noexcept {
    for (index_t c = first; c < last;) {
      std::uint64_t& word = words_[static_cast<std::size_t>(c / 64)];
      const index_t end = std::min(last, (c / 64 + 1) * 64), count = end - c;
      const std::uint64_t ones = count == 64 ? ~std::uint64_t{0} : ((std::uint64_t{1} << count) - 1) << (c % 64);
      word &= ~ones;
      c = end;
    }
  }

 private:
  std::vector<std::uint64_t> words_;
};

/// One layer of one cache: its two tensors, and the indices of its streams' KV heads. A cell's code is used only while
/// its bit of `current` is set; whatever writes to the tensors clears bits, and an attention call codes the cells that
/// it sees and whose bits are not set. So no event needs to be understood: it only has to be seen.
class layer_cache {
 public:
  layer_cache(const ggml_tensor* k, const ggml_tensor* v, index_t kv_heads, index_t dk, index_t dv);

  /// Whether the tensors are still what they were when this was made.
  [[nodiscard]] bool is_of(const ggml_tensor* k, const ggml_tensor* v, index_t kv_heads) const noexcept;
  /// Which stream a view of the whole cache begins with, or −1 where it is not a view that is understood.
  [[nodiscard]] index_t first_stream(const ggml_tensor* k_view, const ggml_tensor* v_view) const noexcept;

  /// Bytes [first, last) of memory were or will be written.
  void written(const void* first, std::size_t bytes) noexcept;
  /// A row of the flattened cache, stream after stream.
  void row_written(index_t row) noexcept {
    if (row >= 0 && row < streams * cells)
      current[static_cast<std::size_t>(row / cells)].remove(row % cells, row % cells + 1);
  }
  void all_written() noexcept {
    for (cell_set& s : current) s.clear();
  }

  [[nodiscard]] vattn::kv_index& index(index_t stream, index_t kv) noexcept {
    return indices[static_cast<std::size_t>(stream * kv_heads + kv)];
  }
  [[nodiscard]] std::size_t bytes() const noexcept;

  const ggml_tensor *k, *v;
  const void *k_data, *v_data;
  const ggml_backend_buffer *k_buffer, *v_buffer;
  index_t kv_heads, cells, streams;
  std::vector<vattn::kv_index> indices;           // [streams, kv_heads], of one KV head each
  std::vector<cell_set> current;                  // [streams]
  std::vector<vattn::index_memory> memory;        // [slots, kv_heads, parts]
  std::vector<std::vector<std::int32_t>> coding;  // [streams]: cells to be coded before a call
  std::uint32_t step = 0, built = 0;              // calls; and when units were taken last
  std::uint64_t random = 0x9E3779B97F4A7C15u;     // of cells whose codes are checked
  index_t rows_at_build = 0;                      // cells of which units were taken
};

/// All layers of the process's caches, by their tensors. Buffers that hold one are watched: what writes to them without
/// a graph (states and sequences that are loaded, streams that are copied, clear) clears bits, what frees them ends the
/// layers. Safe from several threads; a layer itself is its graph's alone.
class layer_registry {
 public:
  /// The layer of these tensors, made if there is none; null where they are not ready for one.
  [[nodiscard]] layer_cache* get(const ggml_tensor* k, const ggml_tensor* v, index_t kv_heads, index_t dk, index_t dv);
  /// The layer that `t` is a tensor of, or null.
  [[nodiscard]] layer_cache* find(const ggml_tensor* t);
  /// Indices' bytes, and those of the tensors beside which they are.
  [[nodiscard]] std::array<std::size_t, 2> bytes();

  static layer_registry& instance();

 private:
  struct watched {
    ggml_backend_buffer_i original{};
  };
  void watch(ggml_backend_buffer_t b);
  void written(ggml_backend_buffer_t b, const void* first, std::size_t bytes) noexcept;
  void freed(ggml_backend_buffer_t b) noexcept;
  [[nodiscard]] ggml_backend_buffer_i original(ggml_backend_buffer_t b) noexcept;

  std::mutex mutex_;
  std::unordered_map<const ggml_tensor*, std::shared_ptr<layer_cache>> layers_;  // by K and by V
  std::unordered_map<ggml_backend_buffer_t, watched> buffers_;
  std::size_t code_bytes_ = 0, cache_bytes_ = 0;  // the most that there was
};

}  // namespace vattn_ggml
