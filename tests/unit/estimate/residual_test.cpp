// The sampled part against direct double-precision sums over explicit terms.
#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "support/looks.hpp"

using namespace vattn::test;
using vattn::index_t;
using vattn::ordinal;
using vattn::residual_moments;

TEMPLATE_TEST_CASE("one-pass moments are the sums they stand for", "[estimate][moments]", float, Eigen::half) {
  constexpr std::size_t dv = 7;
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> storage(residual_moments::storage_size(dv)), centre(dv);
  for (float& c : centre) c = 1 + 0.1f * normal(random);
  residual_moments moments(storage, dv);
  // Logits that rise far above the reference force the sums to be rescaled half-way.
  for (const float rise : {0.0f, 30.0f}) {
    moments.clear(centre, 0.5f);
    std::vector<std::vector<TestType>> rows;
    std::vector<float> logits;
    for (int i = 0; i < 150; ++i) {
      rows.emplace_back();
      for (std::size_t j = 0; j < dv; ++j) rows.back().push_back(TestType(1 + normal(random)));
      logits.push_back(normal(random) + (i == 80 ? rise : 0));
      moments.add(logits.back(), std::span<const TestType>(rows.back()));
    }
    const residual_moments::sums s = moments.total();
    const double m = moments.reference_logit();
    double S = 0, A = 0, C = 0, Q = 0, P = 0;
    std::vector<double> N(dv), B(dv);
    std::vector<double> group_rows(residual_moments::groups);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const double x = std::exp(static_cast<double>(logits[i]) - m);
      double r2 = 0;
      for (std::size_t j = 0; j < dv; ++j) {
        const double r = static_cast<double>(static_cast<float>(rows[i][j])) - static_cast<double>(centre[j]);
        r2 += r * r;
        N[j] += x * r;
        B[j] += x * x * r;
      }
      S += x, A += x * x, C += x * x * r2, Q += x * x * r2 * x * x * r2, P += x * r2;
    }
    CHECK(s.rows == 150);
    CHECK_THAT(s.S, WithinRel(S, 1e-5));
    CHECK_THAT(s.A, WithinRel(A, 1e-5));
    CHECK_THAT(s.C, WithinRel(C, 1e-5));
    CHECK_THAT(s.Q, WithinRel(Q, 2e-5));
    CHECK_THAT(s.P, WithinRel(P, 1e-5));
    CHECK(vattn::reference::relative_error(moments.first().data(), N) < 1e-4);
    CHECK(vattn::reference::relative_error(moments.second().data(), B) < 1e-4);
    double rows_in_groups = 0;
    for (std::size_t g = 0; g < residual_moments::groups; ++g) {
      CHECK(moments.group(g).rows >= 9);  // dealt in turn
      rows_in_groups += moments.group(g).rows;
    }
    CHECK(rows_in_groups == 150);
  }
}

namespace {

// Explicit terms Y_i = x_i (v_i − ô)/D̂ of the sampled rows, in the order in which they were drawn.
std::vector<std::vector<double>> explicit_terms(const sampled_head& s) {
  std::vector<std::vector<double>> terms;
  const std::size_t dv = static_cast<std::size_t>(s.p.s.dv);
  for (const vattn::drawn_row& row : s.sample.rows()) {
    terms.emplace_back();
    const double x = std::exp(static_cast<double>(row.logit) - s.now.reference);
    for (std::size_t j = 0; j < dv; ++j) {
      const double o = static_cast<double>(s.centre[j]) + static_cast<double>(s.offset[j]);
      const auto v = static_cast<double>(s.p.v[row.place * dv + j]);
      terms.back().push_back(x * (v - o) / s.now.denominator);
    }
  }
  return terms;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t j = 0; j < a.size(); ++j) sum += a[j] * b[j];
  return sum;
}

}  // namespace

