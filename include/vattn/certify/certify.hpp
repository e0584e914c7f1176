// Writes what was judged into a certificate: the one place that does, whatever the design.
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>

#include "vattn/certificate.hpp"
#include "vattn/stats/judge.hpp"

namespace vattn::VATTN_ABI::stats {

/// How an output came about.
struct reading {
  index_t rows_exact = 0;    ///< read because they were chosen
  index_t rows_sampled = 0;  ///< read by chance
  index_t budget = 0;        ///< sampled rows that the bound asked for
  guarantee kind = guarantee::none;
  const char* bound = "none";
  const char* assumptions = "none: nothing is promised";
};

/// n, the promise, rounds, breaches and log D̂ are the call's to set.
inline void certify(certificate& c, const evidence& e, const verdict& v, const reading& r) noexcept {
  c.rows_exact = r.rows_exact;
  c.rows_sampled = r.rows_sampled;
  c.budget = r.budget;
  c.epsilon_achieved = v.epsilon_achieved;
  c.denominator_error = v.denominator_error;
  c.coherence = e.power > 0 ? std::sqrt(e.output2 / e.power) : 0;
  c.promise = r.kind;
  c.bound = r.bound;
  c.assumptions = r.assumptions;
  c.saturated = !v.met;
}

}  // namespace vattn::VATTN_ABI::stats

#include "vattn/macros_pop.hpp"
