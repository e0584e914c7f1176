// Answers at any scale: V × 2^a, and K × 2^b with q × 2^−b, give the same decisions, and outputs times 2^a.
#include <cmath>
#include <string>
#include <typeinfo>
#include <vector>

#include "support/catch.hpp"
#include "support/long_enough.hpp"
#include "support/problem.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

struct scales {
  int a = 0, b = 0;
};
// Far out, near where squares in float end, and next to 1, where another rounding would show.
const std::vector<scales> all_scales{{-100, 0}, {-81, 0}, {-64, 0}, {-33, 0}, {-13, 0},  {-1, 0},     {3, 0},
                                     {14, 0},   {40, 0},  {60, 0},  {0, -60}, {0, -45},  {0, -1},     {0, 7},
                                     {0, 33},   {0, 60},  {0, 45},  {60, 60}, {60, -60}, {-100, -60}, {-100, 60}};
const std::vector<scales> few_scales{{-100, 0}, {-13, 0}, {3, 0}, {60, 0}, {0, -60}, {0, 5}, {0, 60}, {-90, 55}};

// Values with a mean, or without one, where ε is relative to their root mean square.
template <class T = float>
problem<T> problem_of(index_t n, bool mean, index_t heads = 1, float spread = 2, index_t dim = 48) {
  problem<T> p({.heads = heads, .kv_heads = 1, .n = n, .dk = dim, .dv = dim}, 5, spread);
  if (!mean)
    for (auto& x : p.v) x = T(static_cast<float>(x) - 1);
  return p;
}

template <class T>
problem<T> scaled(problem<T> p, const scales& s) {
  for (auto& x : p.v) x = T(std::ldexp(static_cast<float>(x), s.a));
  for (auto& x : p.k) x = T(std::ldexp(static_cast<float>(x), s.b));
  for (auto& x : p.q) x = std::ldexp(x, -s.b);
  return p;
}

config settings(bool mean, double epsilon = 0.1) {
  config c;
  c.epsilon = epsilon;
  c.sinks = c.window = 16;
  c.scale = mean ? error_scale::output : error_scale::rms;
  return c;
}

// The error that a certificate speaks of.
template <class T>
double error_of(const problem<T>& p, const results& r, index_t h, error_scale scale) {
  const reference::row want = reference::attend(p.exactly(), 0, 0, h);
  const std::size_t at = r.at(0, 0, h);
  double off = 0, power = 0;
  for (std::size_t j = 0; j < want.output.size(); ++j)
    off += std::pow(static_cast<double>(r.row(at)[j]) - want.output[j], 2);
  if (scale == error_scale::output) {
    for (const double o : want.output) power += o * o;
    return std::sqrt(off / power);
  }
  const auto dv = static_cast<std::size_t>(p.s.dv);
  for (std::size_t i = 0; i < want.tokens.size(); ++i) {
    double norm2 = 0;
    for (std::size_t j = 0; j < dv; ++j)
      norm2 += std::pow(static_cast<double>(p.v[static_cast<std::size_t>(want.tokens[i]) * dv + j]), 2);
    power += std::exp(want.logits[i] - want.max_logit) / want.denominator * norm2;
  }
  return std::sqrt(off / power);
}

