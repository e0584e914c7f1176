// Cells of a test of the promise, and the judgement of many of them together.
#pragma once

#include <string>
#include <vattn/vattn.hpp>
#include <vector>

#include "stat/binomial.hpp"
#include "support/catch.hpp"
#include "support/regimes.hpp"

namespace vattn::stat {

// Chance of a false alarm in a whole test case; each of its cells gets an equal part (Bonferroni).
inline constexpr double false_alarm = 1e-4;

struct tested {
  std::string name;
  long failures = 0, draws = 0;
  double delta = 0;
};

// Every cell alone (corrected for their number), and all cells of one δ together: a single bad cell
// shows in the first, a small excess everywhere in the second. Cells use seeds of their own.
inline void require_promise(const std::vector<tested>& cells) {
  REQUIRE_FALSE(cells.empty());
  for (const tested& c : cells) {
    INFO(c.name << ": " << c.failures << " of " << c.draws << " draws failed at delta " << c.delta);
    CHECK(binomial_upper_tail(c.failures, c.draws, c.delta) > false_alarm / static_cast<double>(cells.size()));
  }
  for (const double delta : {0.05, 0.1, 0.2}) {
    long failures = 0, draws = 0;
    for (const tested& c : cells) {
      if (c.delta != delta) continue;
      failures += c.failures;
      draws += c.draws;
    }
    INFO("all cells at delta " << delta << ": " << failures << " of " << draws);
    CHECK(binomial_upper_tail(failures, draws, delta) > false_alarm);
  }
}

inline std::vector<std::string> all_regimes() {
  std::vector<std::string> names = synthetic::standard_regimes();
  names.insert(names.end(), synthetic::hostile_regimes().begin(), synthetic::hostile_regimes().end());
  return names;
}

inline config promise(double epsilon, double delta, error_scale scale = error_scale::output) {
  config c;
  c.epsilon = epsilon;
  c.delta = delta;
  c.scale = scale;
  return c;
}

}  // namespace vattn::stat
