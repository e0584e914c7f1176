// Product codebooks: k-means centroids for groups of coordinates, and vectors as the numbers of the nearest ones.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "vattn/base/config.hpp"
#include "vattn/base/philox.hpp"

namespace vattn::VATTN_ABI::sketch {

// Format. The coordinates of a vector are cut into G groups of consecutive ones, the g-th w_g wide; group g has
// K = 2^b centroids, coordinate-major: float [w_g][K], the groups one after another. A code is the b-bit number of the
// nearest centroid (Euclid) of each group, group g at bit g·b of a little-endian string of ceil(G·b/8) bytes:
// 10 groups of 6 bits take 8 bytes, 21 take 16 (Jegou, Douze, Schmid: product quantisation, PAMI 2011).

/// Squared distances of x [width] to K centroids [width][K]; returns the nearest, the first of equals, and 0 where
/// none is finite. `distances` [K].
inline std::size_t nearest_centroid(const float* x, std::size_t width, const float* centroids, std::size_t K,
                                    float* distances) noexcept {
  std::fill_n(distances, K, 0.0f);
  for (std::size_t j = 0; j < width; ++j) {
    for (std::size_t c = 0; c < K; ++c) {
      const float d = x[j] - centroids[j * K + c];
      distances[c] += d * d;
    }
  }
  std::size_t best = 0;
  for (std::size_t c = 1; c < K; ++c) best = distances[c] < distances[best] ? c : best;
  return best;
}

/// k-means of points [n, stride], coordinates [0, width) of each: k-means++ (Arthur and Vassilvitskii, SODA 2007), then
/// `iterations` of Lloyd's. A function of its arguments alone. A centroid that no point is nearest to stays where it
/// was; with no points all are 0. `centroids` [width][K], K <= 256. O(n·K·width·iterations), allocates O(n).
inline void k_means(const float* points, std::size_t n, std::size_t stride, std::size_t width, std::size_t K,
                    int iterations, random_stream random, float* centroids) {
  std::fill_n(centroids, width * K, 0.0f);
  if (n == 0 || width == 0) return;
  std::vector<double> gap(n, INFINITY);  // squared distance to the nearest centroid so far
  std::size_t chosen = random.below(static_cast<std::uint32_t>(n));
  for (std::size_t c = 0;; ++c) {
    const float* from = points + chosen * stride;
    for (std::size_t j = 0; j < width; ++j) centroids[j * K + c] = from[j];
    if (c + 1 == K) break;
    double total = 0;
    for (std::size_t i = 0; i < n; ++i) {
      double d2 = 0;
      for (std::size_t j = 0; j < width; ++j) {
        const double d = static_cast<double>(points[i * stride + j]) - static_cast<double>(from[j]);
        d2 += d * d;
      }
      gap[i] = std::min(gap[i], d2);
      total += gap[i];
    }
    double at = (random.next() + 0.5) * 0x1p-32 * total;
    // Fewer distinct points than centroids: total is 0, and the first point is taken again and again.
    for (chosen = 0; chosen + 1 < n && (at -= gap[chosen]) > 0;) ++chosen;
  }
  std::vector<double> sum(width * K);
  std::vector<std::size_t> count(K);
  std::array<float, 256> distances{};
  for (int round = 0; round < iterations; ++round) {
    std::fill(sum.begin(), sum.end(), 0.0);
    std::fill(count.begin(), count.end(), std::size_t{0});
    for (std::size_t i = 0; i < n; ++i) {
      const float* x = points + i * stride;
      const std::size_t c = nearest_centroid(x, width, centroids, K, distances.data());
      ++count[c];
      for (std::size_t j = 0; j < width; ++j) sum[j * K + c] += static_cast<double>(x[j]);
    }
    for (std::size_t j = 0; j < width; ++j) {
      for (std::size_t c = 0; c < K; ++c) {
        if (count[c] > 0) centroids[j * K + c] = static_cast<float>(sum[j * K + c] / static_cast<double>(count[c]));
      }
    }
  }
}

/// `dim` coordinates in `groups` parts, the first ones wider by one where they do not divide.
[[nodiscard]] inline std::vector<index_t> equal_widths(index_t dim, index_t groups) {
  std::vector<index_t> widths(static_cast<std::size_t>(std::max<index_t>(groups, 0)));
  for (std::size_t g = 0; g < widths.size(); ++g)
    widths[g] = dim / groups + (static_cast<index_t>(g) < dim % groups ? 1 : 0);
  return widths;
}

/// Centroids of every group, and what is done with them.
class codebook {
 public:
  codebook() = default;
  /// bits 1 to 8.
  codebook(std::vector<index_t> widths, int bits) : bits_(bits), widths_(std::move(widths)) {
    centroids_.resize(static_cast<std::size_t>(dim()) << bits_);
  }

