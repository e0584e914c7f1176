// The sampled part against direct double-precision sums over explicit terms.
#include "vattn/estimate/residual.hpp"

#include <algorithm>
#include <vector>

#include "support/catch.hpp"
#include "support/looks.hpp"

using namespace vattn::test;
using vattn::index_t;
using vattn::ordinal;

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

  // The products that evidence and terms are made of: of the sampled rows about the centre.
  double u2 = 0, centre2 = 0, first2 = 0, first_u = 0, second_u = 0, first_c = 0, second_c = 0;
  for (std::size_t j = 0; j < 6; ++j) {
    const double c = static_cast<double>(s.centre[j]), u = N[j] - c;
    double first = 0, second = 0;
    for (const vattn::drawn_row& row : s.sample.rows()) {
      const double x = std::exp(want.logits[row.place] - s.now.reference);
      const double r = static_cast<double>(s.p.v[row.place * 6 + j]) - c;
      first += x * r, second += x * x * r;
    }
    u2 += u * u, centre2 += c * c, first2 += first * first;
    first_u += first * u, second_u += second * u, first_c += first * c, second_c += second * c;
  }
  CHECK_THAT(s.now.u2, WithinRel(u2, 1e-4));
  CHECK_THAT(s.now.centre2, WithinRel(centre2, 1e-5));
  CHECK_THAT(s.now.first2, WithinRel(first2, 1e-4));
  CHECK_THAT(s.now.first_u, WithinRel(first_u, 1e-4));
  CHECK_THAT(s.now.second_u, WithinRel(second_u, 1e-4));
  CHECK_THAT(s.now.first_c, WithinRel(first_c, 1e-4));
  CHECK_THAT(s.now.second_c, WithinRel(second_c, 1e-4));

  vattn::add_residual(s.state, s.now, s.moments);
  const double lse = s.state.finish(output);
  CHECK(vattn::reference::relative_error(output.data(), N) < 1e-5);
  CHECK_THAT(lse, WithinAbs(s.now.reference + std::log(D), 1e-5));
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
