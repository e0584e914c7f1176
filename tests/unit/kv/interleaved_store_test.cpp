// The interleaved store: rows as they came, key beside value, whatever grew or was dropped between them.
#include "vattn/store/interleaved_store.hpp"

#include <cmath>
#include <vector>

#include "support/layout.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

template <class T>
interleaved_store<T> store_for(const problem<T>& p) {
  return interleaved_store<T>({.n_kv_heads = p.s.kv_heads, .dk = p.s.dk, .dv = p.s.dv});
}

// Tokens [from, to) of the problem, one by one.
template <class T>
void append(interleaved_store<T>& store, const problem<T>& p, index_t from, index_t to) {
  for (index_t token = from; token < to; ++token)
    REQUIRE(
        store.append(p.k.data() + token * p.s.dk, p.s.n * p.s.dk, p.v.data() + token * p.s.dv, p.s.n * p.s.dv).ok());
}

// The first tokens of the problem's sequence `b`, value right behind key.
template <class T>
void check_contents(const interleaved_store<T>& store, const problem<T>& p, index_t b = 0) {
  index_t wrong = 0;
  const auto view = p.cache();
  for (index_t h = 0; h < p.s.kv_heads; ++h) {
    const auto head = store.head(0, h);
    const auto from = view.head(b, h);
    REQUIRE(head.size() == store.size());
    for (index_t i = 0; i < store.size(); ++i) {
      wrong += loaded(head.key(i), p.s.dk) != loaded(from.key(i), p.s.dk);
      wrong += loaded(head.value(i), p.s.dv) != loaded(from.value(i), p.s.dv);
      wrong += head.value(i).data() != head.key(i).data() + p.s.dk;
      double square = 0;
      const std::vector<float> value = loaded(head.value(i), p.s.dv);
      for (std::size_t j = 0; j < value.size(); ++j)
        square += std::pow(static_cast<double>(value[j]) - static_cast<double>(head.value_centre()[j]), 2);
      wrong += std::abs(std::sqrt(square) - static_cast<double>(head.value_norm(i))) > 1e-5 * (1 + std::sqrt(square));
    }
  }
  CHECK(wrong == 0);
}

template <class T>
void check_type(const shape& s) {
  CAPTURE(s.n, s.kv_heads, s.dk, s.dv);
  const problem<T> p(s);
  auto assigned = store_for(p), appended = store_for(p);
  REQUIRE(assigned.assign(p.cache()).ok());
  append(appended, p, 0, s.n);
  CHECK(assigned.size() == s.n);
  CHECK(appended.size() == s.n);
  check_contents(assigned, p);
  check_contents(appended, p);
}

std::string why(const status& s) {
  CHECK_FALSE(s.ok());
  return s.message();
}

struct by_codes : default_policy {
  using selector = select::indexed<sketch::key_codes<4>>;
  using sampler = sample::by_importance;
};

}  // namespace

TEST_CASE("interleaved rows are those that came", "[kv][interleaved]") {
  check_type<float>({.kv_heads = 2, .n = 700, .dk = 24, .dv = 10});
  check_type<Eigen::half>({.n = 300, .dk = 16, .dv = 16});
  check_type<Eigen::bfloat16>({.kv_heads = 3, .n = 1500, .dk = 32, .dv = 48});
  check_type<float>({.n = 200, .dk = 1, .dv = 1});
  check_type<float>({.n = 0, .dk = 8, .dv = 8});
}

