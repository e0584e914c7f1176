// Plans: the same bits however many threads take part, in whatever order they run, and clear refusals.
#include "vattn/plan.hpp"

#include <thread>
#include <vector>

#include "support/layout.hpp"
#include "vattn/call/audit.hpp"
#include "vattn/kv/reference.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

struct planned {
  explicit planned(index_t threads = 1)
      : r({.queries = 2, .heads = 6, .kv_heads = 2, .dk = 16, .dv = 8}, {900, 0, 700, 31}),
        what{.n_batch = 4,
             .n_queries = 2,
             .n_q_heads = 6,
             .n_kv_heads = 2,
             .max_tokens = 900,
             .dk = 16,
             .dv = 8,
             .threads = threads} {}
  [[nodiscard]] auto arguments(results& to) const {
    return run_arguments{r.p.query(), r.contiguous(), r.p.options, to.view(),
                         draw_key{.seed = 3, .layer = 1, .step = 9}};
  }
  ragged<float> r;
  plan_shape what;
};

}  // namespace

TEST_CASE("a plan gives the functor's bits for any number of threads", "[runtime][plan]") {
  const planned one;
  results want(one.r.p.s);
  workspace memory;
  REQUIRE(vattention<ranked_policy>(small_config())(one.r.p.query(), one.r.contiguous(), one.r.p.options, want.view(),
                                                    memory, {.seed = 3, .layer = 1, .step = 9})
              .ok());
  for (const index_t nth : {1, 2, 3, 7, 40}) {
    const planned many(nth);
    const auto p = plan<ranked_policy>(many.what, small_config());
    REQUIRE(p.validate().ok());
    std::vector<std::byte> bytes(workspace_bytes(p) + 1);
    const std::span<std::byte> odd = std::span(bytes).subspan(1);  // any alignment
    results got(one.r.p.s);
    for (index_t ith = nth; ith-- > 0;) REQUIRE(run(p, many.arguments(got), odd, ith, nth).ok());
    CHECK(got.output == want.output);
    CHECK(got.log_sum_exp == want.log_sum_exp);

    results together(one.r.p.s);
    std::vector<std::thread> threads;
    std::atomic<int> failed{0};
    for (index_t ith = 0; ith < nth; ++ith)
      threads.emplace_back([&, ith] { failed += !run(p, many.arguments(together), odd, ith, nth).ok(); });
    for (std::thread& t : threads) t.join();
    CHECK(failed == 0);
    CHECK(together.output == want.output);

    results executed(one.r.p.s);
    CHECK(run(p, many.arguments(executed), odd, thread_executor(nth)).ok());
    CHECK(executed.output == want.output);
  }
}

TEST_CASE("threads keep to their own rows and their own memory", "[runtime][plan]") {
  const planned three(3);
  const auto p = plan(three.what, small_config());
  std::vector<std::byte> bytes(workspace_bytes(p));
  results got(three.r.p.s);
  REQUIRE(run(p, three.arguments(got), bytes, 1, 3).ok());
  std::size_t untouched = 0;
  for (const float l : got.log_sum_exp) untouched += l == -12345.0f;
  CHECK(untouched > got.log_sum_exp.size() / 2);
  CHECK(untouched < got.log_sum_exp.size());
}

TEST_CASE("a plan serves an observer", "[runtime][plan]") {
  const planned two(2);
  const auto p = plan(two.what, small_config());
  std::vector<std::byte> bytes(workspace_bytes(p));
  results got(two.r.p.s);
  auditor audit(1);
  REQUIRE(run(p, two.arguments(got), bytes, 0, 2, audit).ok());
  REQUIRE(run(p, two.arguments(got), bytes, 1, 2, audit).ok());
  CHECK(audit.report().rows == 4 * 2 * 6);
  CHECK(audit.report().audited == 4 * 2 * 6);
}

