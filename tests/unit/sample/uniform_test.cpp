// Uniform samples: permutations exactly, uniformity by chi-square. All draws are pinned by their seeds.
#include "vattn/sample/uniform.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "support/catch.hpp"

using vattn::draw_key;
using vattn::ordinal;
using vattn::random_stream;
using without = vattn::sample::uniform_without_replacement;
using with = vattn::sample::uniform_with_replacement;

namespace {

// Quantile 1 - 1e-4 of chi-square, Wilson and Hilferty's approximation.
double chi2_limit(double dof) {
  const double a = 2 / (9 * dof);
  return dof * std::pow(1 - a + 3.719 * std::sqrt(a), 3);
}

std::vector<ordinal> draw(ordinal n, ordinal count, std::uint64_t seed) {
  std::vector<std::uint64_t> table(without::table_size(n));
  without sampler(n, random_stream(draw_key{.seed = seed}, 0), table);
  std::vector<ordinal> drawn;
  for (ordinal i = 0; i < count; ++i) drawn.push_back(sampler.next());
  return drawn;
}

}  // namespace

TEST_CASE("without replacement, all n draws are a permutation", "[sample]") {
  // Around the sizes at which the table grows: 1024, then by fours, half full.
  for (const ordinal n : {1u, 2u, 3u, 10u, 511u, 512u, 513u, 1000u, 2047u, 2048u, 2049u, 5000u, 8191u, 8193u, 60000u}) {
    for (const std::uint64_t seed : {1u, 2u}) {
      auto drawn = draw(n, n, seed);
      CAPTURE(n, seed);
      if (n > 100) CHECK_FALSE(std::is_sorted(drawn.begin(), drawn.end()));
      std::sort(drawn.begin(), drawn.end());
      ordinal wrong = 0;
      for (ordinal i = 0; i < n; ++i) wrong += drawn[i] != i;
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("the permutation is Fisher-Yates of the stream, whatever the table does", "[sample]") {
  for (const ordinal n : {7u, 600u, 9000u}) {
    std::vector<ordinal> places(n), want;
    for (ordinal i = 0; i < n; ++i) places[i] = i;
    random_stream stream(draw_key{.seed = 77}, 0);
    for (ordinal i = 0; i < n; ++i) {
      std::swap(places[i], places[i + stream.below(n - i)]);
      want.push_back(places[i]);
    }
    CHECK(draw(n, n, 77) == want);
  }
}

TEST_CASE("every place is equally likely to be in a prefix, and every pair", "[sample]") {
  constexpr ordinal n = 12, m = 5;
  constexpr int trials = 30000;
  std::vector<double> single(n), pair(n * n), order(n * n);
  for (int t = 0; t < trials; ++t) {
    const auto drawn = draw(n, m, static_cast<std::uint64_t>(t));
    for (std::size_t i = 0; i < m; ++i) {
      ++single[drawn[i]];
      for (std::size_t j = 0; j < i; ++j) ++pair[std::min(drawn[i], drawn[j]) * n + std::max(drawn[i], drawn[j])];
    }
    ++order[drawn[3] * n + drawn[4]];
  }
  // Counts without replacement vary less than multinomial ones: the variance of an inclusion count is
  // T p (1 - p), and the n of them sum to T m; so Σ(c - Tp)²/(T p (1 - p))·(n - 1)/n is chi-square(n - 1).
  const double p = double{m} / n;
  double chi2 = 0;
  for (const double c : single) chi2 += (c - trials * p) * (c - trials * p) / (trials * p * (1 - p)) * (n - 1) / n;
  CHECK(chi2 < chi2_limit(n - 1));
  CHECK(chi2 > 0.5);

  // Pairs of one draw overlap, so the cells are dependent; the mean of the sum is below that of independent
  // cells (by 1 - p2), and their limit is far above it.
  const double p2 = double{m} * (m - 1) / (double{n} * (n - 1));
  chi2 = 0;
  for (ordinal a = 0; a < n; ++a) {
    for (ordinal b = a + 1; b < n; ++b) {
      const double c = pair[a * n + b];
      chi2 += (c - trials * p2) * (c - trials * p2) / (trials * p2);
    }
  }
  CHECK(chi2 < chi2_limit(n * (n - 1) / 2.0 - 1));

  // Ordered pairs at two given draws are multinomial.
  const double p3 = 1.0 / (double{n} * (n - 1));
  chi2 = 0;
  for (ordinal a = 0; a < n; ++a) {
    for (ordinal b = 0; b < n; ++b) {
      const double c = order[a * n + b];
      if (a == b) CHECK(c == 0);
      if (a != b) chi2 += (c - trials * p3) * (c - trials * p3) / (trials * p3);
    }
  }
  CHECK(chi2 < chi2_limit(n * (n - 1) - 1.0));
}

TEST_CASE("what is left of a sample after dropping a fixed subset is uniform", "[sample]") {
  // The first 4 draws that fall outside {0, 3, 7}: each of the other nine places is in them equally often.
  constexpr int trials = 20000;
  std::vector<double> count(12);
  for (int t = 0; t < trials; ++t) {
    int kept = 0;
    for (const ordinal place : draw(12, 12, static_cast<std::uint64_t>(t) + 500000)) {
      if (place == 0 || place == 3 || place == 7) continue;
      ++count[place];
      if (++kept == 4) break;
    }
  }
  const double p = 4.0 / 9;
  double chi2 = 0;
  for (std::size_t i = 0; i < 12; ++i) {
    if (i == 0 || i == 3 || i == 7) continue;
    chi2 += (count[i] - trials * p) * (count[i] - trials * p) / (trials * p * (1 - p)) * 8 / 9;
  }
  CHECK(chi2 < chi2_limit(8));
}

TEST_CASE("with replacement draws are independent and uniform", "[sample]") {
  constexpr ordinal n = 10;
  constexpr int draws = 50000;
  with sampler(n, random_stream(draw_key{.seed = 3}, 0), {});
  std::vector<double> single(n), pair(n * n);
  ordinal last = sampler.next();
  for (int i = 0; i < draws; ++i) {
    const ordinal place = sampler.next();
    REQUIRE(place < n);
    ++single[place];
    if (i % 2 == 0) ++pair[last * n + place];
    last = place;
  }
  const auto chi2 = [](const std::vector<double>& counts, double total) {
    const double want = total / static_cast<double>(counts.size());
    double sum = 0;
    for (const double c : counts) sum += (c - want) * (c - want) / want;
    return sum;
  };
  CHECK(chi2(single, draws) < chi2_limit(n - 1));
  CHECK(chi2(pair, draws / 2.0) < chi2_limit(n * n - 1));
  CHECK(with::with_replacement);
  CHECK_FALSE(without::with_replacement);
}
