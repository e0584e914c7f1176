// Bounds: the published formula, sizes against brute force, coverage of the finite-sample ones.
#include "vattn/stats/bounds.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "support/catch.hpp"

using namespace vattn::test;
namespace stats = vattn::stats;
using stats::sum_evidence;

namespace {

sum_evidence example(bool scalar, bool with_replacement) {
  sum_evidence e;
  e.population = 5000;
  e.variance = 1.7;
  e.radius = 4;
  e.second_moment = 2.1;
  e.sampled = 150;
  e.scalar = scalar;
  e.with_replacement = with_replacement;
  return e;
}

}  // namespace

TEST_CASE("clt reproduces the published budget b = (z N s / tau)^2", "[stats][bounds]") {
  for (const double delta : {0.05, 0.1, 0.2}) {
    for (const double tau : {200.0, 500.0, 1500.0}) {
      sum_evidence e = example(true, true);
      const double z = stats::normal_quantile(1 - delta / 2);
      const double b = std::pow(z * e.population, 2) * e.variance / (tau * tau);
      CAPTURE(delta, tau, b);
      const double m = stats::sample_size<stats::clt>(e, tau, delta);
      CHECK(m == std::min(e.population, std::ceil(b)));
      // Without replacement the finite population corrects it to b / (1 + b/N), never more.
      e.with_replacement = false;
      CHECK(stats::sample_size<stats::clt>(e, tau, delta) == std::ceil(b / (1 + b / e.population) - 1e-9));
      // For vectors too where z covers every spectrum.
      e.scalar = false;
      CHECK(stats::sample_size<stats::clt>(e, tau, delta) == std::ceil(b / (1 + b / e.population) - 1e-9));
    }
  }
}

TEST_CASE("clt of vectors keeps z where one dimension is no longer the worst spectrum", "[stats][bounds]") {
  const sum_evidence vector = example(false, true), scalar = example(true, true);
  CHECK(stats::sum_radius<stats::clt>(vector, 100, 0.2) == stats::sum_radius<stats::clt>(scalar, 100, 0.2));
  CHECK(stats::sum_radius<stats::clt>(vector, 100, 0.4) > stats::sum_radius<stats::clt>(scalar, 100, 0.4));
  CHECK_THAT(stats::sum_radius<stats::clt>(vector, 100, 0.4),
             WithinRel(stats::sum_radius<stats::clt>(vector, 100, 0.21515), 1e-3));
  sum_evidence known = vector;
  known.dimension = 40;
  CHECK(stats::sum_radius<stats::clt>(known, 100, 0.1) < stats::sum_radius<stats::clt>(vector, 100, 0.1));
}

TEST_CASE("student is wider than clt, by the quantile of its degrees of freedom", "[stats][bounds]") {
  sum_evidence e = example(true, true);
  e.sampled = 11;  // t with 10 degrees of freedom: t² is F(1, 10)
  const double ratio = stats::sum_radius<stats::student>(e, 11, 0.05) / stats::sum_radius<stats::clt>(e, 11, 0.05);
  CHECK_THAT(ratio, WithinRel(std::sqrt(4.9646027437307144) / 1.9599639845400542, 1e-6));
}

TEMPLATE_TEST_CASE("sample_size is the smallest size that will do", "[stats][bounds]", stats::clt, stats::student,
                   stats::hoeffding, stats::bernstein) {
  for (const bool scalar : {true, false}) {
    for (const bool replace : {true, false}) {
      for (const double population : {1.0, 2.0, 37.0, 400.0}) {
        sum_evidence e = example(scalar, replace);
        e.population = population;
        for (const double share : {1e-6, 0.01, 0.1, 0.3, 1.0, 10.0}) {
          const double tau = share * population;
          double want = population;
          for (double m = 1; m <= population; ++m) {
            if (vattn::stats::sum_radius<TestType>(e, m, 0.1) <= tau) {
              want = m;
              break;
            }
          }
          CAPTURE(scalar, replace, population, share);
          CHECK(stats::sample_size<TestType>(e, tau, 0.1) == want);
        }
      }
    }
  }
}