// `attend(problem)` -> results. Samples at scale 1, and elsewhere does the same.
template <class T, class Attend>
void check_equivariance(const problem<T>& p, const config& c, Attend&& attend, const std::vector<scales>& at,
                        bool samples = true) {
  const results base = attend(p);
  for (index_t h = 0; h < p.s.heads; ++h) {
    const certificate& one = base.certificates[static_cast<std::size_t>(h)];
    INFO("head " << h << ": " << to_string(one.promise) << ", " << one.rows() << " of " << one.n << " rows");
    CHECK((one.promise != guarantee::exact) == samples);
    // A single draw: ε may be exceeded in a share δ of them, which these seeds are not of.
    if (one.target == target_kind::output) CHECK(error_of(p, base, h, c.scale) <= (samples ? c.epsilon : 1e-5));
  }
  for (const scales& s : at) {
    const problem<T> q = scaled(p, s);
    const results r = attend(q);
    INFO("V x 2^" << s.a << ", K x 2^" << s.b);
    for (std::size_t h = 0; h < base.certificates.size(); ++h) {
      const certificate &x = base.certificates[h], &y = r.certificates[h];
      CHECK(y.promise == x.promise);
      CHECK(y.rounds == x.rounds);
      CHECK(y.rows_exact == x.rows_exact);
      CHECK(y.rows_sampled == x.rows_sampled);
      CHECK(y.budget == x.budget);
      CHECK(y.breaches == x.breaches);
      CHECK(y.saturated == x.saturated);
      CHECK(std::abs(y.epsilon_achieved - x.epsilon_achieved) <= 1e-5 * x.epsilon_achieved);
      CHECK(std::abs(y.denominator_error - x.denominator_error) <= 1e-5 * x.denominator_error);
      CHECK(std::abs(y.coherence - x.coherence) <= 1e-5 * x.coherence);
      CHECK(r.log_sum_exp[h] == base.log_sum_exp[h]);
      double off = 0, norm = 0;
      for (index_t j = 0; j < p.s.dv; ++j) {
        const double want = std::ldexp(static_cast<double>(base.row(h)[j]), s.a);
        off = std::max(off, std::abs(static_cast<double>(r.row(h)[j]) - want));
        norm = std::max(norm, std::abs(want));
      }
      CHECK(off <= 1e-6 * norm);
    }
  }
}

template <class Policy, class T, class Cache>
results attend_with(const problem<T>& p, const Cache& cache, const config& c,
                    const typename Policy::selector& selector) {
  // Of certified samples some are not enough, and end exact: with seed 2 one does.
  const std::uint64_t seed = Policy::bound::kind == guarantee::finite_sample ? 3 : 2;
  results r(p.s);
  workspace memory;
  const status s = vattention<Policy>(c, selector)(p.query(), cache, p.options, r.view(), memory, {.seed = seed});
  INFO(s.message());
  REQUIRE(s.ok());
  return r;
}

// A policy without an index, on a view.
template <class Policy, class T = float>
void check_policy(const problem<T>& p, const config& c, const std::vector<scales>& at = few_scales, bool samples = true,
                  const typename Policy::selector& selector = {}) {
  check_equivariance(
      p, c, [&](const problem<T>& q) { return attend_with<Policy>(q, q.cache(), c, selector); }, at, samples);
}

// A policy over an index that `make()` makes.
template <class Policy, class T, class Make>
void check_indexed(const problem<T>& p, const config& c, Make&& make, const std::vector<scales>& at = few_scales,
                   bool samples = true) {
  CAPTURE(typeid(Policy).name());
  check_equivariance(
      p, c,
      [&](const problem<T>& q) {
        std::vector<decltype(make())> index;
        index.push_back(make());
        append_from(index[0], q.cache().head(0, 0));
        typename Policy::selector select;
        if constexpr (requires { select.base; }) {
          select.base.heads = index;
        } else {
          select.heads = index;
        }
        return attend_with<Policy>(q, q.cache(), c, select);
      },
      at, samples);
}

template <class Bound>
struct bounded : ranked_policy {
  using bound = Bound;
};
struct with_replacement : ranked_policy {
  using sampler = sample::uniform_with_replacement;
};
struct by_logits : default_policy {
  using selector = select::top_k<select::exact_logits>;
};
struct by_norms : default_policy {
  using selector = select::top_k<select::contributions<select::norm_bounds>>;
};
struct by_mass : default_policy {
  using selector = select::top_p<select::exact_contributions>;
};
struct unranked : default_policy {
  using selector = select::none;
};
template <class Target, class Bound>
struct published : ranked_policy {
  using target = Target;
  using bound = Bound;
};
template <class Index, class Sampler = sample::by_importance>
struct importance : default_policy {
  using selector = select::indexed<Index>;
  using sampler = Sampler;
};
template <class Index>
struct ranked : default_policy {
  using selector = select::indexed<Index>;
};
template <class Index>
struct calibrated : default_policy {
  using selector = select::calibrated<select::indexed<Index>>;
  using sampler = sample::by_importance;
};
struct two_phases : default_policy {
  using selector = select::two_phase<sketch::key_codes<2>, sketch::key_codes<8>>;
  using sampler = sample::in_two_phases;
};

