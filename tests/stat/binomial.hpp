// Exact tests of a failure count against a promise.
#pragma once

#include <unsupported/Eigen/SpecialFunctions>

namespace vattn::stat {

/// P(X >= failures), X ~ Binomial(draws, p).
inline double binomial_upper_tail(long failures, long draws, double p) {
  if (failures <= 0) return 1;
  if (failures > draws) return 0;
  return Eigen::numext::betainc(static_cast<double>(failures), static_cast<double>(draws - failures + 1), p);
}

/// P(X >= x), X chi-squared with `dof` degrees of freedom.
inline double chi2_upper_tail(double x, double dof) { return Eigen::numext::igammac(dof / 2, x / 2); }

/// Upper end of the one-sided Clopper-Pearson interval of a failure probability.
inline double upper_confidence(long failures, long draws, double confidence) {
  double low = static_cast<double>(failures) / static_cast<double>(draws), high = 1;
  for (int i = 0; i < 60; ++i) {
    const double p = (low + high) / 2;
    // P(X <= failures | p) = 1 − P(X >= failures + 1 | p)
    (1 - binomial_upper_tail(failures + 1, draws, p) > 1 - confidence ? low : high) = p;
  }
  return high;
}

}  // namespace vattn::stat
