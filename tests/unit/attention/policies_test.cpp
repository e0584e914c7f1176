// Every target with every bound, sampler and selector: compiles, runs, and is near the truth.
// Built without optimisation: it is the number of instantiations that costs here, not their speed.
#include "support/catch.hpp"
#include "support/problem.hpp"

using namespace vattn::test;
using vattn::index_t;
namespace budget = vattn::budget;
namespace sample = vattn::sample;
namespace ranked = vattn::select;  // ::select is a function of POSIX

namespace {

template <class Target, class Bound, class Sampler, class Selector>
struct policy : vattn::default_policy {
  using target = Target;
  using bound = Bound;
  using sampler = Sampler;
  using selector = Selector;
};

template <class Policy>
void run(const problem<float>& p, int& sampled) {
  static_assert(vattn::attention_policy<Policy>);
  vattn::config c;
  c.sinks = c.window = 16;
  c.epsilon = 0.2;
  vattn::workspace memory;
  results r(p.s);
  typename Policy::selector selector;
  if constexpr (requires { selector.mass; }) selector.mass = 0.3;  // 0.9 would leave nothing to sample
  const vattn::vattention<Policy> attend(c, selector);
  const vattn::status s = attend(p.query(), p.cache(), p.options, r.view(), memory, {.seed = 3});
  CAPTURE(to_string(Policy::target::kind), Policy::bound::name, Policy::sampler::with_replacement, s.message());
  CHECK(s.ok());
  const disagreement worst = compare(p, r);
  const vattn::certificate& cert = r.certificates[0];
  CAPTURE(worst.output, worst.denominator, cert.rows_exact, cert.rows_sampled, cert.epsilon_achieved);
  // One draw at a fixed seed: beyond what a correct estimate does, and far less than what a part of the
  // tokens makes if it is left out or counted twice.
  CHECK(worst.output < 0.3);
  CHECK(worst.denominator < 0.3);
  CHECK(cert.n == p.s.n);
  CHECK(cert.rows() <= p.s.n);
  CHECK(cert.target == Policy::target::kind);
  CHECK_FALSE(cert.saturated);
  if (cert.exact()) {
    CHECK(worst.output < 1e-5);
    CHECK(cert.rows_sampled == 0);
  } else {
    CHECK(cert.promise == Policy::bound::kind);
    CHECK(cert.bound == Policy::bound::name);
    CHECK(cert.epsilon_achieved <= c.epsilon);
    CHECK(cert.rows_exact >= 32);
    CHECK(cert.rows_sampled >= c.min_sample);
    ++sampled;
  }
}

template <class Target, class Bound, class Sampler>
void each_selector(const problem<float>& p, int& sampled) {
  run<policy<Target, Bound, Sampler, ranked::top_k<ranked::exact_contributions>>>(p, sampled);
  run<policy<Target, Bound, Sampler, ranked::top_k<ranked::exact_logits>>>(p, sampled);
  run<policy<Target, Bound, Sampler, ranked::top_p<>>>(p, sampled);
  run<policy<Target, Bound, Sampler, ranked::none>>(p, sampled);
}

template <class Target, class Bound>
void each_sampler(const problem<float>& p, int& sampled) {
  each_selector<Target, Bound, sample::uniform_without_replacement>(p, sampled);
  each_selector<Target, Bound, sample::uniform_with_replacement>(p, sampled);
}

struct by_mass : vattn::default_policy {
  using selector = ranked::top_p<>;
  using target = budget::denominator;
};

}  // namespace

TEMPLATE_TEST_CASE("every bound, sampler and selector runs", "[vattention][policy]", budget::denominator,
                   budget::numerator, budget::sdpa, budget::output) {
  const problem<float> p({.n = 6000, .dk = 8, .dv = 8}, 31, 1.5f);
  int asymptotic = 0, finite_sample = 0;
  each_sampler<TestType, budget::clt>(p, asymptotic);
  each_sampler<TestType, budget::student>(p, asymptotic);
  each_sampler<TestType, budget::hoeffding>(p, finite_sample);
  each_sampler<TestType, budget::bernstein>(p, finite_sample);
  CHECK(asymptotic >= 8);  // of 16: else nothing but exact attention was tried
}

TEST_CASE("the published presets run as the paper's algorithm does", "[vattention][policy]") {
  const problem<float> p({.heads = 2, .n = 6000, .dk = 16, .dv = 16}, 32, 1.5f);
  for (const vattn::config& c : {vattn::presets::paper_tight, vattn::presets::paper_default,
                                 vattn::presets::paper_moderate, vattn::presets::paper_loose}) {
    vattn::workspace memory;
    results r(p.s);
    const vattn::vattention<vattn::verified_denominator> attend(c);
    REQUIRE(attend(p.query(), p.cache(), p.options, r.view(), memory, {.seed = 1}).ok());
    CAPTURE(c.epsilon);
    CHECK(compare(p, r).denominator < 3 * c.epsilon);
    for (const vattn::certificate& cert : r.certificates) {
      CHECK(cert.rounds <= 2);
      const auto heavy = static_cast<index_t>(std::ceil(c.heavy * 6000));
      if (!cert.exact()) CHECK(cert.rows_exact == 256 + heavy);
    }
  }
}

TEST_CASE("top_p reads its heavy set exactly", "[vattention][policy]") {
  // A tenth of the tokens holds nearly all: lost, D would be a fraction of the truth.
  problem<float> p({.n = 4000, .dk = 4, .dv = 4}, 33);
  std::fill(p.q.begin(), p.q.end(), 0.0f);
  std::vector<float> mask(4000, 0.0f);
  for (std::size_t i = 5; i < 4000; i += 10) mask[i] = 8;
  p.set_mask(mask);
  vattn::config c;
  c.sinks = c.window = 16;
  vattn::workspace memory;
  results r(p.s);
  ranked::top_p<> selector;
  selector.mass = 0.996;  // all of them: 399 of the 400 hold 0.9945
  REQUIRE(vattn::vattention<by_mass>(c, selector)(p.query(), p.cache(), p.options, r.view(), memory).ok());
  CHECK_FALSE(r.certificates[0].exact());
  CHECK(compare(p, r).denominator < 0.05);
  CHECK(r.certificates[0].rows_exact >= 400);
}
