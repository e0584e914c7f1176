// kv_view: that a row is found wherever the strides say, and that strides that cannot be meant are refused.
#include <cstdint>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using vattn::contiguous_kv;
using vattn::dynamic;
using vattn::errc;
using vattn::index_t;
using vattn::kv_shape;
using vattn::kv_strides;
using vattn::kv_view;
using vattn::token_major_kv;
using namespace vattn::test;

// Distinct numbers that all three types hold exactly: bfloat16 has 8 bits, so the place is split over two elements.
template <class T>
std::vector<T> numbered(index_t rows, index_t width) {
  std::vector<T> x;
  for (index_t r = 0; r < rows; ++r) {
    for (index_t j = 0; j < width; ++j) x.push_back(T(static_cast<float>(j == 0 ? r % 128 : j == 1 ? r / 128 : j)));
  }
  return x;
}

// Number of the row at the head of which a span stands.
template <class Row>
index_t row_number(const Row& row) {
  return static_cast<index_t>(static_cast<float>(row[0])) + 128 * static_cast<index_t>(static_cast<float>(row[1]));
}

}  // namespace

TEMPLATE_TEST_CASE("contiguous_kv and token_major_kv find every row of every type", "[kv][view]", float, Eigen::half,
                   Eigen::bfloat16) {
  const kv_shape s{.n_batch = 3, .n_kv_heads = 2, .n_tokens = 37, .dk = 6, .dv = 4};
  const index_t rows = s.n_batch * s.n_kv_heads * s.n_tokens;
  const auto k = numbered<TestType>(rows, s.dk);
  const auto v = numbered<float>(rows, s.dv);  // K and V need not have the same type

  const auto by_head = contiguous_kv(k.data(), v.data(), s);
  const auto by_token = token_major_kv<6, 4>(k.data(), v.data(), s);
  static_assert(decltype(by_token.head(0, 0).key(0))::extent == 6);
  static_assert(decltype(by_token.head(0, 0).value(0))::extent == 4);
  REQUIRE(by_head.validate().ok());
  REQUIRE(by_token.validate().ok());
  REQUIRE(by_token.dk() == 6);
  REQUIRE(by_token.dv() == 4);

  index_t wrong = 0;
  for (index_t b = 0; b < s.n_batch; ++b) {
    for (index_t h = 0; h < s.n_kv_heads; ++h) {
      const auto first = by_head.head(b, h);
      const auto second = by_token.head(b, h);
      REQUIRE(first.size() == s.n_tokens);
      REQUIRE(first.key(0).size() == 6);
      REQUIRE(first.value(0).size() == 4);
      for (index_t t = 0; t < s.n_tokens; ++t) {
        const index_t in_first = (b * s.n_kv_heads + h) * s.n_tokens + t;
        const index_t in_second = (b * s.n_tokens + t) * s.n_kv_heads + h;
        wrong += row_number(first.key(t)) != in_first;
        wrong += row_number(first.value(t)) != in_first;
        wrong += row_number(second.key(t)) != in_second;
        wrong += row_number(second.value(t)) != in_second;
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("K and V interleaved in padded rows, heads innermost", "[kv][view]") {
  // gemma.cpp's rows: [token][head][K | V], padded.
  constexpr index_t heads = 3, dk = 5, dv = 4, tokens = 11, row = heads * (dk + dv) + 7;
  std::vector<float> buffer(static_cast<std::size_t>(tokens * row), not_a_number);
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t h = 0; h < heads; ++h) {
      float* at = buffer.data() + t * row + h * (dk + dv);
      for (index_t j = 0; j < dk; ++j) at[j] = static_cast<float>(1000 * t + 10 * h);
      for (index_t j = 0; j < dv; ++j) at[dk + j] = static_cast<float>(1000 * t + 10 * h + 1);
    }
  }
  const kv_strides strides{.token = row * 4, .head = (dk + dv) * 4, .batch = 0};
  const kv_view<float> view(buffer.data(), strides, buffer.data() + dk, strides,
                            {.n_batch = 1, .n_kv_heads = heads, .n_tokens = tokens, .dk = dk, .dv = dv});
  REQUIRE(view.validate().ok());
  index_t wrong = 0;
  for (index_t h = 0; h < heads; ++h) {
    for (index_t t = 0; t < tokens; ++t) {
      for (const float x : view.head(0, h).key(t)) wrong += x != static_cast<float>(1000 * t + 10 * h);
      for (const float x : view.head(0, h).value(t)) wrong += x != static_cast<float>(1000 * t + 10 * h + 1);
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("negative strides read a cache backwards", "[kv][view]") {
  constexpr index_t n = 9, d = 4;
  const auto k = numbered<float>(2 * n, d);
  const float* last = k.data() + (2 * n - 1) * d;  // last token of the last head
  const kv_strides back{.token = -d * 4, .head = -n * d * 4, .batch = 0};
  const kv_view<float> view(last, back, last, back, {.n_batch = 1, .n_kv_heads = 2, .n_tokens = n, .dk = d, .dv = d});
  REQUIRE(view.validate().ok());
  for (index_t h = 0; h < 2; ++h) {
    for (index_t t = 0; t < n; ++t) CHECK(row_number(view.head(0, h).key(t)) == 2 * n - 1 - (h * n + t));
  }
}

#if defined(__linux__)
TEST_CASE("strides past 4 GiB", "[kv][view]") {
  // 36 GiB of address space, of which eight pages are ever touched.
  constexpr std::size_t bytes = std::size_t{36} << 30;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    WARN("skipped: the system lends no 36 GiB of address space");
    return;
  }
  constexpr index_t d = 8, token = (index_t{5} << 30) + 64, head = (index_t{17} << 30) + 4096;
  const shape s{.heads = 2, .kv_heads = 2, .n = 3, .dk = d, .dv = d};
  problem<float> p(s);
  auto* base = static_cast<std::byte*>(memory);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t t = 0; t < 3; ++t) {
      std::memcpy(base + h * head + t * token, p.k.data() + (h * 3 + t) * d, d * 4);
      std::memcpy(base + h * head + t * token + 32, p.v.data() + (h * 3 + t) * d, d * 4);
    }
  }
  const kv_strides strides{.token = token, .head = head, .batch = 0};
  const kv_view<float> view(reinterpret_cast<const float*>(base), strides, reinterpret_cast<const float*>(base + 32),
                            strides, p.cache_shape());
  results r(s);
  vattn::workspace memory_of_call;
  const vattn::status st = vattn::exact_attention(p.query(), view, p.options, r.view(), memory_of_call);
  CAPTURE(st.message());
  CHECK(st.ok());
  CHECK(compare(p, r).output < 1e-6);
  munmap(memory, bytes);
}
#endif

TEST_CASE("norms of rows are found by batch, head and token", "[kv][view]") {
  const kv_shape s{.n_batch = 2, .n_kv_heads = 3, .n_tokens = 5, .dk = 2, .dv = 4};
  const std::vector<float> rows(static_cast<std::size_t>(2 * 3 * 5 * 4));
  std::vector<float> keys, values, centres;
  for (int i = 0; i < 2 * 3 * 5; ++i) {
    keys.push_back(static_cast<float>(i));
    values.push_back(static_cast<float>(100 + i));
  }
  for (int i = 0; i < 2 * 3 * 4; ++i) centres.push_back(static_cast<float>(i));
  const auto plain = contiguous_kv(rows.data(), rows.data(), s);
  CHECK_FALSE(plain.head(1, 2).has_value_norms());
  CHECK_FALSE(plain.head(1, 2).has_key_norms());
  const auto view = plain.with_norms({.keys = keys.data(), .values = values.data(), .value_centres = centres.data()});
  const auto head = view.head(1, 2);
  REQUIRE(head.has_value_norms());
  REQUIRE(head.has_key_norms());
  CHECK(head.key_norm(4) == 29.0f);
  CHECK(head.value_norm(4) == 129.0f);
  CHECK(head.value_centre()[0] == 20.0f);

  // With room behind the tokens: a head's numbers begin after the room of the heads before it.
  const auto roomy =
      contiguous_kv(rows.data(), rows.data(), {.n_batch = 1, .n_kv_heads = 3, .n_tokens = 5, .dk = 2, .dv = 4})
          .with_norms({.keys = keys.data(), .values = values.data(), .value_centres = centres.data(), .per_head = 9});
  CHECK(roomy.head(0, 2).key_norm(4) == 22.0f);
  CHECK(roomy.head(0, 2).value_norm(0) == 118.0f);
  CHECK(roomy.head(0, 2).value_centre()[0] == 8.0f);
}

TEST_CASE("a view that cannot be meant says why", "[kv][view]") {
  std::vector<float> buffer(4096);
  const float* k = buffer.data();
  const kv_shape good{.n_batch = 2, .n_kv_heads = 2, .n_tokens = 4, .dk = 8, .dv = 8};
  const kv_strides strides{.token = 32, .head = 128, .batch = 256};
  const auto why = [&](const kv_view<float>& view) {
    const vattn::status s = view.validate();
    CHECK(s.code() == errc::invalid_argument);
    return std::string(s.message());
  };
  REQUIRE(kv_view<float>(k, strides, k, strides, good).validate().ok());

  SECTION("strides in elements") {
    CHECK(contains(why({k, {.token = 8, .head = 128, .batch = 256}, k, strides, good}),
                   "the token stride of K is 8 bytes, less than one row of 32 bytes: strides are in bytes"));
    CHECK(contains(why({k, strides, k, {.token = 32, .head = 16, .batch = 256}, good}), "the head stride of V is 16"));
    CHECK(contains(why({k, strides, k, {.token = 32, .head = 128, .batch = 8}, good}), "the batch stride of V is 8"));
    CHECK(contains(why({k, {.token = -8, .head = 128, .batch = 256}, k, strides, good}), "stride of K is -8"));
  }
  SECTION("strides that split an element") {
    CHECK(contains(why({k, {.token = 33, .head = 128, .batch = 256}, k, strides, good}), "no multiple of the element"));
  }
  SECTION("strides of 0 repeat: heads that were expanded, a prefix that is shared") {
    CHECK(kv_view<float>(k, {.token = 32, .head = 0, .batch = 256}, k, strides, good).validate().ok());
    CHECK(kv_view<float>(k, strides, k, {.token = 32, .head = 128, .batch = 0}, good).validate().ok());
  }
  SECTION("strides that leave every memory") {
    CHECK(contains(why({k, {.token = std::numeric_limits<index_t>::min(), .head = 128}, k, strides, good}),
                   "K reaches over more than 2^60 bytes"));
    CHECK(contains(why({k, strides, k, {.token = 32, .head = 128, .batch = index_t{1} << 61}, good}),
                   "V reaches over more than 2^60 bytes"));
  }
  SECTION("an axis of length 1 needs no stride") {
    const kv_shape one{.n_batch = 1, .n_kv_heads = 1, .n_tokens = 4, .dk = 8, .dv = 8};
    CHECK(kv_view<float>(k, {.token = 32}, k, {.token = 32}, one).validate().ok());
  }
  SECTION("null buffers") {
    CHECK(contains(why({nullptr, strides, k, strides, good}), "K is null"));
    CHECK(contains(why({k, strides, nullptr, strides, good}), "V is null"));
    kv_shape none = good;
    none.n_tokens = 0;
    CHECK(kv_view<float>(nullptr, strides, nullptr, strides, none).validate().ok());
  }
  SECTION("misaligned buffer") {
    const auto* odd = reinterpret_cast<const float*>(reinterpret_cast<const std::byte*>(k) + 2);
    CHECK(contains(why({odd, strides, k, strides, good}), "K is not aligned"));
  }
  SECTION("shapes") {
    for (kv_shape bad : {kv_shape{.n_batch = -1, .n_kv_heads = 2, .n_tokens = 4, .dk = 8, .dv = 8},
                         kv_shape{.n_batch = 1, .n_kv_heads = 0, .n_tokens = 4, .dk = 8, .dv = 8},
                         kv_shape{.n_batch = 1, .n_kv_heads = 2, .n_tokens = -4, .dk = 8, .dv = 8},
                         kv_shape{.n_batch = 1, .n_kv_heads = 2, .n_tokens = 4, .dk = 0, .dv = 8},
                         kv_shape{.n_batch = 1, .n_kv_heads = 2, .n_tokens = 4, .dk = 8, .dv = -8}}) {
      CHECK(contains(why({k, strides, k, strides, bad}), "KV shape is"));
    }
  }
  SECTION("compiled head sizes") {
    const kv_view<float, float, 16, 8> view(k, strides, k, strides, good);
    CHECK(contains(view.validate().message(), "compiled for dk 16, dv 8 but the cache has dk 8, dv 8"));
  }
}
