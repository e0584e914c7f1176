// The second moment of vectors, kept whole: for bounds that know a direction's variance.
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>
#include <span>

#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI {

/// Σ y yᵀ of rows y, [dv, dv], and a bound of its largest eigenvalue. `storage` [2·dv²].
class second_moment {
 public:
  second_moment(std::span<float> storage, index_t dv) noexcept
      : dv_(static_cast<Eigen::Index>(dv)), sum_(storage.data(), dv_, dv_), next_(sum_.data() + dv_ * dv_, dv_, dv_) {
    sum_.setZero();
  }

  /// Adds factor²·y yᵀ.
  void add(float factor, std::span<const float> y) noexcept {
    const kernel::const_float_map v(y.data(), dv_);
    for (Eigen::Index j = 0; j < dv_; ++j) sum_.col(j).head(j + 1) += (factor * factor * v[j]) * v.head(j + 1);
  }

  /// Tr(M^p)^{1/p} with p = 32: at least the largest eigenvalue, at most dv^{1/32} times it. Destroys the sum.
  [[nodiscard]] double largest_eigenvalue() noexcept {
    for (Eigen::Index j = 0; j < dv_; ++j) sum_.col(j).tail(dv_ - j) = sum_.row(j).tail(dv_ - j).transpose();
    double log_scale = 0;
    for (int square = 0; square < 5; ++square) {
      const float trace = sum_.trace();
      if (!(trace > 0)) return 0;
      sum_ *= 1 / trace;
      log_scale = 2 * (log_scale + std::log(static_cast<double>(trace)));
      next_.noalias() = sum_.lazyProduct(sum_);  // no temporaries, no allocation
      sum_ = next_;
    }
    const double trace = static_cast<double>(sum_.trace());
    return trace > 0 ? std::exp((std::log(trace) + log_scale) / 32) * (1 + 1e-4) : 0;
  }

 private:
  using matrix_map = Eigen::Map<Eigen::MatrixXf>;
  Eigen::Index dv_;
  matrix_map sum_, next_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
