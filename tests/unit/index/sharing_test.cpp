// One scan and one sample for several queries, and one KV head's work for several threads.
#include <atomic>
#include <chrono>
#include <cmath>
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

// Draws of queries that see what `sees(query, cell)` says, each against exact attention: whose rows are whose, and how
// often outputs are off.
struct shared_draws {
  index_t failures = 0, draws = 0, sampled = 0, compared = 0, most_apart = 0;
};
template <class Sees>
shared_draws draw_together(const problem<float>& p, const std::vector<kv_index>& index, Sees&& sees, index_t first,
                           index_t second, std::uint32_t steps = 30) {
  const index_t queries = p.s.queries, heads = p.s.heads, n = p.s.n;
  results exact(p.s), r(p.s);
  workspace memory;
  REQUIRE(exact_attention(p.query(), p.cache(), p.options, exact.view(), memory).ok());
  const std::array<index_t, 4> extents{1, queries, heads, n};
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(queries * heads * n)),
      counts(static_cast<std::size_t>(queries * heads));
  std::vector<float> weights(tokens.size());
  const config c = settings();
  shared_draws all;
  for (std::uint32_t step = 0; step < steps; ++step) {
    attention_result to = r.view();
    to.decisions = {{tokens.data(), extents}, {weights.data(), extents}, {counts.data(), {1, queries, heads}}};
    REQUIRE(vattention<>(c, {index})(p.query(), p.cache(), p.options, to, memory, {.seed = 3, .step = step}).ok());
    const auto certificate_of = [&](index_t t) { return r.certificates[static_cast<std::size_t>(t * heads)]; };
    std::vector<std::set<std::int32_t>> rows(static_cast<std::size_t>(queries));
    for (index_t t = 0; t < queries; ++t) {
      std::set<std::int32_t>& own = rows[static_cast<std::size_t>(t)];
      for (index_t i = 0; i < counts[static_cast<std::size_t>(t * heads)]; ++i)
        own.insert(tokens[static_cast<std::size_t>(t * heads * n + i)]);
      index_t seen = 0, first_seen = -1, last_seen = -1;
      for (index_t cell = 0; cell < n; ++cell) {
        if (!sees(t, cell)) continue;
        if (seen++ == 0) first_seen = cell;
        last_seen = cell;
      }
      for (index_t h = 0; h < heads; ++h) {
        const auto at = static_cast<std::size_t>(t * heads + h);
        const std::vector<double> want(exact.row(at), exact.row(at) + p.s.dv);
        all.failures += reference::relative_error(r.row(at), want) > c.epsilon;
        ++all.draws, all.sampled += !r.certificates[at].exact();
        CHECK(r.certificates[at].n == seen);
      }
      index_t hidden = 0;
      for (const std::int32_t cell : own) hidden += !sees(t, index_t{cell});
      CHECK(hidden == 0);
      if (!p.options.positions) {  // sinks and window
        CHECK(*own.begin() == first_seen);
        CHECK(*own.rbegin() == last_seen);
      }
      if (!certificate_of(t).exact()) CHECK(static_cast<index_t>(own.size()) <= certificate_of(t).rows());
    }
    if (certificate_of(first).exact() || certificate_of(second).exact() ||
        certificate_of(first).rounds != certificate_of(second).rounds)
      continue;
    const auto &a = rows[static_cast<std::size_t>(first)], &b = rows[static_cast<std::size_t>(second)];
    std::vector<std::int32_t> differ;
    std::set_symmetric_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(differ));
    ++all.compared, all.most_apart = std::max(all.most_apart, static_cast<index_t>(differ.size()));
  }
  CAPTURE(all.failures, all.draws, all.sampled, all.compared, all.most_apart);
  CHECK(all.compared > 5);
  CHECK(2 * all.sampled > all.draws);
  CHECK(20 * all.failures <= all.draws);  // δ = 0.02
  return all;
}

// 0 or −inf for each query and cell, the same for all heads.
template <class Sees>
void hide(problem<float>& p, Sees&& sees) {
  p.mask.assign(static_cast<std::size_t>(p.s.queries * p.s.n), 0.0f);
  for (index_t t = 0; t < p.s.queries; ++t) {
    for (index_t cell = 0; cell < p.s.n; ++cell) {
      if (!sees(t, cell)) p.mask[static_cast<std::size_t>(t * p.s.n + cell)] = -infinity;
    }
  }
  const index_t row = p.s.n * static_cast<index_t>(sizeof(float));
  p.options.mask = mask_view(tensor_view<const float, 4>(p.mask.data(), {1, p.s.heads, p.s.queries, p.s.n},
                                                         {row * p.s.queries, 0, row, sizeof(float)}));
}

shape several(index_t queries) {
  return {.queries = queries, .heads = 2, .kv_heads = 1, .n = 9000, .dk = 32, .dv = 32};
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
    const index_t queries = 5;
    problem<float> p(several(queries), 4u, 2.0f);
    p.options.causal = true;
    p.options.sliding_window = window;
    const auto sees = [&](index_t t, index_t cell) {
      const index_t last = p.s.n - queries + t;
      return cell <= last && (window == 0 || cell > last - window);
    };
    // Queries 0 to 3 of two heads are one task: what they read differs at the ends alone.
    CHECK(draw_together(p, index_of(p.cache()), sees, 0, 3).most_apart <= 6);
  }
}

