// Learned product codes of keys: 6 bits a group of principal axes, with errors that know the query's direction.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string_view>

#include "vattn/sketch/learned_codes.hpp"

namespace vattn::VATTN_ABI::sketch {

// Format. A key k of D coordinates becomes y = B(k − μ), B the principal axes of the training keys (rows, dealt to
// G groups by balanced variances, principal_axes.hpp) and μ their mean; y becomes a code c of G centroids of 64
// (codebook.hpp), stored in ceil(6G/8) bytes. Beside it stands one float:
//   ρ = ‖y − c‖      the norm of what the code leaves
// in a unit, a power of two that is chosen with what is learned and is 1 for keys of ordinary size (kernel/units.hpp),
// so that s = ⟨c, Bq⟩ + ⟨q, μ⟩ has |q·k − s| <= ‖q‖ρ always (to float rounding). Bytes a key: ceil(6G/8) + 4.
//
// The error scale is not ‖q‖ρ/sqrt(D). What a code leaves is no ball: groups with more variance leave more, and
// queries point along the keys' strong directions, where residuals are large too. Training also keeps
//   R = (1 − w)·E[rrᵀ]/E‖r‖² + w·I/D,    r = y − c of training keys that the centroids did not see, w = 0.1,
// and σ = ρ·sqrt((Bq)ᵀR(Bq)): the size of this key's residual, spread over directions as residuals are. The share w
// is for directions that later keys need and training did not see. It also keeps the concept's constant finite:
// R >= w·I/D, so |error| <= ‖q‖ρ <= σ·sqrt(D/w). That is valid but loose (25 at D = 64); for a bound ask
// hard_bounds(), which is ‖q‖ρ itself.

class product_codes : public learned_codes<true> {
 public:
  static constexpr bool estimates = true;

  product_codes() = default;
  /// `groups` of 6 bits: 10 are "60 bits" a key, 21 are "126 bits". How and when they learn: learned_codes. Source:
  /// optimised product quantisation (Ge et al., PAMI 2014), error scales as above. When to use: train(head) after a
  /// prefill; at 8 + 4 bytes a key (D = 64) real keys are then estimated as by rotated codes of twice the size
  /// (docs/sketches.md). When not: few tokens (centroids take 256·D bytes, axes and moments 8·D²), or learned from a
  /// beginning that later keys are unlike: errors on recordings were then twice as large and up to 1.4 times what
  /// the scales say, which no measure of the size of ρ can show. drift() tells such cases apart.
  explicit product_codes(index_t dim, index_t groups = 10, const learning& how = {})
      : learned_codes(dim, groups, 6, how) {}

  /// No error exceeds this times its scale.
  [[nodiscard]] float bound_over_error() const noexcept {
    return std::sqrt(static_cast<float>(std::max<index_t>(dim(), 1)) / static_cast<float>(isotropic)) * (1 + 1e-5f);
  }

  /// Residual norm ρ of a token, 0 while it is kept as it is.
  [[nodiscard]] float residual(index_t token) const noexcept {
    return trained() ? residuals()[static_cast<std::size_t>(token)] / unit() : 0.0f;
  }

  /// Mean ρ² of the last 256 tokens over what training expects of new keys, 1 before training. On recordings 0.9 to
  /// 2.4 where keys spread over the prefill were learned from, 7 to 600 where its beginning alone was. Above 4:
  /// train(head), then append_from.
  [[nodiscard]] double drift() const noexcept {
    const std::size_t n = std::min<std::size_t>(residuals().size(), 256);
    if (n == 0) return 1;
    double sum = 0;
    for (const float rho : std::span<const float>(residuals()).last(n)) sum += double{rho} * double{rho};
    if (!(learned_square() > 0)) return sum > 1e-9 ? std::numeric_limits<double>::infinity() : 1;
    return sum / static_cast<double>(n) / learned_square();
  }

  /// scores[i] = estimated product of the query with key first + i, errors[i] (if asked for) its error scale; exact
  /// and 0 before training. Reads no key, allocates nothing.
  void score(const float* scaled_query, index_t first, std::span<float> scores, std::span<float> errors,
             std::span<float> scratch) const noexcept {
    score_tokens(scaled_query, first, scores, scratch);
    if (errors.empty()) return;
    if (!trained()) return std::fill(errors.begin(), errors.end(), 0.0f);
    const kernel::const_float_map query(scratch.data(), dim());
    double square = 0;  // the query may be of any size
    for (index_t j = 0; j < dim(); ++j)
      square += double{query[j]} * double{kernel::const_float_map(moments().data() + j * dim(), dim()).dot(query)};
    const auto unit = static_cast<float>(std::sqrt(std::max(square, 0.0)));
    for (std::size_t i = 0; i < errors.size(); ++i) errors[i] = unit * residuals()[static_cast<std::size_t>(first) + i];
  }

  /// bounds[i] = ‖q‖ρ of key first + i: no error exceeds it.
  void hard_bounds(const float* scaled_query, index_t first, std::span<float> bounds) const noexcept {
    const float norm = kernel::norm(kernel::const_float_map(scaled_query, dim()));
    for (std::size_t i = 0; i < bounds.size(); ++i) bounds[i] = norm * residual(first + static_cast<index_t>(i));
  }

  static constexpr std::string_view format() noexcept { return "product codes v2"; }
};

}  // namespace vattn::VATTN_ABI::sketch

#include "vattn/macros_pop.hpp"
