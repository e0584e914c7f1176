// Exact attention against the double-precision reference.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

using namespace vattn::test;
using vattn::errc;
using vattn::index_t;

namespace {

template <class T>
results dense(const problem<T>& p) {
  results r(p.s);
  vattn::workspace memory;
  const vattn::status s = vattn::exact_attention(p.query(), p.cache(), p.options, r.view(), memory);
  CAPTURE(s.message());
  REQUIRE(s.ok());
  return r;
}

std::vector<float> random_floats(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& f : x) f = normal(random);
  return x;
}

}  // namespace

TEMPLATE_TEST_CASE("every combination of options, on every type", "[attention][exact]", float, Eigen::half,
                   Eigen::bfloat16) {
  // Bits: softcap, causal, window, mask, sinks, ALiBi.
  for (unsigned options = 0; options < 64; ++options) {
    const index_t n = 3 + static_cast<index_t>(options) * 5;
    problem<TestType> p({.batch = 2, .queries = 3, .heads = 6, .kv_heads = 2, .n = n, .dk = 10, .dv = 7}, options + 1,
                        2);
    if (options & 1) p.options.softcap = 1.5f;
    p.options.causal = options & 2;
    if (options & 4) p.options.sliding_window = 1 + n / 2;
    if (options & 8) {
      auto mask = random_floats(static_cast<std::size_t>(2 * 6 * 3 * n), options);
      for (float& m : mask) m = m > 0.8f ? -infinity : m;
      p.set_mask(mask);
    }
    if (options & 16) p.set_sinks({0, 3, -2, -infinity, 1, 20});
    if (options & 32) p.set_alibi({0, 0.5f, 0.25f, -0.1f, 0.01f, 1});
    const results r = dense(p);
    const disagreement worst = compare(p, r);
    CAPTURE(options, n, worst.output, worst.denominator);
    CHECK(worst.output < 5e-6);
    CHECK(worst.denominator < 2e-5);
    for (std::size_t i = 0; i < r.certificates.size(); ++i) {
      CHECK(r.certificates[i].exact());
      CHECK(r.certificates[i].rows() == r.certificates[i].n);
      CHECK(r.certificates[i].log_denominator == static_cast<double>(r.log_sum_exp[i]));
    }
  }
}

TEST_CASE("any whole GQA ratio", "[attention][exact]") {
  for (const index_t ratio : {1, 3, 4, 6}) {
    for (const index_t kv_heads : {1, 2, 3}) {
      const problem<float> p({.heads = ratio * kv_heads, .kv_heads = kv_heads, .n = 40, .dk = 6, .dv = 5},
                             static_cast<unsigned>(ratio));
      CAPTURE(ratio, kv_heads);
      CHECK(compare(p, dense(p)).output < 2e-6);
    }
  }
}

TEST_CASE("K wider than V, V wider than K, and V of one element", "[attention][exact]") {
  for (const auto& [dk, dv] : {std::pair<index_t, index_t>{576, 512}, {4, 64}, {64, 1}, {1, 1}, {129, 130}}) {
    const problem<Eigen::bfloat16> p({.n = 70, .dk = dk, .dv = dv});
    CAPTURE(dk, dv);
    CHECK(compare(p, dense(p)).output < 5e-6);
  }
}

TEST_CASE("compiled head sizes and run-time ones give the same bits", "[attention][exact]") {
  const problem<Eigen::half> p({.heads = 2, .n = 700, .dk = 64, .dv = 32}, 5);
  const results dynamic = dense(p);
  results fixed(p.s);
  vattn::workspace memory;
  const auto cache = vattn::contiguous_kv<64, 32>(p.k.data(), p.v.data(), p.cache_shape());
  REQUIRE(vattn::exact_attention(p.query(), cache, p.options, fixed.view(), memory).ok());
  CHECK(compare(p, fixed).output < 5e-6);
  CHECK(fixed.output == dynamic.output);
}

TEST_CASE("queries in half precision, strided", "[attention][exact]") {
  problem<float> p({.queries = 2, .heads = 3, .n = 50, .dk = 8, .dv = 8}, 4);
  // [heads, queries, dk + 2] in memory, seen as [1, queries, heads, dk].
  std::vector<Eigen::half> q(3 * 2 * 10, Eigen::half(not_a_number));
  for (std::size_t t = 0; t < 2; ++t) {
    for (std::size_t h = 0; h < 3; ++h) {
      for (std::size_t j = 0; j < 8; ++j) {
        float& x = p.q[(t * 3 + h) * 8 + j];
        q[(h * 2 + t) * 10 + j] = Eigen::half(x);
        x = static_cast<float>(Eigen::half(x));
      }
    }
  }
  results r(p.s);
  vattn::workspace memory;
  const vattn::tensor_view<const Eigen::half, 4> view(q.data(), {1, 2, 3, 8}, {0, 20, 40, 2});
  REQUIRE(vattn::exact_attention(view, p.cache(), p.options, r.view(), memory).ok());
  CHECK(compare(p, r).output < 2e-6);
}

