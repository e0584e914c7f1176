// One-pass moments of the sampled rows: all that any bound or target asks of them.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <span>

#include "vattn/kernel/units.hpp"

namespace vattn::VATTN_ABI {

/// Moments of the sampled terms, with x = exp(l − m) and r = v − c for a centre c fixed before the draw:
///   S = Σx,  N = Σ x r,  A = Σx²,  B = Σ x² r,  C = Σ x²‖r‖²,  Q = Σ x⁴‖r‖⁴,  P = Σ x‖r‖²,
/// kept apart for `groups` groups to which the rows are dealt in turn. They give, for ANY later ô and
/// without touching a row again, the linearised terms Y = x(v − ô)/D̂: their mean, the trace of their
/// covariance, its reliability (fourth moments) and, from the groups' sums, their effective dimension.
/// Centring keeps the differences accurate in float when values share a large mean. Values whose squares float does not
/// hold are given in a unit (kernel/units.hpp), and the centre in the same.
class residual_moments {
 public:
  static constexpr std::size_t groups = 16;

  /// Scalars of one group, or of all.
  struct sums {
    double rows = 0, S = 0, A = 0, C = 0, Q = 0, P = 0;
    sums& operator+=(const sums& o) noexcept {
      rows += o.rows, S += o.S, A += o.A, C += o.C, Q += o.Q, P += o.P;
      return *this;
    }
  };

  /// Floats of storage for values of dv elements.
  [[nodiscard]] static constexpr std::size_t storage_size(index_t dv) noexcept {
    return (2 * groups + 3) * static_cast<std::size_t>(dv);
  }

  residual_moments() = default;
  residual_moments(std::span<float> storage, index_t dv) noexcept
      : width_(static_cast<std::size_t>(dv)),
        first_(storage.subspan(0, groups * width_)),
        second_(storage.subspan(groups * width_, groups * width_)),
        total_first_(storage.subspan(2 * groups * width_, width_)),
        total_second_(storage.subspan((2 * groups + 1) * width_, width_)),
        residual_(storage.subspan((2 * groups + 2) * width_, width_)) {}

  /// Forgets all rows. `centre` [dv] must stay alive and unchanged.
  void clear(std::span<const float> centre, float reference_logit) noexcept {
    centre_ = centre;
    m_ = reference_logit;
    next_ = 0;
    scalars_ = {};
    std::fill(first_.begin(), first_.end(), 0.0f);
    std::fill(second_.begin(), second_.end(), 0.0f);
  }

  [[nodiscard]] float reference_logit() const noexcept { return m_; }
  [[nodiscard]] std::span<const float> centre() const noexcept { return centre_; }

  /// Adds one sampled row and returns ‖v − c‖².
  template <kernel::row R>
  float add(float logit, const R& value) noexcept {
    // x up to e^8 keeps x⁴ and its sums far inside double, x² far inside float.
    if (logit > m_ + 8) raise(logit);
    return add_weighted(std::exp(logit - m_), value);
  }

  /// Makes room for logits up to `most` and returns the reference of their weights.
  float prepare(float most) noexcept {
    if (most > m_ + 8) raise(most);
    return m_;
  }

  /// As `add`, the weight exp(logit - reference) given.
  template <kernel::row R>
  float add_weighted(float x, const R& value) noexcept {
    const std::size_t g = next_;
    next_ = (next_ + 1) % groups;
    float* N = first_.data() + g * width_;
    float* B = second_.data() + g * width_;
    const float* v = kernel::as_floats(value);
    if (v == nullptr) {
      using kernel::load;
      load(value, residual_.data());
      v = residual_.data();
    }
    const float r2 = accumulate(v, x, N, B);
    sums& s = scalars_[g];
    const double w = x, c = w * w * r2;
    s += {1, w, w * w, c, c * c, w * r2};
    return r2;
  }

  /// Sums over the groups; `first()` and `second()` then hold N and B.
  [[nodiscard]] sums total() noexcept {
    sums all;
    const auto n = static_cast<Eigen::Index>(width_);
    kernel::float_map N(total_first_.data(), n), B(total_second_.data(), n);
    N.setZero();
    B.setZero();
    for (std::size_t g = 0; g < groups; ++g) {
      all += scalars_[g];
      N += kernel::const_float_map(first_.data() + g * width_, n);
      B += kernel::const_float_map(second_.data() + g * width_, n);
    }
    return all;
  }
  [[nodiscard]] std::span<const float> first() const noexcept { return total_first_; }
  [[nodiscard]] std::span<const float> second() const noexcept { return total_second_; }

  [[nodiscard]] const sums& group(std::size_t g) const noexcept { return scalars_[g]; }
  [[nodiscard]] std::span<const float> group_first(std::size_t g) const noexcept {
    return first_.subspan(g * width_, width_);
  }
  [[nodiscard]] std::span<const float> group_second(std::size_t g) const noexcept {
    return second_.subspan(g * width_, width_);
  }

 private:
  // N += x r, B += x² r; returns ‖r‖². One pass: each element of v and c is read once, and x does not wait for r.
  [[nodiscard]] float accumulate(const float* v, float x, float* N, float* B) const noexcept {
    using lanes = Eigen::Array<float, 16, 1>;
    const float xx = x * x;
    const float* c = centre_.data();
    lanes square = lanes::Zero();
    std::size_t j = 0;
    for (; j + 16 <= width_; j += 16) {
      const lanes r = Eigen::Map<const lanes>(v + j) - Eigen::Map<const lanes>(c + j);
      square += r * r;
      Eigen::Map<lanes>(N + j) += x * r;
      Eigen::Map<lanes>(B + j) += xx * r;
    }
    float r2 = square.sum();
    for (; j < width_; ++j) {
      const float r = v[j] - c[j];
      r2 += r * r;
      N[j] += x * r;
      B[j] += xx * r;
    }
    return r2;
  }

  void raise(float m) noexcept {
    const float factor = std::exp(m_ - m);
    const double f1 = factor, f2 = f1 * f1;
    for (float& a : first_) a *= factor;
    for (float& b : second_) b *= factor * factor;
    for (sums& s : scalars_) s = {s.rows, s.S * f1, s.A * f2, s.C * f2, s.Q * f2 * f2, s.P * f1};
    m_ = m;
  }

  std::size_t width_ = 0;
  std::span<float> first_, second_, total_first_, total_second_, residual_;
  std::span<const float> centre_;
  float m_ = 0;
  std::size_t next_ = 0;
  std::array<sums, groups> scalars_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
