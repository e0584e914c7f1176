// Memory that runs out: an index that fails to grow is as it was; a call says so; the decode path asks for none.
#include <new>
#include <random>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/problem.hpp"
#include "vattn/vattn.hpp"

namespace {

using vattn::index_t;
using vattn::test::allocations, vattn::test::fail_at;
using namespace vattn::test;

constexpr index_t dim = 8;

std::vector<float> random_keys(index_t n) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> keys(static_cast<std::size_t>(n * dim));
  for (float& x : keys) x = normal(random);
  return keys;
}

// Every allocation of every append fails once; the append is then tried again.
template <class Index>
void check_appends(const Index& empty, index_t n = 150) {
  const std::vector<float> keys = random_keys(n);
  const auto key = [&](index_t i) { return std::span<const float>(keys.data() + i * dim, std::size_t{dim}); };
  Index undisturbed = empty, disturbed = empty;
  long failures = 0;
  for (index_t i = 0; i < n; ++i) {
    undisturbed.append(key(i));
    for (long which = 1;; ++which) {
      allocations = 0, fail_at = which;
      bool failed = false;
      try {
        disturbed.append(key(i));
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      fail_at = -1;
      if (!failed) break;
      ++failures;
      REQUIRE(disturbed.size() == i);
    }
  }
  CHECK(failures > 4);
  CHECK(disturbed.size() == n);
  CHECK(vattn::save(disturbed) == vattn::save(undisturbed));
}

}  // namespace

TEST_CASE("an append for which memory runs out changes nothing, and can be tried again", "[faults]") {
  namespace select = vattn::select;
  namespace sketch = vattn::sketch;
  SECTION("codes") {
    check_appends(sketch::key_codes<1>(dim));
    check_appends(sketch::key_codes<8>(dim));
  }
  SECTION("learned codes, which learn meanwhile") {
    check_appends(sketch::product_codes(dim, 2, {.train_size = 70, .iterations = 2}));
    check_appends(select::pq_cache(dim, 2, 3, {.train_size = 70, .iterations = 2}));
  }
  SECTION("selectors of the literature") {
    check_appends(select::quest(dim, 4));
    check_appends(select::double_sparsity({0, 3, 5}));
    check_appends(select::hash_attention<select::simhash_map>(select::simhash_map(dim, 32)));
    check_appends(select::magic_pig(dim, 4, 6));
    check_appends(select::socket(dim, 4, 6));
  }
}

// Every allocation of a change to an index fails once: the index is as it was, and the change is then made.
template <class Change>
void check_change(vattn::kv_index& index, Change&& change) {
  for (long which = 1;; ++which) {
    const std::vector<std::byte> before = vattn::save(index);
    allocations = 0, fail_at = which;
    const vattn::status s = change();
    const bool asked = allocations >= which;
    fail_at = -1;
    if (s.ok() && !asked) break;
    if (s.ok()) continue;  // it could do without, as where bits are to be chosen
    REQUIRE(s.code() == vattn::errc::out_of_memory);
    REQUIRE(contains(s.message(), "no memory for the codes of"));
    REQUIRE(vattn::save(index) == before);
  }
}

TEST_CASE("an index beside a cache for which memory runs out is as it was, and can be tried again", "[faults]") {
  problem<float> p({.heads = 3, .kv_heads = 3, .n = 4500, .dk = 16, .dv = 8});
  const auto first = [&](index_t n) {
    vattn::kv_shape s = p.cache_shape();
    s.n_tokens = n;
    const vattn::kv_strides k{.token = 64, .head = 64 * 4500}, v{.token = 32, .head = 32 * 4500};
    return vattn::kv_view<float>(p.k.data(), k, p.v.data(), v, s);
  };
  for (const int bits : {0, 3}) {
    const vattn::index_shape shape{.n_kv_heads = 3, .dk = 16, .dv = 8, .bits = bits};
    vattn::kv_index index(shape), undisturbed(shape);
    check_change(index, [&] { return index.build(first(1000)); });
    check_change(index, [&] { return index.append_from(first(1100)); });
    check_change(index, [&] { return index.append_from(first(4500)); });  // built again
    check_change(index, [&] { return index.reserve(9000); });
    check_change(index, [&] {
      return index.set(
          20000, [&](index_t h) { return p.cache().head(0, h).key(7); },
          [&](index_t h) { return p.cache().head(0, h).value(7); });
    });
    index.truncate(4500);
    REQUIRE(undisturbed.build(first(4500)).ok());
    CHECK(vattn::save(index) == vattn::save(undisturbed));
  }
}

