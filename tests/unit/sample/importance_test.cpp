// Poisson sampling by permanent numbers: nested, and with the probabilities that it states.
#include <cmath>
#include <set>
#include <vattn/sample/importance.hpp>
#include <vector>

#include "support/catch.hpp"

namespace {

using namespace vattn;

struct setup {
  std::vector<float> scores, errors, weight, floor, number;
  sample::importance pi;

  explicit setup(std::uint64_t seed)
      : scores(400), errors(400, 0.5f), weight(400), floor(400), number(400), pi(weight, floor, number) {
    for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = std::sin(static_cast<float>(i)) * 3;
    pi.prepare(
        scores, errors, [](index_t) { return 1.0f; }, 10, 390, 0.8, {}, random_stream({.seed = seed}, 0));
  }
};

}  // namespace

TEST_CASE("weights sum to one plus the defensive share", "[sample][importance]") {
  const setup s(1);
  double sum = 0;
  for (index_t i = 10; i < 390; ++i) sum += s.weight[static_cast<std::size_t>(i)];
  CHECK(std::abs(sum - 1.1) < 1e-4);
  CHECK(s.pi.probability(0, 1e-9, 0) == 1);  // the exact set
  CHECK(s.pi.probability(399, 1e-9, 0) == 1);
}

TEST_CASE("samples are nested and each growth is visited once", "[sample][importance]") {
  const setup s(2);
  std::set<index_t> in;
  double c = 0, lambda = 0;
  for (const auto& next : {std::pair{5.0, 0.0}, {5.0, 0.2}, {40.0, 0.2}, {1e9, 0.2}}) {
    s.pi.enter(next.first, next.second, c, lambda, [&](index_t i) { CHECK(in.insert(i).second); });
    c = next.first;
    lambda = next.second;
  }
  CHECK(in.size() == 380);  // everything is in at the end, nothing of the exact set is
}

TEST_CASE("tokens are in the sample as often as stated", "[sample][importance]") {
  std::vector<long> hits(400);
  constexpr long draws = 4000;
  const double c = 30, lambda = 0.02;
  for (long d = 0; d < draws; ++d) {
    const setup s(static_cast<std::uint64_t>(d));
    s.pi.enter(c, lambda, 0, 0, [&](index_t i) { ++hits[static_cast<std::size_t>(i)]; });
  }
  const setup s(0);
  double chi2 = 0;
  long cells = 0;
  for (index_t i = 10; i < 390; ++i) {
    const double p = s.pi.probability(i, c, lambda);
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