TEST_CASE("the rows for a ratio of variances are those that the goal asks for", "[stats][bounds]") {
  for (const bool replace : {false, true}) {
    sum_evidence e = example(true, replace);
    e.sampled = 200;
    const double radius = stats::sum_radius<stats::clt>(e, 200, 0.1);
    CHECK_THAT(std::sqrt(stats::clt::squared_quantile(e.shape(), 0.1) * e.error_variance()), WithinRel(radius, 1e-12));
    for (const double tau : {radius / 3, radius * 0.9, radius * 1.7})
      CHECK(e.rows_for(radius / tau * (radius / tau)) == stats::sample_size<stats::clt>(e, tau, 0.1));
    CHECK(e.rows_for(0) == 1);
    CHECK(e.rows_for(stats::infinity) == e.population);
  }
}

TEST_CASE("terms that do not vary need one row, even of a sum of zero", "[stats][bounds]") {
  sum_evidence e;
  e.population = 1000;
  e.sampled = 50;
  for (const double tau : {0.0, 0.1}) {
    CHECK(stats::sample_size<stats::clt>(e, tau, 0.1) == 1);
    CHECK(stats::sample_size<stats::student>(e, tau, 0.1) == 1);
  }
}

TEMPLATE_TEST_CASE("a radius falls with m, with delta and with the population, and is 0 for all of it",
                   "[stats][bounds]", stats::clt, stats::student, stats::hoeffding, stats::bernstein) {
  for (const bool scalar : {true, false}) {
    sum_evidence e = example(scalar, false);
    double last = std::numeric_limits<double>::infinity();
    for (double m = 1; m < e.population; m *= 1.3) {
      const double r = vattn::stats::sum_radius<TestType>(e, m, 0.1);
      CHECK(r < last);
      CHECK(r > 0);
      last = r;
    }
    CHECK(vattn::stats::sum_radius<TestType>(e, e.population, 0.1) == 0);
    CHECK(vattn::stats::sum_radius<TestType>(e, 200, 0.01) > vattn::stats::sum_radius<TestType>(e, 200, 0.1));
    sum_evidence replaced = e;
    replaced.with_replacement = true;
    CHECK(vattn::stats::sum_radius<TestType>(replaced, 3000, 0.1) >= vattn::stats::sum_radius<TestType>(e, 3000, 0.1));
  }
}

// By hand, to the last digit: a bound that is looser than its formula covers too, and no simulation shows it.
TEST_CASE("hoeffding and bernstein are their formulas", "[stats][bounds]") {
  sum_evidence e;
  e.population = 1000;
  e.radius = 2;
  e.second_moment = 0.5;
  e.sampled = 50;
  e.scalar = true;
  CHECK_THAT(stats::sum_radius<stats::hoeffding>(e, 50, 0.1), WithinRel(346.16367652045705, 1e-12));
  CHECK_THAT(stats::sum_radius<stats::bernstein>(e, 60, 0.1), WithinRel(440.55340949833834, 1e-12));
  e.scalar = false;
  CHECK_THAT(stats::sum_radius<stats::hoeffding>(e, 50, 0.1), WithinRel(889.8135642286775, 1e-12));
  CHECK_THAT(stats::sum_radius<stats::bernstein>(e, 60, 0.1), WithinRel(487.79872338345234, 1e-12));
  e.second_moment = 3.9;  // a range of 2 allows 4: the estimate's upper bound is cut to it
  CHECK_THAT(stats::sum_radius<stats::bernstein>(e, 60, 0.1), WithinRel(788.0703551141332, 1e-12));
}

TEST_CASE("no known range, no finite-sample bound", "[stats][bounds]") {
  sum_evidence e = example(true, true);
  e.radius = std::numeric_limits<double>::infinity();
  CHECK(std::isinf(stats::sum_radius<stats::hoeffding>(e, 100, 0.1)));
  CHECK(std::isinf(stats::sum_radius<stats::bernstein>(e, 100, 0.1)));
  CHECK(stats::sample_size<stats::hoeffding>(e, 1e9, 0.1) == e.population);
}

