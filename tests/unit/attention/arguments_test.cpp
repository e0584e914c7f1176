// Arguments that cannot be meant: one line that says which, and what to give instead.
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

using namespace vattn::test;
using vattn::errc;
using vattn::index_t;
using vattn::tensor_view;

namespace {

struct call {
  problem<float> p{{.batch = 2, .queries = 3, .heads = 4, .kv_heads = 2, .n = 50, .dk = 8, .dv = 6}};
  results r{p.s};
  tensor_view<const float, 4> q = p.query();
  vattn::kv_view<float> cache = p.cache();
  vattn::attention_options options = p.options;
  vattn::attention_result result = r.view();
  vattn::config settings;

  // Both entries must say the same.
  std::string why(errc code = errc::invalid_argument) {
    vattn::workspace memory;
    const vattn::status dense = vattn::exact_attention(q, cache, options, result, memory);
    const vattn::status sparse = vattn::vattention<vattn::ranked_policy>(settings)(q, cache, options, result, memory);
    CHECK(dense.code() == code);
    CHECK(sparse.code() == code);
    CHECK(std::string(dense.message()) == sparse.message());
    CHECK_FALSE(contains(sparse.message(), "\n"));
    return sparse.message();
  }
};

}  // namespace

TEST_CASE("a good call is ok, with and without the optional results", "[arguments]") {
  call c;
  CHECK(c.why(errc::ok).empty());
  c.result.log_sum_exp = {};
  c.result.certificates = {};
  CHECK(c.why(errc::ok).empty());
}

TEST_CASE("scale not set, or not a number", "[arguments]") {
  call c;
  c.options = {};
  CHECK(contains(c.why(), "options.scale is not set: 1/sqrt(dk) = 0.353553"));
  c.options.scale = infinity;
  CHECK(contains(c.why(), "options.scale is not finite"));
}

TEST_CASE("soft cap and sliding window", "[arguments]") {
  call c;
  for (const float bad : {-1.0f, not_a_number, infinity}) {
    c.options.softcap = bad;
    CHECK(contains(c.why(), "options.softcap is "));
  }
  c.options.softcap = 0;
  c.options.sliding_window = -5;
  CHECK(contains(c.why(), "options.sliding_window is -5"));
}

TEST_CASE("K and V swapped", "[arguments]") {
  call c;
  c.cache = vattn::contiguous_kv(c.p.v.data(), c.p.k.data(), {2, 2, 50, 6, 8});
  CHECK(contains(c.why(), "q has head size 8, the keys 6: are K and V swapped?"));
}

TEST_CASE("the output has the width of the keys", "[arguments]") {
  call c;
  c.result.output.extents[3] = 8;
  CHECK(contains(c.why(), "output is [2, 3, 4, 8], not [2, 3, 4, 6]: are K and V swapped?"));
}

TEST_CASE("heads that are no multiple of the KV heads", "[arguments]") {
  call c;
  c.q.extents[2] = 3;
  CHECK(contains(c.why(), "q has 3 heads, the cache 2: the number of query heads must be a multiple"));
}

TEST_CASE("batches that differ", "[arguments]") {
  call c;
  c.q.extents[0] = 1;
  CHECK(contains(c.why(), "q has n_batch 1, the cache 2"));
}

TEST_CASE("strides in elements, of the cache and of q", "[arguments]") {
  call c;
  const vattn::kv_strides bytes{.token = 32, .head = 1600, .batch = 3200};
  c.cache = {c.p.k.data(), {.token = 8, .head = 400, .batch = 800}, c.p.v.data(), bytes, c.p.cache_shape()};
  CHECK(contains(c.why(), "the token stride of K is 8 bytes, less than one row of 32 bytes"));
  c.cache = c.p.cache();
  c.q.strides[3] = 1;
  CHECK(contains(c.why(), "the last byte stride of q is 1, not 4"));
}

TEST_CASE("a mask of less than the call's extents", "[arguments]") {
  call c;
  std::vector<float> mask(2 * 4 * 3 * 50);
  for (const std::array<index_t, 4>& extents :
       {std::array<index_t, 4>{1, 4, 3, 50}, {2, 1, 3, 50}, {2, 4, 1, 50}, {2, 4, 3, 49}}) {
    c.options.mask = vattn::mask_view(tensor_view<const float, 4>(mask.data(), extents));
    CHECK(
        contains(c.why(), "less than [2, 4, 3, 50]: give the full extents, with byte stride 0 where an axis repeats"));
  }
  c.options.mask = vattn::mask_view(tensor_view<const float, 4>(mask.data(), {2, 4, 3, 50}, {0, 0, 0, 4}));
  CHECK(c.why(errc::ok).empty());
}

