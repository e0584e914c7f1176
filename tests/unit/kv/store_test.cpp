// The shuffled store: which token is where, whatever the way it came, and what the store says of bad requests.
#include <algorithm>
#include <map>
#include <vector>

#include "stat/binomial.hpp"
#include "support/layout.hpp"
#include "vattn/store/shuffled_store.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

template <class T>
shuffled_store<T> store_for(const problem<T>& p, index_t sinks = 16, index_t window = 16, std::uint64_t seed = 3) {
  return shuffled_store<T>(
      {.n_kv_heads = p.s.kv_heads, .dk = p.s.dk, .dv = p.s.dv, .sinks = sinks, .window = window, .seed = seed});
}

// Tokens [from, to) of the problem, one by one.
template <class T>
void append(shuffled_store<T>& store, const problem<T>& p, index_t from, index_t to) {
  for (index_t token = from; token < to; ++token)
    REQUIRE(
        store.append(p.k.data() + token * p.s.dk, p.s.n * p.s.dk, p.v.data() + token * p.s.dv, p.s.n * p.s.dv).ok());
}

template <class T>
std::vector<index_t> order(const shuffled_store<T>& store) {
  std::vector<index_t> positions;
  for (index_t row = 0; row < store.size(); ++row) positions.push_back(store.position(row));
  return positions;
}

// Every row holds the token that it says it holds, and the codes say no less of it.
template <class T>
void check_contents(const shuffled_store<T>& store, const problem<T>& p) {
  std::vector<index_t> seen = order(store);
  std::sort(seen.begin(), seen.end());
  index_t wrong = 0;
  for (index_t i = 0; i < store.size(); ++i) wrong += seen[static_cast<std::size_t>(i)] != i;
  CHECK(wrong == 0);
  const auto view = p.cache();
  for (index_t h = 0; h < p.s.kv_heads; ++h) {
    const auto head = store.head(0, h);
    const auto from = view.head(0, h);
    REQUIRE(head.size() == store.size());
    REQUIRE(head.codes().size() == head.past());
    CHECK(head.sinks() == std::min(store.shape().sinks, store.size()));
    CHECK(head.past() == std::max<index_t>(0, store.size() - store.shape().sinks - store.shape().window));
    for (index_t row = 0; row < store.size(); ++row) {
      const index_t token = store.position(row);
      wrong += loaded(head.key(row), p.s.dk) != loaded(from.key(token), p.s.dk);
      wrong += loaded(head.value(row), p.s.dv) != loaded(from.value(token), p.s.dv);
      const bool moved = row >= head.sinks() && row < head.sinks() + head.past();
      if (!moved) wrong += token != row;
      if (!moved) continue;
      const std::vector<float> value = loaded(head.value(row), p.s.dv);
      double away = 0;
      for (std::size_t j = 0; j < value.size(); ++j)
        away += std::pow(static_cast<double>(value[j] - head.value_centre()[j]), 2);
      if (away < 1e-8) continue;  // the only token so far: it is the mean
      wrong += std::abs(static_cast<double>(head.codes().reach(row - head.sinks())) / std::sqrt(away) - 1) > 5e-3;
      wrong += !(head.codes().radius(row - head.sinks()) > 0);
    }
  }
  CHECK(wrong == 0);
}

template <class T>
void check_both_ways(const shape& s, index_t sinks, index_t window) {
  CAPTURE(s.n, s.kv_heads, s.dk, s.dv, sinks, window);
  const problem<T> p(s);
  auto assigned = store_for(p, sinks, window), appended = store_for(p, sinks, window);
  REQUIRE(assigned.assign(p.cache()).ok());
  append(appended, p, 0, s.n);
  CHECK(assigned.size() == s.n);
  CHECK(appended.size() == s.n);
  check_contents(assigned, p);
  check_contents(appended, p);
  CHECK(order(assigned) == order(appended));
}

