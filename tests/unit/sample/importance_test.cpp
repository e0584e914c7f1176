// Poisson sampling by permanent numbers: nested, and with the probabilities that it states.
#include <algorithm>
#include <cmath>
#include <set>
#include <vattn/sample/importance.hpp>
#include <vector>

#include "support/catch.hpp"

namespace {

using namespace vattn;

struct setup {
  std::vector<float> scores, errors, weight, floor, reach, number;
  sample::importance pi;

  explicit setup(std::uint64_t seed)
      : scores(400), errors(400, 0.5f), weight(400), floor(400), reach(400), number(400), pi(weight, floor, reach) {
    for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = std::sin(static_cast<float>(i)) * 3;
    pi.prepare(scores, errors, [](index_t) { return 1.0f; }, 10, 390, 0.8, {}, 0.2);
    sample::draw_numbers(number, 10, 390, random_stream({.seed = seed}, 0));
  }
  [[nodiscard]] bool kept(index_t i, double c, double lambda) const {
    return static_cast<double>(number[static_cast<std::size_t>(i)]) < pi.probability(i, c, lambda, 0.1);
  }
};

}  // namespace

TEST_CASE("weights sum to one plus the defensive share", "[sample][importance]") {
  const setup s(1);
  double sum = 0;
  for (index_t i = 10; i < 390; ++i) sum += s.weight[static_cast<std::size_t>(i)];
  CHECK(std::abs(sum - 1.1) < 1e-4);
  CHECK(s.pi.probability(0, 1e-9, 0, 0) == 1);  // the exact set
  CHECK(s.pi.probability(399, 1e-9, 0, 0) == 1);
}

TEST_CASE("samples are nested, and in the end everything is in", "[sample][importance]") {
  const setup s(2);
  std::set<index_t> in;
  for (const auto& next : {std::pair{5.0, 0.0}, {5.0, 0.2}, {40.0, 0.2}, {1e9, 0.2}}) {
    std::set<index_t> now;
    for (index_t i = 10; i < 390; ++i) {
      if (s.kept(i, next.first, next.second)) now.insert(i);
    }
    CHECK(std::includes(now.begin(), now.end(), in.begin(), in.end()));
    in = now;
  }
  CHECK(in.size() == 380);
}

TEST_CASE("a prior caps the probabilities, and sums over its tokens stand for all", "[sample][importance]") {
  setup s(3);
  // Every other token was kept, with probability one half.
  std::vector<float> prior(400, 0.5f);
  for (std::size_t i = 0; i < 400; ++i) s.scores[i] = static_cast<float>(i % 2);
  sample::importance pi(s.weight, s.floor, s.reach, prior);
  pi.prepare(s.scores, s.errors, [](index_t) { return 1.0f; }, 10, 390, 1, {}, 0.2);
  double sum = 0;
  for (index_t i = 10; i < 390; ++i) {
    sum += static_cast<double>(s.weight[static_cast<std::size_t>(i)]) / 0.5;
    CHECK(pi.probability(i, 1e9, 0, 0) == 0.5);
  }
  CHECK(std::abs(sum - 1.1) < 1e-4);
  CHECK(pi.probability(3, 0, 0, 0) == 1);  // the exact set has no prior
}

TEST_CASE("tokens are in the sample as often as stated", "[sample][importance]") {
  std::vector<long> hits(400);
  constexpr long draws = 4000;
  const double c = 30, lambda = 0.02;
  for (long d = 0; d < draws; ++d) {
    const setup s(static_cast<std::uint64_t>(d));
    for (index_t i = 10; i < 390; ++i) hits[static_cast<std::size_t>(i)] += s.kept(i, c, lambda);
  }
  const setup s(0);
  double chi2 = 0;
  long cells = 0;
  for (index_t i = 10; i < 390; ++i) {
    const double p = s.pi.probability(i, c, lambda, 0.1);
    if (p >= 1) {
      CHECK(hits[static_cast<std::size_t>(i)] == draws);
      continue;
    }
    chi2 += std::pow(static_cast<double>(hits[static_cast<std::size_t>(i)]) - draws * p, 2) / (draws * p * (1 - p));
    ++cells;
  }
  REQUIRE(cells > 200);
  const auto dof = static_cast<double>(cells);
  CHECK(std::abs(chi2 - dof) < 5 * std::sqrt(2 * dof));
}
