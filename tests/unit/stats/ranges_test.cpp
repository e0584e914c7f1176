// Evidence of known ranges: the formulas by hand, that they cover, and what the judge makes of them.
#include <Eigen/Eigenvalues>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "vattn/stats/judge.hpp"

using namespace vattn::test;
using vattn::target_kind;
namespace stats = vattn::stats;
using stats::sampled_sum;

// Worked out apart from the code (Python, double precision): a bound that is looser than its formula covers too.
TEST_CASE("norm_bound is its formula", "[stats][ranges]") {
  const sampled_sum e{.weight = 4, .variance = 2, .largest = 0.5, .term = 0.3};
  CHECK_THAT(stats::norm_bound(e, 0.25, 0.1), WithinRel(8.460687268460454, 1e-12));
  CHECK_THAT(stats::norm_bound(e, 0, 0.01), WithinRel(10.356723698552099, 1e-12));
  // Of degree one in what has a length.
  const sampled_sum small{.weight = 0.25, .variance = 2e-8, .largest = 5e-9, .term = 3e-5};
  const sampled_sum large{.weight = 0.25, .variance = 2, .largest = 0.5, .term = 0.3};
  CHECK_THAT(stats::norm_bound(small, 2.5e-5, 0.1) * 1e4, WithinRel(stats::norm_bound(large, 0.25, 0.1), 1e-12));
  // No direction has more than all of them have together.
  const sampled_sum loose{.weight = 4, .variance = 2, .largest = 7, .term = 0.3};
  const sampled_sum round{.weight = 4, .variance = 2, .largest = 2, .term = 0.3};
  CHECK(stats::norm_bound(loose, 0.25, 0.1) == stats::norm_bound(round, 0.25, 0.1));
  // Sums that rounding has made negative count as 0, as no evidence does.
  const sampled_sum below{.weight = -1e-9, .variance = -1e-9, .largest = -1e-9, .term = 0};
  CHECK(stats::norm_bound(below, 1, 0.1) == 0);
  CHECK(stats::norm_bound({}, 1, 0.1) == 0);
}

TEST_CASE("one trial value proves itself: the bound grows at most in proportion to the distance", "[stats][ranges]") {
  const sampled_sum e{.weight = 0.02, .variance = 2, .largest = 0.5, .term = 0.01};
  double last = std::numeric_limits<double>::infinity();
  for (double distance = 0.1; distance < 100; distance *= 1.7) {
    const double share = stats::norm_bound(e, distance, 0.1) / distance;
    CHECK(share < last);
    last = share;
  }
}

TEST_CASE("sums of nonnegative terms are their formulas", "[stats][ranges]") {
  CHECK_THAT(stats::sum_at_least(10, 0.7, 0.05), WithinRel(4.33705235619405, 1e-12));
  CHECK_THAT(stats::sum_at_most(10, 0.7, 0.05), WithinRel(18.904193626146288, 1e-12));
  CHECK_THAT(stats::sum_at_least(10, 0, 0.05), WithinRel(10, 1e-12));
  CHECK_THAT(stats::sum_at_most(10, 0, 0.05), WithinRel(10, 1e-12));
  CHECK_THAT(stats::sum_at_least(0.01, 0.0007, 0.05), WithinRel(4.33705235619405e-3, 1e-12));
  // Where the estimate says nothing, nothing is promised: half = term·ln(1/δ)/2, above 1 − half/3, then above 1.
  CHECK(stats::sum_at_least(1, 1, 0.05) == 0);
  CHECK(stats::sum_at_least(1, 4, 0.05) == 0);
  CHECK(stats::sum_at_least(0, 1, 0.05) == 0);
}

TEST_CASE("the bounds cover Poisson samples, and are not vacuous", "[stats][ranges]") {
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
    const double radius = stats::norm_bound(e, 0, delta);
    beyond += w.norm() > radius;
    within += w.norm() > 0.18 * radius;
    below += sum < stats::sum_at_least(estimate, term, delta);
    above += sum > stats::sum_at_most(estimate, term, delta);
  }
  const double limit = trials * (delta + 4 * std::sqrt(delta * (1 - delta) / trials));
  CHECK(beyond <= limit);
  CHECK(below <= limit);
  CHECK(above <= limit);
  CHECK(within > delta * trials);
}

