// Quantised keys: a few bits a coordinate from which a query's logits are estimated, with a known error.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "vattn/base/floating_point.hpp"
#include "vattn/base/room.hpp"
#include "vattn/kernel/row_size.hpp"
#include "vattn/kernel/units.hpp"
#include "vattn/sketch/recent_keys.hpp"
#include "vattn/sketch/rotation.hpp"

namespace vattn::VATTN_ABI::sketch {

// Format. A key k of D coordinates becomes y = R(k − μ), R a fixed rotation to P = bit_ceil(D) coordinates
// and μ the mean of its epoch; each y_j becomes a level c_j in {±1, ±3, …, ±(2^b − 1)}, stored as the b-bit
// integer (c_j + 2^b − 1)/2; coordinate j sits in byte j·b/8, lower coordinates in lower bits. Beside the
// code stand two floats:
//   α = ‖y‖²/⟨c, y⟩   the scale that makes the estimate s = α⟨c, Rq⟩ + ⟨q, μ⟩ unbiased over rotations
//   ρ = ‖y − αc‖      the norm of what the code leaves: |q·k − s| <= ‖q‖ρ always, and of a size
//                     ‖q‖ρ/sqrt(P) typically
// (RaBitQ, Gao and Long, SIGMOD 2024, at one bit; the extended form at more). Bytes a key: P·b/8 + 8.
//
// Epochs. μ of a token is the mean of the keys before its epoch, as their codes decode; from token 1024 on keys
// weigh half as much with each epoch that has passed. Epochs start at 0 (μ = 0), 64, 128, 256, 512, 1024 and every
// 1024 tokens after: a function of the position alone, so appending one by one, in blocks, or again after a
// truncation gives the same codes, and a drift of the mean is followed without touching old ones.

/// Levels of an optimal uniform quantiser of a normal variable: half its step, in standard deviations
/// (Max 1960; at 8 bits the range, not the step, is what is left to choose).
template <int Bits>
inline constexpr float normal_half_step = Bits == 1   ? 0.7979f
                                          : Bits == 2 ? 0.4979f
                                          : Bits == 4 ? 0.1676f
                                                      : 0.0154f;

/// The codes of one KV head of one layer. Owns its memory; `append` allocates as a vector does (amortised),
/// scoring allocates nothing.
template <int Bits>
class key_codes {
  static_assert(Bits == 1 || Bits == 2 || Bits == 4 || Bits == 8, "key_codes<Bits>: Bits must be 1, 2, 4 or 8");

 public:
  static constexpr int bits = Bits;
  static constexpr bool estimates = true;

  key_codes() = default;
  explicit key_codes(index_t dim, std::uint64_t seed = 0)
      : rotation_(dim, seed),
        row_bytes_(rotation_.width() * Bits / 8),
        buffer_(rotation_.width()),
        sum_(rotation_.width()) {}

  [[nodiscard]] index_t size() const noexcept { return static_cast<index_t>(scale_.size()); }
  [[nodiscard]] index_t dim() const noexcept { return static_cast<index_t>(rotation_.dim()); }
  [[nodiscard]] recent_keys& recent() noexcept { return recent_; }
  [[nodiscard]] std::size_t width() const noexcept { return rotation_.width(); }
  /// Codes, scales, residual norms and epoch means, a token.
  [[nodiscard]] std::size_t bytes() const noexcept {
    return codes_.size() + (scale_.size() + residual_.size() + means_.size()) * sizeof(float);
  }

