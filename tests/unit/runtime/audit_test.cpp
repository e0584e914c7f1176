// The auditor counts what a look at the truth counts, the same for any threads; and sees what is broken.
#include "vattn/call/audit.hpp"

#include <vector>

#include "support/layout.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

/// Scores that claim to be exact logits, and are as though every key were alike: importance sampling believes them.
struct blind {
  static constexpr bool estimates = true;
  template <class Row>
  score_result score(const Row& row, const population& tokens, const score_buffers& out) const noexcept {
    for (index_t j = 0; j < tokens.size(); ++j)
      out.scores[static_cast<std::size_t>(j)] = row.logit(tokens[j]) < 4 ? 0 : -20;
    // Wide enough that no row that is read gives them away, and no floor covers what they hide.
    std::fill(out.errors.begin(), out.errors.end(), 0.7f);
    return {};
  }
  index_t heavy_count(const ranking&, index_t, const config&) const noexcept { return 0; }
};
struct broken_policy : default_policy {
  using selector = blind;
  using sampler = sample::by_importance;
};

constexpr draw_key key(std::uint32_t step) { return {.seed = 77, .layer = 2, .step = step}; }

}  // namespace

namespace {

// The error of one row relative to what ε is relative to, from the definitions.
double error_of(const problem<float>& p, const reference::problem& truth, const results& r, index_t b, index_t t,
                index_t h) {
  const std::size_t at = r.at(b, t, h);
  const certificate& c = r.certificates[at];
  const reference::row want = reference::attend(truth, b, t, h);
  const double denominators = std::exp(static_cast<double>(r.log_sum_exp[at]) - want.log_sum_exp);
  if (c.target == target_kind::denominator) return std::abs(denominators - 1);
  std::vector<float> ours(r.row(at), r.row(at) + p.s.dv);
  if (c.target == target_kind::numerator)
    for (float& x : ours) x *= static_cast<float>(denominators);
  const double error = reference::relative_error(ours.data(), want.output);
  if (c.scale == error_scale::output) return error;
  double power = 0, norm = 0;
  for (std::size_t i = 0; i < want.tokens.size(); ++i) {
    const double x = std::exp(want.logits[i] - want.max_logit) / want.denominator;
    const auto row = static_cast<std::size_t>(((b * p.s.kv_heads + h / 2) * p.s.n + want.tokens[i]) * p.s.dv);
    for (std::size_t j = 0; j < static_cast<std::size_t>(p.s.dv); ++j) power += x * truth.v[row + j] * truth.v[row + j];
  }
  for (const double o : want.output) norm += o * o;
  return error * std::sqrt(norm / power);
}

template <class Policy>
void check_count(const config& c) {
  problem<float> p({.batch = 2, .queries = 2, .heads = 4, .kv_heads = 2, .n = 1500, .dk = 16, .dv = 16});
  p.set_sinks({0.5f, 1, -infinity, 2});
  const reference::problem truth = p.exactly();
  auditor audit(1);
  workspace memory;
  results r(p.s);
  serial_executor serial;
  std::uint64_t violations = 0, full = 0;
  double largest = 0;
  for (std::uint32_t step = 0; step < 8; ++step) {
    REQUIRE(vattention<Policy>(c)(p.query(), p.cache(), p.options, r.view(), memory, key(step), serial, audit).ok());
    for (index_t b = 0; b < 2; ++b)
      for (index_t t = 0; t < 2; ++t)
        for (index_t h = 0; h < 4; ++h) {
          const double error = error_of(p, truth, r, b, t, h);
          full += r.certificates[r.at(b, t, h)].exact();
          violations += error > c.epsilon;
          largest = std::max(largest, error / c.epsilon);
        }
  }
  const audit_report got = audit.report();
  INFO(got.text());
  CHECK(got.rows == 8 * 16);
  CHECK(got.audited == 8 * 16);
  CHECK(got.exact == full);
  CHECK(got.violations == violations);
  CHECK_THAT(got.largest, WithinRel(largest, 1e-3));
  CHECK_THAT(got.delta, WithinRel(c.delta, 1e-6));
  CHECK(violations > 10);  // there is something to count
  CHECK(violations < 118);
}

}  // namespace

TEST_CASE("the auditor's count is the count of errors above epsilon, whatever the target", "[runtime][audit]") {
  // One look, kept whatever it shows: many rows miss ε.
  config c = small_config();
  c.max_rounds = 1, c.accept_last = true;
  c.epsilon = 0.05;
  check_count<ranked_policy>(c);
  c.scale = error_scale::output;
  c.epsilon = 0.08;
  check_count<ranked_policy>(c);
  c.epsilon = 0.15;
  check_count<verified_sdpa>(c);
  check_count<verified_numerator>(c);
  check_count<verified_denominator>(c);
}

