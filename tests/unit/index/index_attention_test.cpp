// Verified attention by an index beside the cache: every layout, everything that a call carries, and what is not there.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "support/layout.hpp"
#include "vattn/base/thread_pool.hpp"
#include "vattn/kv/flashinfer.hpp"
#include "vattn/kv/ggml.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

config settings(double epsilon = 0.1, double delta = 0.02) {
  config c;
  c.epsilon = epsilon, c.delta = delta;
  c.sinks = 4, c.window = 16;
  return c;
}

shape long_shape(index_t n = 6000) { return {.heads = 4, .kv_heads = 1, .n = n, .dk = 32, .dv = 32}; }

template <kv_cache KV>
std::vector<kv_index> index_of(const KV& cache, int bits = 2) {
  std::vector<kv_index> all;
  for (index_t b = 0; b < cache.n_batch(); ++b) {
    all.emplace_back(index_shape{.n_kv_heads = cache.n_kv_heads(), .dk = cache.dk(), .dv = cache.dv(), .bits = bits});
    const status s = all.back().build(cache, b);
    INFO(s.message());
    REQUIRE(s.ok());
  }
  return all;
}

struct outcome {
  index_t sampled = 0, failures = 0, rows = 0, draws = 0;
  double worst = 0;  // error over ε
};

// Draws against exact attention over the same view.
template <class T, kv_cache KV>
outcome drawn(const problem<T>& p, const KV& cache, const std::vector<kv_index>& index, const config& c,
              int draws = 20) {
  results exact(p.s), r(p.s);
  workspace memory;
  const status dense = exact_attention(p.query(), cache, p.options, exact.view(), memory);
  INFO(dense.message());
  REQUIRE(dense.ok());
  const vattention<index_policy> attend(c, {index});
  outcome o;
  for (int d = 0; d < draws; ++d) {
    const status s =
        attend(p.query(), cache, p.options, r.view(), memory, {.seed = 3, .step = static_cast<std::uint32_t>(100 * d)});
    INFO(s.message());
    REQUIRE(s.ok());
    for (std::size_t at = 0; at < r.certificates.size(); ++at) {
      const certificate& k = r.certificates[at];
      const std::vector<double> want(exact.row(at), exact.row(at) + p.s.dv);
      const double error = reference::relative_error(r.row(at), want) / c.epsilon;
      REQUIRE(k.n == exact.certificates[at].n);
      ++o.draws, o.sampled += !k.exact(), o.failures += error > 1, o.rows += k.rows();
      o.worst = std::max(o.worst, error);
      if (k.exact()) CHECK(error * c.epsilon < 1e-4);
    }
  }
  return o;
}

// Most draws were sampled, from few rows, and no more than a fair share of them missed: at δ = 0.02, of 80 draws 8.
void check(const outcome& o, index_t n, double share = 0.45) {
  CAPTURE(o.sampled, o.failures, o.rows, o.draws, o.worst);
  CHECK(2 * o.sampled > o.draws);
  CHECK(10 * o.failures <= o.draws);
  CHECK(static_cast<double>(o.rows) < share * static_cast<double>(n * o.draws));
}

}  // namespace

TEST_CASE("by an index each KV head's rows are few and its outputs within epsilon, for every number of bits",
          "[index]") {
  for (const int bits : {1, 2, 3, 4}) {
    const index_t n = bits == 1 ? 24000 : 6000;  // what one bit leaves unknown costs many rows
    problem<float> p(shape{.heads = 6, .kv_heads = 2, .n = n, .dk = 32, .dv = 48}, 5u, 2.0f);
    check(drawn(p, p.cache(), index_of(p.cache(), bits), settings()), p.s.n);
  }
  problem<Eigen::bfloat16> p(shape{.heads = 9, .kv_heads = 1, .n = 6000, .dk = 64, .dv = 64});  // groups of 8 and 1
  check(drawn(p, p.cache(), index_of(p.cache()), settings()), p.s.n);
}