  /// Adds the next token's key. A key that is not of dim() elements is not taken: calls then say that the index lags.
  template <kernel::row R>
  void append(const R& key) {
    using kernel::load;
    if (!kernel::has_size(key, dim())) return;
    const kernel::floating_point_scope standard;
    const index_t token = size();
    vattn::detail::make_room(codes_, row_bytes_);
    vattn::detail::make_room(scale_, 1);
    vattn::detail::make_room(residual_, 1);
    if (starts_epoch(token)) {
      vattn::detail::make_room(means_, width());
      means_.insert(means_.end(), sum_.begin(), sum_.end());
      const float share = weight_ > 0 ? static_cast<float>(1 / weight_) : 0.0f;
      for (std::size_t j = means_.size() - width(); j < means_.size(); ++j) means_[j] *= share;
      if (token >= forgetting) fade(0.5);
    }
    load(key, buffer_.data());
    recent_.add(token, std::span<const float>(buffer_).first(rotation_.dim()));
    rotation_.apply(buffer_);
    const float* mean = means_.data() + means_.size() - width();
    for (std::size_t j = 0; j < width(); ++j) buffer_[j] -= mean[j];
    encode();
    accumulate(token, 1.0f);
  }

  /// Forgets the tokens from n on. O(tokens forgotten).
  void truncate(index_t n) {
    const kernel::floating_point_scope standard;
    for (index_t token = size(); token-- > std::max<index_t>(n, 0);) {
      accumulate(token, -1.0f);
      codes_.resize(codes_.size() - row_bytes_);
      scale_.pop_back();
      residual_.pop_back();
      if (!starts_epoch(token)) continue;
      means_.resize(means_.size() - width());
      if (token >= forgetting) fade(2);  // halves are undone without rounding
    }
  }
  void clear() { truncate(0); }

  static constexpr std::string_view format() noexcept {
    return Bits == 1   ? "key codes 1 v3"
           : Bits == 2 ? "key codes 2 v3"
           : Bits == 4 ? "key codes 4 v3"
                       : "key codes 8 v3";
  }
  template <class Archive>
  void archive(Archive& a) {
    a(rotation_, row_bytes_, sum_, weight_, codes_, scale_, residual_, means_);
    buffer_.resize(sum_.size());  // scratch: valid() compares sum_ with the width
  }
  [[nodiscard]] bool valid() const noexcept {
    const std::size_t epochs = scale_.empty() ? 0 : epoch(size() - 1) + 1;
    return rotation_.valid() && row_bytes_ == width() * Bits / 8 && sum_.size() == width() &&
           codes_.size() == scale_.size() * row_bytes_ && residual_.size() == scale_.size() &&
           means_.size() == epochs * width();
  }

  /// Residual norm ρ of a token's code.
  [[nodiscard]] float residual(index_t token) const noexcept { return residual_[static_cast<std::size_t>(token)]; }

  /// Floats of scratch that `score` needs: the rotated query and, below 8 bits, a table for each byte.
  [[nodiscard]] std::size_t scratch_size() const noexcept { return width() + (Bits < 8 ? row_bytes_ * 256 : 0); }

  /// The error of a score is at most `errors[i]·bound_over_error()`: a hard bound.
  [[nodiscard]] float bound_over_error() const noexcept { return std::sqrt(static_cast<float>(width())); }

  /// scores[i] = estimated product of the query with key first + i, errors[i] (if asked for) its error scale
  /// ‖q‖ρ/sqrt(P). Reads no key, allocates nothing.
  void score(const float* scaled_query, index_t first, std::span<float> scores, std::span<float> errors,
             std::span<float> scratch) const noexcept {
    const prepared p = prepare(scaled_query, scratch);
    index_t token = first;
    for (std::size_t i = 0; i < scores.size();) {
      const index_t epoch_end = next_epoch(token);
      const float base = dot_mean(p, token);
      for (; i < scores.size() && token < epoch_end; ++i, ++token) {
        scores[i] = scale_[static_cast<std::size_t>(token)] * product(p, token) + base;
      }
    }
    const float unit = p.norm / bound_over_error();
    for (std::size_t i = 0; i < errors.size(); ++i) errors[i] = unit * residual_[static_cast<std::size_t>(first) + i];
  }

 private:
  struct prepared {
    const float* query;  // [width], rotated
    const float* table;  // [row bytes][256]
    float norm;          // ‖q‖
  };

