// The estimators themselves: unbiased sums, stated inclusion probabilities, calibrated certificates.
#include "stat/binomial.hpp"
#include "stat/experiment.hpp"
#include "support/catch.hpp"

namespace {

using namespace vattn;
using namespace vattn::stat;

struct with_replacement_policy : remembering<ranked_policy> {
  using sampler = sample::uniform_with_replacement;
};

// One look, kept whatever it says: the sample size is then fixed, and the sums must be unbiased.
config one_look() {
  config c;
  c.epsilon = 1e-6;
  c.heavy = 0.01;
  c.base = 0.03;
  c.max_rounds = 1;
  c.accept_last = true;
  return c;
}

template <class Policy>
void require_unbiased(const char* regime) {
  const problem<float> p(regime, "mean", 4096, 32, 11);
  constexpr long draws = 2000;
  const auto dv = static_cast<std::size_t>(p.dv());
  double sum = 0, square = 0;
  std::vector<double> mean(dv), var(dv);
  for_each_draw<Policy>(p, p.selector(), one_look(), draws, 0, [&](const draw& d, const std::vector<float>& out) {
    sum += d.denominator_error;
    square += d.denominator_error * d.denominator_error;
    for (std::size_t j = 0; j < dv; ++j) {
      const double n = out[j] * (1 + d.denominator_error) - p.output()[j];  // (N̂ − N)/D
      mean[j] += n / draws;
      var[j] += n * n / draws;
    }
  });
  INFO(regime);
  const double average = sum / draws, deviation = std::sqrt((square / draws - average * average) / draws);
  REQUIRE(deviation > 0);
  CHECK(std::abs(average) < 4 * deviation);
  // Σ_j (mean_j / se_j)² over 32 correlated coordinates: at most 32 times a one-dimensional chi-square.
  double worst = 0;
  for (std::size_t j = 0; j < dv; ++j)
    worst = std::max(worst, mean[j] * mean[j] / ((var[j] - mean[j] * mean[j]) / draws));
  CHECK(worst < 4.7 * 4.7);  // 32 two-sided normal tests at 1e-4 together
}

}  // namespace

TEST_CASE("numerator and denominator estimates are unbiased", "[stat][unbiased]") {
  for (const char* regime : {"flat", "gauss2", "spikes", "plateau"}) {
    require_unbiased<remembering<ranked_policy>>(regime);
    require_unbiased<with_replacement_policy>(regime);
  }
}

TEST_CASE("every residual token is sampled with the stated probability", "[stat][inclusion]") {
  const problem<float> p("gauss1", "zero", 512, 8, 2);
  const query_row<decltype(p.cache().head(0, 0))> row{.head = p.cache().head(0, 0), .scaled_query = p.query().data};
  const population tokens(0, p.n());
  std::vector<float> scores(512), centre(8), storage(residual_moments::storage_size(8));
  std::vector<ordinal> order(512);
  static_cast<void>(p.selector().score(row, tokens, {scores, {}, centre, {}}));
  std::vector<drawn_row> drawn(256);
  std::vector<std::uint64_t> table(sample::uniform_without_replacement::table_size(512));
  residual_moments moments(storage, 8);
  std::vector<long> hits(512);
  constexpr long draws = 4000;
  constexpr index_t first = 40, k_later = 60;
  for (long i = 0; i < draws; ++i) {
    ranking grown(scores, 16, 512 - 16, order);
    grown.extend(26);
    moments.clear(centre, 0);
    residual_sample sample(
        row, tokens, 16, 16, grown,
        sample::uniform_without_replacement(512, random_stream({.seed = static_cast<std::uint64_t>(i)}, 0), table),
        drawn, moments);
    REQUIRE(sample.grow(first));
    // Half of the draws see the residual shrink, as when the ranking takes more of it.
    if (i % 2) {
      grown.extend(k_later);
      sample.shed();
      REQUIRE(sample.grow(first));
    }
    REQUIRE(sample.count() == first);
    for (const drawn_row& d : sample.rows()) ++hits[d.place];
  }
  // Expected: first/N_r each; N_r = 480 − 26 in even draws, 480 − 60 in odd ones.
  double chi2 = 0;
  long cells = 0;
  ranking final_order(scores, 16, 512 - 16, order);
  final_order.extend(26);
  std::vector<ordinal> order_later(512);
  ranking later(scores, 16, 512 - 16, order_later);
  later.extend(k_later);
  for (ordinal place = 0; place < 512; ++place) {
    const bool fixed = place < 16 || place >= 512 - 16;
    const double even = fixed || final_order.contains(place) ? 0 : 40.0 / (480 - 26);
    const double odd = fixed || later.contains(place) ? 0 : 40.0 / (480 - 60);
    const double expected = draws / 2.0 * (even + odd);
    if (expected == 0) {
      CHECK(hits[place] == 0);
      continue;
    }
    // Without replacement a place's count is a sum of Bernoullis: variance E(1 − π).
    const double variance = draws / 2.0 * (even * (1 - even) + odd * (1 - odd));
    chi2 += std::pow(static_cast<double>(hits[place]) - expected, 2) / variance;
    ++cells;
  }
  CHECK(chi2_upper_tail(chi2, static_cast<double>(cells)) > 1e-4);
  CHECK(chi2_upper_tail(chi2, static_cast<double>(cells)) < 1 - 1e-6);  // nor too even to be random
}

