// The output's target: what it calls achieved, and the rows that it asks for, recomputed from a look by their formulas.
#include "vattn/budget/output.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/looks.hpp"

using namespace vattn::test;
using vattn::index_t;
using vattn::ordinal;
using vattn::score_kind;
using vattn::split;
using vattn::verdict;
using vattn::stats::sum_evidence;
namespace budget = vattn::budget;

namespace {

struct looked {
  sampled_head s;
  explicit looked(const plan& rows = {.sinks = 16, .window = 16, .heavy = 60, .rows = 300}, float spread = 1.5f,
                  const std::function<void(problem<float>&)>& edit = {})
      : s({.n = 4000, .dk = 8, .dv = 6}, 21, spread, rows, edit) {
    s.settings.epsilon = 0.05;
    s.settings.delta = 0.1;
  }
  [[nodiscard]] double output(std::size_t j) const {
    return static_cast<double>(s.centre[j]) + static_cast<double>(s.offset[j]);
  }
  [[nodiscard]] double weight(double logit) const { return std::exp(logit - s.now.reference); }

  // Of the terms Y = x(v − ô)/D̂ of the sampled rows.
  [[nodiscard]] vattn::linearised_terms terms() const { return vattn::linearise(s.now, s.moments, s.offset); }

  // The largest ‖Y‖ of a place of that score.
  [[nodiscard]] double guard(float score) {
    const double x = weight(static_cast<double>(score)) / s.now.denominator;
    if (s.scored.kind == score_kind::ranking) return 0;
    if (s.scored.kind == score_kind::logit) return x * (std::sqrt(s.now.power) + std::sqrt(s.now.output2));
    return x * unit_of(s) *
           widest(
               s.seen(), [&](std::size_t j) { return output(j); }, 0);
  }

  // Terms of which m draws see none with probability delta count as seen: z sqrt(count) = ln(1/delta).
  [[nodiscard]] sum_evidence evidence(double population, double m, double variance, double dimension, double dof,
                                      double largest) const {
    const double delta = s.settings.delta, z = vattn::stats::normal_quantile(1 - delta / 2);
    const double unseen = std::max(1.0, std::pow(std::log(1 / delta) / z, 2)) * largest * largest / m;
    const double all = variance + unseen;
    sum_evidence e;
    e.population = population;
    e.sampled = m;
    e.variance = all;
    e.dimension = all * all / (variance * variance / dimension + unseen * unseen);
    e.dof = dof * std::pow(all / variance, 2);
    return e;
  }
};

constexpr score_kind kinds[] = {score_kind::ranking, score_kind::logit, score_kind::contribution};

}  // namespace

TEST_CASE("output: a pilot of n/256 rows between 128 and 256, or of the share asked for", "[budget][output]") {
  vattn::config c;
  c.min_sample = 10;
  const auto rows = [&](index_t n, index_t residual) { return budget::output::first(n, residual, 7, c).sampled; };
  CHECK(budget::output::first(1000, 900, 7, c).heavy == 7);
  CHECK(rows(1000, 900) == 128);
  CHECK(rows(256 * 200, 900) == 200);
  CHECK(rows(1 << 20, 900) == 256);
  c.min_sample = 300;
  CHECK(rows(1000, 900) == 300);
  c.min_sample = 10;
  c.base = 0.021;
  CHECK(rows(5000, 1000) == 21);  // of the residual, not of n
  CHECK(rows(5000, 1001) == 22);
  c.base = 0.001;
  CHECK(rows(1000, 1000) == 10);
}

TEST_CASE("output: met means achieved, and a larger sample achieves more", "[budget][output]") {
  looked l;
  l.s.settings.heavy = 0.015;
  double last = 1e9;
  for (const index_t rows : {300, 600, 1200, 2400}) {
    REQUIRE(l.s.sample.grow(rows));
    l.s.look();
    const verdict v = budget::output::judge<budget::clt>(l.s.seen());
    CAPTURE(rows, v.epsilon_achieved);
    CHECK(v.epsilon_achieved > 0);
    CHECK(v.epsilon_achieved < last);
    CHECK(v.met == (v.epsilon_achieved <= 0.05));
    if (!v.met) CHECK(v.next.heavy + v.next.sampled > l.s.order.count() + rows);
    last = v.epsilon_achieved;
  }
}

