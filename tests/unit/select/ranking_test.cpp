// Rankings against a sort, with ties and NaN.
#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

using namespace vattn::test;
using vattn::index_t;
using vattn::ordinal;
using vattn::ranking;

namespace {

// Score descending, NaN last, ties to the lower place.
std::vector<ordinal> sorted(const std::vector<float>& scores, index_t first, index_t last) {
  std::vector<ordinal> order(static_cast<std::size_t>(last - first));
  std::iota(order.begin(), order.end(), static_cast<ordinal>(first));
  std::stable_sort(order.begin(), order.end(), [&](ordinal a, ordinal b) {
    const float x = std::isnan(scores[a]) ? -infinity : scores[a], y = std::isnan(scores[b]) ? -infinity : scores[b];
    return x > y;
  });
  return order;
}

std::set<ordinal> as_set(std::span<const ordinal> places) { return {places.begin(), places.end()}; }

std::vector<float> make_scores(std::size_t n, int kind, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> scores(n);
  for (float& s : scores) {
    s = normal(random);
    if (kind == 1) s = static_cast<float>(static_cast<int>(random() % 5));  // many ties
    if (kind == 2 && random() % 3 == 0) s = not_a_number;                   // holes
    if (kind == 3) s = 1;                                                   // one tie
    if (kind == 4) s = random() % 2 ? -infinity : random() % 7 ? static_cast<float>(random() % 3) : infinity;
  }
  return scores;
}

}  // namespace

TEST_CASE("top_k takes what a stable sort puts first, ties and NaN included", "[select]") {
  std::mt19937 random(1);
  for (int kind = 0; kind < 5; ++kind) {
    for (const std::size_t n : {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{17}, std::size_t{1000}}) {
      const auto scores = make_scores(n, kind, random);
      const auto order = sorted(scores, 0, static_cast<index_t>(n));
      std::vector<ordinal> scratch(n);
      for (const index_t k : {-1, 0, 1, 2, 9, 16, 17, 500, 1000, 5000}) {
        CAPTURE(kind, n, k);
        const auto top = vattn::top_k(scores, k, scratch);
        const std::size_t want = std::min(n, static_cast<std::size_t>(std::max<index_t>(k, 0)));
        REQUIRE(top.size() == want);
        CHECK(as_set(top) == as_set(std::span(order).first(want)));
      }
    }
  }
}

TEST_CASE("a ranking grows: every extension is the prefix of the sort", "[select]") {
  std::mt19937 random(2);
  for (int kind = 0; kind < 5; ++kind) {
    const auto scores = make_scores(400, kind, random);
    const index_t first = 30, last = 370;
    const auto order = sorted(scores, first, last);
    std::vector<ordinal> storage(400);
    ranking r(scores, first, last, storage);
    CHECK(r.size() == 340);
    CHECK(r.bound() == scores[order.front()]);
    for (const index_t k : {1, 2, 5, 5, 3, 60, 61, 200, 339, 340, 999}) {
      const std::vector<ordinal> before(r.top().begin(), r.top().end());
      r.extend(k);
      const index_t want = std::max(std::min<index_t>(k, 340), static_cast<index_t>(before.size()));
      CAPTURE(kind, k);
      REQUIRE(r.count() == want);
      CHECK(as_set(r.top()) == as_set(std::span(order).first(static_cast<std::size_t>(want))));
      CHECK(std::equal(before.begin(), before.end(), r.top().begin()));  // never reordered
      index_t wrong = 0;
      for (index_t i = 0; i < 340; ++i) wrong += r.contains(order[static_cast<std::size_t>(i)]) != (i < want);
      CHECK(wrong == 0);
      if (want < 340) {
        for (index_t i = want; i < 340; ++i) wrong += !(r.score(order[static_cast<std::size_t>(i)]) <= r.bound());
        CHECK(wrong == 0);
      } else {
        CHECK(r.bound() == -infinity);
      }
    }
  }
}

TEST_CASE("at_rank looks ahead without ranking", "[select]") {
  std::mt19937 random(3);
  const auto scores = make_scores(300, 1, random);
  const auto order = sorted(scores, 0, 300);
  std::vector<ordinal> storage(300);
  ranking r(scores, 0, 300, storage);
  r.extend(20);
  for (const index_t k : {20, 21, 100, 50, 300, 22}) {
    CAPTURE(k);
    CHECK(r.at_rank(k) == order[static_cast<std::size_t>(k - 1)]);
    CHECK(r.count() == 20);
    const auto between = r.partitioned(20, k);
    CHECK(as_set(between) == as_set(std::span(order).subspan(20, static_cast<std::size_t>(k - 20))));
  }
  r.extend(50);
  CHECK(as_set(r.top()) == as_set(std::span(order).first(50)));
}