TEST_CASE("strided outputs leave what lies between them alone", "[attention][exact]") {
  const problem<float> p({.queries = 2, .heads = 2, .n = 30, .dk = 4, .dv = 3}, 6);
  const results want = dense(p);
  std::vector<float> padded(2 * 2 * 8, 5.0f);
  vattn::workspace memory;
  const vattn::attention_result result{.output = {padded.data(), {1, 2, 2, 3}, {0, 64, 32, 8}}};
  REQUIRE(vattn::exact_attention(p.query(), p.cache(), p.options, result, memory).ok());
  for (std::size_t row = 0; row < 4; ++row) {
    for (std::size_t j = 0; j < 8; ++j) {
      const float want_here = j % 2 == 0 && j < 6 ? want.output[row * 3 + j / 2] : 5.0f;
      CHECK(padded[row * 8 + j] == want_here);
    }
  }
}

TEST_CASE("a query that sees nothing has output 0 and the log-sum-exp of its sink", "[attention][exact]") {
  const auto check = [](const results& r, std::size_t row, float sink = -infinity) {
    CHECK(r.log_sum_exp[row] == sink);
    for (std::size_t j = 0; j < static_cast<std::size_t>(r.extents[3]); ++j)
      CHECK(r.output[row * static_cast<std::size_t>(r.extents[3]) + j] == 0.0f);
    CHECK(r.certificates[row].n == 0);
    CHECK(r.certificates[row].exact());
  };
  SECTION("masked") {
    problem<float> p({.queries = 2, .n = 20});
    std::vector<float> mask(40, 0.0f);
    std::fill(mask.begin(), mask.begin() + 20, -infinity);
    p.set_mask(mask);
    p.set_sinks({4});
    const results r = dense(p);
    check(r, 0, 4);
    CHECK(r.certificates[1].n == 20);
    CHECK(compare(p, r).output < 2e-6);
  }
  SECTION("before the first token") {
    problem<float> p({.queries = 5, .n = 3});
    p.options.causal = true;
    const results r = dense(p);
    check(r, 0);
    check(r, 1);
    CHECK(r.certificates[2].n == 1);
    CHECK(compare(p, r).output < 2e-6);
  }
  SECTION("no tokens") {
    const problem<float> p({.batch = 2, .heads = 3, .n = 0});
    const results r = dense(p);
    for (std::size_t row = 0; row < 6; ++row) check(r, row);
  }
}

TEST_CASE("no queries, no heads, no batch: nothing to do", "[attention][exact]") {
  for (const shape& s : {shape{.queries = 0, .n = 5}, shape{.heads = 0, .n = 5}, shape{.batch = 0, .n = 5}}) {
    const problem<float> p(s);
    CHECK(dense(p).output.empty());
  }
}

TEST_CASE("huge and tiny logits neither overflow nor vanish", "[attention][exact]") {
  for (const float factor : {1e-20f, 50.0f, 2000.0f}) {
    problem<float> p({.n = 600, .dk = 4, .dv = 4}, 9);
    for (float& x : p.q) x *= factor;
    CAPTURE(factor);
    CHECK(compare(p, dense(p)).output < 2e-3f * factor / 2000 + 5e-6f);
  }
}

TEST_CASE("permuting the tokens changes nothing", "[attention][exact]") {
  const problem<float> p({.heads = 2, .kv_heads = 2, .n = 900, .dk = 8, .dv = 4}, 10, 3);
  problem<float> shuffled = p;
  std::vector<std::size_t> order(900);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), std::mt19937(3));
  for (std::size_t h = 0; h < 2; ++h) {
    for (std::size_t i = 0; i < 900; ++i) {
      std::copy_n(p.k.begin() + static_cast<std::ptrdiff_t>((h * 900 + order[i]) * 8), 8,
                  shuffled.k.begin() + static_cast<std::ptrdiff_t>((h * 900 + i) * 8));
      std::copy_n(p.v.begin() + static_cast<std::ptrdiff_t>((h * 900 + order[i]) * 4), 4,
                  shuffled.v.begin() + static_cast<std::ptrdiff_t>((h * 900 + i) * 4));
    }
  }
  const results a = dense(p), b = dense(shuffled);
  CHECK(compare(p, b).output < 3e-6);
  for (std::size_t i = 0; i < a.output.size(); ++i)
    CHECK_THAT(static_cast<double>(a.output[i]), WithinAbs(static_cast<double>(b.output[i]), 3e-6));
}

