// The snippets of docs/engines.md do what the page says.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <span>
#include <thread>
#include <vector>

#include "support/layout.hpp"
#include "vattn/vattn.hpp"

// As much of ggml.h as a custom op sees.
struct ggml_tensor {
  std::int64_t ne[4];
  std::size_t nb[4];
  ggml_tensor* src[10];
  void* data;
};

namespace {
#include "snippets/engines/beside-any-of-these-caches.hpp"
#include "snippets/engines/flashinfer.hpp"
#include "snippets/engines/gemmacpp.hpp"
#include "snippets/engines/llamacpp-and-ggml.hpp"
#include "snippets/engines/only-the-decision.hpp"
#include "snippets/engines/vllm.hpp"

using namespace vattn;
using namespace vattn::test;

template <class T>
ggml_tensor dense(T* data, std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) {
  ggml_tensor t{{a, b, c, d}, {}, {}, data};
  t.nb[0] = sizeof(T);
  for (int i = 1; i < 4; ++i) t.nb[i] = t.nb[i - 1] * static_cast<std::size_t>(t.ne[i - 1]);
  return t;
}

// [n_batch][heads][n][d] -> [n_batch][n][heads][d]
template <class T>
std::vector<T> token_major(const ragged<T>& r, bool keys) {
  const shape& s = r.p.s;
  std::vector<T> to(r.p.k.size());
  r.for_each_row([&](index_t b, index_t h, index_t t) {
    std::copy_n(keys ? r.key(b, h, t) : r.value(b, h, t), s.dk, to.data() + ((b * s.n + t) * s.kv_heads + h) * s.dk);
  });
  return to;
}

plan_shape shape_of(const shape& s, index_t threads, bool masked) {
  return {.n_batch = s.batch,
          .n_queries = s.queries,
          .n_q_heads = s.heads,
          .n_kv_heads = s.kv_heads,
          .max_tokens = s.n,
          .dk = s.dk,
          .dv = s.dv,
          .masked = masked,
          .threads = threads};
}

template <class T>
results expected(const ragged<T>& r, const draw_key& key) {
  results want(r.p.s);
  workspace memory;
  REQUIRE(vattention<>(small_config())(r.p.query(), r.contiguous(), r.p.options, want.view(), memory, key).ok());
  REQUIRE(want.certificates[0].exact());  // there is no index
  return want;
}

// Paged rows are read one by one, contiguous ones by blocks: sums in another order.
bool near(const results& a, const results& b) {
  double worst = 0;
  for (std::size_t i = 0; i < a.output.size(); ++i)
    worst = std::max(worst, std::abs(static_cast<double>(a.output[i]) - static_cast<double>(b.output[i])));
  return worst < 4e-6;
}

}  // namespace

TEST_CASE("the page's ggml op, called by three threads", "[docs]") {
  ragged<Eigen::half> r({.queries = 2, .heads = 4, .kv_heads = 2, .dk = 32, .dv = 32}, {800});
  const shape& s = r.p.s;
  std::vector<Eigen::half> k = token_major(r, true), v = token_major(r, false), mask;
  std::vector<float> plain;
  for (index_t h = 0; h < 4; ++h)
    for (index_t i = 0; i < 2 * 800; ++i) plain.push_back(i % 5 == 0 ? -infinity : 0.0f);
  for (index_t i = 0; i < 2 * 800; ++i) mask.push_back(Eigen::half(plain[static_cast<std::size_t>(i)]));
  const std::size_t e = 2;
  ggml_tensor q{{32, 2, 4, 1}, {4, 4 * 32 * 4, 32 * 4, 4 * 32 * 8}, {}, r.p.q.data()};
  ggml_tensor kt{{32, 800, 2, 1}, {e, 64 * e, 32 * e, 800 * 64 * e}, {}, k.data()};
  ggml_tensor vt = kt, m = dense(mask.data(), 800, 2, 1, 1);
  vt.data = v.data();
  results got(s);
  ggml_tensor dst = dense(got.output.data(), 32, 4, 2, 1);
  dst.src[0] = &q, dst.src[1] = &kt, dst.src[2] = &vt, dst.src[3] = &m;

  sparse_attention_op op{
      plan(shape_of(s, 3, true), small_config()), {}, r.p.options, {.seed = 1, .layer = 4, .step = 2}};
  op.scratch.resize(workspace_bytes(op.plan));
  std::vector<std::thread> threads;
  for (int ith = 0; ith < 3; ++ith) threads.emplace_back([&, ith] { attend(&dst, ith, 3, &op); });
  for (std::thread& t : threads) t.join();
  CHECK_FALSE(op.failed);
  r.p.set_mask(plain);
  CHECK(got.output == expected(r, op.key).output);
  vt.ne[1] = 799;
  attend(&dst, 0, 1, &op);
  CHECK(op.failed);
}