TEST_CASE("the stated error covers the true one, and is not far above it", "[stat][calibration]") {
  long uncovered = 0, sampled = 0;
  for (const char* regime : {"flat", "gauss1", "gauss2", "plateau", "ties", "constant"}) {
    for (const char* values : {"mean", "low_rank", "zero"}) {
      const problem<float> p(regime, values, 8192, 64, 21);
      config c;
      c.epsilon = 0.1;
      c.delta = 0.1;
      c.scale = error_scale::rms;
      const summary s = run_cell<remembering<ranked_policy>>(p, c, 150, 5000);
      INFO(regime << "/" << values << " stated " << s.achieved_mean << " true quantile " << s.quantile(0.9));
      uncovered += s.uncovered;
      sampled += static_cast<long>(s.errors.size());
      // Outside the floors: the first look was not already enough.
      if (!s.errors.empty() && s.rounds > 1.5) CHECK(s.achieved_mean < 2 * s.quantile(0.9));
      CHECK(binomial_upper_tail(s.uncovered, static_cast<long>(s.errors.size()), 0.1) > 1e-4 / 18);
    }
  }
  REQUIRE(sampled > 1000);
  CHECK(binomial_upper_tail(uncovered, sampled, 0.1) > 1e-4);
}

TEST_CASE("the stated error covers where nothing but its quantile is between it and the true one",
          "[stat][calibration]") {
  // One dimension: no slack from others, and six looks.
  long uncovered = 0, sampled = 0;
  for (const char* regime : {"flat", "gauss2"}) {
    for (const double epsilon : {0.02, 0.05}) {
      const problem<float> p(regime, "rank_one", 4096, 16, 21);
      config c;
      c.epsilon = epsilon;
      c.delta = 0.05;
      const summary s = run_cell<remembering<ranked_policy>>(p, c, 800, 9000);
      uncovered += s.uncovered;
      sampled += static_cast<long>(s.errors.size());
    }
  }
  INFO(uncovered << " of " << sampled);
  REQUIRE(sampled > 2000);
  CHECK(binomial_upper_tail(uncovered, sampled, 0.05) > 1e-4);
}

TEST_CASE("a smaller epsilon never costs fewer rows on average", "[stat][monotone]") {
  const problem<float> p("gauss2", "mean", 8192, 64, 4);
  double last = 0;
  for (const double epsilon : {0.4, 0.2, 0.1, 0.05, 0.02}) {
    config c;
    c.epsilon = epsilon;
    const summary s = run_cell<remembering<ranked_policy>>(p, c, 40, 0);
    CHECK(s.density >= last);
    last = s.density;
  }
}

TEST_CASE("a selector that ranks while it counts loses no token", "[stat][top_p]") {
  struct policy : default_policy {
    using selector = select::top_p<select::exact_contributions>;
  };
  const problem<float> p("gauss2", "mean", 4096, 32, 12);
  select::top_p<select::exact_contributions> half;
  half.mass = 0.5;
  const vattention<policy> attention({.epsilon = 0.05, .delta = 0.1}, half);
  std::vector<float> out(32);
  certificate c;
  workspace memory;
  long failures = 0, sampled = 0;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    REQUIRE(attention(p.query(), p.cache(), p.options(),
                      {.output = {out.data(), {1, 1, 1, 32}}, .certificates = {&c, {1, 1, 1}}}, memory, {.seed = seed})
                .ok());
    double e2 = 0;
    for (std::size_t j = 0; j < 32; ++j) e2 += std::pow(out[j] - p.output()[j], 2);
    failures += std::sqrt(e2) > 0.05 * p.norm();
    sampled += !c.exact();
  }
  CHECK(sampled > 0);
  CHECK(binomial_upper_tail(failures, 60, 0.1) > 1e-4);
}

TEST_CASE("remembered scores are the exact ranking", "[stat]") {
  const problem<float> p("laplace", "heavy_tailed", 3000, 32, 9);
  const vattention<remembering<ranked_policy>> fast({}, p.selector());
  const vattention<ranked_policy> slow;
  std::vector<float> a(32), b(32);
  certificate ca, cb;
  workspace memory;
  REQUIRE(fast(p.query(), p.cache(), p.options(),
               {.output = {a.data(), {1, 1, 1, 32}}, .certificates = {&ca, {1, 1, 1}}}, memory)
              .ok());
  REQUIRE(slow(p.query(), p.cache(), p.options(),
               {.output = {b.data(), {1, 1, 1, 32}}, .certificates = {&cb, {1, 1, 1}}}, memory)
              .ok());
  CHECK(ca.rows() == cb.rows());
  for (std::size_t j = 0; j < 32; ++j) CHECK(std::abs(a[j] - b[j]) < 1e-4f);
}
