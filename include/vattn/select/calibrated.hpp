// Any ranking as estimates of logits: fitted, for each query, to the logits of a few rows.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "vattn/select/index.hpp"

namespace vattn::VATTN_ABI::select {

/// Makes a selector that only ranks fit for importance sampling, which needs estimates with error scales. For each
/// query the keys of `pilot` tokens are read, evenly spaced among those that the score ranks as they come and among
/// the best, and the logit is fitted to the score by least squares; the error scale is the larger of the residuals'
/// root mean squares in both halves, times a margin for its own uncertainty, and of two thirds of the highest residual.
/// A score that says nothing gets slope about 0 and the logits' own spread as its error: then sampling is nearly
/// uniform. The rows are counted as read. Costs pilot keys a query; not for scores that state their errors.
template <class Ranking>
struct calibrated {
  static_assert(
      !requires { requires Ranking::wants_errors; },
      "calibrated<Ranking>: supply a ranking; scores that state their errors need no calibration (use select::indexed "
      "over the same index)");
  static constexpr bool estimates = true;

  Ranking base;
  index_t pilot = 256;

  [[nodiscard]] std::size_t scratch_size() const noexcept {
    return std::max(selector_scratch(base), static_cast<std::size_t>(4 * pilot));
  }

  template <kv_head Head>
  score_result score(const query_row<Head>& row, const population& tokens, const score_buffers& out) const noexcept {
    std::fill(out.scores.begin(), out.scores.end(), 0.0f);  // a base that ranks nothing writes nothing
    score_result r = base.score(row, tokens, {out.scores, {}, out.centre, out.scratch});
    if (!r.ok || out.errors.empty()) return r;
    const index_t n = tokens.size(), half = std::min(pilot, n) / 2;
    const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
    if (half < 8) {
      for (index_t j = 0; j < n; ++j) out.scores[at(j)] = row.logit(tokens[j]), out.errors[at(j)] = 0;
      r.rows_read = n;
      return r;
    }
    // Half by stride; half the best of as many equal blocks: high scores, without a sort.
    const std::span<float> x = out.scratch.first(at(2 * half)), y = out.scratch.subspan(at(2 * half), at(2 * half));
    const auto put = [&](index_t to, index_t j) {
      x[at(to)] = std::isfinite(out.scores[at(j)]) ? out.scores[at(j)] : 0;
      y[at(to)] = row.logit(tokens[j]);
      return std::isfinite(y[at(to)]);
    };
    bool finite = true;
    for (index_t b = 0; b < half; ++b) {
      const index_t from = b * n / half, to = (b + 1) * n / half;
      index_t best = from;
      for (index_t j = from; j < to; ++j) best = out.scores[at(j)] > out.scores[at(best)] ? j : best;
      finite = put(b, from + (to - from) / 2) && finite;
      finite = put(half + b, best) && finite;
    }
    if (!finite) return {.ok = false};
    double mx = 0, my = 0, xx = 0, xy = 0;
    const auto count = static_cast<double>(2 * half);
    for (index_t i = 0; i < 2 * half; ++i)
      mx += static_cast<double>(x[at(i)]) / count, my += static_cast<double>(y[at(i)]) / count;
    for (index_t i = 0; i < 2 * half; ++i) {
      const double dx = static_cast<double>(x[at(i)]) - mx;
      xx += dx * dx;
      xy += dx * (static_cast<double>(y[at(i)]) - my);
    }
    const double slope = xx > 0 ? std::max(0.0, xy / xx) : 0;
    double worst = 0, highest = 0;
    for (index_t part = 0; part < 2; ++part) {
      double square = 0;
      for (index_t i = part * half; i < (part + 1) * half; ++i) {
        const double e = static_cast<double>(y[at(i)]) - my - slope * (static_cast<double>(x[at(i)]) - mx);
        square += e * e / static_cast<double>(half);
        highest = std::max(highest, e);
      }
      worst = std::max(worst, std::sqrt(square));
    }
    // What counts is how far a logit may lie above its score: where tails are heavy the root mean square says too
    // little of that, and the highest residual of the pilot says more.
    const auto error =
        static_cast<float>(std::max(worst * (1 + 2 / std::sqrt(static_cast<double>(half))), highest / 1.5));
    for (index_t j = 0; j < n; ++j) {
      const double s = std::isfinite(out.scores[at(j)]) ? static_cast<double>(out.scores[at(j)]) : mx;
      out.scores[at(j)] = static_cast<float>(my + slope * (s - mx));
      out.errors[at(j)] = error;
    }
    r.kind = score_kind::ranking;
    r.rows_read = 2 * half;
    return r;
  }

  index_t heavy_count(ranking& r, index_t n, const config& c) const noexcept { return base.heavy_count(r, n, c); }
};

}  // namespace vattn::VATTN_ABI::select

#include "vattn/macros_pop.hpp"
