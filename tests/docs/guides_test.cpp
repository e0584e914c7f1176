// The guides' code, as it stands there, in the order of each page.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <span>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "vattn/vattn.hpp"
// Before the pages include them again, within functions.
#include "vattn/base/thread_pool.hpp"
#include "vattn/dist/sharded_attention.hpp"
#include "vattn/dist/threads.hpp"

namespace {

#include "snippets/auditing/one-for-each-layer.hpp"
// After what it is about.
#include "snippets/auditing/how-much-to-audit.hpp"
#include "snippets/certificate/a-dashboard.hpp"
#include "snippets/certificate/reading-one.hpp"

namespace extensions {
#include "snippets/selectors/a-selector.hpp"
#include "snippets/selectors/a-target.hpp"
#include "snippets/selectors/an-index.hpp"
#include "snippets/selectors/the-layout-of-a-cache.hpp"
}  // namespace extensions

using namespace vattn::test;
using vattn::index_t;

double distance(const float* a, const float* b, std::size_t n) {
  double off = 0, norm = 0;
  for (std::size_t j = 0; j < n; ++j) {
    off += (double{a[j]} - b[j]) * (double{a[j]} - b[j]);
    norm += double{b[j]} * b[j];
  }
  return std::sqrt(off / norm);
}

}  // namespace

TEST_CASE("docs/decoding.md, an engine step by step", "[docs]") {
  constexpr index_t room = 16384;
  const problem<Eigen::half> p({.batch = 2, .heads = 8, .kv_heads = 2, .n = room, .dk = 64, .dv = 64}, 3u);
  const Eigen::half *const K = p.k.data(), *const V = p.v.data();
  std::int32_t lengths[] = {16000, 1000};
  const float* const q = p.q.data();
  results to(p.s);
  float* const output = to.output.data();
  vattn::certificate* const certificates = to.certificates.data();
  const auto write_token = [&] { ++lengths[0], ++lengths[1]; };

#include "snippets/decoding/2-a-view-of-the-cache.hpp"
#include "snippets/decoding/3-exact-attention.hpp"
  REQUIRE(s);
  const std::vector<float> exact = to.output;
  const auto errors_above = [&](double epsilon) {
    int count = 0;
    for (std::size_t h = 0; h < 16; ++h) count += distance(output + 64 * h, exact.data() + 64 * h, 64) > epsilon;
    return count;
  };
#include "snippets/decoding/4-an-index-beside-it.hpp"
  REQUIRE(s);
  CHECK(static_cast<double>(index[0].bytes()) < 16000. * 2 * 256 / 10);
#include "snippets/decoding/5-few-rows.hpp"
  REQUIRE(s);
  for (std::size_t h = 0; h < 8; ++h) CHECK(certificates[h].density() < 0.4);
  CHECK(certificates[8].exact());
  CHECK(errors_above(0.1) <= 4);  // of 8, at δ = 0.1 more once in 400 times
  const std::vector<float> alone = to.output;
#include "snippets/decoding/6-threads.hpp"
  REQUIRE(s);
  CHECK(to.output == alone);
#include "snippets/decoding/7-your-own-threads-no-allocation.hpp"
  REQUIRE(of_thread[0]);
  REQUIRE(of_thread[1]);
  CHECK(errors_above(0.1) <= 4);
#include "snippets/decoding/8-the-next-token.hpp"
  REQUIRE(s);
  CHECK(certificates[0].n == 16001);
  CHECK(index[1].size() == 1001);
}

TEST_CASE("docs/choosing.md, docs/certificate.md and docs/auditing.md", "[docs]") {
  const problem<float> p({.heads = 4, .kv_heads = 2, .n = 8000, .dk = 32, .dv = 32}, 5u, 2.0f);
  const auto view = p.cache();
  const auto query = p.query();
  const vattn::attention_options& options = p.options;
  results to(p.s);
  const std::vector<vattn::certificate>& certificates = to.certificates;
  const vattn::attention_result result = to.view();
  vattn::workspace memory;
  vattn::thread_pool pool(2);
  std::vector<vattn::kv_index> index;
  index.emplace_back(vattn::index_shape{.n_kv_heads = 2, .dk = 32, .dv = 32});
  vattn::status s = index[0].build(view);
#include "snippets/choosing/on-your-own-cache.hpp"
  REQUIRE(s);

  audited_layers layers(2, 1);
  layer_health health;
  const vattn::vattention<> attend({.epsilon = 0.1, .sinks = 16, .window = 64}, {index});
  for (std::uint32_t step = 0; step < 10; ++step) {
    const vattn::run_arguments call{query, view, options, result, vattn::draw_key{.layer = 1, .step = step}};
    REQUIRE(audited_step(attend, call, memory, pool, layers));
    for (const vattn::certificate& c : certificates) health.add(c);
  }
  CHECK(report(layers));
  CHECK(layers.of[1].report().audited == 40);
  new_period(layers);
  CHECK(layers.of[1].report().rows == 0);
  print(certificates[0]);
  health.print();
  CHECK(health.outputs == 40);
  CHECK(health.exact == 0);
  CHECK(health.density < 20);
}

TEST_CASE("docs/index.md and docs/stores.md", "[docs]") {
  const problem<float> p({.heads = 8, .kv_heads = 8, .n = 4000, .dk = 128, .dv = 128}, 5u);
  const auto view = p.cache(), prefilled_view = view;
  const auto query = p.query();
  const vattn::attention_options& options = p.options;
  results to(p.s);
  const vattn::attention_result result = to.view();
  vattn::workspace scratch;
  vattn::thread_pool pool(2);
  const std::uint32_t step = 0;
  const index_t cell = 17;
  const auto check = [&](const vattn::status& s) {
    REQUIRE(s);
    int wrong = 0;
    results exact(p.s);
    REQUIRE(vattn::exact_attention(query, view, options, exact.view(), scratch));
    for (std::size_t h = 0; h < 8; ++h) wrong += distance(to.row(h), exact.row(h), 128) > 0.05;
    CHECK(wrong <= 4);
  };
  SECTION("beside a cache") {
#include "snippets/index/top.hpp"
    check(s);
  }
  SECTION("a store") {
    vattn::workspace memory;
#include "snippets/stores/top.hpp"
    check(s);
  }
}