TEST_CASE("exactly: scaling the values scales the output, to the bit for powers of two", "[attention][exact]") {
  const problem<float> p({.n = 300, .dk = 8, .dv = 4}, 11);
  problem<float> scaled = p;
  for (float& x : scaled.v) x *= -8;
  const results a = dense(p), b = dense(scaled);
  for (std::size_t i = 0; i < a.output.size(); ++i) CHECK(b.output[i] == -8 * a.output[i]);
  CHECK(a.log_sum_exp == b.log_sum_exp);
}

TEST_CASE("exactly: a constant added to all logits moves the log-sum-exp alone", "[attention][exact]") {
  const problem<float> p({.n = 300, .dk = 8, .dv = 4}, 12);
  problem<float> moved = p;
  moved.set_mask(std::vector<float>(300, 40.0f));
  const results a = dense(p), b = dense(moved);
  for (std::size_t i = 0; i < a.output.size(); ++i)
    CHECK_THAT(static_cast<double>(b.output[i]), WithinAbs(static_cast<double>(a.output[i]), 3e-5));
  CHECK_THAT(static_cast<double>(b.log_sum_exp[0]), WithinAbs(static_cast<double>(a.log_sum_exp[0]) + 40, 1e-4));
}

TEST_CASE("NaN and infinity where they are read, silence where they are not", "[attention][exact]") {
  for (const float bad : {not_a_number, infinity, -infinity}) {
    for (int where = 0; where < 5; ++where) {
      problem<float> p({.batch = 2, .queries = 2, .heads = 4, .kv_heads = 2, .n = 30}, 13);
      const std::size_t element = ((1 * 2 + 1) * 30 + 17) * 16 + 3;  // batch 1, KV head 1, token 17
      if (where == 0) p.q[((1 * 2 + 1) * 4 + 3) * 16 + 5] = bad;     // batch 1, query 1, head 3
      if (where == 1) p.k[element] = bad;
      if (where == 2) p.v[element] = bad;
      if (where == 3) {
        std::vector<float> mask(2 * 4 * 2 * 30, 0.0f);
        mask[((1 * 4 + 2) * 2 + 0) * 30 + 17] = bad;
        p.set_mask(mask);
      }
      if (where == 4) p.set_sinks({0, bad, 0, 0});
      results r(p.s);
      vattn::workspace memory;
      const vattn::status s = vattn::exact_attention(p.query(), p.cache(), p.options, r.view(), memory);
      CAPTURE(bad, where, s.message());
      if (bad == -infinity && where >= 3) {  // means "absent" there
        CHECK(s.ok());
        continue;
      }
      CHECK(s.code() == errc::non_finite);
      if (where == 0) CHECK(contains(s.message(), "batch 1, query 1, head 3"));
      if (where == 1 || where == 2) CHECK(contains(s.message(), "batch 1, query 0, head 2"));
      if (where == 3) CHECK(contains(s.message(), "batch 1, query 0, head 2"));
      if (where == 4) CHECK(contains(s.message(), "batch 0, query 0, head 1"));
    }
  }
}

TEST_CASE("more results than one thread is to finish", "[attention][exact]") {
  problem<float> p({.queries = 700, .heads = 3, .kv_heads = 1, .n = 750, .dk = 8, .dv = 4}, 12);
  p.options.causal = true;
  const auto call = [&](results& r, auto&& exec) {
    vattn::workspace memory;
    return vattn::exact_attention(p.query(), p.cache(), p.options, r.view(), memory, exec);
  };
  results one(p.s), three(p.s);
  REQUIRE(call(one, vattn::serial_executor()).ok());
  REQUIRE(call(three, vattn::thread_executor(3)).ok());
  CHECK(compare(p, one).output < 5e-6);
  CHECK(one.output == three.output);
  CHECK(one.log_sum_exp == three.log_sum_exp);
  p.q[(650 * 3 + 2) * 8] = p.q[(680 * 3 + 1) * 8] = not_a_number;
  const vattn::status s = call(three, vattn::thread_executor(3));
  CHECK(s.code() == vattn::errc::non_finite);
  CHECK(contains(s.message(), "query 650, head 2"));
}
