// Estimates from rows of unequal probability: the weighted sums, and how far off they may be.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/estimate/state.hpp"
#include "vattn/kv/query.hpp"
#include "vattn/sample/philox.hpp"

namespace vattn {

/// A row of a Poisson sample.
struct weighted_row {
  ordinal place;
  float logit;
  float probability;
  float spread;  ///< ‖Y‖², Y = x(v − ô)/D̂, of the last look
};

/// The Hájek estimate ô = Σ x v/π / Σ x/π and the distribution of its linearised error
/// Σ (1{i in S}/π_i − 1) Y_i: independent terms of variance (1 − π)/π·‖Y‖².
struct weighted_estimate {
  double reference = 0;                                  ///< logit
  double denominator = 0;                                ///< D̂ relative to it
  double denominator_variance = 0;                       ///< of D̂, relative to D̂²
  double output2 = 0;                                    ///< ‖ô‖²
  double power = 0;                                      ///< Σ x‖v‖²/π / D̂
  double variance = 0;                                   ///< V̂ = Σ t, t = (1 − π)/π²·‖Y‖²
  double dimension = 1;                                  ///< ν₁
  double dof = std::numeric_limits<double>::infinity();  ///< ν₂ = 2V̂²/Σt²
  /// ‖Cov(V̂, error)‖/V̂: a sample that lacks rows of one side is off to the other, and its V̂ is too small by `skew`
  /// times the error.
  double skew = 0;
  index_t certain = 0;  ///< rows of probability 1
};

/// Groups to whose signed sums the rows are dealt, for Tr(Σ²).
inline constexpr std::size_t weighted_groups = 16;

/// group += z·(value − centre); returns ‖value − centre‖².
template <kernel::row R>
[[nodiscard]] double add_deviation(const R& value, std::span<const float> centre, float z, float* group,
                                   std::span<float> scratch) noexcept {
  using kernel::load;
  const auto n = static_cast<Eigen::Index>(centre.size());
  load(value, scratch.data());
  kernel::float_map y(scratch.data(), n);
  y -= kernel::const_float_map(centre.data(), n);
  kernel::float_map(group, n) += z * y;
  return static_cast<double>(y.squaredNorm());
}

/// `exact` holds the rows that are no part of `rows`, with power. Writes ô to `output` [dv] and each row's
/// spread; `groups` is scratch, [(weighted_groups + 2)·dv]. The rows' values are read twice. `state` receives the
/// whole estimate: its finished output is ô, its log-sum-exp log D̂.
template <kv_head Head>
[[nodiscard]] weighted_estimate estimate_weighted(const query_row<Head>& row, const population& tokens,
                                                  std::span<weighted_row> rows, const softmax_state& exact,
                                                  softmax_state& state, std::span<float> output,
                                                  std::span<float> groups, random_stream signs) noexcept {
  using kernel::axpy, kernel::load, kernel::squared_norm;
  const auto n = static_cast<Eigen::Index>(output.size());
  weighted_estimate e;
  float reference = exact.max_logit();
  for (const weighted_row& r : rows) reference = std::max(reference, r.logit);
  state.clear();
  state.raise(reference);
  state.merge(exact);
  for (const weighted_row& r : rows) {
    const auto value = row.value(tokens[r.place]);
    const double x = std::exp(r.logit - reference) / static_cast<double>(r.probability);
    state.add_denominator(x);
    state.add_power(x * static_cast<double>(squared_norm(value)));
    axpy(static_cast<float>(x), value, state.numerator().data());
    e.certain += r.probability >= 1;
  }
  e.reference = reference;
  e.denominator = state.denominator();
  e.power = state.power() / e.denominator;
  static_cast<void>(state.finish(output));
  e.output2 = static_cast<double>(kernel::const_float_map(output.data(), n).squaredNorm());

  // Signs make the groups' sums Z_g of z = sqrt(1 − π)/π·Y unbiased for both traces: E (Z_g·Z_h)² = Σ_{i in g, j in h}
  // (z_i·z_j)² and E ‖Z_g‖²‖Z_h‖² = Σ ‖z_i‖²‖z_j‖².
  std::fill(groups.begin(), groups.end(), 0.0f);
  double fourth = 0;
  std::size_t g = 0;
  std::uint32_t coins = 0, left = 0;
  const std::span<float> deviation = groups.subspan(weighted_groups * output.size(), output.size());
  kernel::float_map third(groups.data() + (weighted_groups + 1) * output.size(), n);  // Cov(V̂, error)
  for (weighted_row& r : rows) {
    if (r.probability >= 1) continue;
    if (left == 0) coins = signs.next(), left = 32;
    const double x = std::exp(r.logit - reference) / e.denominator, p = static_cast<double>(r.probability);
    const double root = std::sqrt(1 - p) / p;
    const auto z = static_cast<float>((coins & 1 ? x : -x) * root);
    coins >>= 1, --left;
    const double norm2 =
        add_deviation(row.value(tokens[r.place]), output, z, groups.data() + g * output.size(), deviation);
    g = (g + 1) % weighted_groups;
    r.spread = static_cast<float>(x * x * norm2);
    const double t = root * root * x * x * norm2;
    e.variance += t;
    fourth += t * t;
    e.denominator_variance += root * root * x * x;
    third += static_cast<float>(t * x * (1 - p) / p) * kernel::const_float_map(deviation.data(), n);
  }
  if (e.variance > 0) e.skew = static_cast<double>(third.norm()) / e.variance;
  if (fourth > 0) e.dof = 2 * e.variance * e.variance / fourth;
  // 1/ν₁ is the mean squared cosine between groups' sums, weighted by their lengths: exactly 1 in one dimension,
  // where Tr(Σ)² from the rows over Tr(Σ²) from sixteen sums would scatter far above it.
  std::array<double, weighted_groups> length2{};
  double product = 0, aligned = 0;
  for (std::size_t a = 0; a < weighted_groups; ++a) {
    const kernel::const_float_map za(groups.data() + a * output.size(), n);
    length2[a] = static_cast<double>(za.squaredNorm());
    for (std::size_t b = 0; b < a; ++b) {
      const double dot = static_cast<double>(za.dot(kernel::const_float_map(groups.data() + b * output.size(), n)));
      product += length2[a] * length2[b];
      aligned += dot * dot;
    }
  }
  if (aligned > 0) e.dimension = std::clamp(product / aligned, 1.0, static_cast<double>(n));
  return e;
}

}  // namespace vattn