TEST_CASE("output: achieved is the quantile of the terms and of one unseen, over the scale", "[budget][output]") {
  looked l;
  const auto y = l.terms();
  for (const score_kind kind : kinds) {
    for (const double delta : {0.01, 0.1, 0.3, 0.9}) {  // past 0.57 less than one unseen term would do: one it is
      for (const bool rms : {false, true}) {
        CAPTURE(static_cast<int>(kind), delta, rms);
        l.s.scored.kind = kind;
        l.s.settings.delta = delta;
        l.s.settings.scale = rms ? vattn::error_scale::rms : vattn::error_scale::output;
        const double N = l.s.now.population, largest = l.guard(l.s.order.bound());
        CHECK((largest > 0) == (kind != score_kind::ranking));
        const sum_evidence e = l.evidence(N, 300, y.variance, y.dimension, y.dof, largest);
        const double off2 = N * N * e.variance / 300 * (1 - 300 / N);
        REQUIRE(off2 < 0.5 * l.s.now.output2);
        const double scale = std::sqrt(rms ? l.s.now.power : l.s.now.output2 - off2);
        const verdict by_clt = budget::output::judge<budget::clt>(l.s.seen());
        const verdict by_student = budget::output::judge<budget::student>(l.s.seen());
        CHECK_THAT(by_clt.epsilon_achieved, WithinRel(budget::sum_radius<budget::clt>(e, 300, delta) / scale, 1e-6));
        CHECK_THAT(by_student.epsilon_achieved,
                   WithinRel(budget::sum_radius<budget::student>(e, 300, delta) / scale, 1e-6));
        for (const verdict& v : {by_clt, by_student}) {
          CHECK(v.met == (v.epsilon_achieved <= 0.05));
          CHECK(v.budget == v.next.sampled);
        }
      }
    }
  }
}

TEST_CASE("output: no term of the residual is larger than the unseen one", "[budget][output]") {
  for (const unsigned heavy : {1u, 60u}) {
    for (const float lift : {-1.0f, 0.0f, 4.0f}) {
      looked l({.sinks = 16, .window = 16, .heavy = heavy, .rows = 300}, 1.5f, [&](problem<float>& p) {
        for (std::size_t i = 0; i < p.v.size(); i += 6) p.v[i] += lift;
      });
      double largest = 0;
      for (index_t i = 16; i < 4000 - 16; ++i) {
        const auto place = static_cast<ordinal>(i);
        if (l.s.order.contains(place)) continue;
        double length2 = 0;
        for (std::size_t j = 0; j < 6; ++j)
          length2 += std::pow(static_cast<double>(l.s.p.v[place * 6 + j]) - l.output(j), 2);
        const double x = l.weight(static_cast<double>(l.s.row.logit(i))) / l.s.now.denominator;
        largest = std::max(largest, x * std::sqrt(length2));
      }
      CHECK(largest <= l.guard(l.s.order.bound()) * (1 + 1e-5));
      CHECK(l.guard(l.s.order.bound()) < 10 * largest);
    }
  }
}

TEST_CASE("output: a sample of everything has no error, and one that bounds nothing is not met", "[budget][output]") {
  looked l({.sinks = 16, .window = 16, .heavy = 0, .rows = 300});
  l.s.scores[1000] = infinity;
  for (const score_kind kind : {score_kind::logit, score_kind::contribution}) {
    l.s.scored.kind = kind;
    const verdict v = budget::output::judge<budget::clt>(l.s.seen());
    CHECK(v.epsilon_achieved == std::numeric_limits<double>::infinity());
    CHECK_FALSE(v.met);
    CHECK(v.next.heavy > 0);  // it is read exactly next
    CHECK(v.next.sampled >= 300);
  }
  l.s.scored.kind = score_kind::ranking;
  l.s.settings.scale = vattn::error_scale::rms;
  l.s.now.power = std::numeric_limits<double>::quiet_NaN();
  CHECK_FALSE(budget::output::judge<budget::clt>(l.s.seen()).met);

  looked all;
  REQUIRE(all.s.sample.grow(4000));
  all.s.look();
  const verdict v = budget::output::judge<budget::clt>(all.s.seen());
  CHECK(v.epsilon_achieved == 0);
  CHECK(v.met);
  CHECK(v.next.heavy == 60);
  CHECK(v.next.sampled == 4000 - 32 - 60);
  CHECK(v.budget == v.next.sampled);

  // Nothing but zeros: no error of an output without length.
  looked zeros({.sinks = 16, .window = 16, .heavy = 60, .rows = 300}, 1.5f,
               [](problem<float>& p) { std::fill(p.v.begin(), p.v.end(), 0.0f); });
  zeros.s.scored.kind = score_kind::ranking;
  const verdict none = budget::output::judge<budget::clt>(zeros.s.seen());
  CHECK(none.epsilon_achieved == 0);
  CHECK(none.met);
}

