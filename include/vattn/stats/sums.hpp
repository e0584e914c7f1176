// The sums over sampled rows from which all statistics come. They are about a fixed centre, so that rows may be split
// over threads, GPUs or machines in any way: parts merge, in the order of the caller, into the sums of the whole.
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>

#include "vattn/base/config.hpp"
#include "vattn/stats/quantile.hpp"

namespace vattn::VATTN_ABI::stats {

/// Groups to which rows are dealt with random signs, for the effective dimension; at most this many.
inline constexpr int most_groups = 16;

/// What a row counts for: w in sums, t = w(w − 1) in their variance, s = w(w − 1)² in their third moment.
struct row_weight {
  double w = 1, t = 0, s = 0;
};
/// Read for certain.
[[nodiscard]] VATTN_FN constexpr row_weight certain_row() noexcept { return {}; }
/// Of a Poisson sample: kept with probability 1/w, independently of all others.
[[nodiscard]] VATTN_FN constexpr row_weight poisson_row(double w) noexcept {
  return {w, w * (w - 1), w * (w - 1) * (w - 1)};
}
/// Of a uniform sample, which `uniform_draw` describes as a whole.
[[nodiscard]] VATTN_FN constexpr row_weight uniform_row() noexcept { return {1, 1, 0}; }

/// Group and sign of a row: of its place in the cache and the call's key alone, so that no split changes them.
struct dealt {
  int group = 0;
  bool negative = false;
};
[[nodiscard]] VATTN_FN constexpr dealt deal(std::uint64_t key, std::uint64_t place, int groups) noexcept {
  // Steele, Lea and Flood's mixer (2014).
  std::uint64_t z = key + (place + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return {static_cast<int>((z >> 33) % static_cast<std::uint64_t>(groups)), (z & 1) != 0};
}

/// Σ over rows of one head, with x = exp(l − reference), ρ = ‖v − c‖² and w, t, s as in row_weight.
struct scalar_sums {
  double reference = -infinity;         ///< logit; −infinity: no row yet
  double x = 0, power = 0;              ///< Σ w x {1, ρ}
  double square = 0, spread = 0;        ///< Σ t x² {1, ρ}
  double f0 = 0, f2 = 0, f4 = 0;        ///< Σ t² x⁴ {1, ρ, ρ²}
  double third0 = 0, third2 = 0;        ///< Σ s x³ {1, ρ}
  double signed_x[most_groups] = {};    ///< Σ ±√t x, by group
  double signed_one[most_groups] = {};  ///< Σ ±√t
  index_t rows = 0, certain = 0;        ///< all, and those of t = 0
};

/// Every x times `factor`.
VATTN_FN inline void rescale(scalar_sums& s, double factor) noexcept {
  const double f2 = factor * factor, f3 = f2 * factor, f4 = f2 * f2;
  s.x *= factor, s.power *= factor;
  s.square *= f2, s.spread *= f2;
  s.third0 *= f3, s.third2 *= f3;
  s.f0 *= f4, s.f2 *= f4, s.f4 *= f4;
  for (double& z : s.signed_x) z *= factor;
}

/// What the rows of either of two parts are to be multiplied by before they are added.
struct merge_factors {
  double mine = 1, theirs = 1;
};
/// Brings `to` to the larger of both references and adds `from`; vector sums are the caller's to rescale and add, by
/// the powers of x that they hold. `from` is left as it is.
VATTN_FN inline merge_factors merge(scalar_sums& to, const scalar_sums& from) noexcept {
  const double reference = larger(to.reference, from.reference);
  // An empty part has no reference, and nothing to rescale.
  const auto factor = [&](double own) { return own < reference ? std::exp(own - reference) : 1.0; };
  const merge_factors f{factor(to.reference), factor(from.reference)};
  scalar_sums part = from;
  if (f.mine != 1) rescale(to, f.mine);
  if (f.theirs != 1) rescale(part, f.theirs);
  to.reference = reference;
  to.x += part.x, to.power += part.power;
  to.square += part.square, to.spread += part.spread;
  to.f0 += part.f0, to.f2 += part.f2, to.f4 += part.f4;
  to.third0 += part.third0, to.third2 += part.third2;
  for (int g = 0; g < most_groups; ++g) {
    to.signed_x[g] += part.signed_x[g];
    to.signed_one[g] += part.signed_one[g];
  }
  to.rows += part.rows, to.certain += part.certain;
  return f;
}

/// The scalars of a row of probability weight q; returns its x.
VATTN_FN inline double add_scalars(scalar_sums& s, double logit, double rho, const row_weight& q, dealt to) noexcept {
  const double x = std::exp(logit - s.reference), x2 = x * x, tx2 = q.t * x2, root = std::sqrt(q.t);
  s.x += q.w * x, s.power += q.w * x * rho;
  s.rows += 1, s.certain += q.t > 0 ? 0 : 1;
  if (!(q.t > 0)) return x;
  s.square += tx2, s.spread += tx2 * rho;
  s.f0 += tx2 * tx2, s.f2 += tx2 * tx2 * rho, s.f4 += tx2 * tx2 * rho * rho;
  s.third0 += q.s * x2 * x, s.third2 += q.s * x2 * x * rho;
  s.signed_x[to.group] += to.negative ? -root * x : root * x;
  s.signed_one[to.group] += to.negative ? -root : root;
  return x;
}

namespace detail {
/// Σ f(j) over j = first, first + step, … below n, in eight partial sums: a compiler may not reorder one of floats.
template <class F>
[[nodiscard]] VATTN_FN inline double striped_sum(index_t first, index_t n, index_t step, F&& f) noexcept {
  using term = decltype(f(first));
  term part[8] = {};
  const index_t count = first < n ? (n - first + step - 1) / step : 0, whole = count / 8 * 8;
  for (index_t k = 0; k < whole; k += 8) {
    for (index_t i = 0; i < 8; ++i) part[i] += f(first + (k + i) * step);
  }
  double sum = 0;
  for (index_t k = whole; k < count; ++k) sum += static_cast<double>(f(first + k * step));
  for (const term t : part) sum += static_cast<double>(t);
  return sum;
}
}  // namespace detail

/// The elements of a vector that one thread of several takes: all of them, or those of one lane.
struct lanes {
  index_t first = 0, step = 1;
};

/// The sums of the rows of one head, vectors included. Vectors are the caller's memory, [3 + groups, dv], r = v − c:
///   0: Σ w x r   1: Σ t x² r   2: Σ s x³ρ r   3 + g: Σ ±√t x r over group g
struct sample_sums {
  scalar_sums s;
  float* vectors = nullptr;
  index_t dv = 0;
  int groups = most_groups;

  [[nodiscard]] VATTN_FN static constexpr index_t storage(index_t dv, int groups) noexcept { return (3 + groups) * dv; }
  [[nodiscard]] VATTN_FN float* vector(int i) const noexcept { return vectors + i * dv; }

  VATTN_FN void clear(lanes mine = {}) noexcept {
    s = {};
    for (index_t j = mine.first; j < storage(dv, groups); j += mine.step) vectors[j] = 0;
  }

  /// Brings the reference up to `logit`; never down.
  VATTN_FN void raise(double logit, lanes mine = {}) noexcept {
    if (!(logit > s.reference)) return;
    const double factor = std::exp(s.reference - logit);  // 0 where there is no row yet
    rescale(s, factor);
    rescale_vectors(factor, mine);
    s.reference = logit;
  }

  /// Adds a row and returns ‖v − c‖²; `value` and `centre` [dv].
  VATTN_FN double add(double logit, const float* value, const float* centre, const row_weight& q, dealt to) noexcept {
    // x up to e^8 keeps Σ x⁴ far inside double, and Σ x³ρ inside float.
    if (!(logit <= s.reference + 8)) raise(logit);
    const double rho = detail::striped_sum(0, dv, 1, [&](index_t j) {
      const float r = value[j] - centre[j];
      return r * r;
    });
    const double x = add_scalars(s, logit, rho, q, to);
    const auto n = static_cast<float>(q.w * x);
    float* sum = vector(0);
    for (index_t j = 0; j < dv; ++j) sum[j] += n * (value[j] - centre[j]);
    if (!(q.t > 0)) return rho;
    const auto b = static_cast<float>(q.t * x * x), h = static_cast<float>(q.s * x * x * x * rho);
    const auto z = static_cast<float>((to.negative ? -x : x) * std::sqrt(q.t));
    float *second = vector(1), *third = vector(2), *group = vector(3 + to.group);
    for (index_t j = 0; j < dv; ++j) {
      const float r = value[j] - centre[j];
      second[j] += b * r;
      third[j] += h * r;
      group[j] += z * r;
    }
    return rho;
  }

  /// Adds the rows of `from`, whose centre, width and groups are the same. Exact up to rounding, and the same bits
  /// whenever parts come in the same order. With `lanes`, each thread of several calls this with its own copy of `s`.
  VATTN_FN void merge(const sample_sums& from, lanes mine = {}) noexcept {
    const merge_factors f = stats::merge(s, from.s);
    if (f.mine != 1) rescale_vectors(f.mine, mine);
    for (int i = 0; i < 3 + groups; ++i) {
      const auto by = static_cast<float>(power_of(f.theirs, i));
      for (index_t j = mine.first; j < dv; j += mine.step) vector(i)[j] += by * from.vector(i)[j];
    }
  }

 private:
  [[nodiscard]] VATTN_FN static double power_of(double factor, int i) noexcept {
    return i == 1 ? factor * factor : i == 2 ? factor * factor * factor : factor;
  }
  VATTN_FN void rescale_vectors(double factor, lanes mine) noexcept {
    for (int i = 0; i < 3 + groups; ++i) {
      const auto by = static_cast<float>(power_of(factor, i));
      for (index_t j = mine.first; j < dv; j += mine.step) vector(i)[j] *= by;
    }
  }
};

}  // namespace vattn::VATTN_ABI::stats

#include "vattn/macros_pop.hpp"