TEST_CASE("docs/scale.md, two threads", "[docs]") {
  const problem<float> p({.heads = 4, .kv_heads = 2, .n = 16000, .dk = 32, .dv = 32}, 5u);
  const auto query = p.query();
  const vattn::attention_options& options = p.options;
  std::vector<results> to(2, results(p.s));
  const auto result = [&](int rank) { return to[static_cast<std::size_t>(rank)].view(); };
  const auto shard = [&](int rank) {  // each second token
    const vattn::kv_strides strides{.token = 2 * 32 * 4, .head = 16000 * 32 * 4};
    const auto first = static_cast<std::size_t>(rank) * 32;
    return vattn::kv_view<float>(p.k.data() + first, strides, p.v.data() + first, strides,
                                 {.n_kv_heads = 2, .n_tokens = 8000, .dk = 32, .dv = 32});
  };
  const std::uint32_t step = 3;
#include "snippets/scale/top.hpp"
  vattn::status of_rank[2];
  std::thread other([&] { of_rank[1] = on_rank(1); });
  of_rank[0] = on_rank(0);
  other.join();
  for (const vattn::status& s : of_rank) {
    INFO(s.message());
    REQUIRE(s);
  }
  CHECK(to[0].output == to[1].output);
  CHECK(to[0].certificates[0].shards == 2);
  CHECK(to[0].certificates[0].n == 16000);
  CHECK(to[0].certificates[0].density() < 0.5);
  CHECK(compare(p, to[0]).output < 0.2);
}

TEST_CASE("docs/selectors.md", "[docs]") {
  using namespace extensions;
  constexpr index_t n = 2000, d = 8;
  std::vector<std::int32_t> table(n);
  std::vector<std::byte> k(3000 * (4 + d)), v(k.size());
  std::vector<float> plain_k, plain_v;  // in order of their tokens
  for (index_t i = 0; i < n; ++i) {
    const index_t cell = i * 7 % 3000;
    table[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(cell);
    const float scale = 0.02f;
    const auto at = static_cast<std::size_t>(cell * (4 + d));
    std::memcpy(k.data() + at, &scale, 4);
    std::memcpy(v.data() + at, &scale, 4);
    for (std::size_t j = 0; j < 8; ++j) {
      const int a = static_cast<int>((i * 8 + static_cast<index_t>(j)) * 37 % 101) - 50;
      const int b = static_cast<int>((i * 8 + static_cast<index_t>(j)) * 53 % 90) + 10;
      k[at + 4 + j] = static_cast<std::byte>(a);
      v[at + 4 + j] = static_cast<std::byte>(b);
      plain_k.push_back(scale * static_cast<float>(a));
      plain_v.push_back(scale * static_cast<float>(b));
    }
  }
  const auto cache = byte_view(k.data(), v.data(), {.table = table, .cells = 3000}, d);
  const std::vector<float> q(8, 1.0f);
  const vattn::tensor_view<const float, 4> query(q.data(), {1, 1, 1, d});
  const vattn::attention_options options{.scale = 0.35f};
  vattn::workspace memory;
  results sparse({.n = n, .dk = d, .dv = d}), dense(sparse), plain(sparse);
  REQUIRE(vattn::exact_attention(query, cache, options, dense.view(), memory));

  // The strided layer: K and V of two layers side by side, of which the second is ours.
  std::vector<float> all;
  for (std::size_t i = 0; i < plain_k.size(); i += 8) {
    all.resize(all.size() + 16);
    all.insert(all.end(), plain_k.begin() + static_cast<std::ptrdiff_t>(i),
               plain_k.begin() + static_cast<std::ptrdiff_t>(i) + 8);
    all.insert(all.end(), plain_v.begin() + static_cast<std::ptrdiff_t>(i),
               plain_v.begin() + static_cast<std::ptrdiff_t>(i) + 8);
  }
  REQUIRE(vattn::exact_attention(query, layer_of(all.data(), n, 2, 1, 1, d), options, plain.view(), memory));
  CHECK(distance(dense.row(0), plain.row(0), 8) < 1e-5);

  const auto check = [&](const vattn::status& s, double epsilon) {
    INFO(s.message());
    REQUIRE(s);
    CHECK_FALSE(sparse.certificates[0].exact());
    CHECK(distance(sparse.row(0), dense.row(0), 8) < 2 * epsilon);
  };
  check(by_nth(query, cache, options, sparse.view(), memory), 0.1);
  norms index;
  vattn::append_from(index, cache.head(0, 0));
  const vattn::config settings{.epsilon = 0.1, .delta = 0.1, .sinks = 16, .window = 16};
  check(vattn::vattention<norm_policy>(settings, {{&index, 1}})(query, cache, options, sparse.view(), memory), 0.1);
  check(by_both(query, cache, options, sparse.view(), memory), 0.05);
  const vattn::certificate& c = sparse.certificates[0];
  CHECK(c.epsilon_achieved <= 0.05);
  CHECK(std::abs(std::exp(sparse.log_sum_exp[0] - dense.log_sum_exp[0]) - 1) < 0.1);

  table[5] = 3000;
  const vattn::status wrong = by_nth(query, cache, options, sparse.view(), memory);
  CHECK(contains(wrong.message(), "cell 3000 of 3000"));
}