std::string why(const status& s) {
  CHECK_FALSE(s.ok());
  return s.message();
}

}  // namespace

TEST_CASE("tokens that come one by one lie as tokens that come together", "[kv][store]") {
  check_both_ways<float>({.kv_heads = 2, .n = 700, .dk = 24, .dv = 10}, 16, 16);
  check_both_ways<Eigen::half>({.n = 300, .dk = 16, .dv = 16}, 4, 8);
  check_both_ways<Eigen::bfloat16>({.kv_heads = 3, .n = 1500, .dk = 32, .dv = 48}, 16, 128);
  check_both_ways<float>({.n = 200, .dk = 8, .dv = 1}, 0, 0);
  check_both_ways<float>({.n = 200, .dk = 1, .dv = 8}, 0, 5);
  check_both_ways<float>({.n = 200, .dk = 16, .dv = 8}, 7, 0);
}

TEST_CASE("a store of few tokens has no past", "[kv][store]") {
  for (const index_t n : {0, 1, 5, 15, 16, 17, 31, 32, 33})
    check_both_ways<float>({.n = n, .dk = 16, .dv = 16}, 16, 16);
  check_both_ways<float>({.n = 40, .dk = 16, .dv = 16}, 1000, 16);
  check_both_ways<float>({.n = 40, .dk = 16, .dv = 16}, 16, 1000);
}

TEST_CASE("tokens that are dropped and come again lie where they lay", "[kv][store]") {
  const problem<float> p({.kv_heads = 2, .n = 600, .dk = 16, .dv = 8});
  for (const index_t keep : {0, 3, 20, 31, 40, 599, 600}) {
    CAPTURE(keep);
    auto store = store_for(p), fresh = store_for(p);
    REQUIRE(store.assign(p.cache()).ok());
    const std::vector<index_t> before = order(store);
    store.truncate(keep);
    CHECK(store.size() == keep);
    check_contents(store, p);
    append(fresh, p, 0, keep);
    CHECK(order(store) == order(fresh));
    append(store, p, keep, 600);
    CHECK(order(store) == before);
    check_contents(store, p);
  }
  auto store = store_for(p);
  append(store, p, 0, 600);
  store.truncate(-5);
  CHECK(store.size() == 0);
  append(store, p, 0, 100);
  store.truncate(1000);  // nothing to forget
  CHECK(store.size() == 100);
  REQUIRE(store.assign(p.cache()).ok());  // over what was there
  check_contents(store, p);
  store.clear();
  CHECK(store.size() == 0);
  CHECK(store.row_bytes() == 0);
}

TEST_CASE("codes taken again are those of a store that was assigned", "[kv][store]") {
  const problem<Eigen::bfloat16> p({.kv_heads = 2, .n = 900, .dk = 64, .dv = 16});
  auto assigned = store_for(p), appended = store_for(p);
  REQUIRE(assigned.assign(p.cache()).ok());
  append(appended, p, 0, 900);
  REQUIRE(appended.recode().ok());
  for (index_t h = 0; h < 2; ++h) {
    const auto a = assigned.head(0, h), b = appended.head(0, h);
    const auto x = a.codes().view(), y = b.codes().view();
    REQUIRE(a.codes().bytes() == b.codes().bytes());
    CHECK(std::equal(x.first, x.first + a.codes().bytes(), y.first));
    CHECK(std::equal(a.value_centre(), a.value_centre() + 16, b.value_centre()));
    CHECK(a.codes().alpha_unit() == b.codes().alpha_unit());
  }
}

