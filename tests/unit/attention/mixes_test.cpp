// Each pair of selector and sampler that is accepted runs, and is near the truth for every head. What bounds and
// targets do with a uniform sample is policies_test.cpp's business: they know nothing of selectors.
#include "compile/mixes.hpp"

#include "support/policies.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

struct tried {
  int mixes = 0, sampled = 0;
};

template <class Policy, kv_cache KV>
void run(const problem<float>& p, const KV& cache, const typename Policy::selector& select, tried& count) {
  config c = small_config();
  c.scale = error_scale::output;
  results r(p.s);
  workspace memory;
  const status s = vattention<Policy>(c, select)(p.query(), cache, p.options, r.view(), memory, {.seed = 3});
  CAPTURE(count.mixes, s.message());
  REQUIRE(s.ok());
  CHECK(compare(p, r).output < 1);  // a head that is forgotten is off by exactly 1
  CHECK(compare(p, r).denominator < 1);
  for (const certificate& k : r.certificates) {
    CHECK(k.n == p.s.n);
    CHECK(k.rows() <= k.n);
    CHECK((k.exact() || k.promise == Policy::bound::kind || k.promise == guarantee::deterministic));
    count.sampled += !k.exact();
  }
  ++count.mixes;
}

template <class Selector, class Sampler>
void run_pair(const problem<float>& p, const indices& of, tried& count) {
  if constexpr (attention_policy<mix_of<Selector, Sampler, budget::clt, budget::output>>) {
    run<mix_of<Selector, Sampler, budget::clt, budget::output>>(p, p.cache(), make_selector<Selector>(of), count);
  } else if constexpr (attention_policy<mix_of<Selector, Sampler, budget::bernstein, budget::output>>) {
    run<mix_of<Selector, Sampler, budget::bernstein, budget::output>>(p, p.cache(), make_selector<Selector>(of), count);
  }
}

template <class Selector>
void run_each(const problem<float>& p, const indices& of, tried& count) {
  run_pair<Selector, sample::uniform_without_replacement>(p, of, count);
  run_pair<Selector, sample::uniform_with_replacement>(p, of, count);
  run_pair<Selector, sample::by_importance>(p, of, count);
  run_pair<Selector, sample::by_group_importance>(p, of, count);
  run_pair<Selector, sample::in_two_phases>(p, of, count);
}

}  // namespace

TEST_CASE("every mix of selector and sampler that compiles serves every head", "[vattention][policy]") {
  const problem<float> p({.queries = 1, .heads = 6, .kv_heads = 2, .n = 3000, .dk = 16, .dv = 16}, 4, 1.5f);
  const indices of(p.cache());
  tried count;
  run_each<ranks_nothing>(p, of, count);
  run_each<ranks>(p, of, count);
  run_each<exact_estimates>(p, of, count);
  run_each<exact_mass>(p, of, count);
  run_each<exact_reach>(p, of, count);
  run_each<norm_reach>(p, of, count);
  run_each<norms>(p, of, count);
  run_each<estimates>(p, of, count);
  run_each<index_bounds>(p, of, count);
  run_each<soft_bounds>(p, of, count);
  run_each<soft_reach>(p, of, count);
  run_each<hard>(p, of, count);
  run_each<calibrated_ranks>(p, of, count);
  run_each<two>(p, of, count);
  CHECK(count.mixes == 13 * 2 + 4 * 2 + 2 + 1);
  CHECK(count.sampled > 100);
}