TEST_CASE("rows are read wherever they lie: token-major, in pages, quantised, decoded", "[index]") {
  const problem<float> p(long_shape(), 2u, 2.0f);
  const index_t n = p.s.n, d = p.s.dk;
  check(drawn(p, token_major_kv(p.k.data(), p.v.data(), p.cache_shape()), index_of(p.cache()), settings()), n);

  for (const index_t page : {1, 7, 16, 256}) {
    const index_t count = (n + page - 1) / page;
    const std::vector<std::int32_t> ids = shuffled_pages(count);
    std::vector<float> k(static_cast<std::size_t>(count * page * d)), v(k.size());
    for (index_t token = 0; token < n; ++token) {
      const index_t at = ids[static_cast<std::size_t>(token / page)] * page + token % page;
      std::copy_n(p.k.data() + token * d, d, k.data() + at * d);
      std::copy_n(p.v.data() + token * d, d, v.data() + at * d);
    }
    const std::vector<std::int32_t> ends{0, static_cast<std::int32_t>(count)};
    const auto last = static_cast<std::int32_t>((n - 1) % page + 1);
    const auto pages = flashinfer_paged_kv(k.data(), v.data(), page_order::hnd,
                                           {.n_pages = count,
                                            .page_size = page,
                                            .n_kv_heads = 1,
                                            .dk = d,
                                            .dv = d,
                                            .n_batch = 1,
                                            .indptr = ends.data(),
                                            .indices = ids.data(),
                                            .last_page_len = &last});
    REQUIRE(pages.validate().ok());
    check(drawn(p, pages, index_of(pages), settings()), n);
  }

  const auto ggml = [&]<class B>(B) {
    std::vector<B> k(static_cast<std::size_t>(n * d / 32)), v(k.size());
    kernel::quantise(p.k.data(), p.k.size(), k.data());
    kernel::quantise(p.v.data(), p.v.size(), v.data());
    const std::array<index_t, 4> ne{d, n, 1, 1};
    const index_t row = d / 32 * static_cast<index_t>(sizeof(B));
    const std::array<index_t, 4> nb{sizeof(B), row, n * row, n * row};
    const auto view = ggml_kv<B>({k.data(), ne, nb}, {v.data(), ne, nb});
    REQUIRE(view.validate().ok());
    check(drawn(p, view, index_of(view), settings()), n);
  };
  ggml(kernel::q8_0_block{});
  ggml(kernel::q4_0_block{});
}

TEST_CASE("what a call carries is served by the index: cap, sinks, masks, ALiBi, causal queries, windows", "[index]") {
  const auto with = [](auto&& change, index_t queries = 1, double share = 0.45) {
    shape s = long_shape(9000);
    s.queries = queries;
    problem<float> p(s, 4u, 2.0f);
    change(p);
    check(drawn(p, p.cache(), index_of(p.cache()), settings(), queries > 1 ? 6 : 20), p.s.n, share);
  };
  with([](auto& p) { p.options.softcap = 3; });
  with([](auto& p) { p.set_sinks({1, -2, 3, 8}); });
  with([](auto& p) { p.options.causal = true; }, 5);
  with([](auto& p) { p.options.sliding_window = 7000; }, 1, 0.4);
  with([](auto& p) { p.set_alibi({0.0001f, 0.0002f, 0, -0.0001f}); });
  with([](auto& p) {  // 0 and −inf, the same for all heads; every third token is hidden
    std::vector<float> mask(static_cast<std::size_t>(p.s.heads * p.s.n));
    for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 == 0 ? -infinity : 0.0f;
    p.set_mask(mask);
  });
  with([](auto& p) {  // finite, of each head's own: a few tokens that no score knows of
    std::vector<float> mask(static_cast<std::size_t>(p.s.heads * p.s.n));
    for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = 0.5f * std::sin(static_cast<float>(i));
    p.set_mask(mask);
  });
}

