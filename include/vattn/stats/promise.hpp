// What is promised of an output: the words that settings, statistics and certificates share.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/base/config.hpp"

namespace vattn::VATTN_ABI {

/// What kind of promise a radius is.
enum class guarantee : std::uint8_t {
  none,           ///< no statement (top-k alone, windows alone)
  asymptotic,     ///< holds as the sample grows; relies on the sample having seen the tails
  finite_sample,  ///< holds at this sample size, given ranges that are known
  deterministic,  ///< certain: known bounds make all unread tokens negligible
  exact,          ///< every row was read
};

/// What the promise is about.
enum class target_kind : std::uint8_t { none, denominator, numerator, sdpa, output };

/// What ε is relative to.
enum class error_scale : std::uint8_t {
  output,  ///< ‖o‖
  rms,     ///< root mean square of the attended values, sqrt(Σ x‖v‖²/D): where values cancel
};

namespace stats {

/// P(error of the target > epsilon·scale) <= delta, over the draws.
struct promise {
  double epsilon = 0.1;                     ///< (0, 1)
  double delta = 0.1;                       ///< (0, 1)
  error_scale scale = error_scale::output;  ///< of the output's error; the other targets are relative to themselves
  /// κ: share of ε that tokens may cost which a design leaves unread and unseen: its floors are made for κ·ε, so no
  /// smaller error is ever stated. 0 where nothing is left unseen.
  double hidden = 0;
};

}  // namespace stats
}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