  prepared prepare(const float* scaled_query, std::span<float> scratch) const noexcept {
    const std::span<float> query = scratch.first(width()), table = scratch.subspan(width());
    std::copy_n(scaled_query, rotation_.dim(), query.begin());
    rotation_.apply(query);
    if constexpr (Bits < 8) {
      constexpr std::size_t per_byte = 8 / Bits;
      for (std::size_t byte = 0; byte < row_bytes_; ++byte) {
        for (std::size_t code = 0; code < 256; ++code) {
          float sum = 0;
          for (std::size_t i = 0; i < per_byte; ++i) {
            const auto level = static_cast<float>(2 * static_cast<int>(code >> (i * Bits) & mask) - top);
            sum += level * query[byte * per_byte + i];
          }
          table[byte * 256 + code] = sum;
        }
      }
    }
    const auto n = static_cast<Eigen::Index>(rotation_.dim());
    return {query.data(), table.data(), kernel::norm(kernel::const_float_map(scaled_query, n))};
  }

  static constexpr int top = (1 << Bits) - 1;
  static constexpr unsigned mask = static_cast<unsigned>(top);

  [[nodiscard]] static bool starts_epoch(index_t token) noexcept {
    return token % 1024 == 0 || (token >= 64 && token < 1024 && std::has_single_bit(static_cast<std::uint64_t>(token)));
  }
  [[nodiscard]] static index_t next_epoch(index_t token) noexcept {
    if (token >= 1024) return (token / 1024 + 1) * 1024;
    return std::max<index_t>(
        64, static_cast<index_t>(std::bit_floor(static_cast<std::uint64_t>(std::max<index_t>(token, 1))) * 2));
  }
  [[nodiscard]] static std::size_t epoch(index_t token) noexcept {
    if (token >= 1024) return static_cast<std::size_t>(4 + token / 1024);
    return token < 64 ? 0 : static_cast<std::size_t>(std::bit_width(static_cast<std::uint64_t>(token)) - 6);
  }

  [[nodiscard]] float dot_mean(const prepared& p, index_t token) const noexcept {
    const auto n = static_cast<Eigen::Index>(width());
    return kernel::const_float_map(p.query, n).dot(kernel::const_float_map(means_.data() + epoch(token) * width(), n));
  }

  [[nodiscard]] const std::uint8_t* code(index_t token) const noexcept {
    return codes_.data() + static_cast<std::size_t>(token) * row_bytes_;
  }
  [[nodiscard]] static float level(const std::uint8_t* code, std::size_t j) noexcept {
    const unsigned stored = unsigned{code[j * Bits / 8]} >> (j * Bits % 8) & mask;
    return static_cast<float>(2 * static_cast<int>(stored) - top);
  }

  // ⟨c, Rq⟩
  [[nodiscard]] float product(const prepared& p, index_t token) const noexcept {
    const std::uint8_t* c = code(token);
    if constexpr (Bits < 8) {
      float a = 0, b = 0;
      for (std::size_t byte = 0; byte < row_bytes_; byte += 2) {
        a += p.table[byte * 256 + c[byte]];
        if (byte + 1 < row_bytes_) b += p.table[(byte + 1) * 256 + c[byte + 1]];
      }
      return a + b;
    } else {
      float lanes[8] = {};
      for (std::size_t j = 0; j < width(); j += 8) {
        for (std::size_t i = 0; i < std::min<std::size_t>(8, width() - j); ++i) {
          lanes[i] += static_cast<float>(2 * static_cast<int>(c[j + i]) - top) * p.query[j + i];
        }
      }
      float sum = 0;
      for (const float x : lanes) sum += x;
      return sum;
    }
  }

