// Every policy with everything that a call carries: outputs within the certificate, decisions that give them again,
// the same from a plan's shares, and an auditor that sees it.
#include <map>

#include "support/policies.hpp"
#include "vattn/call/audit.hpp"
#include "vattn/kv/reference.hpp"
#include "vattn/plan.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

constexpr index_t n = 1600;

/// Buffers for decisions, and the same as a mask.
struct decided {
  explicit decided(const shape& of) : s(of), tokens(rows() * size()), weights(tokens.size()), counts(rows()) {}
  [[nodiscard]] std::size_t rows() const { return static_cast<std::size_t>(s.batch * s.queries * s.heads); }
  [[nodiscard]] std::size_t size() const { return static_cast<std::size_t>(s.n); }
  [[nodiscard]] decision_result view() {
    return {{tokens.data(), {s.batch, s.queries, s.heads, s.n}},
            {weights.data(), {s.batch, s.queries, s.heads, s.n}},
            {counts.data(), {s.batch, s.queries, s.heads}}};
  }
  /// [batch, heads, queries, n], on top of the call's own mask.
  [[nodiscard]] std::vector<float> mask(const attention_options& o) const {
    std::vector<float> all;
    for (index_t b = 0; b < s.batch; ++b)
      for (index_t h = 0; h < s.heads; ++h)
        for (index_t t = 0; t < s.queries; ++t) {
          const auto at = static_cast<std::size_t>((b * s.queries + t) * s.heads + h);
          std::vector<float> line(size());
          const auto count = static_cast<std::size_t>(counts[at]);
          additive_mask(std::span(tokens).subspan(at * size(), count), std::span(weights).subspan(at * size(), count),
                        line);
          const mask_view::line own = o.mask.at(b, h, t);
          for (index_t i = 0; i < s.n; ++i) all.push_back(line[static_cast<std::size_t>(i)] + (own ? own(i) : 0.0f));
        }
    return all;
  }
  shape s;
  std::vector<std::int32_t> tokens;
  std::vector<float> weights;
  std::vector<std::int32_t> counts;
};

struct carried {
  std::string name;
  std::function<void(problem<float>&)> set;
};

/// What lets a store's rows be told from its tokens is not among the first ones.
const std::vector<carried>& everything() {
  static std::vector<std::int32_t> cells, queries;
  static const std::vector<carried> all{
      {"nothing", [](auto&) {}},
      {"sinks",
       [](auto& p) {
         p.set_sinks({1, -2, -infinity, 4});
       }},
      {"causal", [](auto& p) { p.options.causal = true; }},
      {"window", [](auto& p) { p.options.sliding_window = 1200; }},
      {"window and causal", [](auto& p) { p.options.sliding_window = 1300, p.options.causal = true; }},
      {"soft cap", [](auto& p) { p.options.softcap = 2; }},
      {"ALiBi",
       [](auto& p) {
         p.set_alibi({0.001f, 0, 0.002f, 0.0001f});
       }},
      {"mask",
       [](auto& p) {
         std::vector<float> mask(static_cast<std::size_t>(p.s.batch * p.s.heads * p.s.queries * p.s.n));
         for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = i % 7 == 0 ? -infinity : static_cast<float>(i % 3) / 4;
         p.set_mask(mask);
       }},
      {"positions",
       [](auto& p) {  // in runs of 100 that are out of order; one in eleven cells is another's
         cells.clear();
         for (index_t b = 0; b < p.s.batch; ++b)
           for (index_t c = 0; c < p.s.n; ++c)
             cells.push_back(c % 11 == 3 ? -1 : static_cast<std::int32_t>((c / 100 * 7 % 16) * 100 + c % 100));
         queries.assign(static_cast<std::size_t>(p.s.batch * p.s.queries), 1500);
         p.options.positions = {{cells.data(), {p.s.batch, p.s.n}}, {queries.data(), {p.s.batch, p.s.queries}}};
         p.options.sliding_window = 1400;
         p.set_alibi({0.001f, 0, 0.002f, 0.0001f});
       }},
  };
  return all;
}

