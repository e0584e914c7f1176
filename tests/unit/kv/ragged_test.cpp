// Sequences of different lengths in one call: each as if it were alone.
#include "vattn/kv/ragged.hpp"

#include "support/layout.hpp"

namespace {
using namespace vattn;
using namespace vattn::test;
}  // namespace

TEST_CASE("a ragged batch is exact attention of each sequence alone, causal offsets and all", "[kv][ragged]") {
  const shape s{.queries = 3, .heads = 4, .kv_heads = 2, .dk = 8, .dv = 6};
  ragged<float> r(s, {0, 1, 2, 3, 40, 77});
  r.p.options.causal = true;
  r.p.options.sliding_window = 30;
  r.p.set_alibi({0.01f, 0, 0.1f, 0.02f});
  results got(r.p.s);
  workspace memory;
  const status st = exact_attention(r.p.query(), r.contiguous(), r.p.options, got.view(), memory);
  INFO(st.message());
  REQUIRE(st.ok());
  for (index_t b = 0; b < r.p.s.batch; ++b) {
    problem<float> alone(
        {.queries = 3, .heads = 4, .kv_heads = 2, .n = r.lengths[static_cast<std::size_t>(b)], .dk = 8, .dv = 6});
    alone.q.assign(r.p.q.begin() + b * 3 * 4 * 8, r.p.q.begin() + (b + 1) * 3 * 4 * 8);
    for (index_t h = 0; h < 2; ++h)
      for (index_t t = 0; t < alone.s.n; ++t) {
        std::copy_n(r.key(b, h, t), 8, alone.k.data() + (h * alone.s.n + t) * 8);
        std::copy_n(r.value(b, h, t), 6, alone.v.data() + (h * alone.s.n + t) * 6);
      }
    alone.options.causal = true, alone.options.sliding_window = 30;
    alone.set_alibi(r.p.alibi);
    results part(alone.s);
    std::copy_n(got.row(got.at(b, 0, 0)), part.output.size(), part.output.begin());
    std::copy_n(got.log_sum_exp.begin() + static_cast<std::ptrdiff_t>(got.at(b, 0, 0)), part.log_sum_exp.size(),
                part.log_sum_exp.begin());
    const disagreement d = compare(alone, part);
    CAPTURE(b);
    CHECK(d.output < 1e-6);
    CHECK(d.denominator < 1e-5);
  }
}

TEST_CASE("padded caches refuse lengths past their room", "[kv][ragged]") {
  const std::vector<float> rows(2 * 10 * 4);
  std::int32_t lengths[] = {10, 11};
  const kv_shape s{.n_batch = 2, .n_kv_heads = 1, .n_tokens = 10, .dk = 4, .dv = 4};
  CHECK(contains(padded_kv(rows.data(), rows.data(), s, lengths).validate().message(), "sequence 1 has length 11"));
  lengths[1] = -1;
  CHECK(contains(padded_kv(rows.data(), rows.data(), s, lengths).validate().message(), "sequence 1 has length -1"));
  lengths[1] = 0;
  CHECK(padded_kv(rows.data(), rows.data(), s, lengths).validate().ok());
  const auto* off = reinterpret_cast<const std::int32_t*>(reinterpret_cast<std::uintptr_t>(lengths) + 1);
  CHECK(contains(padded_kv(rows.data(), rows.data(), s, off).validate().message(), "lengths is not aligned"));
}
