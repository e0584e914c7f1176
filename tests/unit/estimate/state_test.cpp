// Partial states: any split of the tokens, merged in any order, is the whole.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

using namespace vattn::test;
using vattn::index_t;
using vattn::softmax_state;

namespace {

constexpr std::size_t width = 5;

struct token {
  float logit;
  std::vector<float> value;
};

std::vector<token> make_tokens(std::size_t n, float spread, float shift, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<token> tokens(n);
  for (token& t : tokens) {
    t.logit = shift + spread * normal(random);
    for (std::size_t j = 0; j < width; ++j) t.value.push_back(normal(random) + 1);
  }
  return tokens;
}

// One token at a time, by the definition.
struct owned_state {
  std::vector<float> storage = std::vector<float>(width);
  softmax_state state{storage};

  void add(const token& t) {
    state.raise(t.logit);
    const auto x = std::exp(static_cast<double>(t.logit) - static_cast<double>(state.max_logit()));
    state.add_denominator(x);
    double norm = 0;
    for (std::size_t j = 0; j < width; ++j) {
      state.numerator()[j] += static_cast<float>(x) * t.value[j];
      norm += static_cast<double>(t.value[j]) * static_cast<double>(t.value[j]);
    }
    state.add_power(x * norm);
  }
};

struct truth {
  double lse = 0, power = 0;
  std::vector<double> output = std::vector<double>(width);
};
truth sum(const std::vector<token>& tokens) {
  double m = -1e300, d = 0;
  for (const token& t : tokens) m = std::max(m, static_cast<double>(t.logit));
  truth r;
  for (const token& t : tokens) {
    const double x = std::exp(static_cast<double>(t.logit) - m);
    d += x;
    for (std::size_t j = 0; j < width; ++j) {
      r.output[j] += x * static_cast<double>(t.value[j]);
      r.power += x * static_cast<double>(t.value[j]) * static_cast<double>(t.value[j]);
    }
  }
  for (double& o : r.output) o /= d;
  r.power /= d;
  r.lse = m + std::log(d);
  return r;
}

void check(const softmax_state& s, const truth& want) {
  std::vector<float> out(width);
  const auto lse = static_cast<double>(s.finish(out));
  CHECK(std::abs(lse - want.lse) < 2e-7 * std::abs(want.lse) + 2e-6);
  CHECK(vattn::reference::relative_error(out.data(), want.output) < 3e-6);
  CHECK_THAT(s.power() / s.denominator(), WithinRel(want.power, 1e-5));
}

}  // namespace

TEST_CASE("split and merge equals whole, whatever the split and the order", "[estimate][state]") {
  for (const float shift : {0.0f, 300.0f, -300.0f}) {  // exp(300) overflows float, exp(-300) vanishes
    for (const float spread : {0.01f, 1.0f, 40.0f}) {
      CAPTURE(shift, spread);
      const auto tokens = make_tokens(200, spread, shift, 3);
      const truth want = sum(tokens);
      std::mt19937 random(5);
      for (int trial = 0; trial < 6; ++trial) {
        // 1..9 parts, some of which get nothing.
        std::vector<owned_state> parts(1 + static_cast<std::size_t>(trial) * 8 / 5);
        for (const token& t : tokens) parts[random() % ((parts.size() + 2) / 2)].add(t);
        std::shuffle(parts.begin(), parts.end(), random);
        owned_state all;
        for (const owned_state& part : parts) all.state.merge(part.state);
        check(all.state, want);
        // As a tree too.
        while (parts.size() > 1) {
          parts[0].state.merge(parts.back().state);
          parts.pop_back();
          std::swap(parts[0], parts[parts.size() / 2]);
        }
        owned_state tree;
        tree.state.merge(parts[0].state);
        check(tree.state, want);
      }
    }
  }
}

TEST_CASE("the empty state is neutral and finishes as 0 and -inf", "[estimate][state]") {
  owned_state empty, other;
  CHECK(empty.state.empty());
  empty.state.merge(other.state);
  std::vector<float> out(width, 9.0f);
  CHECK(empty.state.finish(out) == -infinity);
  for (const float x : out) CHECK(x == 0.0f);

  const auto tokens = make_tokens(3, 1, 0, 1);
  for (const token& t : tokens) other.add(t);
  empty.state.merge(other.state);
  check(empty.state, sum(tokens));
  owned_state none;
  other.state.merge(none.state);
  check(other.state, sum(tokens));
}