TEST_CASE("ranges of a uniform sample: every target by its own radius", "[stats][ranges]") {
  stats::uniform_ranges e;
  e.denominator = 50, e.output2 = 4, e.away2 = 0.09, e.rows = 400;
  e.weights.population = 1000, e.weights.sampled = 400, e.weights.second_moment = 1e-4, e.weights.radius = 0.02;
  e.values = e.joint = e.weights;
  e.weights.scalar = true;
  e.values.second_moment = 2e-4, e.values.radius = 0.03, e.joint.second_moment = 3e-4, e.joint.radius = 0.04;
  e.join = 0.5;
  const stats::promise p{.epsilon = 0.3, .delta = 0.1};
  const double of_d = stats::bernstein::radius(e.weights, 400, 0.1) / 50;
  const double of_n = stats::hoeffding::radius(e.values, 400, 0.1) / 100;
  const auto d = stats::judge<stats::bernstein, target_kind::denominator>(e, p);
  CHECK_THAT(d.epsilon_achieved, WithinRel(of_d, 1e-12));
  CHECK_THAT(d.denominator_error, WithinRel(of_d, 1e-12));
  CHECK(d.met == (of_d <= 0.3));
  const auto n = stats::judge<stats::hoeffding, target_kind::numerator>(e, p);
  CHECK_THAT(n.epsilon_achieved, WithinRel(of_n, 1e-12));
  const auto s = stats::judge<stats::bernstein, target_kind::sdpa>(e, p);
  for (double share = 0.05; share < 1; share += 0.05) {
    const double e1 = stats::bernstein::radius(e.values, 400, share * 0.1) / 100;
    const double e2 = stats::bernstein::radius(e.weights, 400, (1 - share) * 0.1) / 50;
    CHECK(s.epsilon_achieved <= (e1 + e2) / (1 - e2) * (1 + 1e-6));
  }
  const double error = stats::bernstein::radius(e.joint, 400, 0.1);
  const double away = std::sqrt(1 + 0.09 / 0.25) * error / (50 - error / 0.5);
  const auto o = stats::judge<stats::bernstein>(e, p);
  CHECK_THAT(o.epsilon_achieved, WithinRel(away / (2 - away), 1e-12));
  CHECK_THAT(o.denominator_error, WithinRel(of_d, 1e-12));
  // Fewer rows show less, and without a range of the values nothing is said of the output.
  stats::uniform_ranges fewer = e;
  fewer.rows = 100;
  CHECK(stats::judge<stats::bernstein>(fewer, p).epsilon_achieved > o.epsilon_achieved);
  fewer = e;
  fewer.join = 0;
  CHECK_FALSE(stats::judge<stats::bernstein>(fewer, p).met);
  fewer = e;
  fewer.output2 = std::nan("");
  CHECK_FALSE(stats::judge<stats::bernstein, target_kind::denominator>(fewer, p).met);
}

TEST_CASE("ranges of a Poisson sample: the least error in steps, and none where epsilon is not shown",
          "[stats][ranges]") {
  stats::poisson_ranges e;
  e.denominator = 50, e.output2 = 4, e.power = 9, e.sampled_denominator = 30, e.sampled_power = 200;
  e.unit = 0.01, e.nearest = 0.5, e.farthest = 3, e.margin = 1, e.centre_norm = 1, e.away = 0.25;
  e.sum = {.weight = 0.1, .variance = 0.2, .largest = 0.05};
  const double slack = 1 + 1e-5;
  int met = 0, missed = 0;
  for (const auto scale : {vattn::error_scale::output, vattn::error_scale::rms}) {
    for (const double epsilon : {0.002, 0.005, 0.01, 0.03, 0.1}) {
      const stats::promise p{.epsilon = epsilon, .delta = 0.1, .scale = scale};
      double goal = epsilon / (1 + epsilon) * 2, delta = 0.1;
      if (scale == vattn::error_scale::rms) {
        const double far = (3 * slack + 1) * (3 * slack + 1) / 4, near = (0.5 * slack + 1) * (0.5 * slack + 1) / 1.5;
        const double low = stats::sum_at_least(200, 0.01 * std::max(far, near) * slack, 0.005);
        const double high = stats::sum_at_most(30, 0.01 / 1.5 * slack, 0.005);
        goal = std::max(goal, epsilon * std::sqrt((450 - 200 + low) / (20 + high)));
        delta = 0.09;
      }
      CHECK_THAT(stats::allowed_error(e, p), WithinRel(goal, 1e-12));
      const auto shown = [&](double error) {
        sampled_sum w = e.sum;
        w.term = 0.01 * std::max(1.0, (0.5 * slack + (0.25 + error) * slack) / 1.5) * slack;
        return stats::norm_bound(w, error, delta) * (1 + 1e-4) < error * 50;
      };
      double least = 1;
      for (int i = 0; i < 12 && shown(goal * least * 0.97); ++i) least *= 0.97;
      const auto v = stats::judge<stats::bernstein>(e, p);
      CHECK(v.met == shown(goal));
      CHECK_THAT(v.epsilon_achieved, WithinRel(shown(goal) ? epsilon * least : stats::infinity, 1e-12));
      ++(v.met ? met : missed);
      const double term = 0.01 / 1.5 * slack, low = stats::sum_at_least(30, term, 0.05);
      const double high = stats::sum_at_most(30, term, 0.05);
      CHECK_THAT(v.denominator_error, WithinRel(std::max(30 - low, high - 30) / 50, 1e-9));
    }
  }
  CAPTURE(met, missed);
  CHECK(met > 2);
  CHECK(missed > 2);
}
