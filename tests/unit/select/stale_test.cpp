// Indices that are not of the cache they are used with: found by their length, by append_from, or by the rows read.
#include <random>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "vattn/vattn.hpp"

namespace {

using namespace vattn;
using vattn::test::contains;

constexpr index_t n = 4000, d = 32;

struct keys {
  std::vector<float> k, v;
  explicit keys(unsigned seed = 1) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    k.resize(n * d), v.resize(n * d);
    for (float& x : k) x = normal(random);
    for (float& x : v) x = normal(random) + 1;
  }
  [[nodiscard]] auto cache(index_t tokens) const {
    return contiguous_kv(k.data(), v.data(), {.n_tokens = tokens, .dk = d, .dv = d});
  }
  /// Others in the cells [from, to).
  void overwrite(index_t from, index_t to, unsigned seed) {
    const keys other(seed);
    std::copy(other.k.begin() + from * d, other.k.begin() + to * d, k.begin() + from * d);
  }
};

template <class I>
std::vector<float> scores(const I& index) {
  std::vector<float> q(d), out(static_cast<std::size_t>(index.size())), errors(out.size()),
      scratch(index.scratch_size());
  for (std::size_t j = 0; j < q.size(); ++j) q[j] = std::sin(static_cast<float>(j + 1));
  index.score(q.data(), 0, out, errors, scratch);
  out.insert(out.end(), errors.begin(), errors.end());
  return out;
}

// `make` gives an empty index. What it holds after `head` was brought in is what a new one would hold.
template <class Make>
void check_mended(Make&& make) {
  const keys before(1);
  for (const index_t drafts : {1, 4, 16}) {
    for (const index_t accepted : {index_t{0}, drafts / 2}) {
      for (const index_t later : {1, 20}) {  // tokens in the cells when the index is brought up again
        CAPTURE(drafts, accepted, later);
        auto index = make(), anew = make();
        append_from(index, before.cache(120 + drafts).head(0, 0));
        keys now = before;
        now.overwrite(120 + accepted, n, 2);
        const index_t size = 120 + accepted + later;
        append_from(index, now.cache(size).head(0, 0));
        append_from(anew, now.cache(size).head(0, 0));
        CHECK(index.size() == size);
        CHECK(scores(index) == scores(anew));
        CHECK(append_from(index, now.cache(size).head(0, 0)) == 0);  // and is at rest then
      }
    }
  }
}

using codes4 = sketch::key_codes<4>;
using codes8 = sketch::key_codes<8>;

struct importance : default_policy {
  using selector = select::indexed<codes4>;
  using sampler = sample::by_importance;
};
struct group : importance {
  using sampler = sample::by_group_importance;
};
struct two_phases : default_policy {
  using selector = select::two_phase<codes4, codes8>;
  using sampler = sample::in_two_phases;
};
struct calibrated : default_policy {
  using selector = select::calibrated<select::indexed<select::quest>>;
  using sampler = sample::by_importance;
};
struct upper : default_policy {
  using selector = select::top_k<select::upper_scores<codes4>>;
};
struct ranked : default_policy {
  using selector = select::indexed<select::quest>;
};

template <class Policy>
status attend(const keys& in, index_t tokens, const typename Policy::selector& selector, certificate& c,
              std::uint32_t step = 0, std::span<float> output = {}) {
  std::vector<float> own(d), q(d);
  std::mt19937 random(9 + step);
  std::normal_distribution<float> normal;
  for (float& x : q) x = normal(random);
  workspace memory;
  return vattention<Policy>({.epsilon = 0.2, .sinks = 16, .window = 16}, selector)(
      tensor_view<const float, 4>(q.data(), {1, 1, 1, d}), in.cache(tokens),
      {.scale = 1 / std::sqrt(static_cast<float>(d))},
      {.output = {output.empty() ? own.data() : output.data(), {1, 1, 1, d}}, .certificates = {&c, {1, 1, 1}}}, memory,
      {.step = step});
}

template <class I>
std::vector<I> filled(const keys& from, index_t tokens, I index) {
  append_from(index, from.cache(tokens).head(0, 0));
  return {index};
}

// What a selector makes of indices.
template <class P>
auto with(std::span<const codes4> four, std::span<const codes8> eight, std::span<const select::quest> pages) {
  typename P::selector s;
  if constexpr (std::is_same_v<P, two_phases>) {
    s.coarse.heads = four, s.fine.heads = eight;
  } else if constexpr (std::is_same_v<P, calibrated>) {
    s.base.heads = pages;
  } else if constexpr (std::is_same_v<P, ranked>) {
    s.heads = pages;
  } else if constexpr (std::is_same_v<P, certified_policy<codes8>>) {
    s = select::hard_bounds<codes8>(eight);
  } else {
    s.heads = four;
  }
  return s;
}

}  // namespace

TEST_CASE("append_from mends what a cache has overwritten", "[select][stale]") {
  check_mended([] { return sketch::key_codes<1>(d, 1); });
  check_mended([] { return codes4(d, 1); });
  check_mended([] { return codes8(d, 1); });
  check_mended([] { return select::magic_pig(d, 4, 20); });
  check_mended([] { return select::socket(d, 4, 20); });
  check_mended([] { return select::double_sparsity({0, 3, 5, 8}); });
  check_mended([] { return select::quest(d, 4096); });  // all in the last page, where truncation is exact
  check_mended([] { return select::pq_cache(d, 2, 4, {.train_size = 100}); });
  check_mended([] { return sketch::product_codes(d, 4, {.train_size = 100}); });
}

