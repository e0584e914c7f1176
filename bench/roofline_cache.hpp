// Caches for `roofline`: any regime at up to a million tokens, in seconds, in memory with huge pages by advice.
#pragma once

#include <Eigen/Core>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/npy.hpp"
#include "support/regimes.hpp"
#include "vattn/base/pages.hpp"
#include "vattn/vattn.hpp"

namespace vattn::bench {

/// Bytes that the system is asked to back with huge pages.
[[nodiscard]] inline page_buffer huge_pages(std::size_t bytes) {
  page_buffer p;
  if (!p.resize_for_overwrite(bytes))
    throw std::runtime_error("no memory for " + std::to_string(bytes >> 20) + " MiB: give a smaller --n");
  return p;
}

struct cache_shape {
  std::string regime;
  index_t n = 0, heads = 0, kv_heads = 0, dim = 0;
  bool agree = false;  ///< heads of a group have the first one's logits + 0.1·N(0, 1)
};

/// One layer of a trained model: PREFIX_q.npy [T, heads, dim], PREFIX_k.npy and PREFIX_v.npy [n, kv_heads, dim].
struct real_cache {
  explicit real_cache(const std::string& prefix)
      : name(prefix.substr(prefix.find_last_of('/') + 1)),
        q(npy::read(prefix + "_q.npy")),
        k(npy::read(prefix + "_k.npy")),
        v(npy::read(prefix + "_v.npy")) {
    const bool fits = q.shape.size() == 3 && k.shape.size() == 3 && k.shape == v.shape && q.shape[2] == k.shape[2] &&
                      q.size() > 0 && k.size() > 0 && q.shape[1] % k.shape[1] == 0;
    if (!fits) throw std::runtime_error(prefix + ": give q [T, heads, dim], k and v [n, kv_heads, dim]");
    for (const npy::array* a : {&q, &k, &v}) {
      if (a->type != npy::dtype::float32 && a->type != npy::dtype::float16)
        throw std::runtime_error(prefix + ": give arrays of float32 or float16");
    }
  }
  [[nodiscard]] cache_shape shape() const { return {name, k.shape[0], q.shape[1], k.shape[1], k.shape[2]}; }
  [[nodiscard]] static float at(const npy::array& a, index_t i) {
    const auto place = static_cast<std::size_t>(i);
    return a.type == npy::dtype::float32 ? a.as<float>()[place] : kernel::half_to_float(a.as<std::uint16_t>()[place]);
  }

  std::string name;
  npy::array q, k, v;
};

/// K and V apart, [n_kv_heads, n, dim], and queries [heads, dim]: one of bfloat16 numbers whose logits are those of the
/// regime, up to the rounding of T, beside values that are N(0, I) plus a vector that the tokens of a KV head share; or
/// those of a trained model, in turn.
template <class T>
class roofline_cache {
 public:
  /// `part`: of a cache that is split, whose parts have the same query and tokens of their own; −1: a whole one.
  roofline_cache(const cache_shape& shape, std::uint64_t seed, int part = -1) : roofline_cache(shape) {
    part_ = part;
    query_.resize(static_cast<std::size_t>(shape.heads * shape.dim));
    // Noise is cut from a table: two cuts added are as good as new, and a hundred times faster.
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0, std::sqrt(0.5f));
    noise_.resize(static_cast<std::size_t>(noise_size + shape.dim));
    for (float& x : noise_) x = normal(random);
    for (index_t kv = 0; kv < shape.kv_heads; ++kv) fill(kv, random());
  }
  explicit roofline_cache(const real_cache& real) : roofline_cache(real.shape()) {
    const auto& s = shape_;
    query_.resize(real.q.size());
    for (std::size_t i = 0; i < query_.size(); ++i) query_[i] = real_cache::at(real.q, static_cast<index_t>(i));
    Eigen::VectorXf row(s.dim);
    for (index_t i = 0; i < s.n * s.kv_heads; ++i) {
      const index_t to = (i % s.kv_heads * s.n + i / s.kv_heads) * row_;
      for (index_t d = 0; d < s.dim; ++d) row[d] = real_cache::at(real.k, i * s.dim + d);
      store(row, k_.data() + to);
      for (index_t d = 0; d < s.dim; ++d) row[d] = real_cache::at(real.v, i * s.dim + d);
      store(row, v_.data() + to);
    }
  }
  /// The rows of another in elements of this one's type.
  template <class Other>
  explicit roofline_cache(const roofline_cache<Other>& from) : roofline_cache(from.shape()) {
    query_ = from.queries();
    using kernel::load;
    Eigen::VectorXf row(shape_.dim);
    const auto view = from.view();
    for (index_t kv = 0; kv < shape_.kv_heads; ++kv) {
      const auto head = view.head(0, kv);
      for (index_t i = 0; i < shape_.n; ++i) {
        load(head.key(i), row.data());
        store(row, k_.data() + (kv * shape_.n + i) * row_);
        load(head.value(i), row.data());
        store(row, v_.data() + (kv * shape_.n + i) * row_);
      }
    }
  }

  /// Queries that it has, of which `ask` chooses one.
  [[nodiscard]] index_t n_queries() const noexcept {
    return static_cast<index_t>(query_.size()) / (shape_.heads * shape_.dim);
  }
  void ask(index_t query) noexcept { asked_ = query; }
  [[nodiscard]] index_t asked() const noexcept { return asked_; }
  [[nodiscard]] const std::vector<float>& queries() const noexcept { return query_; }

