// What a sample says of the output's error: variances, one struct for every design, from sums that merge. The other
// kind of evidence, known ranges, is in ranges.hpp.
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>

#include "vattn/stats/promise.hpp"
#include "vattn/stats/sums.hpp"

namespace vattn::VATTN_ABI::stats {

/// The estimate ô = N̂/D̂ of one head and the distribution of its errors. Variances are mean squares of errors, of
/// vectors the trace of their covariance; all but `light` are of the whole estimate, whatever its strata.
struct evidence {
  double reference = 0;    ///< logit
  double denominator = 0;  ///< D̂ relative to exp(reference)
  double output2 = 0;      ///< ‖ô‖²
  double power = 0;        ///< Σ x‖v‖²/D̂, mean square of the attended values
  double away2 = 0;        ///< ‖ô − c‖²

  double variance = 0;              ///< V̂ of ô
  double light = 0;                 ///< the uniform stratum's part of it
  double dimension = 1;             ///< ν₁ = Tr(Σ)²/Tr(Σ²), 1 to dv
  double dof = infinity;            ///< ν₂ = 2/(relative variance of V̂)
  double skew = 0;                  ///< ‖Cov(V̂, error)‖/V̂: how much too small V̂ is for each unit of error
  double denominator_variance = 0;  ///< relative to D̂²
  double denominator_dof = infinity;
  double numerator_variance = 0;  ///< of N̂, relative to ‖N̂‖²

  index_t rows = 0;     ///< read
  index_t certain = 0;  ///< of these, without chance

  [[nodiscard]] VATTN_FN bool finite() const noexcept {
    // A NaN fails any comparison.
    return denominator > 0 && denominator < infinity && output2 < infinity && power < infinity && variance >= 0 &&
           variance < infinity;
  }
};

/// A uniform sample of one stratum: `drawn` of `population` rows, those among them that belong to the stratum in its
/// sums (the rest count as zeros).
struct uniform_draw {
  double population = 0, drawn = 0;
  bool with_replacement = false;

  [[nodiscard]] VATTN_FN double weight() const noexcept { return drawn > 0 ? population / drawn : 0; }
  /// The variance of the estimated sum is this times (Σ‖y‖² − ‖Σ y‖²/drawn) over the sample.
  [[nodiscard]] VATTN_FN double factor() const noexcept {
    if (!(drawn > 1)) return 0;
    const double unread = with_replacement ? 1 : larger(0, 1 - drawn / population);
    return weight() * weight() * unread * drawn / (drawn - 1);
  }
};

/// Dot products of a stratum's vector sums with each other, with u = ô − c and with c: sums over the elements of a
/// value, so that threads may take some elements each and add. Names: n, b, h the vectors 0, 1, 2 of sample_sums, z
/// those of the groups.
struct sum_products {
  double nn = 0, nu = 0, nc = 0, bb = 0, bu = 0, bc = 0, hb = 0, hu = 0, hh = 0;
  double zu[most_groups] = {}, zn[most_groups] = {}, zb[most_groups] = {}, zh[most_groups] = {};
  double zz[most_groups * (most_groups + 1) / 2] = {};  ///< a >= b at a(a + 1)/2 + b

