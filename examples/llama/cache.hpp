// Keys and values of the tokens so far, layer by layer, in the element type that the user chose.
#pragma once

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "common/value_norms.hpp"
#include "llama/config.hpp"
#include "vattn/base/pages.hpp"
#include "vattn/vattn.hpp"

namespace vattn::llama {

enum class cache_type : std::uint8_t { f32, f16, bf16 };

[[nodiscard]] constexpr const char* to_string(cache_type t) {
  constexpr const char* names[] = {"f32", "f16", "bf16"};
  return names[static_cast<std::size_t>(t)];
}

namespace detail {
/// In huge pages, as a store's rows are: methods that read all rows would pay for page walks.
template <class T>
class cache_rows {
 public:
  using element = T;
  explicit cache_rows(std::size_t size) {
    if (!k_.resize(size * sizeof(T)) || !v_.resize(size * sizeof(T))) throw std::bad_alloc();
  }
  [[nodiscard]] T* k() { return reinterpret_cast<T*>(k_.data()); }
  [[nodiscard]] T* v() { return reinterpret_cast<T*>(v_.data()); }
  [[nodiscard]] const T* k() const { return reinterpret_cast<const T*>(k_.data()); }
  [[nodiscard]] const T* v() const { return reinterpret_cast<const T*>(v_.data()); }

 private:
  page_buffer k_, v_;
};
}  // namespace detail

/// One layer: K and V [kv_heads, capacity, head_dim], and of each value its distance from the prefill's mean.
class layer_cache {
 public:
  layer_cache(cache_type type, index_t kv_heads, index_t head_dim, index_t capacity)
      : rows_(make_rows(type, static_cast<std::size_t>(kv_heads * capacity * head_dim))),
        kv_heads_(kv_heads),
        head_dim_(head_dim),
        capacity_(capacity) {}

  [[nodiscard]] index_t size() const { return size_; }
  [[nodiscard]] index_t capacity() const { return capacity_; }
  [[nodiscard]] index_t kv_heads() const { return kv_heads_; }
  [[nodiscard]] index_t head_dim() const { return head_dim_; }

  /// Calls visit(kv_view<T>) with the view of the tokens so far.
  template <class Visit>
  decltype(auto) visit(Visit&& visit) const {
    return std::visit([&](const auto& r) -> decltype(auto) { return visit(view_of(r)); }, rows_);
  }
  template <class T>
  [[nodiscard]] kv_view<T> view() const {
    return view_of(std::get<rows<T>>(rows_));
  }

  /// Writes k and v [count, kv_heads · head_dim] at token `first`, which does not make them part of the cache:
  /// different tokens may be written by different threads.
  void write(index_t first, index_t count, const float* k, const float* v) {
    std::visit(
        [&](auto& r) {
          using element = typename std::remove_cvref_t<decltype(r)>::element;
          for (index_t i = 0; i < count; ++i) {
            for (index_t h = 0; h < kv_heads_; ++h) {
              const auto to = static_cast<std::size_t>((h * capacity_ + first + i) * head_dim_);
              const auto from = static_cast<std::size_t>((i * kv_heads_ + h) * head_dim_);
              for (std::size_t j = 0; j < static_cast<std::size_t>(head_dim_); ++j) {
                r.k()[to + j] = element(k[from + j]);
                r.v()[to + j] = element(v[from + j]);
              }
            }
          }
        },
        rows_);
  }

  /// The tokens [0, n) have been written, by a prefill: the centre of their values is measured, and kept from then on.
  void begin(index_t n) {
    size_ = n;
    norms_ = {};
    visit([&](const auto& view) { norms_ = examples::measure_values(view, n, capacity_); });
  }
  /// Adds a token, k and v [kv_heads · head_dim].
  void append(const float* k, const float* v) {
    if (size_ == capacity_) throw std::logic_error("layer_cache: full");
    write(size_, 1, k, v);
    ++size_;
    visit([&](const auto& view) { norms_.measure(view, size_ - 1, size_); });
  }
  void truncate(index_t n) { size_ = std::min(size_, n); }

  /// The tokens so far as bytes, K then V of each head, and back.
  void save(std::vector<std::byte>& out) const {
    std::visit(
        [&](const auto& r) {
          for_each_run(r, [&](const auto* first, std::size_t bytes) {
            const auto* at = reinterpret_cast<const std::byte*>(first);
            out.insert(out.end(), at, at + bytes);
          });
        },
        rows_);
  }
  /// Bytes of n tokens of every head, K and V.
  [[nodiscard]] std::size_t bytes(index_t n) const {
    const auto numbers = static_cast<std::size_t>(2 * kv_heads_ * n * head_dim_);
    return std::visit([&](const auto& r) { return numbers * sizeof(*r.k()); }, rows_);
  }
  /// n tokens from bytes(n) bytes; n <= capacity.
  void load(std::span<const std::byte> in, index_t n) {
    size_ = n;
    std::visit(
        [&](auto& r) {
          for_each_run(r, [&](auto* first, std::size_t bytes) {
            std::memcpy(static_cast<void*>(first), in.data(), bytes);
            in = in.subspan(bytes);
          });
        },
        rows_);
    begin(n);
  }

 private:
  template <class T>
  using rows = detail::cache_rows<T>;
  using any_rows = std::variant<rows<float>, rows<Eigen::half>, rows<Eigen::bfloat16>>;
  [[nodiscard]] static any_rows make_rows(cache_type type, std::size_t size) {
    if (type == cache_type::f32) return rows<float>(size);
    if (type == cache_type::f16) return rows<Eigen::half>(size);
    return rows<Eigen::bfloat16>(size);
  }

  template <class T>
  [[nodiscard]] kv_view<T> view_of(const rows<T>& r) const {
    const auto row = static_cast<index_t>(sizeof(T)) * head_dim_;
    const kv_strides strides{.token = row, .head = row * capacity_, .batch = row * capacity_ * kv_heads_};
    const kv_shape shape{.n_batch = 1, .n_kv_heads = kv_heads_, .n_tokens = size_, .dk = head_dim_, .dv = head_dim_};
    const kv_view<T> view(r.k(), strides, r.v(), strides, shape);
    return norms_.centres.empty() ? view : view.with_norms(norms_.view());
  }

  template <class Rows, class Visit>
  void for_each_run(Rows& r, Visit&& visit) const {
    const std::size_t bytes = static_cast<std::size_t>(size_ * head_dim_) * sizeof(*r.k());
    for (auto* side : {r.k(), r.v()}) {
      for (index_t h = 0; h < kv_heads_ && bytes > 0; ++h) visit(side + h * capacity_ * head_dim_, bytes);
    }
  }

  any_rows rows_;
  index_t kv_heads_, head_dim_, capacity_, size_ = 0;
  examples::value_norms norms_;
};

/// All layers, with room for `capacity` tokens.
[[nodiscard]] inline std::vector<layer_cache> make_caches(const model_config& c, cache_type type, index_t capacity) {
  std::vector<layer_cache> caches;
  for (index_t l = 0; l < c.layers; ++l) caches.emplace_back(type, c.kv_heads, c.head_dim, capacity);
  return caches;
}

}  // namespace vattn::llama