TEST_CASE("the estimate is the exact part plus N/m times the sample", "[estimate][residual]") {
  sampled_head s({.n = 900, .dk = 8, .dv = 6}, 11, 2.0f, {.sinks = 20, .window = 30, .heavy = 40, .rows = 150});
  REQUIRE(s.sample.count() == 150);
  REQUIRE(s.sample.population_size() == 900 - 20 - 30 - 40);

  const auto want = vattn::reference::attend(s.p.exactly(), 0, 0, 0);
  std::vector<double> weight(900, 0.0);
  for (index_t i = 0; i < 20; ++i) weight[static_cast<std::size_t>(i)] = 1;
  for (index_t i = 870; i < 900; ++i) weight[static_cast<std::size_t>(i)] = 1;
  for (const ordinal place : s.order.top()) weight[place] += 1;
  for (const vattn::drawn_row& row : s.sample.rows()) weight[row.place] += 810.0 / 150.0;
  CHECK(*std::max_element(weight.begin(), weight.end()) == 810.0 / 150.0);  // nothing is counted twice

  vattn::reference::weighted_output sums(6);
  for (std::size_t i = 0; i < 900; ++i) {
    sums.add(weight[i] * std::exp(want.logits[i] - s.now.reference), [&](std::size_t j) { return s.p.v[i * 6 + j]; });
  }
  sums.finish();
  const double D = sums.denominator, power = sums.power, output2 = sums.output2;
  const std::vector<double>& N = sums.output;
  CHECK_THAT(s.now.denominator, WithinRel(D, 1e-5));
  CHECK_THAT(s.now.power, WithinRel(power / D, 1e-5));
  CHECK_THAT(s.now.output2, WithinRel(output2, 1e-5));
  std::vector<float> output(6);
  for (std::size_t j = 0; j < 6; ++j) output[j] = s.centre[j] + s.offset[j];
  CHECK(vattn::reference::relative_error(output.data(), N) < 1e-5);

  vattn::add_residual(s.state, s.now, s.moments);
  const double lse = s.state.finish(output);
  CHECK(vattn::reference::relative_error(output.data(), N) < 1e-5);
  CHECK_THAT(lse, WithinAbs(s.now.reference + std::log(D), 1e-5));
}

TEST_CASE("linearised variance, reliability and dimension against explicit terms", "[estimate][linearised]") {
  for (const unsigned seed : {1u, 2u, 3u}) {
    for (const index_t sinks : {0, 16}) {  // without an exact part the centre is the origin
      CAPTURE(seed, sinks);
      sampled_head s({.n = 700, .dk = 8, .dv = 9}, seed, 2.5f, {.sinks = sinks, .window = 0, .heavy = 0, .rows = 240});
      const auto terms = explicit_terms(s);
      const vattn::linearised_terms y = vattn::linearise(s.now, s.moments, s.offset);

      std::vector<double> mean(9, 0.0);
      for (const auto& t : terms) {
        for (std::size_t j = 0; j < 9; ++j) mean[j] += t[j] / 240;
      }
      double variance = 0;
      for (const auto& t : terms) {
        for (std::size_t j = 0; j < 9; ++j) variance += (t[j] - mean[j]) * (t[j] - mean[j]) / 239;
      }
      CHECK_THAT(y.variance, WithinRel(variance, 1e-4));

      // By rows, uncentred, about c; by groups about ô.
      double t1 = 0, t2 = 0;
      for (const vattn::drawn_row& row : s.sample.rows()) {
        const double x = std::exp(static_cast<double>(row.logit) - s.now.reference);
        const double t = x * x * static_cast<double>(row.spread);
        t1 += t;
        t2 += t * t;
      }
      constexpr std::size_t G = residual_moments::groups;
      std::vector<double> square(G, 0.0);
      std::vector<std::vector<double>> group(G, std::vector<double>(9, 0.0));
      for (std::size_t i = 0; i < terms.size(); ++i) {
        square[i % G] += dot(terms[i], terms[i]);
        for (std::size_t j = 0; j < 9; ++j) group[i % G][j] += terms[i][j];
      }
      double s1 = 0, s2 = 0;
      for (const double x : square) {
        s1 += x;
        s2 += x * x;
      }
      const double by_groups = (s2 / (s1 * s1) - 1.0 / G) * G / (G - 1.0);
      CHECK_THAT(y.dof, WithinRel(2 / std::max(t2 / (t1 * t1), by_groups), 1e-3));

      // Covariance of the groups' sums, then the unbiased Tr(Σ²) and (Tr Σ)².
      std::vector<double> centre(9, 0.0);
      for (const auto& g : group) {
        for (std::size_t j = 0; j < 9; ++j) centre[j] += g[j] / G;
      }
      double trace = 0, trace_square = 0;
      for (std::size_t a = 0; a < 9; ++a) {
        for (std::size_t b = 0; b < 9; ++b) {
          double c = 0;
          for (const auto& g : group) c += (g[a] - centre[a]) * (g[b] - centre[b]) / (G - 1.0);
          if (a == b) trace += c;
          trace_square += c * c;
        }
      }
      const double unbiased =
          (G - 1.0) * (G - 1.0) / ((G - 2.0) * (G + 1.0)) * (trace_square - trace * trace / (G - 1.0));
      const double dimension = unbiased > 0 ? std::clamp(trace * trace / unbiased - 2 / (G - 1.0), 1.0, 9.0) : 1.0;
      CHECK_THAT(y.dimension, WithinRel(dimension, 2e-3));
    }
  }
}

