// An index beside a cache: what it holds is what its rows say, however they came; saved, loaded, and its errors.
#include "vattn/index/kv_index.hpp"

#include "support/catch.hpp"
#include "support/index_changes.hpp"
#include "support/problem.hpp"

namespace {

using namespace vattn;
using test::problem;
using test::same;
using test::shape;

}  // namespace

TEST_CASE("after any appends, overwrites, erasures and truncations an index equals one that saw the rows once",
          "[index]") {
  test::check_index_changes(30000);
}

TEST_CASE("an index of 2 bits takes less than 7.4 % of a cache of 16 bits at head size 128", "[index]") {
  problem<Eigen::half> p(shape{.heads = 1, .kv_heads = 1, .n = 8192, .dk = 128, .dv = 128});
  kv_index index({.dk = 128, .dv = 128});
  REQUIRE(index.build(p.cache()).ok());
  CHECK(index.bits() <= 2);
  CHECK(index.size() == 8192);
  CHECK(static_cast<double>(index.bytes()) < 0.074 * 8192 * 512);
  CHECK(index.codes(0).codes() == 8192);
}

TEST_CASE("an index that grows from nothing is built anew until its sample is large", "[index]") {
  problem<float> p(shape{.heads = 1, .kv_heads = 1, .n = 300, .dk = 32, .dv = 32});
  kv_index index({.dk = 32, .dv = 32, .bits = 2});
  kv_shape s = p.cache_shape();
  for (s.n_tokens = 1; s.n_tokens <= 300; ++s.n_tokens) {
    const kv_strides by{.token = 128};
    REQUIRE(index.append_from(kv_view<float>(p.k.data(), by, p.v.data(), by, s)).ok());
  }
  CHECK(index.size() == 300);
  CHECK(index.built_from() == 256);
  CHECK(index.codes(0).codes() > 290);
}

TEST_CASE("a code from rows that the caller has is that of the cache", "[index]") {
  problem<float> p(shape{.heads = 2, .kv_heads = 2, .n = 128, .dk = 16, .dv = 16});
  kv_index a({.n_kv_heads = 2, .dk = 16, .dv = 16, .bits = 3}), b;
  REQUIRE(a.build(p.cache()).ok());
  REQUIRE(load(save(a), b).ok());
  b.erase(0, 128);
  CHECK_FALSE(same(a, b));
  for (index_t c = 127; c >= 0; --c) {
    REQUIRE(b.set(
                 c, [&](index_t h) { return p.cache().head(0, h).key(c); },
                 [&](index_t h) { return p.cache().head(0, h).value(c); })
                .ok());
  }
  CHECK(same(a, b));
}

TEST_CASE("what is wrong with an index is said before anything is changed", "[index]") {
  problem<float> p(shape{.heads = 1, .kv_heads = 1, .n = 70, .dk = 16, .dv = 16});
  CHECK_FALSE(kv_index({.n_kv_heads = 0, .dk = 16, .dv = 16}).validate().ok());
  CHECK_FALSE(kv_index({.dk = 16, .dv = 16, .bits = 5}).build(p.cache()).ok());
  CHECK_FALSE(kv_index().build(p.cache()).ok());
  kv_index wrong({.dk = 32, .dv = 16});
  CHECK_FALSE(wrong.build(p.cache()).ok());
  kv_index index({.dk = 16, .dv = 16});
  CHECK_FALSE(index.build(p.cache(), 1).ok());
  CHECK_FALSE(index.update(p.cache(), -1, 3).ok());
  CHECK_FALSE(index.update(p.cache(), 0, 71).ok());
  CHECK_FALSE(index
                  .set(
                      -1, [&](index_t) { return p.cache().head(0, 0).key(0); },
                      [&](index_t) { return p.cache().head(0, 0).value(0); })
                  .ok());
  std::vector<float> long_row(1000);
  for (const std::size_t size : {std::size_t{15}, long_row.size()}) {  // is not read or written past its end
    const auto row = [&](index_t) { return std::span<const float>(long_row).first(size); };
    const auto right = [&](index_t) { return std::span<const float>(long_row).first(16); };
    CHECK_FALSE(index.set(0, row, right).ok());
    CHECK_FALSE(index.set(0, right, row).ok());
  }
  CHECK(index.size() == 0);
  CHECK(index.build(p.cache()).ok());
  std::vector<std::byte> bytes = save(index);
  kv_index loaded;
  for (const std::size_t cut : {bytes.size() - 1, bytes.size() / 2, std::size_t{40}}) {
    CHECK_FALSE(load(std::span<const std::byte>(bytes).first(cut), loaded).ok());
    CHECK(loaded.size() == 0);
  }
  REQUIRE(load(bytes, loaded).ok());
  CHECK(same(index, loaded));
}

TEST_CASE("bits are those that the queries at hand want, or what the user says", "[index]") {
  const auto bits_for = [](float spread, int fixed = 0, bool asked = true) {
    problem<float> p({.queries = 4, .heads = 4, .kv_heads = 2, .n = 8000, .dk = 64, .dv = 32}, 3u, spread);
    kv_index index(index_shape{.n_kv_heads = 2, .dk = 64, .dv = 32, .bits = fixed});
    const status s = asked ? index.build(p.cache(), p.query(), p.options.scale) : index.build(p.cache());
    INFO(s.message());
    REQUIRE(s.ok());
    CHECK(index.codes(0).codes() == 8000);
    return index.bits();
  };
  CHECK(bits_for(0.2f) == 1);  // logits that hardly differ
  CHECK(bits_for(4.0f) >= 3);  // whose errors count e-fold
  CHECK(bits_for(4.0f, 2) == 2);
  CHECK(bits_for(0.2f, 0, false) >= 2);  // what keys say of queries is a guess

  problem<float> p({.queries = 2, .heads = 3, .kv_heads = 2, .n = 5000, .dk = 64, .dv = 32});
  kv_index index(index_shape{.n_kv_heads = 2, .dk = 64, .dv = 32});
  const tensor_view<const float, 4> wrong(p.q.data(), {1, 2, 3, 64});  // 3 heads for 2
  CHECK_FALSE(index.build(p.cache(), wrong, 0.1f).ok());
  CHECK_FALSE(index.build(p.cache(), p.query(), vattn::test::infinity).ok());
  const auto* between = reinterpret_cast<const float*>(reinterpret_cast<const std::byte*>(p.q.data()) + 2);
  problem<float> q({.queries = 1, .heads = 2, .kv_heads = 2, .n = 5000, .dk = 64, .dv = 32});
  CHECK_FALSE(index.build(q.cache(), tensor_view<const float, 4>(between, {1, 1, 2, 64}), 0.1f).ok());
  CHECK_FALSE(index.build(q.cache(), tensor_view<const float, 4>(q.q.data(), {1, 1, 2, 64}, {4, 4, 4, 2}), 0.1f).ok());
}
