// Arguments that cannot be meant: one line that says which, and what to give instead.
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
    const vattn::status sparse = vattn::vattention<>(settings)(q, cache, options, result, memory);
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
    const vattn::status s = vattn::vattention<>(settings)(c.q, c.cache, c.options, c.result, memory);
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