TEST_CASE("output: relative to RMS where values cancel", "[budget][output]") {
  const auto centred = [](problem<float>& p) {
    for (float& x : p.v) x -= 1;
  };
  sampled_head s({.n = 3000, .dk = 8, .dv = 6}, 5, 1.0f, {.sinks = 16, .window = 16, .heavy = 40, .rows = 300},
                 centred);
  const double to_output = budget::output::judge<budget::clt>(s.seen()).epsilon_achieved;
  s.settings.scale = vattn::error_scale::rms;
  const double to_rms = budget::output::judge<budget::clt>(s.seen()).epsilon_achieved;
  CHECK(to_rms < 0.3 * to_output);
  CHECK(to_rms > 0);

  // ‖ô‖² less its own error, but never less than a quarter.
  looked l({.sinks = 16, .window = 16, .heavy = 60, .rows = 100, .seed = 3}, 0.2f, centred);
  l.s.scored.kind = score_kind::ranking;
  const auto y = l.terms();
  const double N = l.s.now.population;
  const sum_evidence e = l.evidence(N, 100, y.variance, y.dimension, y.dof, 0);
  REQUIRE(N * N * y.variance / 100 * (1 - 100 / N) > 0.75 * l.s.now.output2);
  CHECK_THAT(budget::output::judge<budget::clt>(l.s.seen()).epsilon_achieved,
             WithinRel(budget::sum_radius<budget::clt>(e, 100, 0.1) / std::sqrt(l.s.now.output2 / 4), 1e-6));
}

namespace {

// The (k, m) of fewest rows, by trying the whole ladder: the rows that rank behind k' are the sample of the residual
// without k'. Then no more than twice the rows that there are.
split planned(looked& l, double tau) {
  const sampled_head& s = l.s;
  const index_t k = l.s.order.count();
  const double m = s.now.sampled;
  std::vector<ordinal> by_rank;
  for (ordinal i = 16; i < 4000 - 16; ++i) by_rank.push_back(i);
  std::sort(by_rank.begin(), by_rank.end(), vattn::by_score{s.scores.data()});
  std::vector<index_t> rank(4000, 0);
  for (std::size_t i = 0; i < by_rank.size(); ++i) rank[by_rank[i]] = static_cast<index_t>(i) + 1;

  const auto y = l.terms();
  const auto sums = [&](index_t heavy, double& rows, double& square) {
    double sum = rows = square = 0;
    for (const vattn::drawn_row& r : s.sample.rows()) {
      if (rank[r.place] <= heavy) continue;
      const double t = std::pow(l.weight(static_cast<double>(r.logit)), 2) * static_cast<double>(r.spread);
      rows += 1, sum += t, square += t * t;
    }
    return sum;
  };
  double rows, square;
  const double all = sums(k, rows, square), all_effective = all * all / square;
  const sum_evidence now = l.evidence(s.now.population, m, y.variance, y.dimension, y.dof, l.guard(l.s.order.bound()));
  std::vector<index_t> ladder{k};
  if (s.settings.heavy == vattn::config::automatic && s.scored.kind != score_kind::ranking) {
    for (double rung = 72; rung <= std::min(1000.0, 8 * (static_cast<double>(k) + m)); rung *= 1.5)
      if (rung > 1.25 * static_cast<double>(k)) ladder.push_back(static_cast<index_t>(rung));
  }
  split best{k, std::numeric_limits<index_t>::max() / 2};
  for (const index_t heavy : ladder) {
    const double sum = sums(heavy, rows, square);
    if (rows < 2) continue;
    const double population = s.now.population - static_cast<double>(heavy - k);
    // The variance that the kept rows have, in the units of the linearised terms.
    const double variance = y.variance * (m - 1) * sum / all / (rows - 1);
    const double largest = l.guard(s.scores[heavy > 0 ? by_rank[static_cast<std::size_t>(heavy - 1)] : by_rank[0]]);
    double want = m;
    for (int i = 0; i < 3; ++i) {
      sum_evidence e = l.evidence(population, want, variance, y.dimension, 1, largest);
      e.dof = now.dof * (sum * sum / square / all_effective) * want / rows;
      want = std::max(rows, budget::sample_size<budget::clt>(e, 0.97 * tau, s.settings.delta));
    }
    const auto asked = static_cast<index_t>(want);
    if (heavy + asked < best.heavy + best.sampled) best = {heavy, asked};
  }
  const double have = static_cast<double>(k) + m, asked = static_cast<double>(best.heavy + best.sampled);
  if (asked > 2 * have) {
    const double part = have / (asked - have);
    best.heavy = k + static_cast<index_t>(part * static_cast<double>(best.heavy - k));
    best.sampled = static_cast<index_t>(m + part * (static_cast<double>(best.sampled) - m));
  }
  return best;
}

}  // namespace

