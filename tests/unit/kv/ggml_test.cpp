// ggml's K and V as llama.cpp keeps them: built from known rows in every type, read back, and attended.
#include "vattn/kv/ggml.hpp"

#include <cstring>

#include "support/layouts.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;
using kernel::q4_0_block;
using kernel::q8_0_block;

template <class TK, class TV>
void check_types(index_t pad) {
  ragged<float> r({.heads = 4, .kv_heads = 2, .dk = 64, .dv = 32}, {640, 640});
  const tensor<TK> k(r, true, pad);
  const tensor<TV> v(r, false, pad);
  const auto view = ggml_kv<TK, TV>(k.layout, v.layout);
  check_rows(r, view);
  check_attention(r, view, 1e-4);
}

}  // namespace

TEST_CASE("ggml K and V of every type, rows padded or not", "[kv][ggml]") {
  check_types<float, float>(0);
  check_types<Eigen::half, Eigen::half>(64);
  check_types<Eigen::bfloat16, Eigen::bfloat16>(2);
  check_types<q8_0_block, q8_0_block>(0);
  check_types<q4_0_block, q4_0_block>(34);
  check_types<q8_0_block, Eigen::half>(2);  // as caches with K quantised alone
}

TEST_CASE("ggml V transposed", "[kv][ggml]") {
  ragged<float> r({.heads = 3, .kv_heads = 1, .dk = 32, .dv = 20}, {700});
  const tensor<Eigen::half> k(r, true);
  // [n_kv, dv, heads, streams] in a cache of 1024 cells.
  std::vector<float> v(1024 * 20, not_a_number);
  r.for_each_row([&](index_t b, index_t h, index_t t) {
    for (index_t j = 0; j < 20; ++j) v[static_cast<std::size_t>(j * 1024 + t)] = r.value(b, h, t)[j];
  });
  const ggml_layout layout(v.data(), {700, 20, 1, 1}, {4, 1024 * 4, 20 * 1024 * 4, 20 * 1024 * 4});
  const auto view = ggml_transposed_kv<Eigen::half, float>(k.layout, layout);
  check_rows(r, view);
  check_attention(r, view, 1e-4);
  CHECK(contains(ggml_kv<Eigen::half, float>(k.layout, layout).validate().message(),
                 "but V 20, 1, 1: give both permuted"));
  CHECK(contains(ggml_transposed_kv<Eigen::half, Eigen::half>(k.layout, layout).validate().message(),
                 "nb[0] of V is 4, not 2"));
}

TEST_CASE("MLA in ggml, where V is a view of K", "[kv][ggml]") {
  ragged<float> r({.heads = 4, .kv_heads = 1, .dk = 576, .dv = 512}, {650});
  for (index_t t = 0; t < 650; ++t) std::copy_n(r.key(0, 0, t), 512, r.p.v.data() + t * 512);
  const tensor<Eigen::half> k(r, true);
  for (index_t t = 0; t < 650; ++t)  // as stored
    std::copy_n(r.key(0, 0, t), 512, r.p.v.data() + t * 512);
  ggml_layout v = k.layout;
  v.ne[0] = 512;
  check_rows(r, ggml_kv<Eigen::half>(k.layout, v));
  check_rows(r, ggml_kv<Eigen::half, Eigen::half, 576, 512>(k.layout, v));
  check_attention(r, ggml_kv<Eigen::half, Eigen::half, 576, 512>(k.layout, v), 1e-4);
}

TEST_CASE("a ggml graph's tensors: q permuted, mask of half padded, heads broadcast", "[kv][ggml]") {
  const shape s{.batch = 2, .queries = 3, .heads = 4, .kv_heads = 2, .n = 650, .dk = 16, .dv = 8};
  ragged<float> r(s, {650, 650});
  const tensor<float> k(r, true), v(r, false);
  std::mt19937 random(2);
  // [n_kv, 32 (3 used), 1, streams]
  std::vector<Eigen::half> mask(650 * 32 * 2, Eigen::half(-infinity));
  std::vector<float> plain;
  for (index_t b = 0; b < 2; ++b)
    for (index_t h = 0; h < 4; ++h)
      for (index_t t = 0; t < 3; ++t)
        for (index_t i = 0; i < 650; ++i) {
          auto& m = mask[static_cast<std::size_t>((b * 32 + t) * 650 + i)];
          if (h == 0) m = random() % 4 == 0 ? Eigen::half(-infinity) : Eigen::half(random() % 2 ? 0.0f : -0.5f);
          plain.push_back(static_cast<float>(m));
        }
  // q [dk, n_queries, heads, streams] over memory [streams, n_queries, heads, dk].
  const index_t e = 4;
  const ggml_layout q(r.p.q.data(), {16, 3, 4, 2}, {e, 16 * 4 * e, 16 * e, 16 * 4 * 3 * e});
  r.p.set_mask(plain);
  attention_options options = r.p.options;
  options.mask = ggml_mask<Eigen::half>({mask.data(), {650, 32, 1, 2}, {2, 1300, 1300 * 32, 1300 * 32}}, 4, 2);
  CHECK(options.mask.same_for_heads());

  results a(s), b(s);
  workspace memory;
  attention_result out = a.view();
  out.output = ggml_output(a.output.data(), {nullptr, {8, 4, 3, 2}, {e, 8 * e, 8 * 4 * e, 8 * 4 * 3 * e}});
  const vattention<ranked_policy> attend(small_config());
  const auto view = ggml_kv<float>(k.layout, v.layout);
  const status ours = attend(ggml_query<float>(q), view, options, out, memory);
  INFO(ours.message());
  REQUIRE(ours.ok());
  REQUIRE(attend(r.p.query(), r.contiguous(), r.p.options, b.view(), memory).ok());
  CHECK(difference(a, b) == 0);
  CHECK_FALSE(a.certificates[0].exact());
  // One mask for all streams, and one for each head.
  const auto shared = ggml_mask<Eigen::half>({mask.data(), {650, 32, 1, 1}, {2, 1300, 1300 * 32, 1300 * 32}}, 4, 2);
  CHECK(shared.extents() == std::array<index_t, 4>{2, 4, 32, 650});
  CHECK(shared.at(1, 3, 2)(5) == static_cast<float>(mask[2 * 650 + 5]));
  const auto heads = ggml_mask<Eigen::half>({mask.data(), {650, 16, 4, 1}, {2, 1300, 1300 * 16, 1300 * 64}}, 4, 2);
  CHECK(heads.at(1, 3, 2)(5) == static_cast<float>(mask[static_cast<std::size_t>((3 * 16 + 2) * 650 + 5)]));
}