TEST_CASE("the effective dimension is near the truth of known spectra", "[estimate][linearised]") {
  // Equal keys, so that Y is v − ô: values of a diagonal covariance whose (Tr Σ)²/Tr(Σ²) is known.
  struct spectrum {
    const char* name;
    std::vector<float> deviation;
    double dimension;
  };
  const std::vector<spectrum> spectra{
      {"isotropic", {1, 1, 1, 1, 1, 1}, 6.0},
      {"one direction", {5, 0, 0, 0, 0, 0}, 1.0},
      {"two of six", {2, 2, 0, 0, 0, 0}, 2.0},
      {"falling", {4, 2, 1, 0.5f, 0.25f, 0.125f}, 0},  // filled in below
  };
  for (const spectrum& c : spectra) {
    double trace = 0, square = 0;
    for (const float d : c.deviation) {
      trace += static_cast<double>(d * d);
      square += static_cast<double>(d * d * d * d);
    }
    const double truth = c.dimension > 0 ? c.dimension : trace * trace / square;
    CAPTURE(c.name, truth);
    CHECK_THAT(trace * trace / square, WithinRel(truth, 1e-6));
    // Trials are averaged on 1/ν₁, of which the estimate is a ratio of nearly unbiased parts.
    double inverse = 0;
    constexpr int trials = 200;
    for (int trial = 0; trial < trials; ++trial) {
      sampled_head s({.n = 400, .dk = 2, .dv = 6}, static_cast<unsigned>(trial) + 1, 0.0f, {.rows = 160},
                     [&](problem<float>& p) {
                       for (std::size_t i = 0; i < p.v.size(); ++i) p.v[i] = 1 + (p.v[i] - 1) * c.deviation[i % 6];
                     });
      inverse += 1 / vattn::linearise(s.now, s.moments, s.offset).dimension / trials;
    }
    CHECK_THAT(1 / inverse, WithinRel(truth, 0.25));
    // Here an error would be one of every quantile: nothing else hides it.
    if (truth == 1) CHECK_THAT(1 / inverse, WithinRel(1.0, 1e-3));
  }
}