TEST_CASE("output: the next look has the fewest rows that this one predicts", "[budget][output]") {
  int further = 0, doubled = 0, alone = 0;
  for (const float spread : {0.5f, 1.5f, 3.0f}) {
    for (const index_t heavy : {0, 60, 100}) {
      looked l({.sinks = 16, .window = 16, .heavy = heavy, .rows = 200}, spread);
      const double scale = std::sqrt(l.s.now.power);
      l.s.settings.scale = vattn::error_scale::rms;
      for (const score_kind kind : kinds) {
        for (const double share : {vattn::config::automatic, 0.015}) {
          l.s.scored.kind = kind;
          l.s.settings.heavy = share;
          l.s.settings.epsilon = 1e-6;
          const double have = budget::output::judge<budget::clt>(l.s.seen()).epsilon_achieved;
          for (const double part : {0.98, 0.9, 0.75, 0.5, 0.1}) {
            l.s.settings.epsilon = part * have;
            const verdict v = budget::output::judge<budget::clt>(l.s.seen());
            const split want = planned(l, l.s.settings.epsilon * scale);
            CAPTURE(spread, heavy, static_cast<int>(kind), share, part);
            CHECK_FALSE(v.met);
            CHECK(v.next.heavy == want.heavy);
            CHECK(v.next.sampled == want.sampled);
            CHECK(v.next.heavy + v.next.sampled <= 2 * (heavy + 200));
            if (v.next.heavy == heavy) CHECK(v.next.sampled > 200);
            further += v.next.heavy > heavy;
            alone += v.next.heavy == heavy;
            doubled += v.next.heavy + v.next.sampled >= 2 * (heavy + 200) - 1;
          }
        }
      }
    }
  }
  // All three happened, so that all three were compared.
  CHECK(further > 10);
  CHECK(alone > 10);
  CHECK(doubled > 10);
}

TEST_CASE("output: of a residual without two sampled rows nothing is predicted", "[budget][output]") {
  // All sampled rows but `behind` outrank what was not sampled.
  int further = 0;
  for (const std::size_t behind : {0u, 1u, 2u, 3u, 6u}) {
    for (const double part : {0.99, 0.9, 0.8, 0.6, 0.4}) {
      looked l({.sinks = 16, .window = 16, .heavy = 0, .rows = 20}, 0.5f);
      const float highest = *std::max_element(l.s.scores.begin(), l.s.scores.end());
      for (std::size_t i = behind; i < 20; ++i)
        l.s.scores[l.s.drawn[i].place] = highest + 0.01f * static_cast<float>(i);
      l.s.scored.kind = score_kind::logit;
      l.s.settings.scale = vattn::error_scale::rms;
      l.s.settings.epsilon = 1e-6;
      l.s.settings.epsilon = part * budget::output::judge<budget::clt>(l.s.seen()).epsilon_achieved;
      const verdict v = budget::output::judge<budget::clt>(l.s.seen());
      const split want = planned(l, l.s.settings.epsilon * std::sqrt(l.s.now.power));
      CAPTURE(behind, part);
      CHECK_FALSE(v.met);
      CHECK(v.next.heavy == want.heavy);
      CHECK(v.next.sampled == want.sampled);
      if (behind < 2) CHECK(v.next.heavy == 0);
      if (behind == 2 || behind == 3) further += v.next.heavy > 0;
    }
  }
  CAPTURE(further);
  CHECK(further > 0);
}