TEST_CASE("interleaved rows stay through growth, also of pages, and allocate only then", "[kv][interleaved]") {
  const problem<float> p({.kv_heads = 2, .n = 20000, .dk = 64, .dv = 32});  // 7.7 MB a head
  auto store = store_for(p);
  const float* at = nullptr;
  index_t moves = 0, capacity = 0, early = 0;
  for (index_t token = 0; token < p.s.n; ++token) {
    append(store, p, token, token + 1);
    const float* now = store.head(0, 1).key(0).data();
    early += now != at && store.capacity() == capacity;
    moves += store.capacity() != capacity;
    at = now, capacity = store.capacity();
  }
  CHECK(early == 0);
  CHECK(moves == 12);  // 256, 384, … 33215
  check_contents(store, p);
  REQUIRE(store.reserve(10).ok());  // less than there is
  CHECK(store.head(0, 1).key(0).data() == at);
  const interleaved_store<float> moved = std::move(store);
  check_contents(moved, p);
}

TEST_CASE("interleaved tokens are dropped and come again", "[kv][interleaved]") {
  const problem<float> p({.kv_heads = 2, .n = 600, .dk = 16, .dv = 8}), other(p.s, 9);
  auto store = store_for(p);
  REQUIRE(store.assign(other.cache()).ok());
  store.truncate(600);
  CHECK(store.size() == 600);
  check_contents(store, other);
  store.truncate(40);
  CHECK(store.size() == 40);
  check_contents(store, other);
  store.truncate(50);
  CHECK(store.size() == 40);
  store.truncate(-1);
  CHECK(store.size() == 0);
  append(store, p, 0, 600);
  check_contents(store, p);
  store.clear();
  CHECK(store.size() == 0);
  REQUIRE(store.assign(p.cache()).ok());
  check_contents(store, p);
}

TEST_CASE("attention over interleaved rows is that over a view, bit by bit", "[kv][interleaved]") {
  const problem<Eigen::bfloat16> p({.heads = 4, .kv_heads = 2, .n = 5000, .dk = 64, .dv = 32}, 5);
  auto store = store_for(p);
  REQUIRE(store.assign(p.cache()).ok());
  store.truncate(3000);
  append(store, p, 3000, p.s.n);
  std::vector<float> norms, centres;
  for (index_t h = 0; h < 2; ++h) {
    const auto head = store.head(0, h);
    centres.insert(centres.end(), head.value_centre(), head.value_centre() + 32);
    for (index_t i = 0; i < p.s.n; ++i) norms.push_back(head.value_norm(i));
  }
  const auto view = p.cache().with_norms({.values = norms.data(), .value_centres = centres.data()});
  const auto check = [&](const auto& call) {
    results a(p.s), b(p.s);
    workspace memory;
    REQUIRE(call(view, a.view(), memory).ok());
    REQUIRE(call(store, b.view(), memory).ok());
    CHECK(a.output == b.output);
    CHECK(a.log_sum_exp == b.log_sum_exp);
    return a.certificates.front().density();
  };
  check([&](const auto& cache, const attention_result& r, workspace& memory) {
    return exact_attention(p.query(), cache, p.options, r, memory);
  });
  config c;
  c.epsilon = 0.2;
  CHECK(check([&](const auto& cache, const attention_result& r, workspace& memory) {
          return vattention<ranked_policy>(c)(p.query(), cache, p.options, r, memory, {.seed = 3});
        }) < 1);
  std::vector<sketch::key_codes<4>> codes(2, sketch::key_codes<4>(64, 1));
  for (index_t h = 0; h < 2; ++h) append_from(codes[static_cast<std::size_t>(h)], store.head(0, h));
  CHECK(check([&](const auto& cache, const attention_result& r, workspace& memory) {
          return vattention<by_codes>(c, {.heads = codes})(p.query(), cache, p.options, r, memory, {.seed = 3});
        }) < 1);
}

