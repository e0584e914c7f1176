// One layer's KV cache and the inputs of a decode step as ggml tensors, laid out as llama.cpp does.
#pragma once

#include <ggml.h>

#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <vector>

#include "support/regimes.hpp"
#include "vattn/vattn.hpp"

namespace vattn::examples {

struct decode_shape {
  index_t n = 131072;                ///< tokens before the first step
  index_t steps = 10;                ///< a token each
  index_t heads = 32, kv_heads = 8;  ///< of queries; of keys and values
  index_t dim = 128;

  [[nodiscard]] index_t group() const noexcept { return heads / kv_heads; }
  /// llama.cpp's caches have a multiple of 256 cells; the mask hides those that are empty.
  [[nodiscard]] index_t cells() const noexcept { return (n + steps + 255) / 256 * 256; }
};

template <class T>
inline constexpr ggml_type ggml_type_of = GGML_TYPE_F32;
template <>
inline constexpr ggml_type ggml_type_of<Eigen::half> = GGML_TYPE_F16;
template <>
inline constexpr ggml_type ggml_type_of<Eigen::bfloat16> = GGML_TYPE_BF16;

[[nodiscard]] inline ggml_layout layout_of(const ggml_tensor* t) noexcept { return {t->data, t->ne, t->nb}; }

/// Memory of all tensors, in huge pages where the system has them, as a shuffled_store's is.
class tensor_memory {
 public:
  explicit tensor_memory(std::size_t bytes) {
    if (!memory_.reserve(bytes)) throw std::bad_alloc();
    context_.reset(ggml_init({.mem_size = bytes, .mem_buffer = memory_.data(), .no_alloc = false}));
    if (!context_) throw std::bad_alloc();
  }
  [[nodiscard]] ggml_context* get() const noexcept { return context_.get(); }

 private:
  struct deleter {
    void operator()(ggml_context* c) const noexcept { ggml_free(c); }
  };
  page_buffer memory_;
  std::unique_ptr<ggml_context, deleter> context_;
};

/// What llama.cpp's graph has where attention begins.
struct layer_tensors {
  template <class T>
  [[nodiscard]] static std::size_t bytes(const decode_shape& s) {
    constexpr std::size_t graphs = std::size_t{16} << 20;
    const auto cells = static_cast<std::size_t>(s.cells());
    return cells * (2 * static_cast<std::size_t>(s.kv_heads * s.dim) * sizeof(T) + sizeof(Eigen::half)) + graphs;
  }
  layer_tensors(ggml_context* c, ggml_type type, const decode_shape& s)
      : q(ggml_new_tensor_3d(c, GGML_TYPE_F32, s.dim, s.heads, 1)),
        k_new(ggml_new_tensor_2d(c, GGML_TYPE_F32, s.dim * s.kv_heads, 1)),
        v_new(ggml_new_tensor_2d(c, GGML_TYPE_F32, s.dim * s.kv_heads, 1)),
        cell(ggml_new_tensor_1d(c, GGML_TYPE_I64, 1)),
        k(ggml_new_tensor_2d(c, type, s.dim * s.kv_heads, s.cells())),
        v(ggml_new_tensor_2d(c, type, s.dim * s.kv_heads, s.cells())),
        mask(ggml_new_tensor_2d(c, GGML_TYPE_F16, s.cells(), 1)) {
    std::memset(k->data, 0, ggml_nbytes(k));
    std::memset(v->data, 0, ggml_nbytes(v));
    std::fill_n(static_cast<Eigen::half*>(mask->data), s.cells(), Eigen::half(-std::numeric_limits<float>::infinity()));
  }

  ggml_tensor* q;              // [dim, heads, 1]
  ggml_tensor *k_new, *v_new;  // [dim·kv_heads, 1], of the token that is decoded
  ggml_tensor* cell;           // [1], where it goes
  ggml_tensor *k, *v;          // [dim·kv_heads, cells]
  ggml_tensor* mask;           // [cells, 1]
};

/// The tokens that are still to come, float [kv_heads][steps, dim].
struct coming_tokens {
  std::vector<std::vector<float>> k, v;
};

/// Writes n tokens of a regime into the cache, and the query; returns the tokens of the steps.
template <class T, executor E>
coming_tokens fill(const layer_tensors& t, const decode_shape& s, const std::string& regime, std::uint64_t seed,
                   E& exec) {
  coming_tokens coming;
  coming.k.resize(static_cast<std::size_t>(s.kv_heads)), coming.v.resize(coming.k.size());
  std::fill_n(static_cast<Eigen::half*>(t.mask->data), s.n, Eigen::half(0.0f));
  exec.for_each(s.kv_heads, [&](index_t h, index_t) {
    const synthetic::cache c =
        synthetic::make_cache(regime, "mean", s.n + s.steps, s.dim, seed + static_cast<std::uint64_t>(h), s.group());
    std::copy(c.q.begin(), c.q.end(), static_cast<float*>(t.q->data) + h * s.group() * s.dim);
    const auto write = [&](const std::vector<float>& rows, const ggml_tensor* to, std::vector<float>& rest) {
      for (index_t i = 0; i < s.n; ++i) {
        T* row = static_cast<T*>(to->data) + (i * s.kv_heads + h) * s.dim;
        for (index_t j = 0; j < s.dim; ++j) row[j] = static_cast<T>(rows[static_cast<std::size_t>(i * s.dim + j)]);
      }
      rest.assign(rows.begin() + s.n * s.dim, rows.end());
    };
    write(c.k, t.k, coming.k[static_cast<std::size_t>(h)]);
    write(c.v, t.v, coming.v[static_cast<std::size_t>(h)]);
  });
  return coming;
}

/// The inputs of a step: its token, its cell, and that the mask shows the cell.
inline void set_step(const layer_tensors& t, const decode_shape& s, const coming_tokens& coming, index_t step) {
  for (index_t h = 0; h < s.kv_heads; ++h) {
    const auto i = static_cast<std::size_t>(h);
    std::copy_n(coming.k[i].data() + step * s.dim, s.dim, static_cast<float*>(t.k_new->data) + h * s.dim);
    std::copy_n(coming.v[i].data() + step * s.dim, s.dim, static_cast<float*>(t.v_new->data) + h * s.dim);
  }
  *static_cast<std::int64_t*>(t.cell->data) = s.n + step;
  static_cast<Eigen::half*>(t.mask->data)[s.n + step] = Eigen::half(0.0f);
}

}  // namespace vattn::examples
