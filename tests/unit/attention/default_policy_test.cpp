// vattention<> as it stands: what is cheapest of what it is given, and never less than it promises.
#include <algorithm>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "vattn/base/thread_pool.hpp"
#include "vattn/kv/flashinfer.hpp"
#include "vattn/plan.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

struct bernstein : default_policy {
  using bound = budget::bernstein;
};
struct denominator : default_policy {
  using target = budget::denominator;
};
// A uniform sample that goes by nothing but what it has drawn.
struct unguarded : default_policy {
  using selector = select::none;
};

// All rows, with the bits of exact_attention and the promise on the certificate.
template <class Policy = default_policy, class T, kv_cache KV, class E = serial_executor>
void check_dense(const problem<T>& p, const KV& cache, const typename Policy::selector& select = {}, E&& exec = E{}) {
  results want(p.s), got(p.s);
  workspace memory;
  REQUIRE(exact_attention(p.query(), cache, p.options, want.view(), memory).ok());
  const config c{.epsilon = 0.07, .delta = 0.2, .sinks = 4, .window = 4};
  const status s = vattention<Policy>(c, select)(p.query(), cache, p.options, got.view(), memory, {.seed = 1}, exec);
  INFO(s.message());
  REQUIRE(s.ok());
  CHECK(got.output == want.output);
  CHECK(got.log_sum_exp == want.log_sum_exp);
  for (std::size_t i = 0; i < got.certificates.size(); ++i) {
    const certificate& k = got.certificates[i];
    REQUIRE((k.exact() && k.n == want.certificates[i].n && k.rows() == k.n));
    REQUIRE((k.epsilon == c.epsilon && k.delta == c.delta && k.target == Policy::target::kind));
  }
}

// As an engine's threads run it: in any order, each its own tasks in its own part of the plan's memory.
template <class T>
void check_plan(const problem<T>& p, bool masked = false) {
  results want(p.s);
  workspace memory;
  REQUIRE(exact_attention(p.query(), p.cache(), p.options, want.view(), memory).ok());
  const auto planned = plan({.n_batch = p.s.batch,
                             .n_queries = p.s.queries,
                             .n_q_heads = p.s.heads,
                             .n_kv_heads = p.s.kv_heads,
                             .max_tokens = p.s.n,
                             .dk = p.s.dk,
                             .dv = p.s.dv,
                             .masked = masked,
                             .threads = 3},
                            config{});
  std::vector<std::byte> bytes(workspace_bytes(planned));
  results shares(p.s), together(p.s);
  for (index_t ith = 3; ith-- > 0;)
    REQUIRE(run(planned, run_arguments{p.query(), p.cache(), p.options, shares.view()}, bytes, ith, 3).ok());
  CHECK(shares.output == want.output);
  CHECK(shares.log_sum_exp == want.log_sum_exp);
  thread_pool pool(3);
  REQUIRE(run(planned, run_arguments{p.query(), p.cache(), p.options, together.view()}, bytes, pool).ok());
  CHECK(together.output == want.output);
}

}  // namespace

TEST_CASE("a bare view is attended as exact attention does it, whatever a call carries", "[attention][default]") {
  for (const index_t n : {0, 1, 900, 5000, 20000}) {
    const problem<float> p({.batch = 2, .queries = 3, .heads = 6, .kv_heads = 2, .n = n, .dk = 16, .dv = 24}, 2u);
    check_dense(p, p.cache());
    check_plan(p);
    thread_pool pool(3);
    check_dense(p, p.cache(), {}, pool);
  }
  problem<Eigen::bfloat16> p({.queries = 5, .heads = 8, .kv_heads = 1, .n = 9000, .dk = 32, .dv = 32}, 3u);
  p.options.causal = true;
  check_dense(p, p.cache());
  check_plan(p);
  p.options.sliding_window = 6000;
  p.options.softcap = 5;
  p.set_sinks({0, 1, 2, 3, 4, 5, 6, 7});
  check_dense(p, p.cache());
  check_plan(p);
  std::vector<float> mask(static_cast<std::size_t>(8 * 5 * 9000));
  for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = i % 7 == 0 ? -infinity : 0.1f * static_cast<float>(i % 5);
  p.set_mask(mask);
  check_dense(p, p.cache());
  check_plan(p, true);
}