TEST_CASE("a mask that is no number is told, wherever it is", "[index]") {
  problem<float> p(long_shape(9000), 4u, 1.0f);
  const std::vector<kv_index> index = index_of(p.cache());
  results r(p.s);
  workspace memory;
  for (const float odd : {not_a_number, infinity}) {
    for (const std::size_t at : {std::size_t{0}, std::size_t{4321}, std::size_t{4 * 9000 - 1}}) {
      std::vector<float> mask(static_cast<std::size_t>(p.s.heads * p.s.n));
      mask[at] = odd;
      p.set_mask(mask);
      const status s = vattention<index_policy>(settings(), {index})(p.query(), p.cache(), p.options, r.view(), memory);
      CHECK(s.code() == errc::non_finite);
    }
  }
}

TEST_CASE("sinks and window of any length take the memory of the tokens that there are", "[index]") {
  problem<float> p(long_shape(9000));
  const std::vector<kv_index> index = index_of(p.cache());
  config c = settings();
  c.sinks = c.window = (index_t{1} << 31) - 1;
  const vattention<index_policy> attend(c, {index});
  CHECK(attend.workspace_bytes(9000, p.s.dk, p.s.dv) < 10'000'000);
  results r(p.s);
  workspace memory;
  REQUIRE(attend(p.query(), p.cache(), p.options, r.view(), memory).ok());
  CHECK(r.certificates[0].exact());
}

TEST_CASE("a token that a mask alone makes heavy is not missed", "[index]") {
  problem<float> p(long_shape(), 6u, 1.0f);
  std::vector<float> mask(static_cast<std::size_t>(p.s.heads * p.s.n));
  for (index_t h = 0; h < p.s.heads; ++h) {
    for (const index_t token : {1234, 4321}) mask[static_cast<std::size_t>(h * p.s.n + token)] = 7.5f;
  }
  p.set_mask(mask);
  for (index_t j = 0; j < p.s.dv; ++j) p.v[static_cast<std::size_t>(1234 * p.s.dv + j)] = 4;
  config c = settings();
  const outcome o = drawn(p, p.cache(), index_of(p.cache()), c, 40);
  CAPTURE(o.failures, o.draws, o.worst, o.sampled);
  CHECK(10 * o.failures <= o.draws);
}

TEST_CASE("cells of one sequence among others', in any order, with cells that have no code", "[index]") {
  problem<float> p(long_shape(5000), 7u, 2.0f);
  const index_t cells = 12000, n = p.s.n, d = p.s.dk, heavy = 150;
  // Most of what the first head's query sees.
  const Eigen::Map<const Eigen::VectorXf> first(p.q.data(), d);
  Eigen::Map<Eigen::VectorXf>(p.k.data() + heavy * d, d) = first * (12 / (p.options.scale * first.squaredNorm()));
  std::vector<index_t> cell(static_cast<std::size_t>(cells));
  std::iota(cell.begin(), cell.end(), index_t{0});
  std::shuffle(cell.begin(), cell.end(), std::mt19937(1));
  std::vector<float> k(static_cast<std::size_t>(cells * d), not_a_number), v(k.size(), not_a_number);
  std::vector<std::int32_t> position(static_cast<std::size_t>(cells), -1), query{static_cast<std::int32_t>(n - 1)};
  for (index_t t = 0; t < n; ++t) {
    const index_t c = cell[static_cast<std::size_t>(t)];
    std::copy_n(p.k.data() + t * d, d, k.data() + c * d);
    std::copy_n(p.v.data() + t * d, d, v.data() + c * d);
    position[static_cast<std::size_t>(c)] = static_cast<std::int32_t>(t);
  }
  const auto view = contiguous_kv(k.data(), v.data(), {.n_tokens = cells, .dk = d, .dv = d});
  std::vector<kv_index> index = index_of(view);  // the others' cells are not finite here: they have no code
  CHECK(index[0].codes(0).codes() == n);
  p.options.causal = true;
  p.options.positions = {{position.data(), {1, cells}}, {query.data(), {1, 1}}};
  p.s.n = cells;
  check(drawn(p, view, index, settings()), n);

  // Cells that the index has lost, or never saw, are read for certain.
  for (index_t t = 100; t < 300; ++t)
    index[0].erase(cell[static_cast<std::size_t>(t)], cell[static_cast<std::size_t>(t)] + 1);
  check(drawn(p, view, index, settings()), n);
  index[0].truncate(cells - 500);
  check(drawn(p, view, index, settings()), n, 0.6);
}

