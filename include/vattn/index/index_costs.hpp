// What sampling by an index costs, and the shape of its probabilities: for the planner, and for the choice of bits.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/base/config.hpp"

namespace vattn::VATTN_ABI {

/// What sampling by an index costs, in the time of a row of dense attention (docs/performance.md).
struct index_costs {
  double scan = 0.1;     ///< a cell's codes
  double key = 3;        ///< a row whose key is read
  double once = 600;     ///< tables, plan, judgement
  index_t least = 2048;  ///< cells that are worth it
};

/// Shape of a sample's probabilities. A token that its score hides may cost κ·ε where its score is z errors too low.
struct index_shape_of_sample {
  double z = 2, kappa = 0.5;
  double pilot = 40, pilot_base = 64;  ///< rows of a first look: a head's own, and any
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
