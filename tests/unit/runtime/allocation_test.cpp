// No allocation on the decode path: after a first call of the same shape, none of the calls below asks for memory.
#include <vattn/base/thread_pool.hpp>
#include <vattn/sketch/codes.hpp>
#include <vector>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/problem.hpp"

namespace {

using namespace vattn;
using test::allocations;

using test_problem = test::problem<Eigen::bfloat16>;

template <class Call>
void check_silent(Call&& call) {
  REQUIRE(call().ok());
  const long before = allocations;
  bool ok = true;
  for (int step = 0; step < 3; ++step) ok = call().ok() && ok;
  const long after = allocations;
  CHECK(ok);
  CHECK(after == before);
}

template <class Selector, class Sampler, class Bound = budget::clt, class Target = budget::output>
struct policy : default_policy {
  using selector = Selector;
  using sampler = Sampler;
  using bound = Bound;
  using target = Target;
};

template <class Policy>
void check_policy(const test_problem& p, const typename Policy::selector& selector = {}) {
  config c;
  c.sinks = c.window = 16;
  c.epsilon = 0.2;
  const vattention<Policy> attend(c, selector);
  test::results r(p.s);
  workspace memory;
  thread_pool pool(2);
  check_silent([&] { return attend(p.query(), p.cache(), p.options, r.view(), memory, {.seed = 3}); });
  check_silent([&] { return attend(p.query(), p.cache(), p.options, r.view(), memory, {.seed = 3}, pool); });
  // And none at all over the caller's memory of the size that is asked for.
  std::vector<std::byte> bytes(attend.workspace_bytes(p.s.n, p.s.dk, p.s.dv));
  workspace fixed(bytes);
  const long before = allocations;
  const bool ok = attend(p.query(), p.cache(), p.options, r.view(), fixed, {.seed = 3}).ok();
  const long after = allocations;
  CHECK(ok);
  CHECK(after == before);
}

}  // namespace

TEST_CASE("the counter counts", "[runtime][allocation]") {
  const long before = allocations;
  const std::vector<int> some(test::opaque(std::size_t{10}));
  CHECK(allocations > before);
  CHECK(some.size() == 10);
}

TEST_CASE("exact attention allocates nothing", "[runtime][allocation]") {
  test_problem p({.queries = 2, .heads = 4, .kv_heads = 2, .n = 9000, .dk = 32, .dv = 32}, 7);
  test::results r(p.s);
  workspace memory;
  thread_pool pool(2);
  check_silent([&] { return exact_attention(p.query(), p.cache(), p.options, r.view(), memory); });
  check_silent([&] { return exact_attention(p.query(), p.cache(), p.options, r.view(), memory, pool); });
  p.set_mask(std::vector<float>(static_cast<std::size_t>(2 * 4 * 9000), 0.5f));
  p.options.softcap = 4;
  check_silent([&] { return exact_attention(p.query(), p.cache(), p.options, r.view(), memory); });
}

TEST_CASE("no policy allocates", "[runtime][allocation]") {
  const test_problem p({.heads = 2, .n = 6000, .dk = 32, .dv = 32}, 31, 1.5f);
  check_policy<ranked_policy>(p);
  check_policy<verified_denominator>(p);
  check_policy<verified_numerator>(p);
  check_policy<verified_sdpa>(p);
  using sample::uniform_with_replacement;
  check_policy<policy<select::top_p<>, uniform_with_replacement, budget::bernstein>>(p);

  using codes = sketch::key_codes<4>;
  std::vector<codes> fine(1, codes(32, 1)), coarse(1, codes(32, 2));
  append_from(fine[0], p.cache().head(0, 0));
  append_from(coarse[0], p.cache().head(0, 0));
  check_policy<policy<select::indexed<codes>, sample::by_importance>>(p, {.heads = fine});
  check_policy<policy<select::indexed<codes>, sample::by_group_importance>>(p, {.heads = fine});
  certified_policy<codes>::selector bounds;
  bounds.heads = fine;
  check_policy<certified_policy<codes>>(p, bounds);
  check_policy<policy<select::two_phase<codes, codes>, sample::in_two_phases>>(
      p, {.coarse = {.heads = coarse}, .fine = {.heads = fine}});
}

TEST_CASE("a store within its room allocates neither for a token nor for a step", "[runtime][allocation]") {
  const test_problem p({.heads = 8, .kv_heads = 2, .n = 25000, .dk = 64, .dv = 64}, 5);
  shuffled_store<Eigen::bfloat16> store({.n_kv_heads = 2, .dk = 64, .dv = 64});
  REQUIRE(store.assign(p.cache()).ok());
  REQUIRE(store.reserve(25500).ok());
  config c;
  c.epsilon = 0.2;
  const vattention<store_policy> attend(c);
  test::results r(p.s);
  workspace memory;
  REQUIRE(attend(p.query(), store, p.options, r.view(), memory, {.seed = 3}).ok());
  CHECK_FALSE(r.certificates[0].exact());
  thread_pool pool(2);
  std::uint32_t step = 0;
  const auto key = [&] { return draw_key{.seed = 3, .step = ++step}; };
  check_silent([&] { return attend(p.query(), store, p.options, r.view(), memory, key()); });
  check_silent([&] { return attend(p.query(), store, p.options, r.view(), memory, key(), pool); });
  c.epsilon = 0.001;  // read whole
  check_silent([&] { return vattention<store_policy>(c)(p.query(), store, p.options, r.view(), memory); });
  std::vector<std::byte> bytes(attend.workspace_bytes(25500, 64, 64));
  workspace fixed(bytes);
  const long before = allocations;
  bool ok = true;
  for (index_t token = 0; token < 500; ++token) {
    ok = store.append(p.k.data() + token * 128, p.v.data() + token * 128).ok() && ok;
    if (token % 100 == 0) ok = attend(p.query(), store, p.options, r.view(), fixed, key()).ok() && ok;
  }
  store.truncate(25100);
  const long after = allocations;
  CHECK(ok);
  CHECK(store.size() == 25100);
  CHECK(after == before);
}