  // Codes buffer_ (y). The step that leaves the smallest residual of a few about the normal optimum.
  void encode() {
    double y2 = 0;
    float most = 0;
    for (const float y : buffer_) {
      y2 += static_cast<double>(y) * y;
      most = std::max(most, std::abs(y));
    }
    const auto spread = static_cast<float>(std::sqrt(y2 / static_cast<double>(width())));
    codes_.resize(codes_.size() + row_bytes_);
    std::uint8_t* out = codes_.data() + codes_.size() - row_bytes_;
    float best = spread * normal_half_step<Bits>;
    if constexpr (Bits > 1) {
      double best_cos = -1;
      for (const float factor :
           {0.7f, 0.85f, 1.0f, 1.2f, 1.5f, best > 0 ? most / (static_cast<float>(top) * best) : 1.0f}) {
        const float half = spread * normal_half_step<Bits> * factor;
        double cy = 0, cc = 0;
        for (const float y : buffer_) {
          const double c = quantise(y, half);
          cy += c * y;
          cc += c * c;
        }
        if (const double cosine2 = cc > 0 ? cy * std::abs(cy) / cc : 0; cosine2 > best_cos)
          best_cos = cosine2, best = half;
      }
    }
    double cy = 0, cc = 0;
    for (std::size_t j = 0; j < width(); ++j) {
      const int c = quantise(buffer_[j], best);
      cy += static_cast<double>(c) * buffer_[j];
      cc += static_cast<double>(c) * c;
      out[j * Bits / 8] =
          static_cast<std::uint8_t>(out[j * Bits / 8] | static_cast<unsigned>((c + top) / 2) << (j * Bits % 8));
    }
    const double alpha = cy > 0 ? y2 / cy : 0;
    scale_.push_back(static_cast<float>(alpha));
    // ‖y − αc‖² = α²‖c‖² − ‖y‖², since y − αc is orthogonal to y. Rounded up: it is used as a bound.
    const double left = cy > 0 ? std::max(0.0, alpha * alpha * cc - y2) : y2;
    // What float arithmetic adds when scores are made of it: a sum of products of ‖q‖ with ‖y‖ and with ‖μ‖.
    const auto n = static_cast<Eigen::Index>(width());
    const float mean = kernel::norm(kernel::const_float_map(means_.data() + means_.size() - width(), n));
    const double rounding = 1e-5 * (std::sqrt(y2) + static_cast<double>(mean));
    residual_.push_back(static_cast<float>(std::sqrt(left) * (1 + 1e-6) + rounding));
  }

  [[nodiscard]] static int quantise(float y, float half_step) noexcept {
    if (Bits == 1 || !(half_step > 0)) return y < 0 ? -1 : 1;
    const float cell = std::floor(y / (2 * half_step));
    constexpr auto edge = static_cast<float>(1 << (Bits - 1));
    // In this order what is not a number (∞/∞) becomes the lowest code, and std::clamp would let it through.
    return 2 * static_cast<int>(std::min(std::max(-edge, cell), edge - 1)) + 1;
  }

  static constexpr index_t forgetting = 1024;
  void fade(double factor) noexcept {
    weight_ *= factor;
    for (double& x : sum_) x *= factor;
  }

  // sum_ += sign·(decoded key), so that truncation undoes an append.
  void accumulate(index_t token, float sign) noexcept {
    weight_ += static_cast<double>(sign);
    const std::uint8_t* c = code(token);
    const float alpha = scale_[static_cast<std::size_t>(token)];
    const float* mean = means_.data() + epoch(token) * width();
    for (std::size_t j = 0; j < width(); ++j) sum_[j] += static_cast<double>(sign * (alpha * level(c, j) + mean[j]));
  }

  random_rotation rotation_;
  std::size_t row_bytes_ = 0;
  std::vector<float> buffer_;
  std::vector<double> sum_;  // of decoded keys, weighted
  double weight_ = 0;        // of its terms
  std::vector<std::uint8_t> codes_;
  std::vector<float> scale_, residual_, means_;
  recent_keys recent_;
};

}  // namespace vattn::VATTN_ABI::sketch

#include "vattn/macros_pop.hpp"