TEST_CASE("null q, null output, wrong shapes of the optional results", "[arguments]") {
  call c;
  c.q.data = nullptr;
  CHECK(contains(c.why(), "q is null"));
  c.q = c.p.query();
  c.result.output.data = nullptr;
  CHECK(contains(c.why(), "output is null"));
  c.result = c.r.view();
  c.result.log_sum_exp.extents[1] = 4;
  CHECK(contains(c.why(), "must be [2, 3, 4], or empty"));
  c.result = c.r.view();
  c.result.certificates.extents[2] = 3;
  CHECK(contains(c.why(), "must be [2, 3, 4], or empty"));
}

TEST_CASE("a cache that does not validate", "[arguments]") {
  call c;
  c.cache = vattn::contiguous_kv<>(c.p.k.data(), static_cast<const float*>(nullptr), c.p.cache_shape());
  CHECK(contains(c.why(), "V is null but the cache has 50 tokens"));
}

TEST_CASE("sequences of 2^31 tokens are refused before a row is read", "[arguments]") {
  call c;
  c.cache = vattn::contiguous_kv(c.p.k.data(), c.p.v.data(), {2, 2, index_t{1} << 31, 8, 6});
  CHECK(contains(c.why(), "2147483648 tokens: sequences end at 2^31"));
}

TEST_CASE("settings are checked before the arguments", "[arguments]") {
  call c;
  c.options = {};
  const auto why = [&](auto&& change) {
    vattn::config settings;
    change(settings);
    vattn::workspace memory;
    const vattn::status s =
        vattn::vattention<vattn::ranked_policy>(settings)(c.q, c.cache, c.options, c.result, memory);
    CHECK(s.code() == errc::invalid_argument);
    return std::string(s.message());
  };
  for (const double bad : {0.0, 1.0, std::numeric_limits<double>::quiet_NaN()}) {
    CHECK(contains(why([&](vattn::config& s) { s.epsilon = bad; }), "epsilon is "));
    CHECK(contains(why([&](vattn::config& s) { s.delta = bad; }), "delta is "));
  }
  for (const index_t bad : {index_t{0}, index_t{1001}, std::numeric_limits<index_t>::max()})
    CHECK(contains(why([&](vattn::config& s) { s.max_rounds = bad; }), "give 1 to 1000 looks"));
}

namespace {

// The address one byte on: of no element.
template <class T>
T* off_by_one(T* p) {
  return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(p) + 1);
}

}  // namespace