TEST_CASE("output: with a hard bound, the error of N and D together", "[budget][output]") {
  looked l({.sinks = 16, .window = 16, .heavy = 60, .rows = 3000}, 0.5f);
  l.s.settings.max_rounds = 5;
  const double s = static_cast<double>(l.s.scored.value_offset), N = l.s.now.population;
  double second = 0;
  for (const vattn::drawn_row& r : l.s.sample.rows()) {
    double far2 = s * s;
    for (std::size_t j = 0; j < 6; ++j)
      far2 += std::pow(static_cast<double>(l.s.p.v[r.place * 6 + j]) - static_cast<double>(l.s.centre[j]), 2);
    second += std::pow(l.weight(static_cast<double>(r.logit)), 2) * far2 / 3000;
  }
  sum_evidence e;
  e.population = N;
  e.sampled = 3000;
  e.second_moment = second;
  e.radius = l.weight(static_cast<double>(l.s.order.bound())) * unit_of(l.s) *
             widest(
                 l.s.seen(), [&](std::size_t j) { return static_cast<double>(l.s.centre[j]); }, s);
  const auto achieved = [&](double error) {
    const double away = std::sqrt(1 + l.s.now.u2 / (s * s)) * error / (l.s.now.denominator - error / s);
    return away / (std::sqrt(l.s.now.output2) - away);
  };
  const double want = achieved(budget::sum_radius<budget::bernstein>(e, 3000, 0.1 / 5));
  REQUIRE(want > 0);
  for (const double epsilon : {want * 1.01, want * 0.99}) {
    l.s.settings.epsilon = epsilon;
    const verdict v = budget::output::judge<budget::bernstein>(l.s.seen());
    CHECK_THAT(v.epsilon_achieved, WithinRel(want, 1e-4));
    CHECK(v.met == (epsilon > want));
    CHECK(v.budget == 3000);
    CHECK(v.next.heavy == 120);
    CHECK(v.next.sampled == 6000);
  }
  CHECK_THAT(budget::output::judge<budget::hoeffding>(l.s.seen()).epsilon_achieved,
             WithinRel(achieved(budget::sum_radius<budget::hoeffding>(e, 3000, 0.1 / 5)), 1e-4));
  // Where the error swallows the output or the denominator, and where nothing is known of the values: nothing is said.
  const auto says_nothing = [](looked& some) {
    some.s.settings.epsilon = 0.99;
    const verdict v = budget::output::judge<budget::bernstein>(some.s.seen());
    CHECK(v.epsilon_achieved == std::numeric_limits<double>::infinity());
    CHECK_FALSE(v.met);
  };
  looked few({.sinks = 16, .window = 16, .heavy = 60, .rows = 20}, 0.5f);
  says_nothing(few);
  looked cancelling({.sinks = 16, .window = 16, .heavy = 60, .rows = 3000}, 0.5f, [](problem<float>& p) {
    for (float& x : p.v) x -= 1;
  });
  says_nothing(cancelling);
  for (const score_kind kind : {score_kind::logit, score_kind::ranking}) {
    l.s.scored.kind = kind;
    says_nothing(l);
  }
}

TEST_CASE("output: what may lie unseen counts, as far as the scores bound it", "[budget][output]") {
  looked l;
  for (const auto kind : {vattn::score_kind::ranking, vattn::score_kind::logit, vattn::score_kind::contribution}) {
    for (const double delta : {0.1, 1e-4}) {
      auto seen = l.s.seen();
      seen.scores.kind = kind;
      l.s.settings.delta = delta;
      const auto& now = l.s.now;
      const auto y = vattn::linearise(now, l.s.moments, l.s.offset);

      double guard = 0;
      if (kind == vattn::score_kind::logit) guard = std::sqrt(now.power) + std::sqrt(now.output2);
      if (kind == vattn::score_kind::contribution)
        guard = unit_of(l.s) * widest(
                                   seen, [&](std::size_t j) { return l.output(j); }, 0);
      guard *= std::exp(static_cast<double>(l.s.order.bound()) - now.reference) / now.denominator;
      const double z = vattn::stats::normal_quantile(1 - delta / 2), lambda = -std::log(delta);
      const double unseen = std::max(1.0, lambda * lambda / (z * z)) * guard * guard / 300;
      vattn::stats::sum_evidence all;
      all.population = now.population;
      all.sampled = 300;
      all.variance = y.variance + unseen;
      all.dimension = all.variance * all.variance / (y.variance * y.variance / y.dimension + unseen * unseen);
      all.dof = y.dof * std::pow(all.variance / y.variance, 2);
      const double mean_square = now.population * (now.population / 300 - 1) * all.variance;
      const double scale = std::sqrt(std::max(now.output2 - mean_square, now.output2 / 4));

      const verdict v = budget::output::judge<budget::clt>(seen);
      CAPTURE(int(kind), delta);
      CHECK_THAT(v.epsilon_achieved, WithinRel(budget::sum_radius<budget::clt>(all, 300, delta) / scale, 1e-4));
      CHECK((unseen > 0.01 * y.variance) == (kind != vattn::score_kind::ranking));
    }
  }
}

