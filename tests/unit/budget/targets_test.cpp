// Targets: what they call achieved is what their formula says, recomputed by brute force from a look.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/looks.hpp"

using namespace vattn::test;
using vattn::index_t;
using vattn::ordinal;
using vattn::verdict;
namespace budget = vattn::budget;

namespace {

struct looked {
  sampled_head s{{.n = 4000, .dk = 8, .dv = 6}, 21, 1.5f, {.sinks = 16, .window = 16, .heavy = 60, .rows = 300}};
  looked() {
    s.settings.epsilon = 0.05;
    s.settings.delta = 0.1;
    s.settings.heavy = 0.015;
  }
  [[nodiscard]] double weight(double logit) const { return std::exp(logit - s.now.reference); }
};

}  // namespace

TEST_CASE("evidence for denominator and numerator is that of the explicit terms", "[budget][targets]") {
  sampled_head s({.n = 700, .dk = 8, .dv = 5}, 8, 2.0f, {.sinks = 10, .window = 10, .heavy = 25, .rows = 180});
  const auto seen = s.seen();
  std::vector<double> xs;
  std::vector<std::vector<double>> xv;
  for (const vattn::drawn_row& row : s.sample.rows()) {
    xs.push_back(std::exp(static_cast<double>(row.logit) - s.now.reference));
    xv.emplace_back();
    for (std::size_t j = 0; j < 5; ++j) xv.back().push_back(xs.back() * static_cast<double>(s.p.v[row.place * 5 + j]));
  }
  double mean = 0, square = 0, variance = 0, variance_v = 0, square_v = 0;
  std::vector<double> mean_v(5);
  for (std::size_t i = 0; i < 180; ++i) {
    mean += xs[i] / 180;
    square += xs[i] * xs[i] / 180;
    for (std::size_t j = 0; j < 5; ++j) mean_v[j] += xv[i][j] / 180;
  }
  for (std::size_t i = 0; i < 180; ++i) {
    variance += (xs[i] - mean) * (xs[i] - mean) / 179;
    for (std::size_t j = 0; j < 5; ++j) {
      square_v += xv[i][j] * xv[i][j] / 180;
      variance_v += (xv[i][j] - mean_v[j]) * (xv[i][j] - mean_v[j]) / 179;
    }
  }
  const vattn::stats::sum_evidence d = budget::denominator_evidence(seen);
  CHECK(d.scalar);
  CHECK(d.population == 655);
  CHECK(d.sampled == 180);
  CHECK_THAT(d.variance, WithinRel(variance, 1e-4));
  CHECK_THAT(d.second_moment, WithinRel(square, 1e-5));
  const vattn::stats::sum_evidence n = budget::numerator_evidence(seen);
  CHECK_FALSE(n.scalar);
  CHECK_THAT(n.variance, WithinRel(variance_v, 1e-4));
  CHECK_THAT(n.second_moment, WithinRel(square_v, 1e-5));

  // The ranges are true of every term of the residual, not only of the sampled ones.
  const auto want = vattn::reference::attend(s.p.exactly(), 0, 0, 0);
  double largest = 0, largest_v = 0;
  for (index_t i = 10; i < 690; ++i) {
    if (s.order.contains(static_cast<ordinal>(i))) continue;
    const auto at = static_cast<std::size_t>(i);
    const double x = std::exp(want.logits[at] - s.now.reference);
    double v2 = 0;
    for (std::size_t j = 0; j < 5; ++j) v2 += std::pow(static_cast<double>(s.p.v[at * 5 + j]), 2);
    largest = std::max(largest, x);
    largest_v = std::max(largest_v, x * std::sqrt(v2));
  }
  CHECK(largest <= d.radius * (1 + 1e-5));
  CHECK(d.radius < 100 * largest);
  CHECK(largest_v <= n.radius * (1 + 1e-5));
  CHECK(n.radius < 100 * largest_v);
}