TEST_CASE("raising the reference changes no result and never lowers it", "[estimate][state]") {
  const auto tokens = make_tokens(20, 1, 0, 2);
  owned_state s;
  for (const token& t : tokens) s.add(t);
  const float m = s.state.max_logit();
  s.state.raise(m - 5);
  CHECK(s.state.max_logit() == m);
  s.state.raise(m + 60);
  CHECK(s.state.max_logit() == m + 60);
  check(s.state, sum(tokens));
  s.state.clear();
  CHECK(s.state.empty());
  CHECK(s.state.power() == 0);
}

TEST_CASE("base-2 log-sum-exp", "[estimate][state]") {
  CHECK_THAT(static_cast<double>(vattn::log2_sum_exp(std::log(8.0f))), WithinRel(3.0, 1e-6));
}

// Keys wider than widest_blocked are read one by one, as all rows without strides are.
TEST_CASE("accumulate_exact at every block boundary, with power", "[estimate][exact]") {
  for (const index_t dk : {index_t{8}, vattn::widest_blocked + 16}) {
    for (const index_t n : {0, 1, 2, 63, 64, 65, 127, 128, 511, 512, 513, 1023, 1025, 1600}) {
      CAPTURE(dk, n);
      problem<float> p({.n = n, .dk = dk, .dv = 3}, static_cast<unsigned>(n) + 1, dk == 8 ? 6 : 2);
      const auto cache = p.cache();
      const auto dv = opaque(std::size_t{3});
      std::vector<float> q = p.q, a(dv), b(dv), out(dv);
      for (float& x : q) x *= p.options.scale;
      const vattn::query_row<decltype(cache.head(0, 0))> row{.head = cache.head(0, 0), .scaled_query = q.data()};
      softmax_state state(a), part(b);
      REQUIRE(vattn::accumulate_exact(
          row, n, [](index_t i) { return i; }, state, part, true));
      const auto want = vattn::reference::attend(p.exactly(), 0, 0, 0);
      const auto lse = static_cast<double>(state.finish(out));
      CHECK((lse == want.log_sum_exp || std::abs(lse - want.log_sum_exp) < 4e-6));
      CHECK(vattn::reference::relative_error(out.data(), want.output) < 2e-6);
      double power = 0;
      for (std::size_t i = 0; i < want.tokens.size(); ++i) {
        for (std::size_t j = 0; j < 3; ++j) {
          const auto v = static_cast<double>(p.v[i * 3 + j]);
          power += std::exp(want.logits[i] - want.max_logit) * v * v / want.denominator;
        }
      }
      if (n > 0) CHECK_THAT(state.power() / state.denominator(), WithinRel(power, 5e-6));
    }
  }
}

TEST_CASE("accumulate_exact reads the tokens that it is given, and no others", "[estimate][exact]") {
  for (const index_t dk : {index_t{4}, vattn::widest_blocked + 16}) {
    problem<float> p({.n = 50, .dk = dk, .dv = 4}, 9);
    for (index_t i = 0; i < 50; ++i) {
      if (i % 3 != 0) p.k[static_cast<std::size_t>(dk * i)] = p.v[static_cast<std::size_t>(4 * i)] = not_a_number;
    }
    const auto cache = p.cache();
    std::vector<float> a(4), b(4), out(4);
    const vattn::query_row<decltype(cache.head(0, 0))> row{.head = cache.head(0, 0), .scaled_query = p.q.data()};
    softmax_state state(a), part(b);
    REQUIRE(vattn::accumulate_exact(
        row, 17, [](index_t i) { return 3 * i; }, state, part, false));
    state.finish(out);
    for (const float x : out) CHECK(std::isfinite(x));
    CHECK_FALSE(vattn::accumulate_exact(
        row, 17, [](index_t i) { return 3 * i + 1; }, state, part, false));
  }
}

TEST_CASE("a learned sink adds to the denominator alone", "[estimate][exact]") {
  owned_state s;
  const auto tokens = make_tokens(4, 1, 0, 8);
  for (const token& t : tokens) s.add(t);
  std::vector<float> before(width), after(width);
  const double lse = s.state.finish(before);
  vattn::add_sink(s.state, -infinity);
  CHECK(static_cast<double>(s.state.finish(after)) == lse);
  vattn::add_sink(s.state, 30.0f);  // above every logit
  const double with_sink = s.state.finish(after);
  CHECK_THAT(with_sink, WithinRel(30 + std::log1p(std::exp(lse - 30)), 1e-6));
  for (std::size_t j = 0; j < width; ++j)
    CHECK_THAT(static_cast<double>(after[j]),
               WithinRel(static_cast<double>(before[j]) * std::exp(lse - with_sink), 1e-5));
}