TEST_CASE("indices that follow a store token by token are those made anew", "[kv][interleaved]") {
  const problem<Eigen::half> p({.n = 10000, .dk = 16, .dv = 16});
  auto store = store_for(p);
  select::quest pages(16);
  sketch::key_codes<2> codes(16, 1);
  index_t taken = 0;
  for (index_t token = 0; token < p.s.n; ++token) {
    append(store, p, token, token + 1);
    taken += append_from(pages, store.head(0, 0)) + append_from(codes, store.head(0, 0));
    if (token % 1000 == 507) {  // a draft of 4 tokens, rejected inside the last page
      store.truncate(token - 3);
      pages.truncate(token - 3);
      codes.truncate(token - 3);
      append(store, p, token - 3, token + 1);
      taken += append_from(pages, store.head(0, 0)) + append_from(codes, store.head(0, 0)) - 8;
    }
  }
  CHECK(taken == 2 * p.s.n);
  const auto check = [&](const auto& grown, auto anew) {
    append_from(anew, p.cache().head(0, 0));
    CHECK(grown.size() == p.s.n);
    CHECK(save(grown) == save(anew));
  };
  check(pages, select::quest(16));
  check(codes, sketch::key_codes<2>(16, 1));
}

TEST_CASE("an interleaved store copies the sequence that is asked for, and converts", "[kv][interleaved]") {
  const problem<float> p({.batch = 2, .kv_heads = 2, .n = 200, .dk = 16, .dv = 8});
  const problem<Eigen::half> halves({.n = 200, .dk = 16, .dv = 8});
  auto store = store_for(p);
  REQUIRE(store.assign(p.cache(), 1).ok());
  check_contents(store, p, 1);
  interleaved_store<float> wide({.dk = 16, .dv = 8});
  REQUIRE(wide.assign(halves.cache()).ok());
  index_t wrong = 0;
  for (index_t i = 0; i < 200; ++i)
    wrong += loaded(wide.head(0, 0).value(i), 8) != loaded(halves.cache().head(0, 0).value(i), 8);
  CHECK(wrong == 0);
}

TEST_CASE("an interleaved store is refused with a reason, and stays as it was", "[kv][interleaved]") {
  const problem<float> p({.kv_heads = 2, .n = 100, .dk = 16, .dv = 8});
  auto store = store_for(p);
  REQUIRE(store.assign(p.cache()).ok());
  for (const shape s :
       {shape{.kv_heads = 1, .n = 100, .dk = 16, .dv = 8}, shape{.kv_heads = 2, .n = 100, .dk = 15, .dv = 8},
        shape{.kv_heads = 2, .n = 100, .dk = 16, .dv = 9}}) {
    const problem<float> other(s);
    CHECK(contains(why(store.assign(other.cache())), "make the store for this cache"));
  }
  CHECK(contains(why(store.assign(p.cache(), 1)), "sequence"));
  CHECK(contains(why(store.assign(p.cache(), -1)), "sequence"));
  for (const index_t n : {index_t{1} << 31, index_t{1} << 45, index_t{1} << 62})
    CHECK(contains(why(store.reserve(n)), "less than 2^31"));
  check_contents(store, p);
  float x[16] = {};
  for (const interleaved_shape bad :
       {interleaved_shape{.n_kv_heads = 0, .dk = 4, .dv = 4}, interleaved_shape{.dk = 0, .dv = 4},
        interleaved_shape{.dk = 4, .dv = -1}, interleaved_shape{}}) {
    interleaved_store<float> s(bad);
    CHECK(contains(why(s.validate()), "at least 1"));
    CHECK(contains(why(s.append(x, x)), "at least 1"));
    CHECK(contains(why(s.reserve(5)), "at least 1"));
    CHECK(contains(why(s.assign(p.cache())), "at least 1"));
    s.clear();
  }
  // More than a machine can address: the memory is refused, what there is stays.
  interleaved_store<float> huge({.dk = 1 << 20, .dv = 1 << 20});
  std::vector<float> row(1 << 20, 3.0f);
  REQUIRE(huge.append(row.data(), row.data()).ok());
  CHECK(contains(why(huge.reserve(index_t{1} << 30)), "no memory"));
  CHECK(huge.size() == 1);
  CHECK(huge.head(0, 0).value(0)[5] == 3.0f);
}