TEST_CASE("denominator: radius over D, and the rows that epsilon asks for", "[budget][targets]") {
  looked l;
  for (const double epsilon : {0.5, 0.05, 0.01}) {
    l.s.settings.epsilon = epsilon;
    const auto seen = l.s.seen();
    const auto d = budget::denominator_evidence(seen);
    const verdict v = budget::denominator::judge<budget::clt>(seen);
    const double z = vattn::stats::normal_quantile(0.95);
    const double radius = z * d.population * std::sqrt(d.variance / 300 * (1 - 300 / d.population));
    CHECK_THAT(v.epsilon_achieved, WithinRel(radius / l.s.now.denominator, 1e-9));
    CHECK_THAT(v.denominator_error, WithinRel(radius / l.s.now.denominator, 1e-9));
    const double b = std::pow(z * d.population / (epsilon * l.s.now.denominator), 2) * d.variance;
    CHECK(v.budget == static_cast<index_t>(std::ceil(b / (1 + b / d.population))));
    CHECK(v.met == (radius / l.s.now.denominator <= epsilon));
    CHECK(v.met == (v.budget <= 300));
    CHECK(v.next.sampled >= v.budget);
    if (!v.met) CHECK(v.next.sampled > 300);
    CHECK(v.next.heavy == 60);
  }
}

TEST_CASE("numerator: radius over the norm of N", "[budget][targets]") {
  looked l;
  const auto seen = l.s.seen();
  const auto n = budget::numerator_evidence(seen);
  const double norm = std::sqrt(l.s.now.output2) * l.s.now.denominator;
  const verdict v = budget::numerator::judge<budget::student>(seen);
  CHECK_THAT(v.epsilon_achieved, WithinRel(budget::sum_radius<budget::student>(n, 300, 0.1) / norm, 1e-9));
  CHECK(v.budget == static_cast<index_t>(budget::sample_size<budget::student>(n, 0.05 * norm, 0.1)));
}

TEST_CASE("sdpa: the exact factor (e1 + e2)/(1 - e2), at the best split of delta", "[budget][targets]") {
  looked l;
  for (const double epsilon : {0.3, 0.1}) {
    l.s.settings.epsilon = epsilon;
    const auto seen = l.s.seen();
    const auto d = budget::denominator_evidence(seen), n = budget::numerator_evidence(seen);
    const double D = l.s.now.denominator, norm = std::sqrt(l.s.now.output2) * D;
    const auto error = [&](double m, double share) {
      const double e1 = budget::sum_radius<budget::clt>(n, m, share * 0.1) / norm;
      const double e2 = budget::sum_radius<budget::clt>(d, m, (1 - share) * 0.1) / D;
      return e2 < 1 ? (e1 + e2) / (1 - e2) : std::numeric_limits<double>::infinity();
    };
    double best = 1e9, fewest = 1e9;
    for (int i = 1; i < 200; ++i) {
      const double share = i / 200.0;
      best = std::min(best, error(300, share));
      double m = 1;
      while (m < d.population && error(m, share) > epsilon) ++m;
      fewest = std::min(fewest, m);
    }
    const verdict v = budget::sdpa::judge<budget::clt>(seen);
    CHECK_THAT(v.epsilon_achieved, WithinRel(best, 1e-3));
    CHECK(v.epsilon_achieved >= best * (1 - 1e-3));
    CHECK(std::abs(static_cast<double>(v.budget) - fewest) <= 0.01 * fewest + 1);
    CHECK(v.met == (v.epsilon_achieved <= epsilon));
  }
}

TEST_CASE("the exact factor bounds the output, and the published 2(e1 + e2) need not be paid", "[budget][targets]") {
  // Worst case by construction: N̂ = (1 + e1)N, D̂ = (1 - e2)D.
  for (const double e1 : {0.01, 0.1, 0.3}) {
    for (const double e2 : {0.01, 0.1, 0.3}) {
      const double output_error = (1 + e1) / (1 - e2) - 1;
      CHECK_THAT((e1 + e2) / (1 - e2), WithinRel(output_error, 1e-12));
    }
  }
}

