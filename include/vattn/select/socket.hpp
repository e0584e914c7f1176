// SOCKET: soft collisions of a query with the hash buckets of keys.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string_view>
#include <vector>

#include "vattn/sketch/hyperplanes.hpp"

namespace vattn::VATTN_ABI::select {

/// Keys are hashed hard, queries softly: score = Σ over L tables of the probability that the query gives to the
/// key's bucket, softmax over the corners c of {±1}^K of Σ_p tanh(z_p) c_p / (sqrt(D)·tau), z the projections of the
/// query before its scale, which is taken to be 1/sqrt(D). The softmax factorises over the bits:
/// Π_p σ(2 c_p tanh(z_p)/(sqrt(D)·tau)). Source: SOCKET, arXiv 2602.06283; its value-aware
/// form is select::contributions around this. When to use: as MagicPIG, with a fraction of its tables (2L bytes a
/// token); the score has no error scale, so mode I needs it calibrated (select/calibrated.hpp).
class socket {
 public:
  static constexpr bool estimates = false;

  socket() = default;
  explicit socket(index_t dim, index_t K = 10, index_t L = 60, double tau = 0.3, std::uint64_t seed = 0,
                  std::vector<float> centre = {})
      : hash_(dim, K, L, seed, std::move(centre)), tau_(tau) {}

  [[nodiscard]] index_t size() const noexcept { return hash_.size(); }
  [[nodiscard]] std::size_t bytes() const noexcept { return hash_.bytes(); }

  [[nodiscard]] index_t dim() const noexcept { return hash_.dim(); }
  [[nodiscard]] recent_keys& recent() noexcept { return hash_.recent(); }

  /// A key that is not of dim() elements is not taken: calls then say that the index lags.
  template <kernel::row R>
  void append(const R& key) {
    static_cast<void>(hash_.append(key));
  }
  void truncate(index_t n) { hash_.truncate(n); }
  void clear() { truncate(0); }

  /// Projections, then for each table the probabilities of the buckets' low and high halves of bits.
  [[nodiscard]] std::size_t scratch_size() const noexcept {
    return hash_.projections() + static_cast<std::size_t>(hash_.tables()) * (low_size() + high_size());
  }
  void score(const float* scaled_query, index_t first, std::span<float> scores, std::span<float>,
             std::span<float> scratch) const noexcept {
    float* z = scratch.data();
    hash_.project(scaled_query, z);
    const double root = std::sqrt(static_cast<double>(std::max<index_t>(hash_.dim(), 1)));
    float* tables = z + hash_.projections();
    const std::size_t stride = low_size() + high_size();
    for (index_t l = 0; l < hash_.tables(); ++l) {
      const float* of = z + l * hash_.bits();
      const auto fill = [&](float* out, index_t from, index_t bits) {
        out[0] = 1;
        for (index_t p = 0; p < bits; ++p) {
          const double t = 2 * std::tanh(static_cast<double>(of[from + p]) * root) / (root * tau_);
          const auto one = static_cast<float>(1 / (1 + std::exp(-t))), zero = static_cast<float>(1 / (1 + std::exp(t)));
          for (std::size_t b = 0; b < std::size_t{1} << p; ++b) {
            out[b | std::size_t{1} << p] = out[b] * one;
            out[b] *= zero;
          }
        }
      };
      fill(tables + static_cast<std::size_t>(l) * stride, 0, low_bits());
      fill(tables + static_cast<std::size_t>(l) * stride + low_size(), low_bits(), hash_.bits() - low_bits());
    }
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const std::uint16_t* of = hash_.of(first + static_cast<index_t>(i));
      float sum = 0;
      for (index_t l = 0; l < hash_.tables(); ++l) {
        const float* t = tables + static_cast<std::size_t>(l) * stride;
        sum += t[of[l] & (low_size() - 1)] * t[low_size() + (std::size_t{of[l]} >> low_bits())];
      }
      scores[i] = sum;
    }
  }

  static constexpr std::string_view format() noexcept { return "socket v1"; }
  template <class Archive>
  void archive(Archive& a) {
    a(tau_);
    hash_.archive(a);
  }
  [[nodiscard]] bool valid() const noexcept { return tau_ > 0 && hash_.valid(); }

 private:
  [[nodiscard]] index_t low_bits() const noexcept { return (hash_.bits() + 1) / 2; }
  [[nodiscard]] std::size_t low_size() const noexcept { return std::size_t{1} << low_bits(); }
  [[nodiscard]] std::size_t high_size() const noexcept { return std::size_t{1} << (hash_.bits() - low_bits()); }

  sketch::hash_tables hash_;
  double tau_ = 0.3;
};

}  // namespace vattn::VATTN_ABI::select

#include "vattn/macros_pop.hpp"