  [[nodiscard]] const cache_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return k_.size() + v_.size(); }
  [[nodiscard]] index_t row_bytes() const noexcept { return row_; }
  [[nodiscard]] const std::byte* k(index_t kv) const noexcept { return k_.data() + kv * shape_.n * row_; }
  [[nodiscard]] const std::byte* v(index_t kv) const noexcept { return v_.data() + kv * shape_.n * row_; }
  [[nodiscard]] tensor_view<const float, 4> query() const noexcept {
    return {query_.data() + asked_ * shape_.heads * shape_.dim, {1, 1, shape_.heads, shape_.dim}};
  }
  [[nodiscard]] auto view() const noexcept {
    const auto& s = shape_;
    if constexpr (kernel::quantised_block<T>) {
      const std::array<index_t, 4> ne{s.dim, s.n, s.kv_heads, 1},
          nb{sizeof(T), row_, s.n * row_, s.kv_heads * s.n * row_};
      return ggml_kv<T>({k_.data(), ne, nb}, {v_.data(), ne, nb});
    } else {
      return contiguous_kv(reinterpret_cast<const T*>(k_.data()), reinterpret_cast<const T*>(v_.data()),
                           {.n_kv_heads = s.kv_heads, .n_tokens = s.n, .dk = s.dim, .dv = s.dim});
    }
  }
  [[nodiscard]] attention_options options() const noexcept {
    attention_options o;
    o.scale = 1 / std::sqrt(static_cast<float>(shape_.dim));
    return o;
  }

 private:
  static constexpr index_t noise_size = index_t{1} << 20;

  explicit roofline_cache(const cache_shape& shape)
      : shape_(shape),
        row_(kernel::row_bytes<T>(shape.dim)),
        k_(huge_pages(static_cast<std::size_t>(shape.kv_heads * shape.n * row_))),
        v_(huge_pages(k_.size())) {}

  [[nodiscard]] Eigen::Map<const Eigen::VectorXf> cut(std::mt19937_64& random) const {
    return {noise_.data() + static_cast<index_t>(random() % noise_size), shape_.dim};
  }

  void store(const Eigen::VectorXf& row, std::byte* to) const {
    if constexpr (kernel::quantised_block<T>) {
      kernel::quantise(row.data(), static_cast<std::size_t>(row.size()), reinterpret_cast<T*>(to));
    } else {
      for (index_t d = 0; d < row.size(); ++d) reinterpret_cast<T*>(to)[d] = static_cast<T>(row[d]);
    }
  }

  void fill(index_t kv, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const index_t group = shape_.heads / shape_.kv_heads, dim = shape_.dim, n = shape_.n;
    if (group > dim) throw std::runtime_error("more query heads of a KV head than elements: give fewer --heads");
    // Columns of `queries` have the length √dim, nearly, and those of `duals`, times a logit, are what a key has of it.
    Eigen::MatrixXf queries(dim, group);
    for (float& x : queries.reshaped()) x = normal(random);
    queries = Eigen::MatrixXf(Eigen::HouseholderQR<Eigen::MatrixXf>(queries).householderQ() *
                              Eigen::MatrixXf::Identity(dim, group)) *
              std::sqrt(static_cast<float>(dim));
    for (float& x : queries.reshaped()) x = static_cast<float>(static_cast<Eigen::bfloat16>(x));
    for (index_t g = 0; g < group; ++g) std::copy_n(queries.col(g).data(), dim, query_.data() + (kv * group + g) * dim);
    const Eigen::MatrixXf scaled = queries / std::sqrt(static_cast<float>(dim));
    const Eigen::MatrixXf duals = scaled * (scaled.transpose() * scaled).inverse();

    Eigen::VectorXf shared(dim), row(dim), left(group);
    if (part_ >= 0) {
      for (float& x : shared) x = normal(random);
      random.seed(seed + 0x9E3779B97F4A7C15u * (static_cast<std::uint64_t>(part_) + 1));
    }
    Eigen::MatrixXf logits(group, n);
    for (index_t g = 0; g < group; ++g) {
      if (g > 0 && shape_.agree) {
        for (index_t i = 0; i < n; ++i) logits(g, i) = logits(0, i) + 0.1f * normal(random);
      } else {
        const std::vector<float> l = synthetic::make_logits(shape_.regime, n, random);
        for (index_t i = 0; i < n; ++i) logits(g, i) = l[static_cast<std::size_t>(i)];
      }
    }
    for (index_t j = 0; part_ < 0 && j < dim; ++j) shared[j] = normal(random);
    for (index_t i = 0; i < n; ++i) {
      row = cut(random) + cut(random);
      left = logits.col(i) - scaled.transpose() * row;
      row.noalias() += duals * left;
      store(row, k_.data() + (kv * n + i) * row_);
      row = cut(random) + cut(random) + shared;
      store(row, v_.data() + (kv * n + i) * row_);
    }
  }

  cache_shape shape_;
  int part_ = -1;
  index_t row_, asked_ = 0;
  page_buffer k_, v_;
  std::vector<float> query_, noise_;
};

}  // namespace vattn::bench
