// Rows of unequal probability against direct double-precision sums over explicit terms.
#include "vattn/estimate/weighted.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "vattn/estimate/exact.hpp"

using namespace vattn::test;
using vattn::index_t;
using vattn::ordinal;
using vattn::softmax_state;
using vattn::weighted_row;

namespace {

// `fixed` tokens are read exactly; of the rest every second with a probability of its own, every fifth of them for
// certain.
struct weighted_head {
  using head_view = decltype(std::declval<vattn::kv_view<float>>().head(0, 0));

  weighted_head(const shape& s, unsigned seed, float spread, index_t fixed)
      : p(s, seed, spread), tokens(0, s.n), output(static_cast<std::size_t>(s.dv)), storage(output), part(output) {
    for (float& x : p.q) x *= p.options.scale;
    softmax_state scratch(part);
    exact_storage = output;
    exact = softmax_state(exact_storage);
    REQUIRE(vattn::accumulate_exact(
        row, fixed, [](index_t i) { return i; }, exact, scratch, true));
    for (index_t i = fixed; i < s.n; i += 2) {
      const float probability = i % 5 == 0 ? 1.0f : 0.1f + 0.8f * static_cast<float>(i) / static_cast<float>(s.n);
      rows.push_back({static_cast<ordinal>(i), row.logit(i), probability, -1});
    }
  }
  void look(std::uint32_t stream = 0) {
    std::vector<float> groups(vattn::weighted_storage(output.size()), not_a_number);
    state = softmax_state(storage);
    now = vattn::estimate_weighted(row, tokens, rows, exact, state, output, groups, {{1, 0, 0}, stream});
  }

  problem<float> p;
  vattn::population tokens;
  vattn::query_row<head_view> row{.head = p.cache().head(0, 0), .scaled_query = p.q.data()};
  std::vector<float> output, storage, part, exact_storage;
  softmax_state exact, state;
  std::vector<weighted_row> rows;
  vattn::stats::evidence now;
};

}  // namespace

TEST_CASE("weighted rows: the estimate and its moments are the sums they stand for", "[estimate][weighted]") {
  constexpr std::size_t dv = 6;
  for (const index_t fixed : {index_t{0}, index_t{40}}) {
    weighted_head s({.n = 400, .dk = 8, .dv = dv}, 7, 2.0f, fixed);
    s.look();
    const auto value = [&](std::size_t i, std::size_t j) { return static_cast<double>(s.p.v[i * dv + j]); };
    vattn::reference::weighted_output sums(dv);
    const auto add = [&](std::size_t i, double x) { sums.add(x, [&](std::size_t j) { return value(i, j); }); };
    const auto weight = [&](index_t i) { return std::exp(static_cast<double>(s.row.logit(i)) - s.now.reference); };
    for (index_t i = 0; i < fixed; ++i) add(static_cast<std::size_t>(i), weight(i));
    index_t certain = 0;
    for (const weighted_row& r : s.rows) {
      add(r.place, weight(r.place) / static_cast<double>(r.probability));
      certain += r.probability >= 1;
    }
    sums.finish();
    const double D = sums.denominator, power = sums.power, output2 = sums.output2;
    const std::vector<double>& o = sums.output;
    CHECK_THAT(s.now.denominator, WithinRel(D, 1e-6));
    CHECK_THAT(s.now.power, WithinRel(power / D, 1e-6));
    CHECK_THAT(s.now.output2, WithinRel(output2, 1e-6));
    CHECK(s.now.certain == certain);
    CHECK(certain > 10);
    CHECK(vattn::reference::relative_error(s.output.data(), o) < 1e-6);
    std::vector<float> finished(dv);
    CHECK_THAT(static_cast<double>(s.state.finish(finished)), WithinRel(s.now.reference + std::log(D), 1e-6));
    CHECK(finished == s.output);

    double variance = 0, fourth = 0, ones = 0;
    std::vector<double> third(dv);
    for (const weighted_row& r : s.rows) {
      const double x = weight(r.place) / D, q = static_cast<double>(r.probability);
      if (q >= 1) {
        CHECK(r.spread == -1);  // what is certain has no part in the error
        continue;
      }
      double norm2 = 0;
      for (std::size_t j = 0; j < dv; ++j) norm2 += std::pow(value(r.place, j) - o[j], 2);
      CHECK_THAT(static_cast<double>(r.spread), WithinRel(x * x * norm2, 1e-4));
      const double t = (1 - q) / (q * q) * x * x * norm2;
      variance += t, fourth += t * t, ones += (1 - q) / (q * q) * x * x;
      // Cov(1{S}·t, 1{S}/π·Y) = t (1 − π) Y for every row of the population: over π for those of the sample.
      for (std::size_t j = 0; j < dv; ++j) third[j] += t * (1 - q) / q * x * (value(r.place, j) - o[j]);
    }
    double third2 = 0;
    for (const double x : third) third2 += x * x;
    CHECK_THAT(s.now.variance, WithinRel(variance, 1e-5));
    CHECK_THAT(s.now.denominator_variance, WithinRel(ones, 1e-5));
    CHECK_THAT(s.now.dof, WithinRel(2 * variance * variance / fourth, 1e-5));
    CHECK_THAT(s.now.skew, WithinRel(std::sqrt(third2) / variance, 1e-4));
  }
}

TEST_CASE("weighted rows: the dimension is that of the values", "[estimate][weighted]") {
  weighted_head line({.n = 600, .dk = 8, .dv = 1}, 3, 0.1f, 10);
  line.look();
  CHECK_THAT(line.now.dimension, WithinRel(1, 1e-6));  // exactly one, however few the groups
  // Of equal spread along dv axes: dv on average over the signs; with one axis far wider, near 1.
  weighted_head round({.n = 2000, .dk = 8, .dv = 12}, 3, 0.1f, 10);
  double inverse = 0;
  constexpr std::uint32_t looks = 24;
  for (std::uint32_t i = 0; i < looks; ++i) {
    round.look(i);
    CHECK(round.now.dimension <= 12);
    inverse += 1 / round.now.dimension / looks;
  }
  CHECK_THAT(1 / inverse, WithinRel(12, 0.15));
  for (std::size_t i = 0; i < round.p.v.size(); i += 12) round.p.v[i] *= 30;
  round.look();
  CHECK(round.now.dimension < 1.2);
}

TEST_CASE("weighted rows: all certain is exact, with no error", "[estimate][weighted]") {
  weighted_head s({.n = 100, .dk = 8, .dv = 5}, 5, 1.0f, 100);
  s.rows.assign(1, {0, -30, 1, -1});  // one row that changes nothing in float
  s.look();
  CHECK(s.now.variance == 0);
  CHECK(s.now.denominator_variance == 0);
  CHECK(s.now.skew == 0);
  CHECK(s.now.dimension == 1);
  CHECK(std::isinf(s.now.dof));
  CHECK(s.now.certain == 1);
  s.p.options.scale = 1;  // it is in the query already
  const auto want = vattn::reference::attend(s.p.exactly(), 0, 0, 0);
  CHECK(vattn::reference::relative_error(s.output.data(), want.output) < 2e-6);
}