constexpr index_t long_enough_to_sample = 8192;

}  // namespace

TEST_CASE("equivariance: uniform samples of ranked contributions") {
  for (const bool mean : {true, false}) {
    const auto p = problem_of(long_enough_to_sample, mean);
    check_policy<ranked_policy>(p, settings(mean), all_scales);
    check_policy<bounded<budget::student>>(p, settings(mean));
    check_policy<with_replacement>(p, settings(mean));
    check_policy<by_logits>(p, settings(mean));
    check_policy<by_mass>(p, settings(mean));
  }
  check_policy<ranked_policy>(problem_of<Eigen::bfloat16>(long_enough_to_sample, true), settings(true));
}

TEST_CASE("equivariance: uniform samples at finite size") {
  const auto p = problem_of(20000, true, 1, 0.5f);
  check_policy<bounded<budget::bernstein>>(p, settings(true, 0.3));
  check_policy<bounded<budget::hoeffding>>(p, settings(true, 0.5));
  check_policy<by_norms>(problem_of(long_enough_to_sample, true, 1, 0.2f), settings(true));
}

TEST_CASE("equivariance: samples without a ranking") {
  for (const bool mean : {true, false})
    check_policy<unranked>(problem_of(long_enough_to_sample, mean, 1, 0.5f), settings(mean), all_scales);
}

TEST_CASE("equivariance: published targets") {
  const auto p = problem_of(long_enough_to_sample, true, 1, 1);
  for (const double epsilon : {0.1, 0.3}) {
    const config c = presets::published(epsilon, epsilon, 0.05, 0.02);
    check_policy<verified_denominator>(p, c);
    check_policy<verified_numerator>(p, c);
    check_policy<verified_sdpa>(p, c);
  }
  config c = settings(true, 0.3);
  check_policy<published<budget::numerator, budget::bernstein>>(problem_of(20000, true, 1, 0.2f), c);
  check_policy<published<budget::denominator, budget::hoeffding>>(problem_of(20000, true, 1, 0.2f), c);
  check_policy<published<budget::sdpa, budget::student>>(p, c);
}

TEST_CASE("equivariance: importance sampling") {
  for (const bool mean : {true, false}) {
    const auto p = problem_of(long_enough_to_sample, mean);
    const config c = settings(mean);
    check_indexed<importance<sketch::key_codes<4>>>(
        p, c, [] { return sketch::key_codes<4>(48, 1); }, all_scales);
    check_indexed<importance<sketch::key_codes<1>>>(p, c, [] { return sketch::key_codes<1>(48, 1); });
    check_indexed<importance<sketch::key_codes<8>>>(p, c, [] { return sketch::key_codes<8>(48, 1); });
  }
  const auto p = problem_of<Eigen::bfloat16>(long_enough_to_sample, true);
  check_indexed<importance<sketch::key_codes<2>>>(p, settings(true), [] { return sketch::key_codes<2>(48, 1); });
}

TEST_CASE("equivariance: one sample for a group, and two phases") {
  const auto p = problem_of(long_enough_to_sample, true, 4);
  const config c = settings(true);
  check_indexed<importance<sketch::key_codes<4>, sample::by_group_importance>>(
      p, c, [] { return sketch::key_codes<4>(48, 1); });
  check_equivariance(
      p, c,
      [&](const problem<>& q) {
        std::vector<sketch::key_codes<2>> coarse{sketch::key_codes<2>(48, 1)};
        std::vector<sketch::key_codes<8>> fine{sketch::key_codes<8>(48, 2)};
        append_from(coarse[0], q.cache().head(0, 0));
        append_from(fine[0], q.cache().head(0, 0));
        return attend_with<two_phases>(q, q.cache(), c, {{coarse}, {fine}});
      },
      few_scales);
}