TEST_CASE("top_p is the shortest prefix of the sort that holds the mass", "[select]") {
  std::mt19937 random(4);
  for (int kind = 0; kind < 4; ++kind) {
    for (const std::size_t n : {std::size_t{1}, std::size_t{5}, std::size_t{63}, std::size_t{64}, std::size_t{65},
                                std::size_t{200}, std::size_t{3000}}) {
      auto scores = make_scores(n, kind, random);
      if (kind == 2) scores[0] = 1;  // at least one that is a number
      const auto order = sorted(scores, 0, static_cast<index_t>(n));
      std::vector<double> mass;
      const auto highest = static_cast<double>(scores[order[0]]);
      for (const ordinal place : order) {
        const float s = scores[place];
        const double x = std::isnan(s) ? 0.0 : std::exp(static_cast<double>(s) - highest);
        mass.push_back((mass.empty() ? 0.0 : mass.back()) + x);
      }
      std::vector<ordinal> scratch(n);
      for (const double p : {0.01, 0.1, 0.5, 0.9, 0.99, 0.9999}) {
        CAPTURE(kind, n, p);
        // With sums in another order the boundary may move by a rounding: accept a tie within 1e-12.
        std::size_t want = 0;
        while (want < n && (want == 0 || mass[want - 1] < p * mass.back() * (1 - 1e-12))) ++want;
        const auto top = vattn::top_p(scores, p, scratch);
        const bool same =
            top.size() == want || (top.size() == want + 1 && mass[want - 1] <= p * mass.back() * (1 + 1e-12));
        CAPTURE(top.size(), want);
        CHECK(same);
        CHECK(as_set(top) == as_set(std::span(order).first(top.size())));
      }
    }
  }
}

TEST_CASE("top_p stops at its limit, at everything, and at nothing", "[select]") {
  std::mt19937 random(5);
  const auto scores = make_scores(500, 0, random);
  const auto order = sorted(scores, 0, 500);
  std::vector<ordinal> scratch(500);
  ranking r(scores, 0, 500, scratch);
  CHECK(vattn::extend_to_mass(r, 0.999, 33) == 33);
  CHECK(as_set(r.top()) == as_set(std::span(order).first(33)));
  CHECK(vattn::top_p(scores, 1.5, scratch).size() == 500);
  CHECK(vattn::top_p(scores, 0, scratch).empty());
  const std::vector<float> holes(20, not_a_number);
  CHECK(vattn::top_p(holes, 0.9, scratch).empty());
  CHECK(vattn::top_p({}, 0.9, scratch).empty());
}

TEST_CASE("selectors say how many places they take, and of what kind their scores are", "[select]") {
  problem<float> p({.n = 1000, .dk = 8, .dv = 4}, 3, 2);
  const auto cache = p.cache();
  std::vector<float> q = p.q, scores(1000), centre(4);
  for (float& x : q) x *= p.options.scale;
  const vattn::query_row<decltype(cache.head(0, 0))> row{.head = cache.head(0, 0), .scaled_query = q.data()};
  const vattn::population tokens(0, 1000);
  std::vector<ordinal> storage(1000);
  vattn::config settings;
  settings.heavy = 0.05;

  const vattn::select::top_k<vattn::select::exact_logits> by_logit;
  const auto scored = by_logit.score(row, tokens, {scores, {}, centre, {}});
  REQUIRE(scored.ok);
  CHECK(scored.kind == vattn::score_kind::logit);
  const auto want = vattn::reference::attend(p.exactly(), 0, 0, 0);
  double worst = 0;
  for (std::size_t i = 0; i < 1000; ++i)
    worst = std::max(worst, std::abs(static_cast<double>(scores[i]) - want.logits[i]));
  CHECK(worst < 1e-5);
  ranking r(scores, 100, 900, storage);
  CHECK(by_logit.heavy_count(r, 1000, settings) == 50);
  settings.heavy = 1;
  CHECK(by_logit.heavy_count(r, 1000, settings) == 800);
  settings.heavy = 0;
  CHECK(by_logit.heavy_count(r, 1000, settings) == 0);

  vattn::select::top_p<> by_mass;
  by_mass.mass = 0.5;
  const index_t half = by_mass.heavy_count(r, 1000, settings);
  CHECK(half > 0);
  CHECK(half < 500);

  const vattn::select::none nothing;
  CHECK(nothing.score(row, tokens, {scores, {}, centre, {}}).kind == vattn::score_kind::ranking);
  CHECK(nothing.heavy_count(r, 1000, settings) == 0);

  // log(x·sqrt(‖v − c‖² + offset²)/unit)
  const vattn::select::exact_contributions contributions;
  const auto contribution = contributions.score(row, tokens, {scores, {}, centre, {}});
  REQUIRE(contribution.ok);
  REQUIRE(contribution.kind == vattn::score_kind::contribution);
  REQUIRE(contribution.value_offset > 0);
  worst = 0;
  for (std::size_t i = 0; i < 1000; ++i) {
    double away = std::pow(static_cast<double>(contribution.value_offset), 2);
    for (std::size_t j = 0; j < 4; ++j) away += std::pow(static_cast<double>(p.v[i * 4 + j] - centre[j]), 2);
    away /= std::pow(static_cast<double>(contribution.contribution_unit), 2);
    worst = std::max(worst, std::abs(static_cast<double>(scores[i]) - (want.logits[i] + 0.5 * std::log(away))));
  }
  CHECK(worst < 1e-5);

  p.k[8 * 500] = not_a_number;
  CHECK_FALSE(by_logit.score(row, tokens, {scores, {}, centre, {}}).ok);
  CHECK_FALSE(contributions.score(row, tokens, {scores, {}, centre, {}}).ok);
}