TEST_CASE("the page's FlashInfer and vLLM calls", "[docs]") {
  // Pages of 16 in order, of one sequence after the other: a dense [B, n, heads, d] cache.
  const ragged<Eigen::half> r({.heads = 4, .kv_heads = 2, .dk = 16, .dv = 16}, {800, 800});
  const std::vector<Eigen::half> k = token_major(r, true), v = token_major(r, false);
  std::vector<std::int32_t> ids(100);
  for (std::size_t i = 0; i < 100; ++i) ids[i] = static_cast<std::int32_t>(i);
  const std::int32_t indptr[] = {0, 50, 100}, last[] = {16, 16}, lens[] = {800, 800};
  const flashinfer_pages pages{.n_pages = 100,
                               .page_size = 16,
                               .n_kv_heads = 2,
                               .dk = 16,
                               .dv = 16,
                               .n_batch = 2,
                               .indptr = indptr,
                               .indices = ids.data(),
                               .last_page_len = last};
  const auto p = plan(shape_of(r.p.s, 2, false), small_config());
  std::vector<std::byte> memory(workspace_bytes(p));
  const draw_key key{.seed = 5, .layer = 1, .step = 3};
  results got(r.p.s);
  const status s = flashinfer_decode(p, memory, r.p.q.data(), k.data(), v.data(), pages, key, got.output.data(),
                                     got.log_sum_exp.data(), 0, 1);
  INFO(s.message());
  REQUIRE(s.ok());
  const results want = expected(r, key);
  CHECK(near(got, want));
  for (std::size_t i = 0; i < want.log_sum_exp.size(); ++i)
    CHECK_THAT(got.log_sum_exp[i], WithinRel(want.log_sum_exp[i] / std::log(2.0f), 1e-5f));

  ragged<float> known({.heads = 4, .kv_heads = 2, .dk = 16, .dv = 16}, {800, 800});
  std::vector<std::uint8_t> bytes(2 * 2 * 800 * 2 * 16);
  std::mt19937 random(3);
  for (auto& b : bytes) b = static_cast<std::uint8_t>(random() & 0xbf);
  known.for_each_row([&](index_t b, index_t h, index_t t) {
    const index_t row = ((b * 800 + t) * 2 + h) * 16, to = ((b * 2 + h) * 800 + t) * 16;
    for (index_t j = 0; j < 16; ++j) {
      known.p.k[static_cast<std::size_t>(to + j)] =
          0.5f * kernel::e4m3_to_float(bytes[static_cast<std::size_t>(row + j)]);
      known.p.v[static_cast<std::size_t>(to + j)] =
          2.0f * kernel::e4m3_to_float(bytes[static_cast<std::size_t>(2 * 800 * 2 * 16 + row + j)]);
    }
  });
  const vllm_blocks blocks{.n_blocks = 100,
                           .block_size = 16,
                           .n_kv_heads = 2,
                           .d = 16,
                           .n_batch = 2,
                           .max_blocks = 50,
                           .block_table = ids.data(),
                           .seq_lens = lens};
  thread_executor threads(2);
  const status fp8 =
      vllm_decode(p, memory, known.p.q.data(), bytes.data(), 0.5f, 2.0f, blocks, key, got.output.data(), threads);
  INFO(fp8.message());
  REQUIRE(fp8.ok());
  results exact(known.p.s);
  workspace other;
  REQUIRE(vattention<>(small_config())(known.p.query(), known.contiguous(), known.p.options, exact.view(), other, key)
              .ok());
  exact.log_sum_exp = got.log_sum_exp;  // outputs alone
  CHECK(difference(got, exact) < 1e-4);
}

