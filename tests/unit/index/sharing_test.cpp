// One scan and one sample for several queries, and one KV head's work for several threads.
#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <thread>

#include "support/layout.hpp"
#include "vattn/base/thread_pool.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

template <kv_cache KV>
std::vector<kv_index> index_of(const KV& cache) {
  std::vector<kv_index> all;
  all.emplace_back(index_shape{.n_kv_heads = cache.n_kv_heads(), .dk = cache.dk(), .dv = cache.dv()});
  REQUIRE(all.back().build(cache).ok());
  return all;
}

config settings(double epsilon = 0.1, double delta = 0.02) {
  config c;
  c.epsilon = epsilon, c.delta = delta;
  c.sinks = 4, c.window = 16;
  return c;
}

// Rows in no strides: asks who reads them.
struct watched_head {
  [[nodiscard]] index_t size() const { return head.size(); }
  [[nodiscard]] index_t dk() const { return head.dk(); }
  [[nodiscard]] index_t dv() const { return head.dv(); }
  [[nodiscard]] auto key(index_t i) const {
    see(i);
    return head.key(i);
  }
  [[nodiscard]] auto value(index_t i) const {
    see(i);
    return head.value(i);
  }
  void see(index_t i) const;
  decltype(std::declval<const kv_view<float>&>().head(0, 0)) head;
  struct watched_cache* cache;
};
struct watched_cache {
  explicit watched_cache(const kv_view<float>& of) : view(of) {}
  [[nodiscard]] status validate() const { return view.validate(); }
  [[nodiscard]] index_t n_batch() const { return view.n_batch(); }
  [[nodiscard]] index_t n_kv_heads() const { return view.n_kv_heads(); }
  [[nodiscard]] index_t dk() const { return view.dk(); }
  [[nodiscard]] index_t dv() const { return view.dv(); }
  [[nodiscard]] watched_head head(index_t b, index_t h) const {
    return {view.head(b, h), const_cast<watched_cache*>(this)};
  }
  kv_view<float> view;
  std::mutex lock;
  std::set<std::thread::id> readers;
  std::atomic<int> seen{0};
  std::atomic<bool> patient{false};
};
void watched_head::see(index_t i) const {
  {
    const std::lock_guard guard(cache->lock);
    if (cache->readers.insert(std::this_thread::get_id()).second) ++cache->seen;
  }
  // For a while, until somebody else has come; not at the ends, which are read before there is anything to share.
  for (int turn = 0; cache->patient && i > 100 && i < size() - 100 && cache->seen < 2 && turn < 50; ++turn)
    std::this_thread::sleep_for(std::chrono::microseconds(100));
}

}  // namespace

TEST_CASE("one KV head's rows are read by several threads, and the bits are those of one", "[index]") {
  for (const bool exact : {false, true}) {
    const problem<float> p({.heads = 4, .kv_heads = 1, .n = 12000, .dk = 32, .dv = 32}, 5u, 2.0f);
    const std::vector<kv_index> index = index_of(p.cache());
    config c = settings(exact ? 1e-4 : 0.05);
    const vattention<> attend(c, {index});
    watched_cache cache(p.cache());
    results one(p.s), more(p.s), strided(p.s);
    workspace memory;
    REQUIRE(attend(p.query(), cache, p.options, one.view(), memory, {.seed = 5}).ok());
    CHECK(one.certificates[0].exact() == exact);
    CHECK(cache.seen == 1);
    CHECK(one.certificates[0].rows() > 600);  // more than a piece
    for (const index_t threads : {2, 3, 5}) {
      thread_pool pool(threads);
      REQUIRE(attend(p.query(), p.cache(), p.options, strided.view(), memory, {.seed = 5}, pool).ok());
      if (threads == 2) more = strided;
      CHECK(strided.output == more.output);
      CHECK(strided.log_sum_exp == more.log_sum_exp);
    }
    REQUIRE(attend(p.query(), p.cache(), p.options, more.view(), memory, {.seed = 5}).ok());
    CHECK(strided.output == more.output);

    thread_pool pool(3);
    cache.patient = true;
    REQUIRE(attend(p.query(), cache, p.options, more.view(), memory, {.seed = 5}, pool).ok());
    CHECK(cache.seen > 1);
    CHECK(one.output == more.output);
    CHECK(one.log_sum_exp == more.log_sum_exp);
  }
}

