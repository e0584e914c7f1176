// Whether the outcome of a call is right: outputs, certificates, decisions, counts.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "product/run.hpp"

namespace vattn::product {

/// Of all calls so far: what a promise may fail in, at each δ, and how much was sampled.
struct tally {
  struct promise {
    long failures = 0, draws = 0;
  };
  std::map<double, promise> outputs;                    ///< the target's error against ε
  std::map<double, promise> denominators;               ///< |D̂/D − 1| against denominator_error
  std::vector<std::array<long, 2>> sampled_by[n_axes];  ///< [level] rows that were sampled, and rows read in full
  double largest = 0;                                   ///< error / ε
};

/// The rule by which the scenario is to be refused; null: it is to be served.
[[nodiscard]] const rule* refusal(const scenario& s, family f);

/// One line for each thing that is wrong.
[[nodiscard]] std::vector<std::string> check(const call& c, const policy_entry& policy, tally& all);

}  // namespace vattn::product