TEST_CASE("the page's gemma.cpp call, on a ring that has wrapped", "[docs]") {
  ragged<float> r({.heads = 4, .kv_heads = 2, .dk = 16, .dv = 16}, {900});
  const std::size_t stride = 3 * 2 * 32 + 7;
  std::vector<float> cache(900 * stride);
  r.for_each_row([&](index_t, index_t h, index_t t) {  // token t at position 500 + t
    float* row = cache.data() + static_cast<std::size_t>((500 + t) % 900) * stride + (2 + h) * 32;
    std::copy_n(r.key(0, h, t), 16, row);
    std::copy_n(r.value(0, h, t), 16, row + 16);
  });
  r.p.options.scale = 1, r.p.options.softcap = 50;
  const draw_key key{.seed = 8, .layer = 1, .step = 1399};
  results got(r.p.s);
  workspace memory;
  const status s = gemma_decode(vattention<>(small_config()), memory, r.p.q.data(), cache.data(), stride, 900, 1399,
                                {.layer = 1, .n_kv_heads = 2, .d = 16}, 4, got.output.data(), key);
  INFO(s.message());
  REQUIRE(s.ok());
  results want(r.p.s);
  REQUIRE(vattention<>(small_config())(r.p.query(), r.contiguous(), r.p.options, want.view(), memory, key).ok());
  CHECK(near(got, want));
}

TEST_CASE("the page's decision", "[docs]") {
  problem<float> p({.n = 8000, .dk = 16, .dv = 16}, 2u, 2.0f);
  workspace memory;
  std::vector<float> mask(8000);
  std::vector<kv_index> index;
  index.emplace_back(index_shape{.dk = 16, .dv = 16});
  REQUIRE(keep_up(index, p.cache()).ok());
  const vattention<> by_index(small_config(), {index});
  REQUIRE(decide(by_index, memory, p.q.data(), p.cache(), p.options, {.seed = 2}, mask).ok());
  index_t chosen = 0;
  for (const float m : mask) chosen += m != -infinity;
  results r(p.s);
  REQUIRE(by_index(p.query(), p.cache(), p.options, r.view(), memory, {.seed = 2}).ok());
  CHECK_FALSE(r.certificates[0].exact());
  CHECK(chosen > 0);
  CHECK(chosen <= r.certificates[0].rows());  // some showed by their keys that their values need not be read
  p.set_mask(mask);
  CHECK(compare(p, r).output < 1e-5);
}

TEST_CASE("the page's step by an index", "[docs]") {
  problem<float> p({.heads = 4, .kv_heads = 2, .n = 8000, .dk = 32, .dv = 32}, 2u, 2.0f);
  std::vector<kv_index> index;
  index.emplace_back(index_shape{.n_kv_heads = 2, .dk = 32, .dv = 32});
  REQUIRE(keep_up(index, p.cache()).ok());
  std::vector<index_memory> memory(2);
  const auto planned =
      plan({.n_q_heads = 4, .n_kv_heads = 2, .max_tokens = 8000, .dk = 32, .dv = 32}, small_config(), {index, memory});
  std::vector<std::byte> workspace(workspace_bytes(planned));
  results r(p.s);
  const run_arguments call{p.query(), p.cache(), p.options, r.view()};
  REQUIRE(step_by_index(planned, index, memory, call, workspace, 0, 1).ok());
  for (const certificate& c : r.certificates) CHECK_FALSE(c.exact());
  CHECK(compare(p, r).output < 0.5);
  CHECK(memory[0].heads == 2);
}