/// One call, and what can be known of it: `truth` is exact attention with the same options.
template <class Policy, kv_cache KV, kv_cache Rows>
void check(const problem<float>& p, const KV& cache, const Rows& rows, const typename Policy::selector& select,
           const results& truth, int& sampled) {
  config c = small_config();
  c.epsilon = 0.2, c.scale = error_scale::output;
  for (const bool joint : {false, true}) {
    if (joint && (p.options.causal || p.options.mask || p.options.alibi_slopes || p.options.softcap > 0)) continue;
    c.joint = joint;
    const vattention<Policy> attend(c, select);
    const draw_key key{.seed = 5, .layer = 2, .step = 3};
    workspace memory;
    results r(p.s);
    const status s = attend(p.query(), cache, p.options, r.view(), memory, key);
    CAPTURE(joint, s.message());
    REQUIRE(s.ok());

    const auto row_count = static_cast<double>(r.certificates.size());
    double worst = 0;
    for (std::size_t at = 0; at < r.certificates.size(); ++at) {
      const certificate& k = r.certificates[at];
      CAPTURE(at, k.n, k.rows_exact, k.rows_sampled, k.epsilon_achieved);
      sampled += !k.exact();
      CHECK(k.n == truth.certificates[at].n);
      CHECK(k.rows() <= k.n);
      CHECK(k.target == Policy::target::kind);
      CHECK(k.epsilon_achieved <= c.epsilon);
      CHECK_THAT(k.delta, WithinRel(joint ? c.delta / row_count : c.delta, 1e-12));
      CHECK(k.log_denominator == static_cast<double>(r.log_sum_exp[at]));
      const std::vector<double> want(truth.row(at), truth.row(at) + p.s.dv);
      const double error = reference::relative_error(r.row(at), want);
      const double lse = std::abs(static_cast<double>(r.log_sum_exp[at] - truth.log_sum_exp[at]));
      CHECK(lse < (k.exact() ? 1e-5 : 1));
      // One draw: beyond what a right estimate does. A head that is forgotten is off by 1.
      CHECK(error < (k.exact() ? 1e-5 : 3 * c.epsilon));
      worst = std::max(worst, error);
    }

    // With decisions and an auditor the bits are the same, the decisions give the output, the auditor its error.
    results again(p.s);
    decided d(p.s);
    attention_result with = again.view();
    with.decisions = d.view();
    auditor audit(1);
    REQUIRE(attend(p.query(), cache, p.options, with, memory, key, serial_executor{}, audit).ok());
    CHECK(again.output == r.output);
    CHECK(again.log_sum_exp == r.log_sum_exp);
    const audit_report seen = audit.report();
    CHECK(seen.rows == r.certificates.size());
    CHECK(seen.audited == r.certificates.size());
    if (Policy::target::kind == target_kind::output || Policy::target::kind == target_kind::sdpa)
      CHECK_THAT(seen.largest * c.epsilon, WithinAbs(seen.audited == seen.exact ? 0 : worst, 1e-4));
    CHECK_THAT(seen.delta, WithinRel(joint ? c.delta / row_count : c.delta, 1e-6));

    problem<float> masked = p;
    if constexpr (!rows_in_order<std::remove_cvref_t<decltype(cache.head(0, 0))>>) masked.options = {};
    masked.options.scale = p.options.scale, masked.options.sink_logits = p.options.sink_logits;
    masked.set_mask(d.mask(p.options));
    results by_mask(p.s);
    REQUIRE(exact_attention(p.query(), rows, masked.options, by_mask.view(), memory).ok());
    CHECK(difference(by_mask, again) < 1e-5);

    // A plan's threads, in any order.
    const plan_shape what{.n_batch = p.s.batch,
                          .n_queries = p.s.queries,
                          .n_q_heads = p.s.heads,
                          .n_kv_heads = p.s.kv_heads,
                          .max_tokens = p.s.n + 100,
                          .dk = p.s.dk,
                          .dv = p.s.dv,
                          .masked = p.options.mask || p.options.positions,
                          .threads = 3};
    const auto planned = plan<Policy>(what, c, select);
    std::vector<std::byte> bytes(workspace_bytes(planned));
    results shared(p.s);
    auditor together(1);
    for (index_t ith = 3; ith-- > 0;) {
      const run_arguments call{p.query(), kv_reference(cache), p.options, shared.view(), key};
      REQUIRE(run(planned, call, bytes, ith, 3, together).ok());
    }
    CHECK(shared.output == r.output);
    CHECK(shared.log_sum_exp == r.log_sum_exp);
    CHECK(together.report().violations == seen.violations);
    CHECK(together.report().largest == seen.largest);
  }
}

}  // namespace