TEST_CASE("causal queries share a sample, each with its own rows at the end and its own promise", "[index]") {
  for (const index_t window : {0, 7000}) {
    const index_t queries = 5, n = 9000;
    problem<float> p({.queries = queries, .heads = 2, .kv_heads = 1, .n = n, .dk = 32, .dv = 32}, 4u, 2.0f);
    p.options.causal = true;
    p.options.sliding_window = window;
    const std::vector<kv_index> index = index_of(p.cache());
    results exact(p.s), r(p.s);
    workspace memory;
    REQUIRE(exact_attention(p.query(), p.cache(), p.options, exact.view(), memory).ok());
    const std::array<index_t, 4> extents{1, queries, 2, n};
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(queries * 2 * n)),
        counts(static_cast<std::size_t>(queries * 2));
    std::vector<float> weights(tokens.size());
    const config c = settings();
    index_t failures = 0, draws = 0, sampled = 0, compared = 0;
    for (std::uint32_t step = 0; step < 30; ++step) {
      attention_result to = r.view();
      to.decisions = {{tokens.data(), extents}, {weights.data(), extents}, {counts.data(), {1, queries, 2}}};
      REQUIRE(vattention<>(c, {index})(p.query(), p.cache(), p.options, to, memory, {.seed = 3, .step = step}).ok());
      const auto rows_of = [&](index_t t) {
        std::set<std::int32_t> rows;
        for (index_t i = 0; i < counts[static_cast<std::size_t>(t * 2)]; ++i)
          rows.insert(tokens[static_cast<std::size_t>(t * 2 * n + i)]);
        return rows;
      };
      for (index_t t = 0; t < queries; ++t) {
        const index_t last = n - queries + t, first = window > 0 ? last - window + 1 : 0;
        for (index_t h = 0; h < 2; ++h) {
          const auto at = static_cast<std::size_t>(t * 2 + h);
          const std::vector<double> want(exact.row(at), exact.row(at) + p.s.dv);
          failures += reference::relative_error(r.row(at), want) > c.epsilon;
          ++draws, sampled += !r.certificates[at].exact();
          CHECK(r.certificates[at].n == last - first + 1);
        }
        const std::set<std::int32_t> rows = rows_of(t);
        CHECK(*rows.begin() == first);
        CHECK(*rows.rbegin() == last);
        if (r.certificates[static_cast<std::size_t>(t * 2)].exact()) continue;
        CHECK(static_cast<index_t>(rows.size()) <= r.certificates[static_cast<std::size_t>(t * 2)].rows());
      }
      // Queries 0 to 3 of two heads are one task: what they read differs at the ends alone.
      if (r.certificates[0].exact() || r.certificates[6].exact() ||
          r.certificates[0].rounds != r.certificates[6].rounds)
        continue;
      ++compared;
      const std::set<std::int32_t> a = rows_of(0), b = rows_of(3);
      std::vector<std::int32_t> differ;
      std::set_symmetric_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(differ));
      CHECK(differ.size() <= 6);
    }
    CAPTURE(failures, draws, sampled);
    CHECK(compared > 5);
    CHECK(2 * sampled > draws);
    CHECK(20 * failures <= draws);  // δ = 0.02
  }
}

TEST_CASE("queries that share a sample may end in all rows, each in its own", "[index]") {
  problem<float> p({.queries = 3, .heads = 2, .kv_heads = 1, .n = 9000, .dk = 32, .dv = 32}, 4u);
  p.options.causal = true;
  p.options.sliding_window = 8000;
  const std::vector<kv_index> index = index_of(p.cache());
  results exact(p.s), r(p.s);
  workspace memory;
  REQUIRE(exact_attention(p.query(), p.cache(), p.options, exact.view(), memory).ok());
  REQUIRE(vattention<>(settings(1e-4), {index})(p.query(), p.cache(), p.options, r.view(), memory).ok());
  for (const certificate& c : r.certificates) CHECK((c.exact() && c.n == 8000));
  CHECK(r.output == exact.output);
  CHECK(r.log_sum_exp == exact.log_sum_exp);
}