TEST_CASE("equivariance: learned codes and rankings that are calibrated") {
  const auto p = problem_of(long_enough_to_sample, true);
  const config c = settings(true);
  const sketch::learning how{.train_size = 512, .iterations = 3};
  check_indexed<importance<sketch::product_codes>>(p, c, [&] { return sketch::product_codes(48, 12, how); });
  // What ranks poorly samples where logits are nearly equal.
  const auto flat = problem_of(long_enough_to_sample, true, 1, 0.3f);
  check_indexed<calibrated<select::pq_cache>>(flat, c, [&] { return select::pq_cache(48, 4, 6, how); });
  check_indexed<calibrated<select::double_sparsity>>(flat, c, [] {
    std::vector<ordinal> channels(24);
    for (ordinal j = 0; j < 24; ++j) channels[j] = j;
    return select::double_sparsity(channels);
  });
  check_indexed<calibrated<select::quest>>(flat, c, [] { return select::quest(48, 4); });
  check_indexed<ranked<select::magic_pig>>(flat, c, [] { return select::magic_pig(48, 8, 20); });
  check_indexed<ranked<select::hash_attention<select::simhash_map>>>(
      flat, c, [] { return select::hash_attention(select::simhash_map(48)); });
}

TEST_CASE("equivariance: certified") {
  for (const bool mean : {true, false}) {
    const auto p = problem_of(20000, mean, 1, 1);
    check_indexed<certified_policy<sketch::key_codes<8>>>(
        p, settings(mean, 0.3), [] { return sketch::key_codes<8>(48, 1); }, mean ? all_scales : few_scales);
  }
  // Few tokens hold all: nothing is left to chance.
  check_indexed<certified_policy<sketch::key_codes<8>>>(problem_of(long_enough_to_sample, true, 1, 12), settings(true),
                                                        [] { return sketch::key_codes<8>(48, 1); });
}

TEST_CASE("equivariance: from a store") {
  const auto check = [](const auto& p, const config& c, const std::vector<scales>& at) {
    check_equivariance(
        p, c,
        [&](const auto& q) {
          using element = typename std::remove_cvref_t<decltype(q.k)>::value_type;
          shuffled_store<element> store({.n_kv_heads = 1, .dk = 48, .dv = 48, .seed = 3});
          REQUIRE(store.assign(q.cache()).ok());
          return attend_with<store_policy>(q, store, c, {});
        },
        at);
  };
  const index_t n = long_enough(4);
  for (const bool mean : {true, false}) check(problem_of(n, mean, 4, 1), settings(mean), few_scales);
  check(problem_of(n, true, 4, 2), settings(true), all_scales);
  check(problem_of<Eigen::bfloat16>(n, true, 4, 1), settings(true), few_scales);
}

TEST_CASE("equivariance: by an index beside the cache") {
  const auto check = [](const auto& p, const config& c, const std::vector<scales>& at, int bits) {
    check_equivariance(
        p, c,
        [&](const auto& q) {
          std::vector<kv_index> index;
          index.emplace_back(index_shape{.n_kv_heads = 1, .dk = 48, .dv = 48, .bits = bits});
          REQUIRE(index[0].build(q.cache()).ok());
          return attend_with<index_policy>(q, q.cache(), c, {.sequences = index});
        },
        at);
  };
  const index_t n = long_enough(4);
  check(problem_of(n, true, 4, 1), settings(true), few_scales, 2);
  check(problem_of(n, false, 4, 1), settings(false, 0.2), few_scales, 4);
  check(problem_of<Eigen::bfloat16>(n, true, 4, 1), settings(true), few_scales, 1);
  // How many bits there are is asked of the keys: of the values' scale it does not depend.
  check(problem_of(n, true, 4, 1), settings(true), {{-100, 0}, {-13, 0}, {14, 0}, {60, 0}}, 0);
}

TEST_CASE("equivariance: a store of rows in one piece, and its norms") {
  const auto p = problem_of(long_enough_to_sample, true);
  const config c = settings(true);
  check_equivariance(
      p, c,
      [&](const problem<>& q) {
        interleaved_store<float> store({.n_kv_heads = 1, .dk = 48, .dv = 48});
        REQUIRE(store.assign(q.cache()).ok());
        return attend_with<ranked_policy>(q, store, c, {});
      },
      all_scales);
}