TEST_CASE("output: scores of infinity bound nothing, and the next look is still a number of rows", "[budget][output]") {
  looked l;
  for (const auto place : l.s.order.top()) l.s.scores[place] = infinity;
  l.s.settings.heavy = vattn::config::automatic;
  for (const auto kind : {vattn::score_kind::logit, vattn::score_kind::contribution}) {
    auto seen = l.s.seen();
    seen.scores.kind = kind;
    const verdict v = budget::output::judge<budget::clt>(seen);
    CHECK(v.epsilon_achieved == std::numeric_limits<double>::infinity());
    CHECK_FALSE(v.met);
    CHECK(v.next.heavy >= 60);
    CHECK(v.next.heavy + v.next.sampled > 360);
    CHECK(v.next.heavy + v.next.sampled <= 720);  // a look at most doubles
  }
}

TEMPLATE_TEST_CASE("output: a finite-sample bound by its formula, at its share of delta", "[budget][output]",
                   budget::hoeffding, budget::bernstein) {
  sampled_head s({.n = 24000, .dk = 8, .dv = 6}, 23, 0.3f, {.sinks = 16, .window = 16, .heavy = 400, .rows = 12000});
  s.settings.max_rounds = 4;
  const double offset = static_cast<double>(s.scored.value_offset), D = s.now.denominator;
  sum_evidence e;
  e.population = s.now.population;
  e.sampled = 12000;
  for (const vattn::drawn_row& r : s.sample.rows()) {
    const double x = std::exp(static_cast<double>(r.logit) - s.now.reference);
    e.second_moment += x * x * (static_cast<double>(r.spread) + offset * offset) / 12000;
  }
  e.radius = std::exp(static_cast<double>(s.order.bound()) - s.now.reference) * unit_of(s) *
             widest(
                 s.seen(), [&](std::size_t j) { return static_cast<double>(s.centre[j]); }, offset);
  const double error = vattn::stats::sum_radius<TestType>(e, 12000, 0.1 / 4);
  const double away = std::sqrt(1 + s.now.u2 / (offset * offset)) * error / (D - error / offset);
  const double want = away / (std::sqrt(s.now.output2) - away);
  CHECK(want > 0.02);
  CHECK(want < 0.5);
  for (const double epsilon : {0.99 * want, 1.01 * want}) {
    s.settings.epsilon = epsilon;
    const verdict v = budget::output::judge<TestType>(s.seen());
    CHECK_THAT(v.epsilon_achieved, WithinRel(want, 1e-4));
    CHECK(v.met == (epsilon > want));
    CHECK(v.budget == 12000);
    // The next look does not depend on the draw: twice the rows of each kind.
    CHECK(v.next.heavy == 800);
    CHECK(v.next.sampled == 24000);
  }
}

TEST_CASE("output: a finite-sample bound states nothing where it knows too little", "[budget][output]") {
  looked l;
  l.s.settings.heavy = 0.015;
  const auto nothing = [&](const vattn::look& seen) {
    const verdict v = budget::output::judge<budget::bernstein>(seen);
    CHECK(v.epsilon_achieved == std::numeric_limits<double>::infinity());
    CHECK_FALSE(v.met);
    CHECK(v.next.heavy == 60);  // its share is set
    CHECK(v.next.sampled == 600);
  };
  nothing(l.s.seen());  // 300 rows: the error may be all of D
  auto seen = l.s.seen();
  for (const auto kind : {vattn::score_kind::logit, vattn::score_kind::ranking}) {
    seen.scores.kind = kind;
    nothing(seen);  // no range of the values is known
  }
  // Enough rows for D, and values that cancel: the error may be all of the output.
  sampled_head s({.n = 24000, .dk = 8, .dv = 6}, 23, 0.3f, {.sinks = 16, .window = 16, .heavy = 400, .rows = 12000},
                 [](problem<float>& p) {
                   for (float& x : p.v) x -= 1;
                 });
  s.settings.epsilon = 0.9;
  const verdict v = budget::output::judge<budget::bernstein>(s.seen());
  CHECK(v.denominator_error < 0.5);
  CHECK(v.epsilon_achieved == std::numeric_limits<double>::infinity());
  CHECK_FALSE(v.met);
}