TEST_CASE("queries under masks that see nearly the same cells share a sample", "[index]") {
  const index_t queries = 5;
  {  // what an engine passes for the next tokens of one sequence among the cells of others
    problem<float> p(several(queries), 4u, 2.0f);
    const auto sees = [&](index_t t, index_t cell) { return cell % 3 != 1 && cell < p.s.n - queries + t; };
    hide(p, sees);
    CHECK(draw_together(p, index_of(p.cache()), sees, 0, 3).most_apart <= 4);
  }
  {  // branches of a tree: each sees its own path of the last cells; and one in the middle is hidden from one of them
    problem<float> p(several(4), 5u, 2.0f);
    const auto sees = [&](index_t t, index_t cell) {
      return cell < p.s.n - 8 ? t != 2 || cell != 4321 : cell % 2 == t % 2 && cell - (p.s.n - 8) <= 2 * t;
    };
    hide(p, sees);
    // One that is read for certain, as others see it, is a query's own where it sees it.
    const std::vector<kv_index> index = index_of(p.cache());
    CHECK(draw_together(p, index, sees, 0, 1).most_apart <= 16);
    CHECK(draw_together(p, index, sees, 1, 2).most_apart <= 16);
  }
  {  // a bias of each query's own
    problem<float> p(several(4), 6u, 2.0f);
    hide(p, [](index_t, index_t) { return true; });
    for (std::size_t i = 0; i < p.mask.size(); ++i) p.mask[i] = 0.5f * std::sin(static_cast<float>(i));
    CHECK(draw_together(
              p, index_of(p.cache()), [](index_t, index_t) { return true; }, 0, 3)
              .most_apart <= 4);
  }
}

TEST_CASE("queries whose cells have positions share a sample", "[index]") {
  const index_t queries = 4;
  problem<float> p(several(queries), 7u, 2.0f);
  const auto n = static_cast<std::int32_t>(p.s.n);
  std::vector<std::int32_t> position(static_cast<std::size_t>(n)), query(static_cast<std::size_t>(queries));
  for (std::int32_t cell = 0; cell < n; ++cell)  // three runs, out of order, and empty cells
    position[static_cast<std::size_t>(cell)] = cell % 7 == 0 ? -1 : (cell + 2 * n / 3) % n;
  for (std::int32_t t = 0; t < 4; ++t) query[static_cast<std::size_t>(t)] = n - 4 + t;
  p.options.causal = true;
  p.options.positions = {{position.data(), {1, p.s.n}}, {query.data(), {1, queries}}};
  const auto sees = [&](index_t t, index_t cell) {
    const std::int32_t at = position[static_cast<std::size_t>(cell)];
    return at >= 0 && at <= query[static_cast<std::size_t>(t)];
  };
  CHECK(draw_together(p, index_of(p.cache()), sees, 0, 3).most_apart <= 8);
}

TEST_CASE("queries of different sequences each have a sample of their own", "[index]") {
  problem<float> p(several(4), 8u, 2.0f);
  // Two sequences' cells in turn: queries 0 and 1 are of one, 2 and 3 of the other.
  const auto sees = [&](index_t t, index_t cell) { return cell % 2 == t / 2 && cell < p.s.n - 4 + t; };
  hide(p, sees);
  const std::vector<kv_index> index = index_of(p.cache());
  CHECK(draw_together(p, index, sees, 0, 1).most_apart <= 4);
  CHECK(draw_together(p, index, sees, 2, 3).most_apart <= 4);
}

TEST_CASE("queries of larger groups are sampled as if each were alone", "[index]") {
  problem<float> p({.queries = 2, .heads = 4, .kv_heads = 1, .n = 9000, .dk = 32, .dv = 32}, 4u, 2.0f);
  hide(p, [&](index_t t, index_t cell) { return cell < p.s.n - 2 + t; });
  const std::vector<kv_index> index = index_of(p.cache());
  const vattention<> attend(settings(), {index});
  results both(p.s), one({.heads = 4, .dv = 32});
  workspace memory;
  REQUIRE(attend(p.query(), p.cache(), p.options, both.view(), memory, {.seed = 3, .step = 7}).ok());
  for (index_t t = 0; t < 2; ++t) {
    const tensor_view<const float, 4> query(p.q.data() + t * 4 * p.s.dk, {1, 1, 4, p.s.dk});
    attention_options options = p.options;
    options.mask =
        mask_view(tensor_view<const float, 4>(p.mask.data() + t * p.s.n, {1, 4, 1, p.s.n}, {0, 0, 0, sizeof(float)}));
    const auto step = static_cast<std::uint32_t>(7 + t);
    REQUIRE(attend(query, p.cache(), options, one.view(), memory, {.seed = 3, .step = step}).ok());
    CHECK(!one.certificates[0].exact());
    CHECK(std::equal(one.output.begin(), one.output.end(), both.output.begin() + t * 4 * p.s.dv));
  }
}

TEST_CASE(
    "queries under masks that share rows read all of them where that is cheaper, with the bits of exact attention",
    "[index]") {
  problem<float> p(several(4), 4u);
  hide(p, [&](index_t t, index_t cell) { return cell % 5 != 0 && cell < p.s.n - 4 + t; });
  const std::vector<kv_index> index = index_of(p.cache());
  results exact(p.s), r(p.s);
  workspace memory;
  REQUIRE(exact_attention(p.query(), p.cache(), p.options, exact.view(), memory).ok());
  for (const bool indexed : {false, true}) {
    const vattention<> attend(settings(1e-4),
                              {indexed ? std::span<const kv_index>(index) : std::span<const kv_index>()});
    REQUIRE(attend(p.query(), p.cache(), p.options, r.view(), memory).ok());
    for (const certificate& c : r.certificates) CHECK(c.exact());
    CHECK(r.output == exact.output);
    CHECK(r.log_sum_exp == exact.log_sum_exp);
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
