// A query that sees no token: its output is 0, and its denominator what a sink leaves. For every policy and every way
// to see nothing.
#include "support/policies.hpp"
#include "vattn/call/audit.hpp"
#include "vattn/kv/flashinfer.hpp"
#include "vattn/plan.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

const std::vector<float> sink_logits{8, -3.5f, -infinity, 0};

/// Row `at` of r saw nothing, and says so.
void check_nothing(const results& r, std::size_t at, float sink) {
  CAPTURE(at, sink);
  CHECK(r.log_sum_exp[at] == sink);
  for (index_t j = 0; j < r.extents[3]; ++j) CHECK(r.row(at)[j] == 0.0f);
  const certificate& c = r.certificates[at];
  CHECK(c.exact());
  CHECK(c.n == 0);
  CHECK(c.rows() == 0);
  CHECK(c.epsilon_achieved == 0);
  CHECK(c.log_denominator == static_cast<double>(sink));
}

/// Ways to see nothing: the problem whose first query does, and whether it alone.
struct way {
  std::string name;
  problem<float> p;
};
std::vector<way> ways() {
  std::vector<way> all;
  const shape s{.queries = 2, .heads = 4, .kv_heads = 2, .dk = 8, .dv = 6};
  const auto add = [&](const std::string& name, index_t n, auto&& edit) {
    shape of = s;
    of.n = n;
    problem<float> p(of);
    edit(p);
    all.push_back({name, std::move(p)});
  };
  const auto nothing = [](auto&) {};
  add("no tokens", 0, nothing);
  add("before the first token", 1, [](auto& p) { p.options.causal = true; });
  add("a window before the first token", 1, [](auto& p) { p.options.sliding_window = 4; });
  add("all masked", 900, [](auto& p) {
    std::vector<float> mask(4 * 2 * 900, 0.0f);
    for (std::size_t h = 0; h < 4; ++h)
      std::fill_n(mask.begin() + static_cast<std::ptrdiff_t>(h * 1800), 900, -infinity);
    p.set_mask(mask);
  });
  add("a window of masked tokens", 900, [](auto& p) {
    p.options.sliding_window = 50;
    std::vector<float> mask(4 * 2 * 900, 0.0f);
    for (std::size_t row = 0; row < 8; row += 2)
      std::fill_n(mask.begin() + static_cast<std::ptrdiff_t>(row * 900 + 840), 59, -infinity);
    p.set_mask(mask);
  });
  return all;
}

}  // namespace

TEST_CASE("what sees nothing has the sink's log-sum-exp, for every policy", "[attention][empty]") {
  for (way& w : ways()) {
    const indices of(w.p.cache());
    for (const bool with_sinks : {false, true}) {
      problem<float>& p = w.p;
      if (with_sinks) p.set_sinks(sink_logits);
      const auto check = [&](const results& r) {
        for (std::size_t h = 0; h < 4; ++h) {
          check_nothing(r, h, with_sinks ? sink_logits[h] : -infinity);
          if (p.s.n == 0) check_nothing(r, 4 + h, with_sinks ? sink_logits[h] : -infinity);
        }
      };
      workspace memory;
      results exact(p.s);
      CAPTURE(w.name, with_sinks);
      REQUIRE(exact_attention(p.query(), p.cache(), p.options, exact.view(), memory).ok());
      check(exact);
      CHECK(compare(p, exact).output < 2e-6);
      for_each_policy([&]<class Policy>(const char* name) {
        CAPTURE(name);
        const auto select = make_selector<typename Policy::selector>(of);
        const vattention<Policy> attend(small_config(), select);
        results r(p.s);
        auditor audit(1);
        const status s = attend(p.query(), p.cache(), p.options, r.view(), memory, {}, serial_executor{}, audit);
        CAPTURE(s.message());
        REQUIRE(s.ok());
        check(r);
        CHECK(audit.report().rows == 8);
        CHECK(audit.report().largest < 1);

        const plan_shape what{.n_queries = 2,
                              .n_q_heads = 4,
                              .n_kv_heads = 2,
                              .max_tokens = p.s.n,
                              .dk = 8,
                              .dv = 6,
                              .masked = true,
                              .threads = 3};
        const auto planned = plan<Policy>(what, small_config(), select);
        std::vector<std::byte> bytes(workspace_bytes(planned));
        results shared(p.s);
        for (index_t ith = 0; ith < 3; ++ith)
          REQUIRE(run(planned, run_arguments{p.query(), p.cache(), p.options, shared.view()}, bytes, ith, 3).ok());
        check(shared);
      });
    }
  }
}

TEST_CASE("a sink that is no number is told even where nothing is seen", "[attention][empty]") {
  for (way& w : ways()) {
    const indices of(w.p.cache());
    for (const float sink : {not_a_number, infinity}) {
      w.p.set_sinks({0, sink, 0, 0});
      CAPTURE(w.name, sink);
      workspace memory;
      results r(w.p.s);
      CHECK(exact_attention(w.p.query(), w.p.cache(), w.p.options, r.view(), memory).code() == errc::non_finite);
      for_each_policy([&]<class Policy>(const char* name) {
        CAPTURE(name);
        const vattention<Policy> attend(small_config(), make_selector<typename Policy::selector>(of));
        CHECK(attend(w.p.query(), w.p.cache(), w.p.options, r.view(), memory).code() == errc::non_finite);
      });
    }
  }
}