TEST_CASE("an index that knows few of the rows, or none, costs rows and not the promise", "[index]") {
  problem<float> p(long_shape(), 8u, 2.0f);
  std::vector<kv_index> index = index_of(p.cache());
  index[0].truncate(2000);
  const outcome all = drawn(p, p.cache(), index, settings());
  CHECK(all.sampled == 0);
  CHECK(all.worst < 1e-3);
  index[0].clear();
  CHECK(drawn(p, p.cache(), index, settings()).sampled == 0);
  // Codes of other rows: what is read shows it.
  problem<float> other(long_shape(), 9u, 2.0f);
  const outcome stale = drawn(p, p.cache(), index_of(other.cache()), settings());
  CHECK(stale.failures == 0);
}

TEST_CASE("any number of threads and any workspace give the same bits, and the decision is that of the output",
          "[index]") {
  problem<float> p(shape{.batch = 2, .queries = 2, .heads = 4, .kv_heads = 2, .n = 5000, .dk = 32, .dv = 32}, 3u, 2.0f);
  p.options.causal = true;
  const std::vector<kv_index> index = index_of(p.cache());
  const vattention<index_policy> attend(settings(), {index});
  results one(p.s), more(p.s);
  workspace memory;
  REQUIRE(attend(p.query(), p.cache(), p.options, one.view(), memory, {.seed = 5}).ok());
  thread_pool pool(3);
  REQUIRE(attend(p.query(), p.cache(), p.options, more.view(), memory, {.seed = 5}, pool).ok());
  CHECK(one.output == more.output);
  CHECK(one.log_sum_exp == more.log_sum_exp);

  std::vector<std::byte> fixed(attend.workspace_bytes(5000, 32, 32));
  workspace exactly_enough(fixed);
  REQUIRE(attend(p.query(), p.cache(), p.options, more.view(), exactly_enough, {.seed = 5}).ok());
  CHECK(one.output == more.output);

  const std::array<index_t, 4> extents{2, 2, 4, 5000};
  std::vector<std::int32_t> tokens(2 * 2 * 4 * 5000), counts(16);
  std::vector<float> weights(tokens.size());
  attention_result r = more.view();
  r.decisions = {{tokens.data(), extents}, {weights.data(), extents}, {counts.data(), {2, 2, 4}}};
  REQUIRE(attend(p.query(), p.cache(), p.options, r, memory, {.seed = 5}).ok());
  CHECK(one.output == more.output);
  for (index_t row = 0; row < 16; ++row) {
    const auto at = static_cast<std::size_t>(row);
    const index_t h = row % 4, b = row / 8;
    const auto head = p.cache().head(b, h / 2);
    const float* q = p.q.data() + row * 32;
    double sum = 0;
    std::vector<double> o(32);
    for (index_t i = 0; i < counts[at]; ++i) {
      const index_t token = tokens[static_cast<std::size_t>(row * 5000 + i)];
      const double x = std::exp(static_cast<double>(kernel::dot(q, head.key(token)) * p.options.scale)) *
                       static_cast<double>(weights[static_cast<std::size_t>(row * 5000 + i)]);
      sum += x;
      for (std::size_t j = 0; j < 32; ++j) o[j] += x * static_cast<double>(head.value(token)[j]);
    }
    for (double& x : o) x /= sum;
    CHECK(reference::relative_error(more.row(at), o) < 1e-4);
  }
}