TEST_CASE("equivariance: exact attention") {
  for (const bool mean : {true, false}) {
    const auto p = problem_of(3000, mean);
    check_equivariance(
        p, settings(mean),
        [](const problem<>& q) {
          results r(q.s);
          workspace memory;
          REQUIRE(exact_attention(q.query(), q.cache(), q.options, r.view(), memory).ok());
          return r;
        },
        all_scales, false);
  }
  check_policy<ranked_policy>(problem_of(300, true), settings(true), few_scales, false);
}

TEST_CASE("equivariance: rows that are decoded, by the scale of an FP8 cache") {
  const index_t n = long_enough_to_sample, d = 48;
  std::mt19937 random(3);
  std::vector<kernel::e4m3> kv(static_cast<std::size_t>(2 * n * d));
  for (auto& x : kv) x.bits = static_cast<std::uint8_t>(0x28 + random() % 16);  // 0.25 to 0.94
  for (std::size_t i = 0; i < kv.size() / 2; ++i)
    kv[i].bits = static_cast<std::uint8_t>(kv[i].bits | random() % 2 << 7);
  const std::int32_t table = 0, length = static_cast<std::int32_t>(n);
  const vllm_blocks blocks{.n_blocks = 1,
                           .block_size = n,
                           .n_kv_heads = 1,
                           .d = d,
                           .n_batch = 1,
                           .max_blocks = 1,
                           .block_table = &table,
                           .seq_lens = &length};
  const problem<> p({.n = 1, .dk = d, .dv = d}, 9, 3);
  config c = settings(true);
  const auto at_scale = [&](const scales& s) {
    const auto cache = vllm_kv(kv.data(), blocks, {.k = std::ldexp(1.0f, s.b), .v = std::ldexp(1.0f, s.a)});
    const problem<> q = scaled(p, {0, s.b});
    std::vector<sketch::key_codes<4>> codes{sketch::key_codes<4>(d, 1)};
    append_from(codes[0], cache.head(0, 0));
    return std::pair{attend_with<ranked_policy>(q, cache, c, {}),
                     attend_with<importance<sketch::key_codes<4>>>(q, cache, c, {codes})};
  };
  const auto base = at_scale({});
  CHECK(base.first.certificates[0].promise == guarantee::asymptotic);
  CHECK(base.second.certificates[0].promise == guarantee::asymptotic);
  for (const scales& s : few_scales) {
    INFO("V x 2^" << s.a << ", K x 2^" << s.b);
    const auto other = at_scale(s);
    const auto same = [&](const results& x, const results& y) {
      CHECK(y.certificates[0].rows_sampled == x.certificates[0].rows_sampled);
      CHECK(y.certificates[0].rows_exact == x.certificates[0].rows_exact);
      for (std::size_t j = 0; j < x.output.size(); ++j)
        CHECK(std::abs(y.output[j] - std::ldexp(x.output[j], s.a)) <= 1e-6f * std::ldexp(std::abs(x.output[j]), s.a));
    };
    same(base.first, other.first);
    same(base.second, other.second);
  }
}

TEST_CASE("equivariance: what is certain is not said of rows that were not read") {
  // One token holds nearly everything, and with ε near 1 nothing else need be read.
  auto p = problem_of(long_enough_to_sample, true, 1, 1);
  for (index_t j = 0; j < p.s.dk; ++j)
    p.k[static_cast<std::size_t>(4000 * p.s.dk + j)] = 12 * p.q[static_cast<std::size_t>(j)];
  config c = settings(true, 0.5);
  std::vector<sketch::key_codes<8>> codes{sketch::key_codes<8>(48, 1)};
  append_from(codes[0], p.cache().head(0, 0));
  const results r = attend_with<importance<sketch::key_codes<8>>>(p, p.cache(), c, {codes});
  const certificate& one = r.certificates[0];
  CHECK(one.promise == guarantee::asymptotic);
  CHECK(one.rows() < one.n);
  CHECK(one.epsilon_achieved > 0);
}