TEST_CASE("zero variance: no spread, whatever the logits", "[estimate][linearised]") {
  sampled_head s({.n = 300, .dk = 4, .dv = 5}, 4, 2.0f, {.sinks = 10, .rows = 100},
                 [](problem<float>& p) { std::fill(p.v.begin(), p.v.end(), 3.25f); });
  const vattn::linearised_terms y = vattn::linearise(s.now, s.moments, s.offset);
  CHECK(y.variance < 1e-12);
  CHECK(std::isfinite(y.dimension));
  CHECK_FALSE(std::isnan(y.dof));
}

TEST_CASE("growing equals drawing at once, and a smaller sample is a prefix", "[estimate][residual]") {
  const sampled_head once({.n = 800, .dk = 4, .dv = 4}, 3, 1.0f, {.sinks = 5, .window = 7, .heavy = 30, .rows = 200});
  sampled_head grown({.n = 800, .dk = 4, .dv = 4}, 3, 1.0f, {.sinks = 5, .window = 7, .heavy = 30, .rows = 60});
  REQUIRE(grown.sample.grow(61));
  REQUIRE(grown.sample.grow(200));
  REQUIRE(grown.sample.count() == 200);
  for (std::size_t i = 0; i < 200; ++i) CHECK(grown.sample.rows()[i].place == once.sample.rows()[i].place);
  grown.look();
  CHECK_THAT(grown.now.denominator, WithinRel(once.now.denominator, 1e-6));
}

TEST_CASE("shedding rows that became exact leaves the sample of the smaller residual", "[estimate][residual]") {
  sampled_head s({.n = 600, .dk = 4, .dv = 4}, 6, 2.0f, {.sinks = 8, .window = 8, .heavy = 20, .rows = 200});
  std::vector<ordinal> before;
  for (const auto& row : s.sample.rows()) before.push_back(row.place);
  s.order.extend(90);
  const std::vector<ordinal> exact(s.order.top().begin(), s.order.top().end());
  s.sample.shed();
  std::vector<ordinal> want;
  for (const ordinal place : before) {
    if (std::find(exact.begin(), exact.end(), place) == exact.end()) want.push_back(place);
  }
  REQUIRE(want.size() < before.size());
  REQUIRE(s.sample.count() == static_cast<index_t>(want.size()));
  for (std::size_t i = 0; i < want.size(); ++i) CHECK(s.sample.rows()[i].place == want[i]);
  CHECK(s.moments.total().rows == static_cast<double>(want.size()));
  CHECK(s.sample.population_size() == 600 - 16 - 90);
  REQUIRE(s.sample.grow(100000));  // cut to all that is left
  CHECK(s.sample.count() == s.sample.population_size());
}

TEST_CASE("D̂ and N̂ are unbiased, with and without replacement, after shedding too", "[estimate][residual]") {
  const auto check = [](auto tag, bool shed) {
    using sampler = typename decltype(tag)::type;
    constexpr int trials = 3000;
    double mean = 0, square = 0, truth = 0;
    for (int trial = 0; trial < trials; ++trial) {
      // The same problem each time, another draw.
      basic_sampled_head<sampler> s({.n = 120, .dk = 4, .dv = 2}, 5, 1.5f,
                                    {.sinks = 4, .window = 4, .heavy = 6, .rows = 25, .seed = std::uint64_t(trial)});
      if (shed) {
        s.extend_heavy(12);
        s.sample.shed();
        s.look();
      }
      const auto want = vattn::reference::attend(s.p.exactly(), 0, 0, 0);
      truth = want.denominator;
      const double d = s.now.denominator * std::exp(s.now.reference - want.max_logit);
      mean += d / trials;
      square += d * d / trials;
    }
    const double error = std::sqrt((square - mean * mean) / trials);
    CAPTURE(mean, truth, error);
    CHECK(error > 0);
    CHECK(error < 0.01 * truth);
    CHECK(std::abs(mean - truth) < 4 * error);
  };
  check(type_tag<vattn::sample::uniform_without_replacement>{}, false);
  check(type_tag<vattn::sample::uniform_without_replacement>{}, true);
  check(type_tag<vattn::sample::uniform_with_replacement>{}, false);
}