TEST_CASE("the pilot is rounded up and never below the floor", "[budget][targets]") {
  vattn::config c;
  c.min_sample = 10;
  c.base = 0.021;
  CHECK(budget::denominator::first(1000, 1000, 7, c).sampled == 21);
  CHECK(budget::denominator::first(1001, 1001, 7, c).sampled == 22);
  CHECK(budget::denominator::first(1000, 1000, 7, c).heavy == 7);
  c.base = 0.001;
  CHECK(budget::denominator::first(1000, 1000, 7, c).sampled == 10);
  c.base = vattn::config::automatic;  // 2 %
  CHECK(budget::denominator::first(1000, 1000, 7, c).sampled == 20);
  CHECK(budget::denominator::first(1000, 1001, 7, c).sampled == 21);  // of the residual
}

TEST_CASE("a contribution bounds every x times a distance, from any point", "[budget][targets]") {
  looked l;
  for (const float offset : {0.05f, 1.0f, 20.0f}) {
    for (const double away : {0.0, 0.3, 5.0}) {
      for (const double along : {0.0, 0.7, 4.0}) {
        CAPTURE(offset, away, along);
        l.s.scored.value_offset = offset;
        const auto seen = l.s.seen();
        const auto point = [&](std::size_t j) {
          return static_cast<double>(l.s.value_centre[j]) + away * static_cast<double>(j);
        };
        CHECK_THAT(budget::reach(seen, point, along), WithinRel(widest(seen, point, along), 1e-6));
      }
    }
  }
}

TEST_CASE("ranges follow from the kind of score", "[budget][targets]") {
  looked l;
  const double logit = l.weight(static_cast<double>(l.s.order.bound())), bound = logit * unit_of(l.s);
  auto d = budget::denominator_evidence(l.s.seen());
  auto n = budget::numerator_evidence(l.s.seen());
  CHECK_THAT(d.radius, WithinRel(bound / static_cast<double>(l.s.scored.value_offset), 1e-9));
  CHECK_THAT(n.radius, WithinRel(bound * widest(
                                             l.s.seen(), [](std::size_t) { return 0.0; }, 0),
                                 1e-6));
  l.s.scored.kind = vattn::score_kind::logit;
  d = budget::denominator_evidence(l.s.seen()), n = budget::numerator_evidence(l.s.seen());
  CHECK_THAT(d.radius, WithinRel(logit, 1e-9));
  CHECK(std::isinf(n.radius));  // logits say nothing of values
  l.s.scored.kind = vattn::score_kind::ranking;
  d = budget::denominator_evidence(l.s.seen()), n = budget::numerator_evidence(l.s.seen());
  CHECK(std::isinf(d.radius));
  CHECK(std::isinf(n.radius));
}

TEST_CASE("a hard bound shares delta among its looks, which follow a schedule", "[budget][targets]") {
  looked l;
  l.s.settings.max_rounds = 5;
  const auto seen = l.s.seen();
  const auto d = budget::denominator_evidence(seen), n = budget::numerator_evidence(seen);
  const double D = l.s.now.denominator, norm = std::sqrt(l.s.now.output2) * D;
  const auto check = [&](const verdict& v, double achieved, double rows) {
    CHECK_THAT(v.epsilon_achieved, WithinRel(achieved, 1e-9));
    CHECK(v.budget == static_cast<index_t>(rows));
    CHECK(v.met == (achieved <= 0.05));
    CHECK(v.next.heavy == 60);
    CHECK(v.next.sampled == 600);
  };
  const double of_d = budget::sum_radius<budget::bernstein>(d, 300, 0.02) / D;
  check(budget::denominator::judge<budget::bernstein>(seen), of_d,
        budget::sample_size<budget::bernstein>(d, 0.05 * D, 0.02));
  check(budget::numerator::judge<budget::hoeffding>(seen), budget::sum_radius<budget::hoeffding>(n, 300, 0.02) / norm,
        budget::sample_size<budget::hoeffding>(n, 0.05 * norm, 0.02));
  // What is stated of D̂ is stated at a look like the rest: it is the looks that decide which of them ends the call.
  CHECK_THAT(budget::denominator::judge<budget::bernstein>(seen).denominator_error, WithinRel(of_d, 1e-9));
  CHECK_THAT(budget::output::judge<budget::bernstein>(seen).denominator_error, WithinRel(of_d, 1e-9));
}

