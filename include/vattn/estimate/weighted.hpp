// The estimate from rows of unequal probability, and how far off it may be.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "vattn/base/philox.hpp"
#include "vattn/estimate/state.hpp"
#include "vattn/kv/query.hpp"
#include "vattn/stats/evidence.hpp"

namespace vattn::VATTN_ABI {

/// A row of a Poisson sample.
struct weighted_row {
  ordinal place;
  float logit;
  float probability;
  float spread;  ///< ‖Y‖², Y = x(v − ô)/D̂, of the last look
};

/// Floats that `estimate_weighted` needs for values of dv elements.
[[nodiscard]] constexpr std::size_t weighted_storage(std::size_t dv) noexcept {
  return static_cast<std::size_t>(stats::sample_sums::storage(1, stats::most_groups) + 2) * dv;
}

/// The Hájek estimate ô = Σ x v/π / Σ x/π with its evidence. `exact` holds the rows that are no part of `rows`, with
/// power. Writes ô to `output` [dv] and each row's spread; `storage` [weighted_storage(dv)]. The rows' values are read
/// twice: the second time about ô itself, where the evidence is exact. `state` receives the whole estimate: its
/// finished output is ô, its log-sum-exp log D̂.
template <kv_head Head>
[[nodiscard]] stats::evidence estimate_weighted(const query_row<Head>& row, const population& tokens,
                                                std::span<weighted_row> rows, const softmax_state& exact,
                                                softmax_state& state, std::span<float> output, std::span<float> storage,
                                                random_stream signs) noexcept {
  using kernel::axpy, kernel::load, kernel::squared_norm;
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
  }
  static_cast<void>(state.finish(output));

  const std::size_t dv = output.size();
  float *value = storage.data(), *offset = value + dv;
  std::fill_n(offset, dv, 0.0f);
  stats::sample_sums sums{{}, offset + dv, static_cast<index_t>(dv), stats::most_groups};
  sums.clear();
  sums.raise(static_cast<double>(reference));
  const std::uint64_t high = signs.next(), key = (high << 32) | signs.next();  // in this order everywhere
  index_t certain = 0;
  for (weighted_row& r : rows) {
    if (r.probability >= 1) {
      ++certain;
      continue;
    }
    load(row.value(tokens[r.place]), value);
    const double norm2 =
        sums.add(r.logit, value, output.data(), stats::poisson_row(1 / static_cast<double>(r.probability)),
                 stats::deal(key, r.place, sums.groups));
    const double x = std::exp(r.logit - reference) / state.denominator();
    r.spread = static_cast<float>(x * x * norm2);
  }
  stats::centre_products centre;
  for (const float o : output) centre.add(0, o);
  stats::sum_products products;
  products.add(sums, offset, output.data());
  stats::evidence e = stats::conclude(sums.s, products, nullptr, nullptr, {}, centre, state.denominator() - sums.s.x,
                                      sums.groups, sums.dv);
  e.power = state.power() / state.denominator();  // with that of the certain rows, which have no part in the rest
  e.rows += certain, e.certain = certain;
  return e;
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