TEST_CASE("every policy with everything that a call carries", "[attention][policy]") {
  std::map<std::string, int> sampled;
  for (const carried& what : everything()) {
    problem<float> p({.batch = 2, .queries = 2, .heads = 4, .kv_heads = 2, .n = n, .dk = 16, .dv = 16}, 8, 1.5f);
    what.set(p);
    const indices of(p.cache());
    workspace memory;
    results truth(p.s);
    CAPTURE(what.name);
    REQUIRE(exact_attention(p.query(), p.cache(), p.options, truth.view(), memory).ok());
    if (what.name != "positions") CHECK(compare(p, truth).output < 1e-5);
    for_each_policy([&]<class Policy>(const char* name) {
      CAPTURE(name);
      check<Policy>(p, p.cache(), p.cache(), make_selector<typename Policy::selector>(of), truth, sampled[name]);
    });
  }
  for (const auto& [name, rows] : sampled) {
    CAPTURE(name, rows);
    CHECK((rows > 10 || name == "bernstein"));  // else nothing but exact attention was tried
  }
}

TEST_CASE("a store with everything that a call may carry", "[attention][policy][store]") {
  int sampled = 0;
  for (const index_t tokens : {index_t{1600}, index_t{24000}}) {  // read in full, and sampled
    for (std::size_t i = 0; i < (tokens > n ? 2 : everything().size()); ++i) {
      problem<float> p({.queries = 2, .heads = 4, .kv_heads = 2, .n = tokens, .dk = 16, .dv = 16}, 8, 1.5f);
      everything()[i].set(p);
      CAPTURE(tokens, everything()[i].name);
      shuffled_store<float> store({.n_kv_heads = 2, .dk = 16, .dv = 16});
      REQUIRE(store.assign(p.cache()).ok());
      workspace memory;
      results truth(p.s);
      if (i >= 2) {  // what a store's order or its codes do not allow: refused by name
        const status refused = vattention<store_policy>()(p.query(), store, p.options, truth.view(), memory);
        CHECK(refused.code() == errc::invalid_argument);
        CHECK(contains(refused.message(), "use a view"));
        if (p.options.softcap > 0) continue;  // exact attention has it
        CHECK(contains(exact_attention(p.query(), store, p.options, truth.view(), memory).message(), "use a view"));
        CHECK(contains(vattention<ranked_policy>()(p.query(), store, p.options, truth.view(), memory).message(),
                       "use a view"));
        continue;
      }
      REQUIRE(exact_attention(p.query(), p.cache(), p.options, truth.view(), memory).ok());
      // The store's rows as a view, for masks over them.
      std::vector<float> k, v;
      for (index_t h = 0; h < 2; ++h) {
        for (index_t row = 0; row < tokens; ++row) {
          const auto key = store.head(0, h).key(row), value = store.head(0, h).value(row);
          k.insert(k.end(), key.begin(), key.end());
          v.insert(v.end(), value.begin(), value.end());
        }
      }
      check<store_policy>(p, store, contiguous_kv(k.data(), v.data(), p.cache_shape()), {}, truth, sampled);
    }
  }
  CHECK(sampled > 0);
}