TEST_CASE("every order of the past is as likely", "[kv][store]") {
  // All 24 orders of four tokens, and where a token of a longer past lies.
  const problem<float> p({.n = 40, .dk = 1, .dv = 1});
  constexpr int seeds = 6000;
  std::map<std::vector<index_t>, int> orders;
  std::vector<int> places(36 * 36, 0);
  for (int seed = 0; seed < seeds; ++seed) {
    auto store = store_for(p, 2, 2, static_cast<std::uint64_t>(seed));
    append(store, p, 0, 8);
    ++orders[order(store)];
    append(store, p, 8, 40);
    for (index_t row = 2; row < 38; ++row) ++places[static_cast<std::size_t>((row - 2) * 36 + store.position(row) - 2)];
  }
  REQUIRE(orders.size() == 24);
  double chi2 = 0;
  for (const auto& [which, count] : orders) chi2 += std::pow(count - seeds / 24.0, 2) / (seeds / 24.0);
  CHECK(stat::chi2_upper_tail(chi2, 23) > 1e-5);
  chi2 = 0;
  for (const int count : places) chi2 += std::pow(count - seeds / 36.0, 2) / (seeds / 36.0);
  CHECK(stat::chi2_upper_tail(chi2, 35 * 35) > 1e-5);
}

TEST_CASE("a store grows with its tokens and moves with its owner", "[kv][store]") {
  const problem<float> p({.kv_heads = 2, .n = 2000, .dk = 16, .dv = 8});
  auto store = store_for(p), reserved = store_for(p);
  REQUIRE(reserved.reserve(2000).ok());
  const float* first = reserved.head(0, 0).key(0).data();
  append(store, p, 0, 2000);  // past three growths
  append(reserved, p, 0, 2000);
  CHECK(reserved.head(0, 0).key(0).data() == first);
  check_contents(store, p);
  CHECK(order(store) == order(reserved));
  REQUIRE(store.reserve(10).ok());  // less than there is
  check_contents(store, p);
  const shuffled_store<float> moved = std::move(store);
  check_contents(moved, p);
}

TEST_CASE("other seeds have other orders, and the same seed the same", "[kv][store]") {
  const problem<float> p({.n = 500, .dk = 16, .dv = 16});
  auto a = store_for(p, 16, 16, 1), b = store_for(p, 16, 16, 1), c = store_for(p, 16, 16, 2);
  REQUIRE((a.assign(p.cache()).ok() && b.assign(p.cache()).ok() && c.assign(p.cache()).ok()));
  CHECK(order(a) == order(b));
  CHECK(order(a) != order(c));
}

TEST_CASE("codes and order cost at most 8 % of bfloat16 rows of 128", "[kv][store]") {
  const problem<Eigen::bfloat16> p({.n = 3000, .dk = 128, .dv = 128});
  auto store = store_for(p);
  REQUIRE(store.assign(p.cache()).ok());
  CHECK(store.row_bytes() == 3000u * 256 * 2);
  CHECK(store.sketch_bytes() > 3000u * 20);
  CHECK(static_cast<double>(store.sketch_bytes()) <= 0.08 * static_cast<double>(store.row_bytes()));
}

TEST_CASE("any cache is copied, and of a batch the sequence that is asked for", "[kv][store]") {
  const problem<float> p({.batch = 2, .kv_heads = 2, .n = 200, .dk = 16, .dv = 8});
  const problem<Eigen::half> halves({.n = 200, .dk = 16, .dv = 8});
  auto store = store_for(p);
  REQUIRE(store.assign(p.cache(), 1).ok());
  const auto view = p.cache();
  index_t wrong = 0;
  for (index_t h = 0; h < 2; ++h)
    for (index_t row = 0; row < 200; ++row)
      wrong += loaded(store.head(0, h).key(row), 16) != loaded(view.head(1, h).key(store.position(row)), 16);
  CHECK(wrong == 0);
  shuffled_store<float> wide({.n_kv_heads = 1, .dk = 16, .dv = 8});
  REQUIRE(wide.assign(halves.cache()).ok());  // converted
  for (index_t row = 0; row < 200; ++row)
    wrong += loaded(wide.head(0, 0).value(row), 8) != loaded(halves.cache().head(0, 0).value(wide.position(row)), 8);
  CHECK(wrong == 0);
}

