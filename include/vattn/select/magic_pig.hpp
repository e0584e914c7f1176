// MagicPIG: keys that collide with the query in hash tables, with the probability that they do.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>
#include <string_view>
#include <vector>

#include "vattn/base/room.hpp"
#include "vattn/sketch/hyperplanes.hpp"

namespace vattn::VATTN_ABI::select {

/// Chance that two vectors at this cosine share a bucket in at least two of L tables of K sign bits:
/// p = 1 − θ/π, u = 1 − (1 − p^K)^L − L p^K (1 − p^K)^{L−1}. arXiv 2410.16179, section 4.
[[nodiscard]] inline double collision_probability(double cosine, index_t K, index_t L) noexcept {
  const double p = 1 - std::acos(std::clamp(cosine, -1.0, 1.0)) / std::numbers::pi;
  const double one = std::pow(p, static_cast<double>(K)), tables = static_cast<double>(L);
  if (one >= 1) return L >= 2 ? 1 : 0;
  // (1 − one)^(L−1)·(1 − one + L·one), by logarithms: near 0 the powers cancel.
  const double none = (tables - 1) * std::log1p(-one) + std::log1p((tables - 1) * one);
  return -std::expm1(none);
}

/// Tokens by the number of tables in which they collide with the query. K sign bits a table, L tables; keys
/// centred by `centre` (the mean of the prefill's keys, as in the paper). Source: MagicPIG, arXiv 2410.16179,
/// K = 10, L = 150 in most of its experiments. Its own estimator, which weights colliding tokens by 1/u, is
/// among the methods that the examples compare; here the count ranks. When to use: hash tables are at hand and
/// memory is not scarce (2L bytes a token); at equal bytes sketch::key_codes say more of a token.
class magic_pig {
 public:
  static constexpr bool estimates = false;

  magic_pig() = default;
  explicit magic_pig(index_t dim, index_t K = 10, index_t L = 150, std::uint64_t seed = 0,
                     std::vector<float> centre = {})
      : hash_(dim, K, L, seed, std::move(centre)) {}

  [[nodiscard]] index_t size() const noexcept { return static_cast<index_t>(norm_.size()); }
  [[nodiscard]] std::size_t bytes() const noexcept { return hash_.bytes() + norm_.size() * sizeof(float); }
  [[nodiscard]] index_t K() const noexcept { return hash_.bits(); }
  [[nodiscard]] index_t L() const noexcept { return hash_.tables(); }

  [[nodiscard]] index_t dim() const noexcept { return hash_.dim(); }
  [[nodiscard]] recent_keys& recent() noexcept { return hash_.recent(); }

  /// A key that is not of dim() elements is not taken: calls then say that the index lags.
  template <kernel::row R>
  void append(const R& key) {
    vattn::detail::make_room(norm_, 1);
    if (const float norm = hash_.append(key); !(norm < 0)) norm_.push_back(norm);
  }
  void truncate(index_t n) {
    hash_.truncate(n);
    if (n < size()) norm_.resize(static_cast<std::size_t>(std::max<index_t>(n, 0)));
  }
  void clear() { truncate(0); }

  /// The query's projections and its buckets.
  [[nodiscard]] std::size_t scratch_size() const noexcept {
    return hash_.projections() + static_cast<std::size_t>(hash_.tables());
  }
  void score(const float* scaled_query, index_t first, std::span<float> scores, std::span<float>,
             std::span<float> scratch) const noexcept {
    float* buckets = scratch.data() + hash_.projections();
    hash_.project(scaled_query, scratch.data());
    for (index_t l = 0; l < hash_.tables(); ++l) buckets[l] = static_cast<float>(hash_.bucket(scratch.data(), l));
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const std::uint16_t* of = hash_.of(first + static_cast<index_t>(i));
      int count = 0;
      for (index_t l = 0; l < hash_.tables(); ++l) count += static_cast<float>(of[l]) == buckets[l];
      scores[i] = static_cast<float>(count);
    }
  }

  /// Chance that `token`, whose product with the scaled query is `logit`, collides twice or more.
  [[nodiscard]] double probability(const float* scaled_query, index_t token, float logit) const noexcept {
    const auto dim = static_cast<Eigen::Index>(hash_.dim());
    const kernel::const_float_map q(scaled_query, dim), mean(hash_.centre().data(), dim);
    const double product = static_cast<double>(logit) - static_cast<double>(q.dot(mean));
    const double norms =
        static_cast<double>(kernel::norm(q)) * static_cast<double>(norm_[static_cast<std::size_t>(token)]);
    return collision_probability(norms > 0 ? product / norms : 0, K(), L());
  }

  static constexpr std::string_view format() noexcept { return "magic pig v1"; }
  template <class Archive>
  void archive(Archive& a) {
    hash_.archive(a);
    a(norm_);
  }
  [[nodiscard]] bool valid() const noexcept { return hash_.valid() && hash_.size() == size(); }

 private:
  sketch::hash_tables hash_;
  std::vector<float> norm_;  // of the centred keys
};

}  // namespace vattn::VATTN_ABI::select

#include "vattn/macros_pop.hpp"
