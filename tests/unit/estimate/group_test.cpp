// Queries of a group against rows in strides, block by block, and each query's state against the reference.
#include "vattn/estimate/group.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

using namespace vattn::test;
using vattn::index_t;
using vattn::ordinal;
using vattn::population;
using vattn::softmax_state;

namespace {

// Three queries of one KV head.
struct grouped {
  using head_view = decltype(std::declval<vattn::kv_view<float>>().head(0, 0));
  static constexpr std::size_t heads = 3, dv = 5;
  using group = vattn::query_group<head_view>;

  explicit grouped(index_t n, unsigned seed = 1)
      : p({.heads = heads, .kv_heads = 1, .n = n, .dk = 8, .dv = dv}, seed, 3), scaled(p.q) {
    for (float& x : scaled) x *= p.options.scale;
    for (std::size_t g = 0; g < heads; ++g) {
      rows.push_back({.head = p.cache().head(0, 0), .scaled_query = scaled.data() + g * 8, .scale = p.options.scale});
      states.emplace_back(std::span(numerators).subspan(g * dv, dv));
    }
  }
  std::uint32_t add(const population& tokens, bool with_power = false) {
    const auto queries = vattn::kernel::prepare_queries<float>(vattn::kernel::active_isa(), scaled.data(), heads, 8,
                                                               p.options.scale, prepared);
    return group{rows.data(), states.data(), queries, part, logits}.add(tokens, with_power);
  }

  problem<float> p;
  std::vector<float> scaled;
  std::vector<vattn::query_row<head_view>> rows;
  std::vector<softmax_state> states;
  std::vector<float> numerators = std::vector<float>(heads * dv), part = std::vector<float>(heads * dv, not_a_number),
                     prepared = std::vector<float>(vattn::kernel::query_storage(heads, 8)),
                     logits = std::vector<float>(group::logits_size(heads), not_a_number);
};

// Each state is the reference's over `tokens`, with Σ x‖v‖² if that was asked for.
void check(const grouped& g, const std::vector<ordinal>& tokens, bool with_power) {
  for (std::size_t h = 0; h < grouped::heads; ++h) {
    const auto want = vattn::reference::attend(g.p.exactly(), 0, 0, static_cast<index_t>(h));
    double highest = -1e300;
    for (const ordinal i : tokens) highest = std::max(highest, want.logits[i]);
    vattn::reference::weighted_output sums(grouped::dv);
    for (const ordinal i : tokens) {
      sums.add(std::exp(want.logits[i] - highest),
               [&](std::size_t j) { return static_cast<double>(g.p.v[i * grouped::dv + j]); });
    }
    sums.finish();
    std::vector<float> out(grouped::dv);
    CAPTURE(h, tokens.size());
    CHECK_THAT(static_cast<double>(g.states[h].finish(out)), WithinAbs(highest + std::log(sums.denominator), 4e-6));
    CHECK(vattn::reference::relative_error(out.data(), sums.output) < 2e-6);
    const double power = g.states[h].power() / g.states[h].denominator();
    CHECK_THAT(power, WithinAbs(with_power ? sums.power / sums.denominator : 0, with_power ? 1e-5 * power : 0));
  }
}

}  // namespace

TEST_CASE("a group reads a range, at every boundary of a block", "[estimate][group]") {
  for (const index_t n : {1, 63, 64, 65, 128, 200, 2048}) {
    for (const bool with_power : {false, true}) {
      grouped g(n + 7, static_cast<unsigned>(n));
      REQUIRE(g.add(population(3, n + 3), with_power) == 0);
      std::vector<ordinal> tokens(static_cast<std::size_t>(n));
      std::iota(tokens.begin(), tokens.end(), ordinal{3});
      check(g, tokens, with_power);
    }
  }
}

TEST_CASE("a group reads a list of rows, and adds to what it had", "[estimate][group]") {
  grouped g(500);
  std::vector<ordinal> some, all;
  for (ordinal i = 0; i < 500; i += 3) some.push_back(499 - i);
  REQUIRE(g.add(population(some), true) == 0);
  check(g, some, true);
  all = some;
  for (ordinal i = 0; i < 80; ++i) {
    if (std::find(some.begin(), some.end(), i) == some.end()) all.push_back(i);
  }
  REQUIRE(g.add(population(std::span(all).subspan(some.size())), true) == 0);
  check(g, all, true);
  // Nothing adds nothing.
  REQUIRE(g.add(population(5, 5), true) == 0);
  check(g, all, true);
}

TEST_CASE("a query whose logit is not finite is named, and keeps its state; the others go on", "[estimate][group]") {
  grouped g(200);
  std::vector<ordinal> first(100), all(200);
  std::iota(first.begin(), first.end(), ordinal{0});
  std::iota(all.begin(), all.end(), ordinal{0});
  REQUIRE(g.add(population(0, 100)) == 0);
  const double before = g.states[1].denominator();
  const float reference = g.states[1].max_logit();
  const std::vector<float> numerator(g.states[1].numerator().begin(), g.states[1].numerator().end());
  g.scaled[8] = not_a_number;
  CHECK(g.add(population(100, 200)) == 0b010);
  CHECK(g.states[1].denominator() == before);
  CHECK(g.states[1].max_logit() == reference);
  CHECK(std::equal(numerator.begin(), numerator.end(), g.states[1].numerator().begin()));
  g.scaled[8] = g.p.q[8] * g.p.options.scale;
  for (const std::size_t other : {0u, 2u}) {
    std::vector<float> out(grouped::dv);
    const auto want = vattn::reference::attend(g.p.exactly(), 0, 0, static_cast<index_t>(other));
    CHECK_THAT(static_cast<double>(g.states[other].finish(out)), WithinAbs(want.log_sum_exp, 4e-6));
    CHECK(vattn::reference::relative_error(out.data(), want.output) < 2e-6);
  }
}

TEST_CASE("a group's logits are capped, biased and masked by the token that they belong to", "[estimate][group]") {
  for (const bool listed : {false, true}) {
    grouped g(150);
    g.p.options.softcap = 4;
    g.p.set_alibi({-0.02f, 0, -0.05f});
    for (std::size_t h = 0; h < grouped::heads; ++h) {
      g.rows[h].softcap = 4;
      g.rows[h].alibi_slope = g.p.alibi[h];
      g.rows[h].position = 149;
    }
    std::vector<ordinal> tokens;
    for (ordinal i = 10; i < 150; ++i) tokens.push_back(i);
    REQUIRE(g.add(listed ? population(tokens) : population(10, 150), true) == 0);
    check(g, tokens, true);
  }
}
