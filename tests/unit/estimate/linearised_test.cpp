// The linearised error against explicit terms of the sampled rows.
#include "vattn/estimate/linearised.hpp"

#include <algorithm>
#include <vector>

#include "support/catch.hpp"
#include "support/looks.hpp"

using namespace vattn::test;
using vattn::index_t;
using vattn::residual_moments;

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