TEST_CASE("short sequences are attended exactly, as exact attention does it", "[index]") {
  for (const index_t n : {0, 1, 20, 700, 2000}) {
    problem<float> p(long_shape(n), 2);
    const std::vector<kv_index> index = index_of(p.cache());
    results a(p.s), b(p.s);
    workspace memory;
    REQUIRE(vattention<index_policy>({}, {index})(p.query(), p.cache(), p.options, a.view(), memory).ok());
    REQUIRE(exact_attention(p.query(), p.cache(), p.options, b.view(), memory).ok());
    CHECK(a.output == b.output);
    for (const certificate& c : a.certificates) CHECK(c.exact());
  }
}

TEST_CASE("what is remembered of a step costs rows, never the promise, whatever it is", "[index]") {
  problem<float> p(long_shape(8000), 11u, 2.0f);
  const std::vector<kv_index> index = index_of(p.cache());
  std::vector<index_memory> memory(1);
  const config c = settings();
  const vattention<index_policy> attend(c, {index, memory});
  results exact(p.s), r(p.s);
  workspace scratch;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  index_t failures = 0, draws = 0, sampled = 0;
  for (std::uint32_t step = 0; step < 120; ++step) {
    if (step % 3 == 0) {
      const float size = std::pow(2.0f, static_cast<float>(random() % 5) - 2);  // another topic
      for (float& x : p.q) x = size * normal(random);
    }
    index_memory& m = memory[0];
    switch (step % 8) {
      case 3:
        for (double& a : m.thresholds.plain) a += 20.0 * static_cast<double>(normal(random));
        for (double& f : m.thresholds.floor) f += 20.0 * static_cast<double>(normal(random));
        break;
      case 5:
        m.thresholds.base = 1e-9;
        for (auto& e : m.estimates) e.output2 *= 1e6, e.denominator *= 1e-6, e.variance = 0;
        break;
      case 6:
        m.estimates[1].output2 = std::numeric_limits<double>::quiet_NaN();
        m.thresholds.away = 1e12;
        break;
      case 7:
        for (double& s : m.log_sum) s = 1e300;
        m.rest = -5, m.failures = 1 << 30;
        break;
      default:
        break;
    }
    REQUIRE(exact_attention(p.query(), p.cache(), p.options, exact.view(), scratch).ok());
    REQUIRE(attend(p.query(), p.cache(), p.options, r.view(), scratch, {.seed = 7, .step = step}).ok());
    for (std::size_t at = 0; at < 4; ++at) {
      const std::vector<double> want(exact.row(at), exact.row(at) + p.s.dv);
      failures += reference::relative_error(r.row(at), want) > c.epsilon;
      ++draws, sampled += !r.certificates[at].exact();
    }
  }
  CAPTURE(failures, draws, sampled);
  CHECK(3 * sampled > draws);
  CHECK(20 * failures <= draws);  // δ = 0.02
}

TEST_CASE("mistakes with indices are said", "[index]") {
  problem<float> p(long_shape(100));
  results r(p.s);
  workspace memory;
  const auto call = [&](std::span<const kv_index> index, std::span<index_memory> remembered = {}) {
    return vattention<index_policy>({}, {index, remembered})(p.query(), p.cache(), p.options, r.view(), memory);
  };
  CHECK_FALSE(call({}).ok());
  std::vector<kv_index> wrong;
  wrong.emplace_back(index_shape{.n_kv_heads = 2, .dk = 32, .dv = 32});
  CHECK_FALSE(call(wrong).ok());
  const std::vector<kv_index> index = index_of(p.cache());
  std::vector<index_memory> two(2);
  CHECK_FALSE(call(index, two).ok());
  CHECK_FALSE(
      vattention<index_policy>({}, {index, {}, {.key = -1}})(p.query(), p.cache(), p.options, r.view(), memory));
  CHECK(call(index).ok());
}