TEST_CASE("a store is refused with a reason, and stays as it was", "[kv][store]") {
  const problem<float> p({.kv_heads = 2, .n = 100, .dk = 16, .dv = 8});
  auto store = store_for(p);
  REQUIRE(store.assign(p.cache()).ok());
  for (const shape s :
       {shape{.kv_heads = 1, .n = 100, .dk = 16, .dv = 8}, shape{.kv_heads = 2, .n = 100, .dk = 15, .dv = 8},
        shape{.kv_heads = 2, .n = 100, .dk = 16, .dv = 9}}) {
    const problem<float> other(s);
    CHECK(contains(why(store.assign(other.cache())), "make the store for this cache"));
    check_contents(store, p);
  }
  CHECK(contains(why(store.assign(p.cache(), 1)), "sequence"));
  CHECK(contains(why(store.assign(p.cache(), -1)), "sequence"));
  check_contents(store, p);
  float x[16] = {};
  for (const store_shape bad :
       {store_shape{.n_kv_heads = 0, .dk = 4, .dv = 4}, store_shape{.dk = 0, .dv = 4}, store_shape{.dk = 4, .dv = -1},
        store_shape{.dk = 4, .dv = 4, .sinks = -1}, store_shape{.dk = 4, .dv = 4, .window = -1}, store_shape{}}) {
    shuffled_store<float> s(bad);
    CHECK(contains(why(s.validate()), "at least 1"));
    CHECK(contains(why(s.append(x, x)), "at least 1"));
    CHECK(contains(why(s.reserve(5)), "at least 1"));
    s.clear();
  }
  CHECK(contains(why(shuffled_store<float>().validate()), "at least 1"));
}

TEST_CASE("room that no machine has is an error, and the store stays as it was", "[kv][store]") {
  const problem<float> p({.kv_heads = 2, .n = 100, .dk = 16, .dv = 8});
  auto store = store_for(p);
  REQUIRE(store.assign(p.cache()).ok());
  for (const index_t n : {index_t{1} << 31, index_t{1} << 45, index_t{1} << 57, index_t{1} << 60, index_t{1} << 62}) {
    CAPTURE(n);
    const status s = store.reserve(n);
    CHECK_FALSE(s.ok());
    CHECK(s.code() == (n == index_t{1} << 31 ? s.code() : errc::invalid_argument));
    check_contents(store, p);
  }
  page_buffer pages;
  CHECK_FALSE(pages.reserve(std::numeric_limits<std::size_t>::max()));
  CHECK_FALSE(pages.reserve(std::numeric_limits<std::size_t>::max() / 2));
  CHECK(pages.data() == nullptr);
}

TEST_CASE("pages keep what they hold, and new bytes are zero", "[kv][pages]") {
  page_buffer pages;
  REQUIRE(pages.resize(100));
  CHECK(reinterpret_cast<std::uintptr_t>(pages.data()) % 64 == 0);
  for (std::size_t i = 0; i < 100; ++i) pages.data()[i] = static_cast<std::byte>(i);
  REQUIRE(pages.resize(5 << 20));
  CHECK(reinterpret_cast<std::uintptr_t>(pages.data()) % (2 << 20) == 0);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < pages.size(); ++i) wrong += pages.data()[i] != static_cast<std::byte>(i < 100 ? i : 0);
  CHECK(wrong == 0);
  const std::byte* at = pages.data();
  REQUIRE(pages.resize(10));
  REQUIRE(pages.resize(50));
  CHECK(pages.data() == at);
  CHECK(pages.data()[9] == std::byte{9});
  CHECK(pages.data()[10] == std::byte{0});
  page_buffer other = std::move(pages);
  CHECK(other.data() == at);
  CHECK(other.size() == 50);
  other = page_buffer();
  CHECK(other.data() == nullptr);
}