namespace {

struct outcome {
  double failed = 0;   ///< share of draws beyond the radius
  double tighter = 0;  ///< share beyond half of it, or as `part` says
};

// Samples m of a finite population of vectors (or numbers) in a ball (or [0, R]) about the origin.
template <class Bound>
outcome simulate(const std::vector<std::vector<double>>& population, double radius, bool scalar, bool replace,
                 std::size_t m, double delta, double part) {
  const std::size_t n = population.size(), d = population[0].size();
  std::vector<double> total(d);
  for (const auto& x : population) {
    for (std::size_t j = 0; j < d; ++j) total[j] += x[j];
  }
  std::mt19937 random(static_cast<unsigned>(m) + 17);
  std::vector<std::size_t> places(n);
  std::iota(places.begin(), places.end(), std::size_t{0});
  constexpr int trials = 4000;
  outcome o;
  for (int trial = 0; trial < trials; ++trial) {
    sum_evidence e;
    e.population = static_cast<double>(n);
    e.radius = radius;
    e.scalar = scalar;
    e.with_replacement = replace;
    e.sampled = static_cast<double>(m);
    std::vector<double> sum(d);
    for (std::size_t i = 0; i < m; ++i) {
      std::size_t place = random() % n;
      if (!replace) {
        std::swap(places[i], places[i + random() % (n - i)]);
        place = places[i];
      }
      for (std::size_t j = 0; j < d; ++j) {
        sum[j] += population[place][j];
        e.second_moment += population[place][j] * population[place][j] / e.sampled;
      }
    }
    double error = 0;
    for (std::size_t j = 0; j < d; ++j) error += std::pow(sum[j] * e.population / e.sampled - total[j], 2);
    const double r = vattn::stats::sum_radius<Bound>(e, static_cast<double>(m), delta);
    o.failed += std::sqrt(error) > r;
    o.tighter += std::sqrt(error) > part * r;
  }
  o.failed /= trials;
  o.tighter /= trials;
  return o;
}

}  // namespace

TEST_CASE("hoeffding and bernstein cover bounded terms at every size", "[stats][bounds]") {
  // Terms that are hard for a bound: two-valued, as wide as their range, and rare.
  std::mt19937 random(4);
  std::uniform_real_distribution<double> uniform;
  std::vector<std::vector<double>> coins, rare, spread, ball;
  for (int i = 0; i < 1500; ++i) {
    coins.push_back({i % 2 ? 2.0 : 0.0});
    rare.push_back({i % 100 == 0 ? 2.0 : 0.01});
    spread.push_back({2 * uniform(random)});
    const double angle = 6.283185307179586 * uniform(random);
    ball.push_back({2 * std::cos(angle), 2 * std::sin(angle), 0});
  }
  // Two-sided; 4000 draws: a true rate of delta shows at most delta + 4 sqrt(delta(1 - delta)/4000).
  for (const double delta : {0.05, 0.2}) {
    const double limit = delta + 4 * std::sqrt(delta * (1 - delta) / 4000);
    for (const bool replace : {true, false}) {
      for (const std::size_t m : {std::size_t{5}, std::size_t{40}, std::size_t{300}}) {
        CAPTURE(delta, replace, m);
        for (const auto* scalars : {&coins, &rare, &spread}) {
          CHECK(simulate<stats::hoeffding>(*scalars, 2, true, replace, m, delta, 1).failed <= limit);
          CHECK(simulate<stats::bernstein>(*scalars, 2, true, replace, m, delta, 1).failed <= limit);
        }
        CHECK(simulate<stats::hoeffding>(ball, 2, false, replace, m, delta, 1).failed <= limit);
        CHECK(simulate<stats::bernstein>(ball, 2, false, replace, m, delta, 1).failed <= limit);
      }
    }
  }
}

TEST_CASE("the finite-sample bounds are not vacuous", "[stats][bounds]") {
  // Were the radii two to three times smaller these would fail: so the coverage test above can fail.
  std::vector<std::vector<double>> coins, rare;
  for (int i = 0; i < 1500; ++i) {
    coins.push_back({i % 2 ? 2.0 : 0.0});
    rare.push_back({i % 100 == 0 ? 2.0 : 0.01});
  }
  CHECK(simulate<stats::hoeffding>(coins, 2, true, true, 300, 0.2, 0.55).tighter > 0.2);
  CHECK(simulate<stats::bernstein>(coins, 2, true, true, 300, 0.2, 0.3).tighter > 0.2);
  // A small variance in a wide range is what Bernstein is for.
  sum_evidence e = example(true, true);
  e.radius = 2;
  e.second_moment = e.variance = 0.04;
  e.sampled = 1000;
  CHECK(stats::sum_radius<stats::bernstein>(e, 1000, 0.1) < 0.5 * stats::sum_radius<stats::hoeffding>(e, 1000, 0.1));
}
