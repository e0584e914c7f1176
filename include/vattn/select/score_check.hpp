// Whether scores keep what they state: rows that are read anyway tell, of a stale or foreign index too.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>

#include "vattn/stats/judge.hpp"

namespace vattn::VATTN_ABI::select {

/// Compares logits that were read with what a score said of them, and counts the breaches: logits far outside. Honest
/// scores breach now and then; they are disbelieved where as many breaches as were seen have, for honest ones, a
/// probability below 1e-6 by Chernoff's bound for independent events, each with a chance of its own:
/// P(X >= k) <= (eμ/k)^k e^{−μ}, μ the expected number. Asked of all rows, and of those alone that are read whatever
/// their scores, among which a few stale ones show that are lost among many others.
class score_check {
 public:
  /// The score estimates the logit with an error of this scale. A breach is more than four of them, beyond rounding.
  /// `chosen`: the row is read because of its score, as by importance sampling. Errors e ~ N(0, σ²) are then seen with
  /// weights up to e^e, which makes them N(σ², σ²): a score that is too high by σ standard errors is nothing odd, and
  /// half of one more is allowed for. At least one in 1000: scales are estimates too.
  void estimate(float logit, float score, float error, bool chosen) noexcept {
    double rate = 1e-3;
    if (chosen && error > 0.25f)  // erfc(x/sqrt(2))/2 = P(N(0, 1) > x)
      rate = std::max(rate, 0.5 * std::erfc((3.5 - std::min(3.5, static_cast<double>(error))) / 1.4142135623730951));
    note(stats::breaches(logit, score, 4 * static_cast<double>(error)), rate, chosen);
  }

  /// The logit is at most `most`, but for a share `rate` of honest scores.
  void bound(float logit, float most, double rate, bool chosen) noexcept {
    note(stats::breaches(logit, most), rate, chosen);
  }

  [[nodiscard]] index_t breaches() const noexcept { return all_.breaches; }
  [[nodiscard]] bool believed() const noexcept { return all_.likely() && fixed_.likely(); }

 private:
  struct tally {
    index_t breaches = 0;
    double expected = 0;
    [[nodiscard]] bool likely() const noexcept {
      const auto k = static_cast<double>(breaches);
      return !(k > expected) || k * std::log(k / expected) - (k - expected) < 13.815510557964274;  // −ln 1e-6
    }
  };
  void note(bool breach, double rate, bool chosen) noexcept {
    all_.breaches += breach, all_.expected += rate;
    if (!chosen) fixed_.breaches += breach, fixed_.expected += rate;
  }

  tally all_, fixed_;
};

}  // namespace vattn::VATTN_ABI::select

#include "vattn/macros_pop.hpp"