TEST_CASE("a token that no sample of a bare view would show is read, whatever norms the view keeps",
          "[attention][default]") {
  problem<float> p({.heads = 1, .kv_heads = 1, .n = 8000, .dk = 64, .dv = 32}, 9u, 1.1f);
  const auto row_norm = [](const std::vector<float>& rows, index_t i, index_t width) {
    return kernel::norm(kernel::const_float_map(rows.data() + i * width, width));
  };
  std::vector<float> keys(static_cast<std::size_t>(p.s.n)), values(keys.size());
  // A third of the softmax for a key that is no longer than others are.
  constexpr index_t needle = 4000;
  for (index_t j = 0; j < p.s.dk; ++j)
    p.k[static_cast<std::size_t>(needle * p.s.dk + j)] =
        p.q[static_cast<std::size_t>(j)] * 8 / row_norm(p.q, 0, p.s.dk);
  for (index_t j = 0; j < p.s.dv; ++j) p.v[static_cast<std::size_t>(needle * p.s.dv + j)] = -3;
  for (index_t i = 0; i < p.s.n; ++i) {
    keys[static_cast<std::size_t>(i)] = row_norm(p.k, i, p.s.dk);
    values[static_cast<std::size_t>(i)] = row_norm(p.v, i, p.s.dv);
  }
  CHECK(std::count_if(keys.begin(), keys.end(), [&](float k) { return k > keys[needle]; }) > 2000);
  const kv_view<float> view = p.cache().with_norms({.keys = keys.data(), .values = values.data()});
  check_dense(p, view);

  results exact(p.s), r(p.s);
  workspace memory;
  REQUIRE(exact_attention(p.query(), view, p.options, exact.view(), memory).ok());
  const std::vector<double> want(exact.row(0), exact.row(0) + p.s.dv);
  index_t wrong = 0;
  for (std::uint32_t step = 0; step < 40; ++step) {
    const vattention<unguarded> attend({.epsilon = 0.1, .delta = 0.1, .sinks = 4, .window = 4});
    REQUIRE(attend(p.query(), view, p.options, r.view(), memory, {.seed = 1, .step = step}).ok());
    wrong += !r.certificates[0].exact() && reference::relative_error(r.row(0), want) > 0.1;
  }
  CHECK(wrong > 20);  // δ says 4
}

TEST_CASE("a finite-sample promise and published targets are kept by all rows", "[attention][default]") {
  const problem<float> p({.heads = 2, .kv_heads = 1, .n = 6000, .dk = 16, .dv = 16}, 2u);
  std::vector<kv_index> index;
  index.emplace_back(index_shape{.dk = 16, .dv = 16});
  REQUIRE(index[0].build(p.cache()).ok());
  check_dense<bernstein>(p, p.cache(), {index, {}});
  check_dense<denominator>(p, p.cache(), {index, {}});
}

TEST_CASE("what is promised for a call as a whole is shared out where all rows are read, too", "[attention][default]") {
  const problem<float> p({.queries = 2, .heads = 2, .kv_heads = 1, .n = 500, .dk = 8, .dv = 8});
  std::vector<kv_index> index;
  index.emplace_back(index_shape{.dk = 8, .dv = 8});
  REQUIRE(index[0].build(p.cache()).ok());
  workspace memory;
  for (const bool with : {false, true}) {
    results r(p.s);
    const select::cheapest by = with ? select::cheapest{index, {}} : select::cheapest{};
    REQUIRE(vattention<>({.delta = 0.2, .joint = true}, by)(p.query(), p.cache(), p.options, r.view(), memory).ok());
    for (const certificate& c : r.certificates) CHECK(c.delta == 0.2 / 4);
  }
}

TEST_CASE("with an index the default samples by it", "[attention][default]") {
  const problem<float> p({.heads = 4, .kv_heads = 2, .n = 8000, .dk = 32, .dv = 32}, 2u, 2.0f);
  std::vector<kv_index> index;
  index.emplace_back(index_shape{.n_kv_heads = 2, .dk = 32, .dv = 32});
  REQUIRE(index[0].build(p.cache()).ok());
  const config c{.epsilon = 0.1, .delta = 0.1, .sinks = 4, .window = 16};
  results own(p.s), named(p.s);
  workspace memory;
  REQUIRE(vattention<>(c, {index})(p.query(), p.cache(), p.options, own.view(), memory, {.seed = 4}).ok());
  REQUIRE(
      vattention<index_policy>(c, {index})(p.query(), p.cache(), p.options, named.view(), memory, {.seed = 4}).ok());
  CHECK(own.output == named.output);
  for (const certificate& k : own.certificates) CHECK((!k.exact() && k.density() < 0.5 && k.rows_sampled > 0));
  std::vector<std::byte> fixed(vattention<>(c, {index}).workspace_bytes(8000, 32, 32));
  workspace enough(fixed);
  REQUIRE(vattention<>(c, {index})(p.query(), p.cache(), p.options, named.view(), enough, {.seed = 4}).ok());
  CHECK(own.output == named.output);

  // An index of another cache is refused, not left out.
  std::vector<kv_index> other;
  other.emplace_back(index_shape{.n_kv_heads = 1, .dk = 32, .dv = 32});
  CHECK_FALSE(vattention<>(c, {other})(p.query(), p.cache(), p.options, own.view(), memory).ok());
}

TEST_CASE("without an index no more memory is taken than exact rows need", "[attention][default]") {
  CHECK(vattention<>().workspace_bytes(1 << 20, 128, 128) < (std::size_t{4} << 20));
}