  VATTN_FN void add(const sample_sums& of, const float* u, const float* centre, lanes mine = {}) noexcept {
    const auto dot = [&](const float* x, const float* y) {
      return detail::striped_sum(mine.first, of.dv, mine.step,
                                 [=](index_t j) { return static_cast<double>(x[j]) * static_cast<double>(y[j]); });
    };
    const float *n = of.vector(0), *b = of.vector(1), *h = of.vector(2);
    nn += dot(n, n), nu += dot(n, u), nc += dot(n, centre), bb += dot(b, b), bu += dot(b, u), bc += dot(b, centre);
    hb += dot(h, b), hu += dot(h, u), hh += dot(h, h);
    for (int g = 0; g < of.groups; ++g) {
      const float* z = of.vector(3 + g);
      zu[g] += dot(z, u), zn[g] += dot(z, n), zb[g] += dot(z, b), zh[g] += dot(z, h);
      for (int o = 0; o <= g; ++o) zz[g * (g + 1) / 2 + o] += dot(z, of.vector(3 + o));
    }
  }
  /// Adds those of other elements.
  VATTN_FN void add(const sum_products& o) noexcept {
    nn += o.nn, nu += o.nu, nc += o.nc, bb += o.bb, bu += o.bu, bc += o.bc, hb += o.hb, hu += o.hu, hh += o.hh;
    for (int a = 0; a < most_groups; ++a) zu[a] += o.zu[a], zn[a] += o.zn[a], zb[a] += o.zb[a], zh[a] += o.zh[a];
    for (int i = 0; i < most_groups * (most_groups + 1) / 2; ++i) zz[i] += o.zz[i];
  }
};

/// Dot products of u = ô − c and c, sums over elements as sum_products are.
struct centre_products {
  double uu = 0, cu = 0, cc = 0, oo = 0;  ///< o = ô
  VATTN_FN void add(float u, float c) noexcept {
    const double a = u, b = c, o = a + b;
    uu += a * a, cu += a * b, cc += b * b, oo += o * o;
  }
};

namespace detail {

/// What one stratum adds. `draw` null: a Poisson sample, and certain rows.
struct stratum_evidence {
  double variance = 0, fourth = 0, third2 = 0;  // of D̂·(ô − o): V̂, Σ t², ‖Cov‖²
  double ones = 0, ones_fourth = 0;             // of D̂
  double values = 0;                            // of N̂
  double dimension = 1;
};

/// docs/mathematics.md, "Sums that merge", derives each line.
[[nodiscard]] VATTN_FN inline stratum_evidence weigh(const scalar_sums& s, const sum_products& p,
                                                     const centre_products& c, int groups, index_t dv,
                                                     const uniform_draw* draw) noexcept {
  stratum_evidence e;
  const double factor = draw ? draw->factor() : 1, share = draw && draw->drawn > 0 ? 1 / draw->drawn : 0;
  // Σ t x²‖v − ô‖², exactly; of a uniform sample, less the square of the mean.
  const double mean2 = p.nn - 2 * s.x * p.nu + s.x * s.x * c.uu;  // ‖Σ x(v − ô)‖²
  const double second = larger(0, s.spread - 2 * p.bu + s.square * c.uu);
  e.variance = factor * larger(0, second - share * mean2);
  e.ones = factor * larger(0, s.square - share * s.x * s.x);
  e.ones_fourth = factor * factor * s.f0;
  const double values2 = p.nn + 2 * s.x * p.nc + s.x * s.x * c.cc;  // ‖Σ x v‖²
  e.values = factor * larger(0, s.spread + 2 * p.bc + s.square * c.cc - share * values2);
  if (!(second > 0)) return e;

  // The signed groups, moved from c to ô, and from 0 to the mean of a uniform sample: Z − α u − β N.
  double product = 0, aligned = 0, along = 0, length = 0;
  double alpha[most_groups] = {}, beta[most_groups] = {}, length2[most_groups];  // nvcc sees a use before the loop
  const auto moved = [&](int a, int b) {                                         // a >= b
    return p.zz[a * (a + 1) / 2 + b] - alpha[b] * p.zu[a] - alpha[a] * p.zu[b] - beta[b] * p.zn[a] - beta[a] * p.zn[b] +
           alpha[a] * alpha[b] * c.uu + beta[a] * beta[b] * p.nn + (alpha[a] * beta[b] + alpha[b] * beta[a]) * p.nu;
  };
  for (int a = 0; a < groups; ++a) {
    beta[a] = share * s.signed_one[a];
    alpha[a] = s.signed_x[a] - beta[a] * s.x;
    along += p.zu[a] * p.zu[a];
    length += p.zz[a * (a + 1) / 2 + a];
    length2[a] = larger(0, moved(a, a));
    for (int b = 0; b < a; ++b) {
      const double dot = moved(a, b);
      product += length2[a] * length2[b];
      aligned += dot * dot;
    }
  }
  // 1/ν₁ is the mean squared cosine between groups' sums, weighted by their lengths: exactly 1 in one dimension, where
  // the ratio of Tr(Σ)² from the rows to Tr(Σ²) from a few sums would scatter far above it.
  if (aligned > 0) e.dimension = within(product / aligned, 1, static_cast<double>(dv));

  // Σ t² x⁴ (ρ − 2 r·u + u²)²: (r·u)² by the share of the squares that lies along u. The odd terms are 0 on average
  // over directions; where the rows lie away from ô they are taken in, for they make ν₂ less, and never to make it
  // more.
  const double share_along = length > 0 && c.uu > 0 ? within(along / (length * c.uu), 0, 1) : 0;
  const double away = s.square > 0 ? larger(0, -p.bu / s.square) : 0;
  const double fourth =
      s.f4 + (2 + 4 * share_along) * c.uu * s.f2 + c.uu * c.uu * s.f0 + 4 * away * (s.f2 + c.uu * s.f0);
  const double rows = static_cast<double>(s.rows - s.certain);
  e.fourth = factor * factor * larger(fourth, second * second / rows);  // Cauchy-Schwarz

  // Σ s x³‖v − ô‖²(v − ô) = H + p·B + q·u + g·Σ (Z·u) Z, whose last term stands for −2 (Σ s x³ r rᵀ) u.
  const double third1 = s.square > 0 ? s.third0 / s.square : 0;
  const double pb = third1 * c.uu, qu = 2 * third1 * p.bu - s.third2 - s.third0 * c.uu;
  const double gz = length > 0 ? -2 * s.third2 / length : 0;
  double zz = 0, zo = 0;  // ‖Σ (Z·u) Z‖², and its product with the rest
  for (int a = 0; a < groups; ++a) {
    zo += p.zu[a] * (p.zh[a] + pb * p.zb[a] + qu * p.zu[a]);
    for (int b = 0; b <= a; ++b) zz += (a == b ? 1 : 2) * p.zu[a] * p.zu[b] * p.zz[a * (a + 1) / 2 + b];
  }
  e.third2 = p.hh + pb * pb * p.bb + qu * qu * c.uu + 2 * (pb * p.hb + qu * p.hu + pb * qu * p.bu) + gz * gz * zz +
             2 * gz * zo;
  return e;
}

}  // namespace detail

/// From scalars alone: the evidence of a Poisson sample with the certain rows (`picked`), and of a uniform sample of
/// what it leaves (`light`, null: none). References are the same. `sink`: what a learned sink adds to D.
[[nodiscard]] VATTN_FN inline evidence conclude(const scalar_sums& picked, const sum_products& picked_products,
                                                const scalar_sums* light, const sum_products* light_products,
                                                const uniform_draw& draw, const centre_products& c, double sink,
                                                int groups, index_t dv) noexcept {
  const auto p = detail::weigh(picked, picked_products, c, groups, dv, nullptr);
  detail::stratum_evidence l;
  double x = picked.x, power = picked.power, nc = picked_products.nc;
  evidence e;
  e.rows = picked.rows, e.certain = picked.certain;
  if (light) {
    l = detail::weigh(*light, *light_products, c, groups, dv, &draw);
    x += draw.weight() * light->x, power += draw.weight() * light->power, nc += draw.weight() * light_products->nc;
    e.rows += light->rows;
  }
  e.reference = picked.reference;
  e.denominator = x + sink;
  const double d2 = e.denominator * e.denominator;
  e.output2 = c.oo, e.away2 = c.uu;
  e.power = larger(0, power + 2 * nc + x * c.cc) / e.denominator;
  e.variance = (p.variance + l.variance) / d2;
  e.light = l.variance / d2;
  if (const double f = p.fourth + l.fourth; f > 0) {
    const double v = p.variance + l.variance;
    e.dof = 2 * v * v / f;
  }
  // Tr((Σ_p + Σ_l)²) <= (Tr(Σ_p²)^½ + Tr(Σ_l²)^½)²
  const double root = p.variance / std::sqrt(p.dimension) + l.variance / std::sqrt(l.dimension);
  if (root > 0) {
    const double v = p.variance + l.variance;
    e.dimension = within(v * v / (root * root), 1, static_cast<double>(dv));
    e.skew = std::sqrt(larger(0, p.third2)) / (v * e.denominator);
  }
  const double ones = p.ones + l.ones;
  e.denominator_variance = ones / d2;
  if (const double f = p.ones_fourth + l.ones_fourth; f > 0) e.denominator_dof = 2 * ones * ones / f;
  e.numerator_variance =
      e.output2 > 0 ? (p.values + l.values) / (d2 * e.output2) : (p.values + l.values > 0 ? infinity : 0);
  return e;
}

/// The estimate and its evidence, on one thread. Writes ô to `output` [dv]; `offset` [dv] receives u = ô − c. `sink` is
/// a learned sink's logit, −infinity: none. Brings all sums to one reference; with no row at all the result is not
/// finite.
[[nodiscard]] VATTN_FN inline evidence estimate(sample_sums& picked, sample_sums* light, const uniform_draw& draw,
                                                const float* centre, double sink, float* output,
                                                float* offset) noexcept {
  if (light) {
    picked.raise(light->s.reference);
    light->raise(picked.s.reference);
  }
  const double more = sink > -infinity ? std::exp(sink - picked.s.reference) : 0;
  const double weight = light ? draw.weight() : 0;
  const double denominator = picked.s.x + (light ? weight * light->s.x : 0) + more;
  centre_products c;
  for (index_t j = 0; j < picked.dv; ++j) {
    // The sink's value is 0: −c from the centre.
    const double n = static_cast<double>(picked.vector(0)[j]) +
                     (light ? weight * static_cast<double>(light->vector(0)[j]) : 0) -
                     more * static_cast<double>(centre[j]);
    offset[j] = static_cast<float>(n / denominator);
    output[j] = offset[j] + centre[j];
    c.add(offset[j], centre[j]);
  }
  sum_products p, l;
  p.add(picked, offset, centre);
  if (light) l.add(*light, offset, centre);
  return conclude(picked.s, p, light ? &light->s : nullptr, light ? &l : nullptr, draw, c, more, picked.groups,
                  picked.dv);
}

/// Adds an error of known variance along one direction: of terms that the sample cannot have seen. To `evidence`, or to
/// the sum_evidence (bounds.hpp) of one term.
template <class Evidence>
VATTN_FN void add_direction(Evidence& e, double variance) noexcept {
  if (variance == 0) return;
  const double seen = e.variance, all = seen + variance;
  e.variance = all;
  if (!(all < infinity)) {  // nothing bounds it
    e.dimension = 1;
    return;
  }
  e.dimension = all * all / (seen * seen / e.dimension + variance * variance);
  if (seen > 0) {  // of the two only `seen` is estimated
    e.dof *= all / seen * (all / seen);
    if constexpr (requires { e.skew; }) e.skew *= seen / all;
  }
}

}  // namespace vattn::VATTN_ABI::stats

#include "vattn/macros_pop.hpp"
