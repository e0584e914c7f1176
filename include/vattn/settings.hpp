// The run-time settings of `vattention`, and what makes them valid.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/base/status.hpp"
#include "vattn/certificate.hpp"

namespace vattn::VATTN_ABI {

/// Counts are tokens; shares are of the tokens that a query sees.
struct config {
  /// Lets the target choose (see budget/targets.hpp and budget/output.hpp).
  static constexpr double automatic = -1;

  double epsilon = 0.05;  ///< in (0, 1): error relative to `scale`
  double delta = 0.1;     ///< in (0, 1): share of draws that may exceed epsilon
  /// delta is for a whole call, all queries and heads together (union bound), not for each.
  bool joint = false;
  index_t sinks = 128;       ///< first visible tokens, always exact
  index_t window = 128;      ///< last visible tokens, always exact
  double heavy = automatic;  ///< share read exactly because it scores highest, [0, 1]
  double base = automatic;   ///< share of the residual sampled first, (0, 1]
  index_t min_sample = 64;   ///< no moments from fewer sampled rows
  double max_density = 0.5;  ///< (0, 1]: past this share of the rows, exact attention costs less
  index_t max_rounds = 8;    ///< looks at the sample before exact attention, 1 to 1000
  /// After max_rounds looks keep the sample, with `saturated` set, instead of exact attention. The paper's
  /// algorithm is max_rounds = 2 with this set; without it a promise is never broken knowingly.
  bool accept_last = false;
  error_scale scale = error_scale::output;

  [[nodiscard]] status validate() const noexcept {
    const auto bad = [](const char* name, double value, const char* rule) {
      return status::error(errc::invalid_argument, "%s is %g: %s", name, value, rule);
    };
    if (!(epsilon > 0 && epsilon < 1)) return bad("epsilon", epsilon, "give a relative error in (0, 1), such as 0.05");
    if (!(delta > 0 && delta < 1)) return bad("delta", delta, "give a failure probability in (0, 1), such as 0.1");
    const char* tokens = "give a number of tokens, from 0 to 2^31 - 1";
    if (sinks < 0 || sinks >> 31) return bad("sinks", static_cast<double>(sinks), tokens);
    if (window < 0 || window >> 31) return bad("window", static_cast<double>(window), tokens);
    if (heavy != automatic && !(heavy >= 0 && heavy <= 1)) return bad("heavy", heavy, "give a share in [0, 1]");
    if (base != automatic && !(base > 0 && base <= 1)) return bad("base", base, "give a share in (0, 1]");
    if (min_sample < 2) return bad("min_sample", static_cast<double>(min_sample), "a variance needs at least 2 rows");
    if (!(max_density > 0 && max_density <= 1)) return bad("max_density", max_density, "give a share in (0, 1]");
    if (max_rounds < 1 || max_rounds > 1000)
      return bad("max_rounds", static_cast<double>(max_rounds), "give 1 to 1000 looks");
    return {};
  }
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
