// Importance sampling in one phase and in two: looks beyond the first, and each way in which they end.
#include <algorithm>
#include <vector>

#include "support/catch.hpp"
#include "support/layout.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

using fine_codes = sketch::key_codes<8>;

struct coarse_codes : sketch::key_codes<2> {
  enum { honest, blind, sure } says = honest;

  coarse_codes() : key_codes(32, 1) {}
  void score(const float* q, index_t first, std::span<float> scores, std::span<float> errors,
             std::span<float> scratch) const noexcept {
    key_codes::score(q, first, scores, errors, scratch);
    if (says == blind) std::fill(scores.begin(), scores.end(), not_a_number);
    if (says == sure) std::fill(errors.begin(), errors.end(), 0.0f);
  }
};

struct by_importance : default_policy {
  using selector = select::indexed<fine_codes>;
  using sampler = sample::by_importance;
};
struct two_phases : default_policy {
  using selector = select::two_phase<coarse_codes, fine_codes>;
  using sampler = sample::in_two_phases;
};

config settings() {
  config c;
  c.sinks = c.window = 16;
  return c;
}

struct indexed_problem {
  explicit indexed_problem(index_t n, float spread = 1)
      : p({.heads = 2, .kv_heads = 1, .n = n, .dk = 32, .dv = 16}, 81, spread), fine(1, fine_codes(32, 1)), coarse(1) {
    append_from(fine[0], p.cache().head(0, 0));
    append_from(coarse[0], p.cache().head(0, 0));
  }
  template <class Policy>
  [[nodiscard]] results attend(const config& c, const typename Policy::selector& selector,
                               std::uint32_t step = 0) const {
    results r(p.s);
    workspace memory;
    const status s =
        vattention<Policy>(c, selector)(p.query(), p.cache(), p.options, r.view(), memory, {.seed = 6, .step = step});
    INFO(s.message());
    REQUIRE(s.ok());
    return r;
  }
  [[nodiscard]] results in_one(const config& c, std::uint32_t step = 0) const {
    return attend<by_importance>(c, {fine}, step);
  }
  [[nodiscard]] results in_two(const config& c, std::uint32_t step = 0) const {
    return attend<two_phases>(c, {.coarse = {coarse}, .fine = {fine}}, step);
  }

  problem<float> p;
  std::vector<fine_codes> fine;
  std::vector<coarse_codes> coarse;
};

}  // namespace

TEST_CASE("importance: a pilot that is not enough asks for what is, and for little more", "[importance]") {
  const indexed_problem cache(6000);
  const config c = settings();
  double stated = 0;
  for (std::uint32_t step = 0; step < 6; ++step) {
    const results r = cache.in_one(c, step);
    CHECK(compare(cache.p, r).output < 3 * c.epsilon);
    for (const certificate& said : r.certificates) {
      CAPTURE(step, said.rounds, said.rows_sampled);
      CHECK_FALSE(said.exact());
      CHECK(said.rounds >= 2);
      CHECK(said.rows_sampled > 200);  // the pilot is 96
      CHECK(said.epsilon_achieved <= c.epsilon);
      stated += said.epsilon_achieved / 12;
    }
  }
  CHECK(stated > 0.85 * c.epsilon);
}

TEST_CASE("importance: without the looks or the rows that it takes all rows are read", "[importance]") {
  const indexed_problem cache(6000);
  for (const bool few_looks : {true, false}) {
    config c = settings();
    if (few_looks) c.max_rounds = 1;
    if (!few_looks) c.max_density = 0.03;  // 180 rows
    for (const bool two : {false, true}) {
      const results r = two ? cache.in_two(c) : cache.in_one(c);
      CAPTURE(few_looks, two);
      for (const certificate& said : r.certificates) CHECK(said.exact());
      CHECK(compare(cache.p, r).output < 1e-5);
    }
  }
}

TEST_CASE("importance in two phases keeps the promise with fewer fine scores", "[importance][two_phase]") {
  const indexed_problem cache(6000);
  config c = settings();
  c.epsilon = 0.1;
  for (std::uint32_t step = 0; step < 4; ++step) {
    const results r = cache.in_two(c, step);
    CHECK(compare(cache.p, r).output < 3 * c.epsilon);
    for (const certificate& said : r.certificates) CHECK_FALSE(said.exact());
    CHECK(r.output != cache.in_one(c, step).output);
  }
}

TEST_CASE("importance in two phases: a first phase that knows nothing, or not how little, leaves all to the second",
          "[importance][two_phase]") {
  indexed_problem cache(6000);
  config c = settings();
  c.epsilon = 0.1;
  const results want = cache.in_one(c);
  for (const certificate& said : want.certificates) REQUIRE_FALSE(said.exact());
  cache.coarse[0].says = coarse_codes::blind;
  CHECK(cache.in_two(c).output == want.output);
  cache.coarse[0].says = coarse_codes::sure;
  const results r = cache.in_two(c);
  CHECK(r.output == want.output);
  for (const certificate& said : r.certificates) CHECK(said.breaches > 10);
}