TEST_CASE("a plan for a selector over indices, and another layer's", "[runtime][plan]") {
  using codes = sketch::key_codes<4>;
  struct policy : default_policy {
    using selector = select::indexed<codes>;
    using sampler = sample::by_importance;
  };
  const problem<float> p({.heads = 2, .kv_heads = 1, .n = 2000, .dk = 32, .dv = 8});
  std::vector<codes> first(1, codes(32, 1)), second(1, codes(32, 2));
  append_from(first[0], p.cache().head(0, 0));
  append_from(second[0], p.cache().head(0, 0));
  const auto planned = plan<policy>({.n_q_heads = 2, .max_tokens = 4000, .dk = 32, .dv = 8}, small_config(), {first});
  std::vector<std::byte> bytes(workspace_bytes(planned));
  for (const auto* heads : {&first, &second}) {
    results a(p.s), b(p.s);
    workspace memory;
    REQUIRE(run(planned.with_selector({*heads}), run_arguments{p.query(), p.cache(), p.options, a.view()}, bytes).ok());
    REQUIRE(vattention<policy>(small_config(), {*heads})(p.query(), p.cache(), p.options, b.view(), memory).ok());
    CHECK(a.output == b.output);
    CHECK_FALSE(a.certificates[0].exact());
  }
}

TEST_CASE("a plan over a store gives the functor's bits for any number of threads", "[runtime][plan]") {
  problem<float> p({.heads = 8, .kv_heads = 4, .n = 20000, .dk = 32, .dv = 16});
  for (float& x : p.v) x += 2;  // values that do not cancel: less than all rows will do
  shuffled_store<float> store({.n_kv_heads = 4, .dk = 32, .dv = 16});
  REQUIRE(store.assign(p.cache()).ok());
  const config settings{.epsilon = 0.2};
  results want(p.s);
  workspace memory;
  REQUIRE(vattention<store_policy>(settings)(p.query(), store, p.options, want.view(), memory, {.step = 5}).ok());
  CHECK_FALSE(want.certificates[0].exact());
  for (const index_t nth : {1, 3, 9}) {
    const auto planned = plan<store_policy>(
        {.n_q_heads = 8, .n_kv_heads = 4, .max_tokens = 20100, .dk = 32, .dv = 16, .threads = nth}, settings);
    std::vector<std::byte> bytes(workspace_bytes(planned));
    results got(p.s);
    const run_arguments call{p.query(), kv_reference(store), p.options, got.view(), draw_key{.step = 5}};
    std::vector<std::thread> threads;
    std::atomic<int> failed{0};
    for (index_t ith = 0; ith < nth; ++ith)
      threads.emplace_back([&, ith] { failed += !run(planned, call, bytes, ith, nth).ok(); });
    for (std::thread& t : threads) t.join();
    CHECK(failed == 0);
    CHECK(got.output == want.output);
  }
}

TEST_CASE("calls that do not fit their plan say why", "[runtime][plan]") {
  const planned two(2);
  const auto p = plan(two.what, small_config());
  std::vector<std::byte> bytes(workspace_bytes(p));
  results got(two.r.p.s);
  auto a = two.arguments(got);
  const auto why = [&](const auto& of, index_t ith = 0, index_t nth = 1) {
    return std::string(run(of, a, bytes, ith, nth).message());
  };
  REQUIRE(why(p).empty());
  static_assert(
      noexcept(run(p, a, bytes, 0, 1))&& noexcept(run(p, a, bytes))&& noexcept(run(p, a, bytes, serial_executor{})));
  CHECK(contains(why(p, 2, 2), "thread 2 of 2"));
  CHECK(contains(why(p, -1, 2), "thread -1 of 2"));
  CHECK(contains(why(p, 0, 0), "thread 0 of 0"));
  CHECK(contains(why(p, 0, 3), "3 threads, but the plan is for 2"));
  plan_shape other = two.what;
  other.max_tokens = 899;
  CHECK(contains(why(plan(other, small_config())), "900 tokens, the plan at most 899"));
  other = two.what, other.n_queries = 1;
  CHECK(contains(why(plan(other, small_config())), "the plan is for [4, 1, 6, 16]"));
  other = two.what, other.dv = 16;
  CHECK(contains(why(plan(other, small_config())), "plan again"));
  other = two.what, other.n_kv_heads = 4;
  CHECK(contains(why(plan(other, small_config())), "query heads a multiple of KV heads"));
  config bad = small_config();
  bad.epsilon = 2;
  CHECK(contains(why(plan(two.what, bad)), "epsilon is 2"));
  CHECK(contains(std::string(run(p, a, std::span(bytes).first(64)).message()), "the workspace has"));
  std::vector<float> mask(900, 0.0f);
  a.options.mask = mask_view(tensor_view<const float, 4>(mask.data(), {4, 6, 2, 900}, {0, 0, 0, 4}));
  CHECK(contains(why(p), "plan with masked = true"));
  other = two.what, other.masked = true;
  const auto masked = plan(other, small_config());
  bytes.resize(workspace_bytes(masked));
  CHECK(why(masked).empty());
}