TEST_CASE("a misaligned pointer is named, whichever argument it is", "[arguments]") {
  call c;
  const auto check = [&](const char* name) { CHECK(contains(c.why(), std::string(name) + " is not aligned to its ")); };
  SECTION("q, in float and in half") {
    c.q.data = off_by_one(c.q.data);
    check("q");
    std::vector<Eigen::half> q(c.p.q.size() + 1);
    vattn::workspace memory;
    const tensor_view<const Eigen::half, 4> half(off_by_one(q.data()), c.q.extents);
    CHECK(contains(vattn::exact_attention(half, c.cache, c.options, c.result, memory).message(),
                   "q is not aligned to its element size 2"));
  }
  SECTION("K and V") {
    c.cache = vattn::contiguous_kv(off_by_one(c.p.k.data()), c.p.v.data(), c.p.cache_shape());
    check("K");
    c.cache = vattn::contiguous_kv(c.p.k.data(), off_by_one(c.p.v.data()), c.p.cache_shape());
    check("V");
  }
  SECTION("norms") {
    const std::vector<float> norms(300);
    const float* off = off_by_one(norms.data());
    c.cache = c.p.cache().with_norms({.keys = off});
    check("norms.keys");
    c.cache = c.p.cache().with_norms({.values = off});
    check("norms.values");
    c.cache = c.p.cache().with_norms({.value_centres = off});
    check("norms.value_centres");
    c.cache = c.p.cache().with_norms({.values = norms.data(), .per_head = 49});
    CHECK(contains(c.why(), "norms have room for 49 cells a head, but there are 50"));
  }
  SECTION("results") {
    c.result.output.data = off_by_one(c.result.output.data);
    check("output");
    c.result = c.r.view();
    c.result.log_sum_exp.data = off_by_one(c.result.log_sum_exp.data);
    check("log_sum_exp");
    c.result = c.r.view();
    c.result.certificates.data = off_by_one(c.result.certificates.data);
    check("certificates");
  }
  SECTION("decisions") {
    std::vector<std::int32_t> tokens(2 * 3 * 4 * 50), counts(2 * 3 * 4);
    std::vector<float> weights(tokens.size());
    const vattn::decision_result good{
        {tokens.data(), {2, 3, 4, 50}}, {weights.data(), {2, 3, 4, 50}}, {counts.data(), {2, 3, 4}}};
    c.result.decisions = good;
    CHECK(c.why(errc::ok).empty());
    c.result.decisions.tokens.data = off_by_one(tokens.data());
    check("decisions.tokens");
    c.result.decisions = good;
    c.result.decisions.weights.data = off_by_one(weights.data());
    check("decisions.weights");
    c.result.decisions = good;
    c.result.decisions.counts.data = off_by_one(counts.data());
    check("decisions.counts");
    c.result.decisions = good;
    c.result.decisions.counts.strides[2] = 0;
    CHECK(contains(c.why(), "elements of decisions.counts overlap"));
  }
  SECTION("what the options point to") {
    const std::vector<float> floats(2 * 4 * 3 * 50 + 1);
    const std::vector<Eigen::half> halves(2 * 4 * 3 * 50 + 1);
    c.options.mask = vattn::mask_view(tensor_view<const float, 4>(off_by_one(floats.data()), {2, 4, 3, 50}));
    check("the mask");
    c.options.mask = vattn::mask_view(tensor_view<const Eigen::half, 4>(off_by_one(halves.data()), {2, 4, 3, 50}));
    check("the mask");
    c.options.mask = {};
    c.options.sink_logits = off_by_one(floats.data());
    check("options.sink_logits");
    c.options.sink_logits = nullptr;
    c.options.alibi_slopes = off_by_one(floats.data());
    check("options.alibi_slopes");
    c.options.alibi_slopes = nullptr;
    const std::vector<std::int32_t> cells(101), queries(7);
    c.options.positions.cells = {off_by_one(cells.data()), {2, 50}};
    check("positions.cells");
    c.options.positions = {{cells.data(), {2, 50}}, {off_by_one(queries.data()), {2, 3}}};
    check("positions.queries");
    c.options.positions = {{}, {queries.data(), {2, 3}}};
    CHECK(contains(c.why(), "positions.queries without positions.cells"));
    c.options.positions = {{cells.data(), {2, 50}}, {queries.data(), {2, 2}}};
    CHECK(contains(c.why(), "positions.queries is [2, 2], less than [2, 3]"));
  }
}

TEST_CASE("strides that are no multiple of an element, and reaches that no memory has", "[arguments]") {
  call c;
  c.q.strides[1] = 129;
  CHECK(contains(c.why(), "the byte stride of axis 1 of q is 129"));
  c.q = c.p.query();
  c.result.output.strides[0] += 2;
  CHECK(contains(c.why(), "the byte stride of axis 0 of output is "));
  c.result = c.r.view();
  c.result.output.strides[0] = std::numeric_limits<index_t>::max() / 4 * 4;
  CHECK(contains(c.why(), "output reaches over more than 2^60 bytes"));
  c.result = c.r.view();
  c.q.strides[0] = std::numeric_limits<index_t>::min();
  CHECK(contains(c.why(), "q reaches over more than 2^60 bytes"));
  c.q = c.p.query();
  c.cache = {c.p.k.data(),
             {.token = index_t{1} << 62, .head = 32, .batch = 32},
             c.p.v.data(),
             {.token = 24, .head = 1200, .batch = 2400},
             c.p.cache_shape()};
  CHECK(contains(c.why(), "K reaches over more than 2^60 bytes"));
  c.cache = vattn::contiguous_kv(c.p.k.data(), c.p.v.data(), {2, 2, std::numeric_limits<index_t>::max() / 2, 8, 6});
  c.why();
  c.cache = vattn::token_major_kv(c.p.k.data(), c.p.v.data(), {2, index_t{1} << 40, index_t{1} << 30, 8, 6});
  c.why();
  const std::vector<float> norms(1000);
  for (const index_t room : {index_t{1} << 60, std::numeric_limits<index_t>::max()}) {
    c.cache = c.p.cache().with_norms({.values = norms.data(), .per_head = room});
    CHECK(contains(c.why(), "norms of 4 heads with room for "));
  }
  c.cache = c.p.cache();
  const std::vector<float> mask(1);
  c.options.mask = vattn::mask_view(tensor_view<const float, 4>(mask.data(), {2, 4, 3, 50}, {0, 0, 0, 6}));
  CHECK(contains(c.why(), "the byte stride of axis 3 of the mask is 6"));
  c.options.mask = {};
  // Extents whose product passes 2^63.
  for (const index_t many : {index_t{1} << 31, std::numeric_limits<index_t>::max()}) {
    c.q.extents[1] = c.result.output.extents[1] = many;
    CHECK(contains(c.why(), "queries: give 0 to 2^31 - 1"));
  }
}