TEST_CASE("norms of a view of some cells of a ggml cache", "[kv][ggml]") {
  ragged<float> r({.heads = 2, .kv_heads = 2, .dk = 32, .dv = 32}, {40, 40});
  const tensor<float> k(r, true), v(r, false);
  std::vector<float> norms(2 * 2 * 64, not_a_number);  // [streams, heads, 64 cells], 40 of them in the view
  r.for_each_row([&](index_t b, index_t h, index_t t) {
    norms[static_cast<std::size_t>((b * 2 + h) * 64 + t)] = static_cast<float>(10000 * b + 100 * h + t);
  });
  const auto view = ggml_kv<float>(k.layout, v.layout).with_norms({.keys = norms.data(), .values = norms.data()}, 64);
  check_rows(r, view);
  index_t wrong = 0;
  r.for_each_row([&](index_t b, index_t h, index_t t) {
    wrong += view.head(b, h).value_norm(t) != static_cast<float>(10000 * b + 100 * h + t);
    wrong += view.head(b, h).key_norm(t) != static_cast<float>(10000 * b + 100 * h + t);
  });
  CHECK(wrong == 0);
  CHECK(contains(view.with_norms({.keys = norms.data()}, 39).validate().message(), "room for 39 cells a head"));
}

TEST_CASE("ggml tensors that cannot be meant say why", "[kv][ggml]") {
  ragged<float> r({.heads = 2, .kv_heads = 2, .dk = 32, .dv = 32}, {40});
  const tensor<float> k(r, true), v(r, false);
  REQUIRE(ggml_kv<float>(k.layout, v.layout).validate().ok());
  const auto why = [](const auto& view) { return std::string(view.validate().message()); };
  CHECK(contains(why(ggml_kv<Eigen::half>(k.layout, v.layout)), "nb[0] of K is 4, not 2"));
  CHECK(contains(why(ggml_kv<float, q8_0_block>(k.layout, v.layout)), "nb[0] of V is 4, not 34"));
  ggml_layout other = v.layout;
  std::swap(other.ne[1], other.ne[2]);
  std::swap(other.nb[1], other.nb[2]);
  CHECK(contains(why(ggml_kv<float>(k.layout, other)), "K has 40 cells, 2 heads, 1 streams but V 2, 40, 1"));
  other = k.layout;
  other.nb[1] = 32;
  CHECK(contains(why(ggml_kv<float>(other, v.layout)), "the cell stride of K is 32 bytes"));
  ggml_layout odd = k.layout;
  odd.ne[0] = 40, odd.nb = {34, 34, 1360, 2720};
  ggml_layout odd_v = odd;
  CHECK(contains(why(ggml_kv<q8_0_block>(odd, odd_v)), "rows of 40 elements, no multiple of 32"));
  odd.data = reinterpret_cast<const std::byte*>(odd.data) + 1;
  odd.ne[0] = 32;
  CHECK(contains(why(ggml_kv<q8_0_block>(odd, odd)), "K is not aligned"));
  // V transposed with rows of an odd number of bytes, and sizes that wrap round.
  odd_v = v.layout;
  odd_v.ne = {40, 32, 2, 1}, odd_v.nb = {4, 161, 8192, 16384};
  CHECK(contains(why(ggml_transposed_kv<float>(k.layout, odd_v)), "the byte stride of axis 3 of V is 161"));
  other = k.layout;
  other.nb[2] = std::numeric_limits<index_t>::min();
  CHECK(contains(why(ggml_kv<float>(other, v.layout)), "K reaches over more than 2^60 bytes"));
  other = k.layout;
  other.nb[2] = 0;  // one head for all
  CHECK(ggml_kv<float>(other, v.layout).validate().ok());
  // What ggml passes: arrays of int64 and size_t.
  const std::int64_t ne[4] = {32, 40, 2, 1};
  const std::size_t nb[4] = {4, 256, 128, 10240};
  CHECK(ggml_layout(k.layout.data, ne, nb).ne == k.layout.ne);
  CHECK(ggml_layout(k.layout.data, ne, nb).nb == k.layout.nb);
}
