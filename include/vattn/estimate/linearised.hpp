// The ratio linearised: how the output's error is distributed, from the sample's moments.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/estimate/residual.hpp"

namespace vattn::VATTN_ABI {

/// Distribution of one term Y = x(v − ô)/D̂ of the residual. To first order ô − o is the sampling error
/// of ΣY: (N̂ − N)/D̂ − ô(D̂ − D)/D̂.
struct linearised_terms {
  double variance = 0;                                   ///< s², trace of the covariance
  double dimension = 1;                                  ///< ν₁ = (Tr Σ)²/Tr(Σ²)
  double dof = std::numeric_limits<double>::infinity();  ///< ν₂ = 2/(relative variance of s²)
};

/// All from one-pass moments: Σ‖Y‖² = (C − 2 B·u + A‖u‖²)/D̂² with u = ô − c, `offset` [dv].
[[nodiscard]] inline linearised_terms linearise(const estimate& e, const residual_moments& moments,
                                                std::span<const float> offset) noexcept {
  constexpr std::size_t G = residual_moments::groups;
  constexpr double g1 = G - 1;
  const double D2 = e.denominator * e.denominator;
  const auto n = static_cast<Eigen::Index>(offset.size());
  const kernel::const_float_map u(offset.data(), n);
  linearised_terms y;

  const double square = std::max(0.0, e.s.C - 2 * e.second_u + e.s.A * e.u2);
  const double mean2 = std::max(0.0, e.first2 - 2 * e.s.S * e.first_u + e.s.S * e.s.S * e.u2);  // ‖ΣY‖²
  y.variance = std::max(0.0, square - mean2 / e.sampled) / (e.sampled - 1) / D2;

  // Relative variance of s². By rows (about c, uncentred), Σt²/(Σt)² with t = x²‖r‖², which sees single
  // spikes; by groups (about ô), which sees what the move from c to ô changes. The larger counts.
  std::array<double, G> along_u{};
  double t_sum = 0, t_square = 0;
  for (std::size_t g = 0; g < G; ++g) {
    along_u[g] = kernel::const_float_map(moments.group_first(g).data(), n).dot(u);
    const double b = kernel::const_float_map(moments.group_second(g).data(), n).dot(u);
    const double t = std::max(0.0, moments.group(g).C - 2 * b + moments.group(g).A * e.u2);
    t_sum += t;
    t_square += t * t;
  }
  const double by_rows = e.s.C > 0 ? e.s.Q / (e.s.C * e.s.C) : 0.0;
  const double by_groups = t_sum > 0 ? (t_square / (t_sum * t_sum) - 1.0 / G) * G / g1 : 0.0;
  if (const double relative = std::max(by_rows, by_groups); relative > 0) y.dof = 2 / relative;

  // Gram matrix of the groups' sums Z_g = Σ_g Y, centred, S their covariance; then the estimates of Tr(Σ²) and of
  // (Tr Σ)² that are unbiased for normal sums (Srivastava 2005): (G−1)²/((G−2)(G+1))·(Tr S² − (Tr S)²/(G−1)) and
  // (Tr S)² − 2 Tr(Σ²)/(G−1). Without the latter's correction one dimension would count as 1.13.
  std::array<std::array<double, G>, G> gram{};
  std::array<double, G> mean{};
  double overall = 0;
  for (std::size_t g = 0; g < G; ++g) {
    const kernel::const_float_map a(moments.group_first(g).data(), n);
    for (std::size_t h = 0; h <= g; ++h) {
      const double ab = a.dot(kernel::const_float_map(moments.group_first(h).data(), n));
      const double Sg = moments.group(g).S, Sh = moments.group(h).S;
      gram[g][h] = gram[h][g] = ab - Sg * along_u[h] - Sh * along_u[g] + Sg * Sh * e.u2;
    }
  }
  for (std::size_t g = 0; g < G; ++g) {
    for (const double z : gram[g]) mean[g] += z / G;
    overall += mean[g] / G;
  }
  double trace = 0, trace_square = 0;
  for (std::size_t g = 0; g < G; ++g) {
    for (std::size_t h = 0; h < G; ++h) {
      const double z = gram[g][h] - mean[g] - mean[h] + overall;
      if (g == h) trace += z;
      trace_square += z * z;
    }
  }
  const double square_trace = (trace_square - trace * trace / g1) / ((G - 2.0) * (G + 1.0));
  y.dimension = square_trace > 0 ? std::clamp(trace / g1 * (trace / g1) / square_trace - 2 / g1, 1.0,
                                              std::max(1.0, static_cast<double>(n)))
                                 : 1.0;
  return y;
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
