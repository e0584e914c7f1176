// Finite-sample bounds of a Poisson sample's sums: the formulas by hand, and that they cover.
#include "vattn/budget/norm_bound.hpp"

#include <Eigen/Eigenvalues>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "support/catch.hpp"

using namespace vattn::test;
using vattn::sampled_sum;

// Worked out apart from the code (Python, double precision): a bound that is looser than its formula covers too.
TEST_CASE("norm_bound is its formula", "[budget][norm_bound]") {
  const sampled_sum e{.weight = 4, .variance = 2, .largest = 0.5, .term = 0.3};
  CHECK_THAT(vattn::norm_bound(e, 0.25, 0.1), WithinRel(8.460687268460454, 1e-12));
  CHECK_THAT(vattn::norm_bound(e, 0, 0.01), WithinRel(10.356723698552099, 1e-12));
  // Of degree one in what has a length.
  const sampled_sum small{.weight = 0.25, .variance = 2e-8, .largest = 5e-9, .term = 3e-5};
  const sampled_sum large{.weight = 0.25, .variance = 2, .largest = 0.5, .term = 0.3};
  CHECK_THAT(vattn::norm_bound(small, 2.5e-5, 0.1) * 1e4, WithinRel(vattn::norm_bound(large, 0.25, 0.1), 1e-12));
  // No direction has more than all of them have together.
  const sampled_sum loose{.weight = 4, .variance = 2, .largest = 7, .term = 0.3};
  const sampled_sum round{.weight = 4, .variance = 2, .largest = 2, .term = 0.3};
  CHECK(vattn::norm_bound(loose, 0.25, 0.1) == vattn::norm_bound(round, 0.25, 0.1));
  // Sums that rounding has made negative count as 0, as no evidence does.
  const sampled_sum below{.weight = -1e-9, .variance = -1e-9, .largest = -1e-9, .term = 0};
  CHECK(vattn::norm_bound(below, 1, 0.1) == 0);
  CHECK(vattn::norm_bound({}, 1, 0.1) == 0);
}

TEST_CASE("one trial value proves itself: the bound grows at most in proportion to the distance",
          "[budget][norm_bound]") {
  const sampled_sum e{.weight = 0.02, .variance = 2, .largest = 0.5, .term = 0.01};
  double last = std::numeric_limits<double>::infinity();
  for (double distance = 0.1; distance < 100; distance *= 1.7) {
    const double share = vattn::norm_bound(e, distance, 0.1) / distance;
    CHECK(share < last);
    last = share;
  }
}

TEST_CASE("sums of nonnegative terms are their formulas", "[budget][norm_bound]") {
  CHECK_THAT(vattn::sum_at_least(10, 0.7, 0.05), WithinRel(4.33705235619405, 1e-12));
  CHECK_THAT(vattn::sum_at_most(10, 0.7, 0.05), WithinRel(18.904193626146288, 1e-12));
  CHECK_THAT(vattn::sum_at_least(10, 0, 0.05), WithinRel(10, 1e-12));
  CHECK_THAT(vattn::sum_at_most(10, 0, 0.05), WithinRel(10, 1e-12));
  CHECK_THAT(vattn::sum_at_least(0.01, 0.0007, 0.05), WithinRel(4.33705235619405e-3, 1e-12));
  // Where the estimate says nothing, nothing is promised: half = term·ln(1/δ)/2, above 1 − half/3, then above 1.
  CHECK(vattn::sum_at_least(1, 1, 0.05) == 0);
  CHECK(vattn::sum_at_least(1, 4, 0.05) == 0);
  CHECK(vattn::sum_at_least(0, 1, 0.05) == 0);
}

TEST_CASE("the bounds cover Poisson samples, and are not vacuous", "[budget][norm_bound]") {
  // Terms of two sizes on a circle; half of them are rare to be drawn.
  constexpr int n = 400, trials = 3000;
  constexpr double delta = 0.2;
  std::mt19937 random(8);
  std::uniform_real_distribution<double> uniform;
  std::vector<Eigen::Vector2d> y(n);
  std::vector<double> p(n);
  double sum = 0, term = 0, longest = 0;
  for (int i = 0; i < n; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const double angle = 6.283185307179586 * uniform(random), length = i % 7 == 0 ? 1.0 : 0.2;
    y[at] = length * Eigen::Vector2d(std::cos(angle), std::sin(angle));
    p[at] = i % 2 ? 0.15 : 0.6;
    sum += length;
    term = std::max(term, length / p[at]);
    longest = std::max(longest, std::max(1.0, 1 / p[at] - 1) * length);
  }
  int beyond = 0, within = 0, below = 0, above = 0;
  for (int trial = 0; trial < trials; ++trial) {
    sampled_sum e;
    e.term = longest;
    Eigen::Vector2d w = Eigen::Vector2d::Zero();
    Eigen::Matrix2d second = Eigen::Matrix2d::Zero();
    double estimate = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const bool drawn = uniform(random) < p[i];
      w += ((drawn ? 1 / p[i] : 0) - 1) * y[i];
      if (!drawn) continue;
      const double a = (1 - p[i]) / (p[i] * p[i]);
      e.variance += a * y[i].squaredNorm();
      second += a * y[i] * y[i].transpose();
      estimate += y[i].norm() / p[i];
    }
    e.largest = Eigen::SelfAdjointEigenSolver<Eigen::Matrix2d>(second).eigenvalues()[1];
    const double radius = vattn::norm_bound(e, 0, delta);
    beyond += w.norm() > radius;
    within += w.norm() > 0.18 * radius;
    below += sum < vattn::sum_at_least(estimate, term, delta);
    above += sum > vattn::sum_at_most(estimate, term, delta);
  }
  const double limit = trials * (delta + 4 * std::sqrt(delta * (1 - delta) / trials));
  CHECK(beyond <= limit);
  CHECK(below <= limit);
  CHECK(above <= limit);
  CHECK(within > delta * trials);
}

TEST_CASE("the largest eigenvalue is bounded from above, within dv^(1/32)", "[budget][norm_bound]") {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const int dv : {1, 2, 16, 65}) {
    for (const int rows : {1, 3, 200}) {
      CAPTURE(dv, rows);
      const auto width = static_cast<std::size_t>(dv);
      std::vector<float> storage(2 * width * width, -7.0f), y(width);
      vattn::second_moment moment(storage, dv);
      Eigen::MatrixXd want = Eigen::MatrixXd::Zero(dv, dv);
      for (int i = 0; i < rows; ++i) {
        for (float& x : y) x = normal(random);
        const float factor = 1e-3f * static_cast<float>(1 + i % 5);
        moment.add(factor, y);
        const Eigen::VectorXd v = Eigen::Map<const Eigen::VectorXf>(y.data(), dv).cast<double>();
        want += static_cast<double>(factor) * static_cast<double>(factor) * v * v.transpose();
      }
      const double largest = Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>(want).eigenvalues()[dv - 1];
      const double got = moment.largest_eigenvalue();
      CHECK(got >= largest);
      CHECK(got <= largest * std::pow(std::min(dv, rows), 1 / 32.0) * (1 + 2e-4));
      // Of equal eigenvalues, no less than what the power of the trace makes of them.
      if (rows == 200 && dv > 1) CHECK(got > largest * (1 + 1e-4));
    }
  }
  std::vector<float> nothing(2 * 9);
  CHECK(vattn::second_moment(nothing, 3).largest_eigenvalue() == 0);
}