TEST_CASE("a key of another size is not taken, and a call says what its index lacks", "[faults]") {
  problem<float> p({.n = 900, .dk = dim, .dv = dim});
  using codes = vattn::sketch::key_codes<4>;
  codes narrow(dim / 2), wide(dim * 2), empty;
  vattn::append_from(narrow, p.cache().head(0, 0));
  wide.append(std::span<const float>(p.q));
  empty.append(std::span<const float>(p.q));
  CHECK(narrow.size() == 0);
  CHECK(wide.size() == 0);
  CHECK(empty.size() == 0);

  struct policy : vattn::default_policy {
    using selector = vattn::select::indexed<codes>;
    using sampler = vattn::sample::by_importance;
  };
  std::vector<float> keys(900 * dim * 2, 0.5f);
  for (std::size_t i = 0; i < 900; ++i) wide.append(std::span<const float>(keys).subspan(i * dim * 2, dim * 2));
  REQUIRE(wide.size() == 900);
  results r(p.s);
  vattn::workspace memory;
  for (const codes* of : {&narrow, &wide, &empty}) {
    const vattn::vattention<policy> attend({.sinks = 16, .window = 16}, {{of, 1}});
    const vattn::status s = attend(p.query(), p.cache(), p.options, r.view(), memory);
    CHECK(s.code() == vattn::errc::invalid_argument);
    CHECK(contains(s.message(), "give one index of the cache's head size"));
  }
}

TEST_CASE("a workspace that cannot grow is a status, and nothing else is allocated by a call", "[faults]") {
  problem<float> p({.heads = 4, .kv_heads = 2, .n = 3000, .dk = dim, .dv = dim});
  using codes = vattn::sketch::key_codes<4>;
  std::vector<codes> indices(2, codes(dim));
  for (index_t h = 0; h < 2; ++h) vattn::append_from(indices[static_cast<std::size_t>(h)], p.cache().head(0, h));
  struct by_importance : vattn::default_policy {
    using selector = vattn::select::indexed<codes>;
    using sampler = vattn::sample::by_importance;
  };
  const vattn::config settings{.epsilon = 0.1, .sinks = 16, .window = 16};
  const std::span<const codes> heads(indices);
  results r(p.s);
  const auto view = [&] { return r.view(); };
  const auto check = [&](auto&& call) {
    vattn::workspace memory;
    allocations = 0, fail_at = 1;
    const vattn::status refused = call(memory);
    fail_at = -1;
    CHECK(refused.code() == vattn::errc::out_of_memory);
    CHECK(contains(refused.message(), "no memory for a workspace of"));
    CHECK(memory.size() == 0);

    CHECK(call(memory).ok());
    allocations = 0;
    const vattn::status again = call(memory);
    const long during = allocations;
    CHECK(again.ok());
    CHECK(during == 0);
  };
  check([&](vattn::workspace& memory) {
    return vattn::exact_attention(p.query(), p.cache(), p.options, view(), memory);
  });
  check([&](vattn::workspace& memory) {
    return vattn::vattention<vattn::ranked_policy>(settings)(p.query(), p.cache(), p.options, view(), memory);
  });
  check([&](vattn::workspace& memory) {
    return vattn::vattention<by_importance>(settings, {heads})(p.query(), p.cache(), p.options, view(), memory);
  });
  check([&](vattn::workspace& memory) {
    return vattn::vattention<vattn::certified_policy<codes>>(settings, {heads})(p.query(), p.cache(), p.options, view(),
                                                                                memory);
  });
}