TEST_CASE("what is audited is the same for any threads, and its outputs are as without", "[runtime][audit]") {
  const problem<float> p({.batch = 3, .queries = 1, .heads = 8, .kv_heads = 4, .n = 1200, .dk = 16, .dv = 8});
  workspace memory;
  results plain(p.s), audited(p.s);
  audit_report first;
  for (const index_t threads : {1, 3, 4}) {
    auditor audit(0.3);
    for (std::uint32_t step = 0; step < 20; ++step) {
      REQUIRE(vattention<ranked_policy>(small_config())(p.query(), p.cache(), p.options, audited.view(), memory,
                                                        key(step), thread_executor(threads), audit)
                  .ok());
      REQUIRE(
          vattention<ranked_policy>(small_config())(p.query(), p.cache(), p.options, plain.view(), memory, key(step))
              .ok());
      REQUIRE(plain.output == audited.output);
      REQUIRE(plain.log_sum_exp == audited.log_sum_exp);
    }
    const audit_report r = audit.report();
    if (threads == 1) first = r;
    CHECK(r.rows == 480);
    CHECK(r.audited == first.audited);
    CHECK(r.violations == first.violations);
    CHECK(r.largest == first.largest);
    CHECK(r.delta == first.delta);
  }
  INFO(first.text());
  // 144 of 480 expected, with a standard deviation of 17: the sequences share their coins.
  CHECK(first.audited > 100);
  CHECK(first.audited < 190);
  CHECK(first.holds());
}

TEST_CASE("an auditor sees a selector that hides the heavy tokens", "[runtime][audit]") {
  problem<float> p({.heads = 8, .kv_heads = 2, .n = 4000, .dk = 16, .dv = 16}, 5, 1);
  // Tokens that matter, with values of their own, where blind scores say that nothing is.
  for (index_t h = 0; h < 2; ++h)
    for (index_t t = 500; t < 3500; t += 100)
      for (index_t j = 0; j < 16; ++j) p.v[static_cast<std::size_t>((h * 4000 + t) * 16 + j)] = 3;
  for (float& x : p.q) x = std::abs(x);
  for (index_t h = 0; h < 2; ++h)
    for (index_t t = 500; t < 3500; t += 100)
      for (index_t j = 0; j < 16; ++j) p.k[static_cast<std::size_t>((h * 4000 + t) * 16 + j)] = 2.2f;
  config c = small_config();
  c.epsilon = 0.1, c.delta = 0.1;
  workspace memory;
  results r(p.s);
  auditor broken(1), sound(1);
  serial_executor serial;
  for (std::uint32_t step = 0; step < 20; ++step) {
    REQUIRE(vattention<broken_policy>(c)(p.query(), p.cache(), p.options, r.view(), memory, key(step), serial, broken)
                .ok());
    REQUIRE(
        vattention<ranked_policy>(c)(p.query(), p.cache(), p.options, r.view(), memory, key(step), serial, sound).ok());
  }
  INFO(broken.report().text());
  INFO(sound.report().text());
  CHECK(broken.report().violations > 100);
  CHECK_FALSE(broken.report().holds());
  CHECK(broken.report().lowest() > 0.1);
  CHECK(contains(broken.report().text(), "DELTA DOES NOT HOLD"));
  CHECK(sound.report().holds());
  CHECK(contains(sound.report().text(), "delta holds"));
}

TEST_CASE("reports: intervals, p-values, and one line", "[runtime][audit]") {
  audit_report r;
  CHECK(contains(r.text(), "nothing audited yet"));
  r.rows = 1000, r.audited = 100, r.violations = 10, r.delta = 0.1;
  // Clopper and Pearson's interval of 10 of 100.
  CHECK_THAT(r.lowest(), WithinAbs(0.04900, 1e-4));
  CHECK_THAT(r.highest(), WithinAbs(0.17622, 1e-4));
  CHECK_THAT(r.p_value(), WithinAbs(0.5487, 1e-3));  // P(X >= 10), X binomial(100, 0.1)
  CHECK(r.holds());
  r.violations = 0;
  CHECK(r.lowest() == 0);
  CHECK_THAT(r.highest(), WithinAbs(1 - std::pow(0.025, 0.01), 1e-6));
  CHECK(r.p_value() == 1);
  r.violations = 100;
  CHECK(r.highest() == 1);
  CHECK_FALSE(r.holds());
  CHECK(r.text().find('\n') == std::string::npos);
}

TEST_CASE("shares of 0 and 1, and nonsense, audit none and all", "[runtime][audit]") {
  const problem<float> p({.heads = 4, .kv_heads = 1, .n = 50, .dk = 8, .dv = 8});
  results r(p.s);
  workspace memory;
  serial_executor serial;
  for (const double share : {0.0, -1.0, std::nan(""), 1.0, 7.0}) {
    auditor audit(share);
    REQUIRE(vattention<ranked_policy>()(p.query(), p.cache(), p.options, r.view(), memory, key(0), serial, audit).ok());
    CHECK(audit.report().rows == 4);
    CHECK(audit.report().audited == (share >= 1 ? 4 : 0));
    audit.reset();
    CHECK(audit.report().rows == 0);
  }
}
