// The exported decision: a plain softmax with the additive mask, or with the weights, is the output.
#include "vattn/certify/decision.hpp"

#include <vector>

#include "support/layout.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

struct decisions {
  explicit decisions(const shape& s)
      : rows(static_cast<std::size_t>(s.batch * s.queries * s.heads)),
        n(static_cast<std::size_t>(s.n)),
        tokens(rows * n, -1),
        counts(rows, -1),
        weights(rows * n, not_a_number),
        extents{s.batch, s.queries, s.heads, s.n} {}
  [[nodiscard]] decision_result view() {
    return {{tokens.data(), extents}, {weights.data(), extents}, {counts.data(), {extents[0], extents[1], extents[2]}}};
  }
  std::size_t rows, n;
  std::vector<std::int32_t> tokens, counts;
  std::vector<float> weights;
  std::array<index_t, 4> extents;
};

template <class Policy>
void check_decision(problem<float>& p, const config& c, const typename Policy::selector& selector, bool sparse) {
  results r(p.s);
  decisions d(p.s);
  attention_result result = r.view();
  result.decisions = d.view();
  workspace memory;
  const status st = vattention<Policy>(c, selector)(p.query(), p.cache(), p.options, result, memory, {.seed = 21});
  INFO(st.message());
  REQUIRE(st.ok());

  // The engine's own mask, and the decision's on top, through the reference: [batch, heads, queries, tokens].
  reference::problem naive = p.exactly();
  std::vector<double> mask(d.rows * d.n);
  std::vector<float> line(d.n);
  index_t exact = 0;
  for (index_t b = 0; b < p.s.batch; ++b)
    for (index_t t = 0; t < p.s.queries; ++t)
      for (index_t h = 0; h < p.s.heads; ++h) {
        const std::size_t at = r.at(b, t, h);
        const auto count = static_cast<std::size_t>(d.counts[at]);
        REQUIRE(count <= d.n);
        exact += r.certificates[at].exact();
        if (r.certificates[at].exact()) CHECK(static_cast<index_t>(count) == r.certificates[at].n);
        additive_mask(std::span(d.tokens).subspan(at * d.n, count), std::span(d.weights).subspan(at * d.n, count),
                      line);
        const std::size_t to = (static_cast<std::size_t>(b * p.s.heads + h) * static_cast<std::size_t>(p.s.queries) +
                                static_cast<std::size_t>(t)) *
                               d.n;
        for (std::size_t i = 0; i < d.n; ++i)
          mask[to + i] = static_cast<double>(line[i]) + (naive.mask.empty() ? 0 : naive.mask[to + i]);
      }
  CHECK((exact < static_cast<index_t>(d.rows)) == sparse);
  naive.mask = mask;
  double worst = 0, denominator = 0;
  for (index_t b = 0; b < p.s.batch; ++b)
    for (index_t t = 0; t < p.s.queries; ++t)
      for (index_t h = 0; h < p.s.heads; ++h) {
        const reference::row want = reference::attend(naive, b, t, h);
        worst = std::max(worst, reference::relative_error(r.row(r.at(b, t, h)), want.output));
        denominator =
            std::max(denominator, std::abs(static_cast<double>(r.log_sum_exp[r.at(b, t, h)]) - want.log_sum_exp));
      }
  CHECK(worst < 1e-5);
  CHECK(denominator < 1e-5);
}

using codes = sketch::key_codes<8>;
struct by_importance : default_policy {
  using selector = select::indexed<codes>;
  using sampler = sample::by_importance;
};
struct by_group : by_importance {
  using sampler = sample::by_group_importance;
};
struct two_phases : default_policy {
  using selector = select::two_phase<sketch::key_codes<2>, codes>;
  using sampler = sample::in_two_phases;
};
struct with_replacement : ranked_policy {
  using sampler = sample::uniform_with_replacement;
};

}  // namespace

TEST_CASE("a naive softmax with the exported mask is the output, for every sampler", "[certify][decision]") {
  problem<float> p({.batch = 1, .queries = 2, .heads = 4, .kv_heads = 2, .n = 4000, .dk = 32, .dv = 16}, 3, 1.5f);
  p.options.causal = true;
  p.options.softcap = 20;
  p.set_sinks({0.5f, -1, 1, 0});
  config c = small_config();
  c.epsilon = 0.2;
  std::vector<codes> heads(2, codes(32, 1));
  std::vector<sketch::key_codes<2>> coarse(2, sketch::key_codes<2>(32, 1));
  for (std::size_t h = 0; h < 2; ++h) {
    append_from(heads[h], p.cache().head(0, static_cast<index_t>(h)));
    append_from(coarse[h], p.cache().head(0, static_cast<index_t>(h)));
  }
  check_decision<ranked_policy>(p, c, {}, true);
  check_decision<with_replacement>(p, c, {}, true);
  check_decision<verified_denominator>(p, c, {}, true);
  check_decision<by_importance>(p, c, {heads}, true);
  check_decision<by_group>(p, c, {heads}, true);
  check_decision<two_phases>(p, c, {.coarse = {coarse}, .fine = {heads}}, true);
  c.scale = error_scale::output, c.epsilon = 0.3;
  check_decision<certified_policy<codes>>(p, c, {heads}, true);
}

TEST_CASE("peaked attention that a certificate settles without chance exports its rows too", "[certify][decision]") {
  problem<float> p({.heads = 2, .kv_heads = 1, .n = 4000, .dk = 32, .dv = 16}, 4, 12);
  config c = small_config();
  c.scale = error_scale::output;
  std::vector<codes> heads(1, codes(32, 1));
  append_from(heads[0], p.cache().head(0, 0));
  check_decision<certified_policy<codes>>(p, c, {heads}, true);
}

TEST_CASE("masked rows, short caches and exact fallbacks export all that is visible", "[certify][decision]") {
  problem<float> p({.batch = 2, .queries = 1, .heads = 2, .kv_heads = 2, .n = 60, .dk = 8, .dv = 8});
  std::vector<float> mask(2 * 2 * 60, 0.25f);
  for (std::size_t i = 0; i < mask.size(); i += 3) mask[i] = -infinity;
  p.set_mask(mask);
  check_decision<ranked_policy>(p, small_config(), {}, false);
}

TEST_CASE("decision buffers that are too small are refused", "[certify][decision]") {
  problem<float> p({.heads = 2, .kv_heads = 1, .n = 60, .dk = 8, .dv = 8});
  results r(p.s);
  decisions d(p.s);
  workspace memory;
  const auto why = [&](const decision_result& wanted) {
    attention_result result = r.view();
    result.decisions = wanted;
    return std::string(vattention<ranked_policy>()(p.query(), p.cache(), p.options, result, memory).message());
  };
  CHECK(why(d.view()).empty());
  decision_result bad = d.view();
  bad.tokens.extents[3] = 59;
  CHECK(contains(why(bad), "at least 60"));
  bad = d.view();
  bad.counts = {};
  CHECK(contains(why(bad), "or none of them"));
  bad = d.view();
  bad.weights.extents[2] = 1;
  CHECK(contains(why(bad), "[1, 1, 2, at least 60]"));
}