TEST_CASE("append_from makes an index anew where the cells hold another sequence", "[select][stale]") {
  const keys one(1), other(2);
  codes4 index(d, 1), anew(d, 1);
  append_from(index, one.cache(1000).head(0, 0));
  CHECK(append_from(index, other.cache(1200).head(0, 0)) == 1200);
  append_from(anew, other.cache(1200).head(0, 0));
  CHECK(scores(index) == scores(anew));
  // A part of a longer rollback than is known of: all of it, rather than a guess.
  keys cut = other;
  cut.overwrite(1100, n, 3);
  CHECK(append_from(index, cut.cache(1201).head(0, 0)) == 1201);
  // Of a saved index nothing is known until it has grown.
  codes4 loaded(d, 1);
  append_from(loaded, one.cache(1201).head(0, 0));
  REQUIRE(load(save(index), loaded).ok());
  CHECK(append_from(loaded, one.cache(1201).head(0, 0)) == 0);
}

TEMPLATE_TEST_CASE("an index that is longer or shorter than its head ends in a status", "[select][stale]", importance,
                   group, two_phases, calibrated, upper, ranked, certified_policy<codes8>) {
  const keys in;
  for (const index_t size : {index_t{2999}, index_t{3001}, index_t{3500}}) {
    const auto four = filled(in, size, codes4(d, 1));
    const auto eight = filled(in, size, codes8(d, 1));
    const auto pages = filled(in, size, select::quest(d));
    certificate c;
    const status s = attend<TestType>(in, 3000, with<TestType>(four, eight, pages), c);
    CHECK(s.code() == errc::invalid_argument);
    CHECK(contains(s.message(), "lacks its latest tokens or has more than there are"));
    CHECK(attend<TestType>(in, size, with<TestType>(four, eight, pages), c).ok());
  }
}

TEMPLATE_TEST_CASE("codes of other keys end in exact attention, honest ones do not", "[select][stale]", importance,
                   group, two_phases, upper, certified_policy<codes8>) {
  const keys in;
  keys now = in;
  now.overwrite(0, n, 5);
  const auto four = filled(in, n, codes4(d, 1));
  const auto eight = filled(in, n, codes8(d, 1));
  int exact = 0;
  for (std::uint32_t step = 0; step < 20; ++step) {
    certificate c;
    REQUIRE(attend<TestType>(now, n, with<TestType>(four, eight, {}), c, step).ok());
    CHECK(c.exact());
    CHECK(c.breaches > 0);
    REQUIRE(attend<TestType>(in, n, with<TestType>(four, eight, {}), c, step).ok());
    exact += c.exact();
  }
  CHECK(exact < 20);
}

TEMPLATE_TEST_CASE("stale tokens in the window are found by what is read for certain", "[select][stale]", importance,
                   group, two_phases, upper, certified_policy<codes8>) {
  const keys in;
  keys now = in;
  now.overwrite(n - 16, n, 5);  // drafts, not truncated, and no append_from that would see it
  for (std::size_t i = (n - 16) * d; i < n * d; ++i) now.k[i] *= 10;
  const auto four = filled(in, n, codes4(d, 1));
  const auto eight = filled(in, n, codes8(d, 1));
  int exact = 0;
  for (std::uint32_t step = 0; step < 40; ++step) {
    certificate c;
    REQUIRE(attend<TestType>(now, n, with<TestType>(four, eight, {}), c, step).ok());
    exact += c.exact() && c.breaches > 0;
  }
  // Upper bounds are exceeded by every second of the 16, and five say enough: P(fewer) = 0.04 a step.
  CHECK(exact >= (std::is_same_v<TestType, upper> ? 30 : 39));
}

TEST_CASE("scores are disbelieved at a rate that honest ones do not reach", "[select][stale]") {
  // 2000 runs of 1000 honest rows each, with errors that are normal and those of rows chosen by their score: none.
  std::mt19937_64 random(3);
  std::poisson_distribution<int> plain(1000 * 1e-3), chosen(1000 * 0.5 * std::erfc((4 - 2.4) / std::sqrt(2.0)));
  int wrong = 0;
  const auto breached = [](int breaches, float error, bool by_score) {
    select::score_check check;
    for (int i = 0; i < 1000; ++i) check.estimate(i < breaches ? 100.0f : 0.0f, 0, error, by_score);
    CHECK(check.breaches() == breaches);
    return !check.believed();
  };
  for (int run = 0; run < 2000; ++run)
    wrong += breached(plain(random), 0.1f, true) + breached(chosen(random), 2.4f, true);
  CHECK(wrong == 0);
  // What is needed to be disbelieved: exact values of the rule.
  CHECK_FALSE(breached(9, 0.1f, true));
  CHECK(breached(10, 0.1f, true));
  CHECK(breached(10, 2.4f, false));
  CHECK_FALSE(breached(190, 2.4f, true));
  CHECK(breached(215, 2.4f, true));
  select::score_check few;
  for (int i = 0; i < 100; ++i) few.bound(i < 1 ? 1.0f : 0.0f, 0.5f, 1e-12, true);
  CHECK_FALSE(few.believed());
}