  [[nodiscard]] index_t dim() const noexcept { return std::accumulate(widths_.begin(), widths_.end(), index_t{0}); }
  [[nodiscard]] std::size_t groups() const noexcept { return widths_.size(); }
  [[nodiscard]] std::size_t entries() const noexcept { return std::size_t{1} << bits_; }
  [[nodiscard]] std::size_t code_bytes() const noexcept { return (groups() * static_cast<std::size_t>(bits_) + 7) / 8; }
  [[nodiscard]] std::size_t table_size() const noexcept { return groups() * entries(); }
  [[nodiscard]] std::size_t bytes() const noexcept {
    return centroids_.size() * sizeof(float) + widths_.size() * sizeof(index_t);
  }

  /// Learns from points [n, dim]; group g draws from a stream of its own.
  void train(std::span<const float> points, int iterations, std::uint64_t seed) {
    const auto stride = static_cast<std::size_t>(dim());
    const std::size_t n = stride > 0 ? points.size() / stride : 0;
    std::size_t start = 0;
    for (std::size_t g = 0; g < groups(); ++g) {
      const auto width = static_cast<std::size_t>(widths_[g]);
      const random_stream random({.seed = seed, .layer = purpose}, static_cast<std::uint32_t>(g));
      k_means(points.subspan(n > 0 ? start : 0).data(), n, stride, width, entries(), iterations, random,
              centroids_.data() + start * entries());
      start += width;
    }
  }

  /// Writes the code of x [dim] (`code_bytes()`, zeroed by the caller) and leaves in x what the code does not say.
  void encode(float* x, std::uint8_t* code) const noexcept {
    std::array<float, 256> distances{};
    const float* block = centroids_.data();
    for (std::size_t g = 0; g < groups(); ++g) {
      const auto width = static_cast<std::size_t>(widths_[g]);
      const std::size_t c = nearest_centroid(x, width, block, entries(), distances.data());
      for (std::size_t j = 0; j < width; ++j) x[j] -= block[j * entries() + c];
      const std::size_t bit = g * static_cast<std::size_t>(bits_);
      const std::size_t shifted = c << (bit % 8);
      code[bit / 8] = static_cast<std::uint8_t>(code[bit / 8] | (shifted & 0xff));
      if (shifted > 0xff) code[bit / 8 + 1] = static_cast<std::uint8_t>(code[bit / 8 + 1] | shifted >> 8);
      x += width;
      block += width * entries();
    }
  }

  /// table[g·K + c] = product of the query [dim] with centroid c of group g, within the group.
  void tabulate(const float* query, float* table) const noexcept {
    const float* block = centroids_.data();
    for (std::size_t g = 0; g < groups(); ++g) {
      float* out = table + g * entries();
      std::fill_n(out, entries(), 0.0f);
      for (index_t j = 0; j < widths_[g]; ++j, block += entries()) {
        const float q = *query++;
        for (std::size_t c = 0; c < entries(); ++c) out[c] += q * block[c];
      }
    }
  }

  /// Product of the tabulated query with the vector that the code stands for.
  [[nodiscard]] float product(const std::uint8_t* code, const float* table) const noexcept {
    const std::uint32_t mask = static_cast<std::uint32_t>(entries()) - 1;
    std::uint32_t window = 0;
    int have = 0;
    float sum = 0;
    for (std::size_t g = 0; g < groups(); ++g, table += entries()) {
      if (have < bits_) {
        window |= static_cast<std::uint32_t>(*code++) << have;
        have += 8;
      }
      sum += table[window & mask];
      window >>= bits_;
      have -= bits_;
    }
    return sum;
  }

  template <class Archive>
  void archive(Archive& a) {
    a(bits_, widths_, centroids_);
  }
  /// What the owner takes it to be.
  [[nodiscard]] bool valid(index_t dim, index_t groups, int bits) const noexcept {
    index_t left = dim;
    for (const index_t w : widths_) {
      if (w < 0 || w > left) return false;
      left -= w;
    }
    return left == 0 && static_cast<index_t>(widths_.size()) == groups && bits_ == bits && bits >= 1 && bits <= 8 &&
           centroids_.size() == static_cast<std::size_t>(dim) << bits;
  }

 private:
  static constexpr std::uint32_t purpose = 0x4b4d4e53;  // keeps these draws apart from any layer's
  int bits_ = 1;
  std::vector<index_t> widths_;   // [G]
  std::vector<float> centroids_;  // [dim·K], see the format
};

}  // namespace vattn::VATTN_ABI::sketch

#include "vattn/macros_pop.hpp"
