// The partial state of a softmax-weighted sum, and its merge: the unit in which attention is split.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/base/floating_point.hpp"
#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI {

/// State (m, d, o) of a set of tokens: with x_i = exp(l_i − m),
///   d = Σ x_i,   o = Σ x_i v_i (not yet divided by d),   power = Σ x_i ‖v_i‖² (where it is asked for).
/// Any split of the tokens, accumulated apart and merged, gives the same result up to rounding
/// (online softmax; FlashAttention, FlashDecoding). `o` is the caller's buffer, [dv].
class softmax_state {
 public:
  softmax_state() = default;
  explicit softmax_state(std::span<float> storage) noexcept : o_(storage) { clear(); }

  /// Of a sum that was made elsewhere; `numerator` [dv] stays the caller's.
  softmax_state(float max_logit, double denominator, std::span<float> numerator) noexcept
      : m_(max_logit), d_(denominator), o_(numerator) {}

  void clear() noexcept {
    m_ = -std::numeric_limits<float>::infinity();
    d_ = 0;
    power_ = 0;
    std::fill(o_.begin(), o_.end(), 0.0f);
  }

  [[nodiscard]] bool empty() const noexcept { return !(d_ > 0); }
  [[nodiscard]] float max_logit() const noexcept { return m_; }
  [[nodiscard]] double denominator() const noexcept { return d_; }
  [[nodiscard]] double power() const noexcept { return power_; }
  [[nodiscard]] std::span<float> numerator() const noexcept { return o_; }

  /// Moves the reference logit up to `m` (never down), so that new terms do not overflow.
  void raise(float m) noexcept {
    if (!(m > m_)) return;
    const double factor = empty() ? 0.0 : std::exp(static_cast<double>(m_) - m);
    d_ *= factor;
    power_ *= factor;
    for (float& x : o_) x *= static_cast<float>(factor);
    m_ = m;
  }

  /// Adds weight·exp(logit − m) to d alone: a learned sink, or a term whose value is added elsewhere.
  void add_denominator(double x) noexcept { d_ += x; }
  void add_power(double p) noexcept { power_ += p; }

  void merge(const softmax_state& other) noexcept {
    if (other.empty()) return;
    const kernel::floating_point_scope standard;  // others merge states too
    raise(other.m_);
    const double factor = std::exp(static_cast<double>(other.m_) - m_);
    d_ += factor * other.d_;
    power_ += factor * other.power_;
    const auto n = static_cast<Eigen::Index>(o_.size());
    kernel::float_map(o_.data(), n) += static_cast<float>(factor) * kernel::const_float_map(other.o_.data(), n);
  }

  /// out = o / d (0 for the empty set). Returns the log-sum-exp, natural log (−inf for the empty set).
  float finish(std::span<float> out) const noexcept {
    const kernel::floating_point_scope standard;
    const auto inverse = empty() ? 0.0f : static_cast<float>(1.0 / d_);
    for (std::size_t j = 0; j < out.size(); ++j) out[j] = o_[j] * inverse;
    const volatile float lse = log_sum_exp();  // or a compiler may round it when the caller's mode is back
    return lse;
  }

  [[nodiscard]] float log_sum_exp() const noexcept {
    return empty() ? -std::numeric_limits<float>::infinity() : static_cast<float>(m_ + std::log(d_));
  }

 private:
  float m_ = -std::numeric_limits<float>::infinity();
  double d_ = 0;
  double power_ = 0;
  std::span<float> o_;
};

/// FlashInfer's convention for a log-sum-exp is base 2.
[[nodiscard]] inline float log2_sum_exp(float natural) noexcept { return natural * 1.44269504f; }

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