TEST_CASE("strides of 0 repeat what is read", "[arguments]") {
  // One sequence, one KV head, one query, for all: as if it had been copied out.
  const problem<float> one({.n = 700, .dk = 8, .dv = 6});
  problem<float> p({.batch = 2, .queries = 3, .heads = 4, .kv_heads = 2, .n = 700, .dk = 8, .dv = 6});
  for (std::size_t i = 0; i < p.k.size(); ++i) p.k[i] = one.k[i % one.k.size()];
  for (std::size_t i = 0; i < p.v.size(); ++i) p.v[i] = one.v[i % one.v.size()];
  for (std::size_t i = 0; i < p.q.size(); ++i) p.q[i] = one.q[i % one.q.size()];
  const vattn::kv_view<float> expanded(one.k.data(), {.token = 32}, one.v.data(), {.token = 24}, p.cache_shape());
  const tensor_view<const float, 4> query(one.q.data(), {2, 3, 4, 8}, {0, 0, 0, 4});
  std::vector<std::int32_t> cells(700);
  for (std::size_t i = 0; i < 700; ++i) cells[i] = static_cast<std::int32_t>(i);
  const std::int32_t last = 699;
  std::vector<float> mask(700, 0.25f);
  p.options.mask = vattn::mask_view(tensor_view<const float, 4>(mask.data(), {2, 4, 3, 700}, {0, 0, 0, 4}));
  for (const bool positions : {false, true}) {
    if (positions) {
      p.options.positions = {{cells.data(), {2, 700}, {0, 4}}, {&last, {2, 3}, {0, 0}}};
      p.options.causal = true;
    }
    for (const bool sparse : {false, true}) {
      results a(p.s), b(p.s);
      vattn::workspace memory;
      const auto run = [&](const auto& q, const auto& cache, results& r) {
        const vattn::status s = sparse ? vattn::vattention<vattn::ranked_policy>(vattn::config{.epsilon = 0.2})(
                                             q, cache, p.options, r.view(), memory)
                                       : vattn::exact_attention(q, cache, p.options, r.view(), memory);
        INFO(s.message());
        REQUIRE(s.ok());
      };
      run(query, expanded, a);
      run(p.query(), p.cache(), b);
      CHECK(a.output == b.output);
      CHECK(a.log_sum_exp == b.log_sum_exp);
    }
  }
  // All tokens one row: its value is the output.
  const vattn::kv_view<float> same(one.k.data(), {}, one.v.data(), {}, p.cache_shape());
  p.options = {.scale = 1};
  for (const bool sparse : {false, true}) {
    results r(p.s);
    vattn::workspace memory;
    REQUIRE((sparse ? vattn::vattention<vattn::ranked_policy>()(query, same, p.options, r.view(), memory)
                    : vattn::exact_attention(query, same, p.options, r.view(), memory))
                .ok());
    for (std::size_t row = 0; row < 24; ++row)
      for (std::size_t j = 0; j < 6; ++j)
        CHECK_THAT(static_cast<double>(r.row(row)[j]), WithinRel(static_cast<double>(one.v[j]), 512 * 0x1p-24));
  }
}

TEST_CASE("results that share memory are refused", "[arguments]") {
  call c;
  for (std::size_t axis = 0; axis < 4; ++axis) {
    c.result = c.r.view();
    c.result.output.strides[axis] = 0;
    CHECK(contains(c.why(), "elements of output overlap: the byte stride of axis " + std::to_string(axis) + " is 0"));
  }
  c.result = c.r.view();
  c.result.output.strides[2] -= 4;  // the last element of a head is the next one's first
  CHECK(contains(c.why(), "elements of output overlap"));
  c.result = c.r.view();
  c.result.log_sum_exp.strides[1] = 0;
  CHECK(contains(c.why(), "elements of log_sum_exp overlap"));
  c.result = c.r.view();
  c.result.certificates.strides[0] = 0;
  CHECK(contains(c.why(), "elements of certificates overlap"));
  // Permuted, padded and reversed ones do not.
  c.result = c.r.view();
  std::vector<float> memory(1000);
  c.result.output = {memory.data(), {2, 3, 4, 6}, {4, 8, 24, 96}};
  CHECK(c.why(errc::ok).empty());
  c.result.output = {memory.data() + 500, {2, 3, 4, 6}, {-600, 128, 32, 4}};
  CHECK(c.why(errc::ok).empty());
}