TEST_CASE("empty sequences of a batch, empty page lists, and positions that leave nothing", "[attention][empty]") {
  ragged<float> r({.heads = 4, .kv_heads = 2, .dk = 8, .dv = 6}, {0, 70, 0});
  r.p.set_sinks(sink_logits);
  workspace memory;
  results to(r.p.s);
  const auto check = [&](index_t b) {
    for (std::size_t h = 0; h < 4; ++h) check_nothing(to, to.at(b, 0, static_cast<index_t>(h)), sink_logits[h]);
  };
  REQUIRE(exact_attention(r.p.query(), r.contiguous(), r.p.options, to.view(), memory).ok());
  check(0), check(2);
  REQUIRE(vattention<ranked_policy>(small_config())(r.p.query(), r.contiguous(), r.p.options, to.view(), memory).ok());
  check(0), check(2);

  // Without any page at all: no rows, and no ids.
  const std::int32_t indptr[] = {0, 0, 0, 0}, last[] = {0, 0, 0};
  const flashinfer_pages none{
      .page_size = 16, .n_kv_heads = 2, .dk = 8, .dv = 6, .n_batch = 3, .indptr = indptr, .last_page_len = last};
  const float* rows = nullptr;
  const auto paged = flashinfer_paged_kv(rows, rows, page_order::nhd, none);
  REQUIRE(exact_attention(r.p.query(), paged, r.p.options, to.view(), memory).ok());
  for (index_t b = 0; b < 3; ++b) check(b);
  REQUIRE(vattention<ranked_policy>(small_config())(r.p.query(), paged, r.p.options, to.view(), memory).ok());
  for (index_t b = 0; b < 3; ++b) check(b);

  // Cells of other sequences alone, and cells after the query's own position.
  const std::vector<std::int32_t> cells(70, 30), absent(70, -1);
  const std::int32_t query[] = {29};
  problem<float> p({.heads = 4, .kv_heads = 2, .n = 70, .dk = 8, .dv = 6});
  p.set_sinks(sink_logits);
  results one(p.s);
  for (const auto* at : {&cells, &absent}) {
    for (const bool window : {false, true}) {
      attention_options o = p.options;
      o.positions = {{at->data(), {1, 70}}, {query, {1, 1}}};
      o.causal = !window, o.sliding_window = window ? 500 : 0;
      for (const bool sparse : {false, true}) {
        const status s = sparse ? vattention<ranked_policy>(small_config())(p.query(), p.cache(), o, one.view(), memory)
                                : exact_attention(p.query(), p.cache(), o, one.view(), memory);
        REQUIRE(s.ok());
        for (std::size_t h = 0; h < 4; ++h) check_nothing(one, h, sink_logits[h]);
      }
    }
  }
}

TEST_CASE("an empty store has the sink's denominator", "[attention][empty][store]") {
  problem<float> p({.heads = 4, .kv_heads = 2, .n = 0, .dk = 16, .dv = 16});
  const shuffled_store<float> store({.n_kv_heads = 2, .dk = 16, .dv = 16});
  workspace memory;
  for (const bool with_sinks : {false, true}) {
    if (with_sinks) p.set_sinks(sink_logits);
    for (const bool observed : {false, true}) {  // two ways through the code
      results r(p.s);
      auditor audit(1);
      const vattention<store_policy> attend;
      const status s = observed ? attend(p.query(), store, p.options, r.view(), memory, {}, serial_executor{}, audit)
                                : attend(p.query(), store, p.options, r.view(), memory);
      REQUIRE(s.ok());
      for (std::size_t h = 0; h < 4; ++h) check_nothing(r, h, with_sinks ? sink_logits[h] : -infinity);
    }
  }
  p.set_sinks({not_a_number, 0, 0, 0});
  results r(p.s);
  CHECK(vattention<store_policy>()(p.query(), store, p.options, r.view(), memory).code() == errc::non_finite);
}

TEST_CASE("shards merge to the whole where the sinks are a shard's that sees nothing", "[attention][empty]") {
  problem<float> p({.heads = 2, .kv_heads = 1, .n = 400, .dk = 8, .dv = 6});
  p.set_sinks({2, 9});
  results whole(p.s);
  workspace memory;
  REQUIRE(exact_attention(p.query(), p.cache(), p.options, whole.view(), memory).ok());
  // Shard 0: no keys, all sinks. Shard 1: all keys, no sink. By the states, and by log-sum-exp.
  problem<float> empty = p, keys = p;
  empty.s.n = 0;
  keys.options.sink_logits = nullptr;
  results a(p.s), b(p.s);
  REQUIRE(exact_attention(empty.query(), empty.cache(), empty.options, a.view(), memory).ok());
  REQUIRE(exact_attention(keys.query(), keys.cache(), keys.options, b.view(), memory).ok());
  for (std::size_t h = 0; h < 2; ++h) {
    std::vector<float> merged(6), left(6), right(b.row(h), b.row(h) + 6);
    softmax_state sum(merged), first(a.log_sum_exp[h], 1, left), second(b.log_sum_exp[h], 1, right);
    sum.merge(first);
    sum.merge(second);
    CHECK_THAT(static_cast<double>(sum.log_sum_exp()), WithinAbs(static_cast<double>(whole.log_sum_exp[h]), 1e-5));
    std::vector<float> out(6);
    static_cast<void>(sum.finish(out));
    for (std::size_t j = 0; j < 6; ++j)
      CHECK_THAT(static_cast<double>(out[j]), WithinAbs(static_cast<double>(whole.row(h)[j]), 1e-6));
  }
}