TEST_CASE("the schedule doubles the sample, and the heavy rows where they are free to grow", "[budget][targets]") {
  looked l;
  const auto next = [&](vattn::score_kind kind, double heavy) {
    l.s.scored.kind = kind;
    l.s.settings.heavy = heavy;
    const verdict v = budget::scheduled(l.s.seen());
    CHECK_FALSE(v.met);
    CHECK(v.budget == 300);
    CHECK(v.next.sampled == 600);
    return v.next.heavy;
  };
  for (const auto kind : {vattn::score_kind::contribution, vattn::score_kind::logit}) {
    CHECK(next(kind, vattn::config::automatic) == 120);
    CHECK(next(kind, 0.015) == 60);
  }
  CHECK(next(vattn::score_kind::ranking, vattn::config::automatic) == 60);
  l.s.extend_heavy(2500);
  CHECK(next(vattn::score_kind::logit, vattn::config::automatic) == 4000 - 32);  // all that can be ranked
}

TEST_CASE("the unit of the values changes nothing", "[budget][targets]") {
  const plan steps{.sinks = 16, .window = 16, .heavy = 60, .rows = 300};
  const shape size{.n = 4000, .dk = 8, .dv = 6};
  sampled_head one(size, 21, 1.5f, steps), small(size, 21, 1.5f, steps, [](problem<float>& p) {
    for (float& x : p.v) x *= 0x1p-20f;
  });
  const auto check = [](const verdict& a, const verdict& b) {
    CHECK(std::isfinite(a.epsilon_achieved));
    CHECK_THAT(b.epsilon_achieved, WithinRel(a.epsilon_achieved, 1e-6));
    CHECK(std::abs(a.budget - b.budget) <= 1);
  };
  check(budget::numerator::judge<budget::clt>(one.seen()), budget::numerator::judge<budget::clt>(small.seen()));
  check(budget::sdpa::judge<budget::clt>(one.seen()), budget::sdpa::judge<budget::clt>(small.seen()));
}

TEST_CASE("a sum without length is never within epsilon of itself", "[budget][targets]") {
  looked l;
  l.s.now.output2 = 0;
  constexpr double infinite = std::numeric_limits<double>::infinity();
  for (const verdict& v :
       {budget::numerator::judge<budget::clt>(l.s.seen()), budget::sdpa::judge<budget::clt>(l.s.seen())}) {
    CHECK(v.epsilon_achieved == infinite);
    CHECK_FALSE(v.met);
  }
}

TEST_CASE("a denominator that may be 0 bounds no output", "[budget][targets]") {
  looked few;
  few.s.now.s.A *= 1e4;
  const auto d = budget::denominator_evidence(few.s.seen());
  REQUIRE(budget::sum_radius<budget::clt>(d, 300, 0.1) > few.s.now.denominator);
  const verdict v = budget::sdpa::judge<budget::clt>(few.s.seen());
  CHECK(v.epsilon_achieved == std::numeric_limits<double>::infinity());
  CHECK_FALSE(v.met);
  CHECK(v.budget > 300);
}

TEST_CASE("where the output vanishes no error is small enough", "[budget][targets]") {
  sampled_head s({.n = 4000, .dk = 8, .dv = 6}, 21, 1.5f, {.sinks = 16, .window = 16, .heavy = 60, .rows = 300},
                 [](problem<float>& p) { std::fill(p.v.begin(), p.v.end(), 0.0f); });
  for (const verdict& v :
       {budget::numerator::judge<budget::clt>(s.seen()), budget::sdpa::judge<budget::clt>(s.seen())}) {
    CHECK(v.epsilon_achieved == std::numeric_limits<double>::infinity());
    CHECK_FALSE(v.met);
    CHECK(v.next.sampled > 300);
  }
}
