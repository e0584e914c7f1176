// FlashInfer's paged caches: built from known rows, read back, and attended.
#include "vattn/kv/flashinfer.hpp"

#include <cstring>

#include "support/layouts.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

}  // namespace

TEST_CASE("FlashInfer pages of 1, 16 and 128 with last pages of every fill", "[kv][flashinfer]") {
  for (const index_t size : {1, 16, 128}) {
    const ragged<float> r({.heads = 2, .kv_heads = 2, .dk = 6, .dv = 4}, every_fill(size));
    const pages t(r.lengths, size);
    for (const page_order order : {page_order::nhd, page_order::hnd}) {
      const std::vector<float> k = paged(r, t, order, true), v = paged(r, t, order, false);
      check_rows(r, flashinfer_paged_kv(k.data(), v.data(), order, t.view(r.p.s)));
    }
  }
}

TEST_CASE("attention over FlashInfer pages, NHD and HND, is that over contiguous rows", "[kv][flashinfer]") {
  const ragged<float> r({.queries = 2, .heads = 6, .kv_heads = 2, .dk = 16, .dv = 8}, {700, 0, 1, 333, 513});
  for (const index_t size : {16, 24}) {
    const pages t(r.lengths, size);
    for (const page_order order : {page_order::nhd, page_order::hnd}) {
      const std::vector<float> k = paged(r, t, order, true), v = paged(r, t, order, false);
      const auto view = flashinfer_paged_kv(k.data(), v.data(), order, t.view(r.p.s));
      check_attention(r, view);
      ragged<float> causal = r;
      causal.p.options.causal = true;
      check_attention(causal, view);
    }
  }
}

TEST_CASE("K and V of FlashInfer in one tensor", "[kv][flashinfer]") {
  const ragged<Eigen::half> r({.heads = 3, .kv_heads = 3, .dk = 8, .dv = 8}, {0, 5, 40, 16, 900});
  const pages t(r.lengths, 16);
  for (const page_order order : {page_order::nhd, page_order::hnd}) {
    const auto k = paged(r, t, order, true), v = paged(r, t, order, false);
    std::vector<Eigen::half> both;  // [pages, 2, ...]
    const index_t page = t.size * 3 * 8;
    for (index_t i = 0; i < t.count; ++i) {
      both.insert(both.end(), k.begin() + i * page, k.begin() + (i + 1) * page);
      both.insert(both.end(), v.begin() + i * page, v.begin() + (i + 1) * page);
    }
    check_rows(r, flashinfer_paged_kv(both.data(), order, t.view(r.p.s)));
    check_rows(r, flashinfer_paged_kv<8>(both.data(), order, t.view(r.p.s)));
    check_attention(r, flashinfer_paged_kv(both.data(), order, t.view(r.p.s)));
  }
}

TEST_CASE("FlashInfer pages with padded strides, norms, and shared pages", "[kv][flashinfer]") {
  const ragged<float> r({.heads = 2, .kv_heads = 2, .dk = 5, .dv = 3}, {37, 9});
  const pages t(r.lengths, 16);
  constexpr index_t cell = 2 * 44 + 4, page = 16 * cell + 12;  // bytes, a row of K and V in 44
  std::vector<std::byte> buffer(static_cast<std::size_t>(t.count * page));
  std::vector<float> norms(static_cast<std::size_t>(t.count * 2 * 16), not_a_number);
  r.for_each_row([&](index_t b, index_t h, index_t token) {
    std::byte* row = buffer.data() + t.page(b, token) * page + token % 16 * cell + h * 44;
    std::memcpy(row, r.key(b, h, token), 20);
    std::memcpy(row + 20, r.value(b, h, token), 12);
    norms[static_cast<std::size_t>((t.page(b, token) * 2 + h) * 16 + token % 16)] =
        static_cast<float>(1000 * b + 100 * h + token);
  });
  const cell_strides strides{.page = page, .cell = cell, .head = 44};
  const auto* first = reinterpret_cast<const float*>(buffer.data());
  const auto view = flashinfer_paged_kv(first, strides, first + 5, strides, t.view(r.p.s));
  check_rows(r, view);
  const float centres[] = {1, 2, 3, 4, 5, 6};
  const auto with = view.with_norms({.keys = norms.data(), .values = norms.data(), .value_centres = centres});
  CHECK_FALSE(view.head(0, 0).has_value_norms());
  CHECK(with.head(1, 1).value_centre()[0] == 4);
  r.for_each_row([&](index_t b, index_t h, index_t token) {
    CHECK(with.head(b, h).key_norm(token) == static_cast<float>(1000 * b + 100 * h + token));
    CHECK(with.head(b, h).value_norm(token) == static_cast<float>(1000 * b + 100 * h + token));
  });

  // Two sequences of one prefix: the same page ids, as after a fork.
  const std::int32_t indptr[] = {0, 2, 4}, indices[] = {t.indices[0], t.indices[1], t.indices[0], t.indices[1]},
                     last[] = {16, 3};
  flashinfer_pages shared = t.view(r.p.s);
  shared.indptr = indptr, shared.indices = indices, shared.last_page_len = last;
  const auto forked = flashinfer_paged_kv(first, strides, first + 5, strides, shared);
  REQUIRE(forked.validate().ok());
  CHECK(forked.head(0, 1).size() == 32);
  CHECK(forked.head(1, 1).size() == 19);
  CHECK(forked.head(0, 1).key(18).data() == forked.head(1, 1).key(18).data());
}

TEST_CASE("page tables that cannot be meant say why", "[kv][flashinfer]") {
  const std::vector<float> rows(4 * 16 * 2 * 8, 1.0f);
  std::int32_t indptr[] = {0, 2, 2, 3}, indices[] = {3, 0, 1}, last[] = {16, 0, 5};
  flashinfer_pages p{.n_pages = 4,
                     .page_size = 16,
                     .n_kv_heads = 2,
                     .dk = 8,
                     .dv = 8,
                     .n_batch = 3,
                     .indptr = indptr,
                     .indices = indices,
                     .last_page_len = last};
  const auto why = [&] {
    const status s = flashinfer_paged_kv(rows.data(), rows.data(), page_order::nhd, p).validate();
    CHECK(s.code() == errc::invalid_argument);
    return std::string(s.message());
  };
  REQUIRE(flashinfer_paged_kv(rows.data(), rows.data(), page_order::nhd, p).validate().ok());

  SECTION("ids") {
    indices[1] = 4;
    CHECK(contains(why(), "page 1 of sequence 0 is page id 4, but the cache has 4 pages"));
    indices[1] = -1;
    CHECK(contains(why(), "page id -1"));
  }
  SECTION("last pages") {
    last[0] = 0;
    CHECK(contains(why(), "last_page_len of sequence 0 is 0: give 1 to page_size 16"));
    last[0] = 17;
    CHECK(contains(why(), "last_page_len of sequence 0 is 17"));
    last[0] = -3;
    CHECK(contains(why(), "last_page_len of sequence 0 is -3"));
  }
  SECTION("running sums") {
    indptr[2] = 1;
    CHECK(contains(why(), "indptr falls from 2 to 1 at sequence 1"));
    indptr[2] = 2, indptr[0] = -1;
    CHECK(contains(why(), "indptr[0] is -1"));
  }
  SECTION("running sums are checked before an id is read by them") {
    // 150 ids are promised at first, and there are 145: of the size that the last entry says.
    std::vector<std::int32_t> falling{0, 150, 143, 145}, few(145, 0), ends{7, 0, 6};
    p.page_size = 7, p.indptr = falling.data(), p.indices = few.data(), p.last_page_len = ends.data();
    CHECK(contains(why(), "indptr falls from 150 to 143 at sequence 1"));
    falling = {0, std::numeric_limits<std::int32_t>::max(), 3, 3};
    CHECK(contains(why(), "indptr falls from 2147483647 to 3"));
    falling = {0, 0, 3, std::numeric_limits<std::int32_t>::min()};
    CHECK(contains(why(), "indptr falls from 3 to -2147483648"));
  }
  SECTION("misaligned tables") {
    const auto off = [](const std::int32_t* at) {
      return reinterpret_cast<const std::int32_t*>(reinterpret_cast<std::uintptr_t>(at) + 2);
    };
    p.indptr = off(indptr);
    CHECK(contains(why(), "indptr is not aligned"));
    p.indptr = indptr, p.indices = off(indices);
    CHECK(contains(why(), "indices is not aligned"));
    p.indices = indices, p.last_page_len = off(last);
    CHECK(contains(why(), "last_page_len is not aligned"));
  }
  SECTION("pages of more tokens than can be counted") {
    p.page_size = index_t{1} << 31;
    CHECK(contains(why(), "give 0 or more of 1 to 2^31 - 1"));
    p.page_size = std::numeric_limits<index_t>::max();
    CHECK(contains(why(), "give 0 or more of 1 to 2^31 - 1"));
    p.page_size = 16, p.n_pages = std::numeric_limits<index_t>::max() / 2;
    CHECK(contains(why(), "K reaches over more than 2^60 bytes"));
    p.n_pages = 4, p.n_kv_heads = index_t{1} << 50;
    CHECK(contains(why(), "K reaches over more than 2^60 bytes"));
    const auto in_one = [&] { return flashinfer_paged_kv(rows.data(), page_order::hnd, p).validate(); };
    CHECK(in_one().code() == errc::invalid_argument);
  }
  SECTION("null tables") {
    p.indices = nullptr;
    CHECK(contains(why(), "indices is null"));
    p.last_page_len = nullptr;
    CHECK(contains(why(), "last_page_len is null"));
    p.indptr = nullptr;
    CHECK(contains(why(), "indptr is null"));
  }
  SECTION("sizes") {
    p.page_size = 0;
    CHECK(contains(why(), "4 pages of 0 tokens"));
    p.page_size = 16, p.dk = 0;
    CHECK(contains(why(), "dk 0"));
    p.dk = 8, p.n_batch = -1;
    CHECK(contains(why(), "n_batch is -1"));
  }
  SECTION("strides in elements") {
    const cell_strides dense{.page = 16 * 2 * 32, .cell = 64, .head = 32}, elements{.page = 256, .cell = 16, .head = 8};
    const auto message = [&](const cell_strides& k, const cell_strides& v) {
      return std::string(flashinfer_paged_kv(rows.data(), k, rows.data(), v, p).validate().message());
    };
    CHECK(message(dense, dense).empty());
    CHECK(contains(message(elements, dense), "the cell stride of K is 16 bytes"));
    CHECK(contains(message(dense, elements), "the cell stride of V is 16 bytes"));
    CHECK(contains(message(elements, dense), "strides are in bytes, not in elements"));
    CHECK(contains(message({.page = 1024, .cell = 64, .head = 34}, dense), "the head stride of K is 34 bytes"));
    CHECK(contains(message({.page = 8, .cell = 64, .head = 32}, dense), "the page stride of K is 8 bytes"));
    CHECK(message({.page = 1024, .cell = 64, .head = 0}, dense).empty());  // one head's rows, for all
  }
  SECTION("null rows, and none to read") {
    const float* none = nullptr;
    CHECK(contains(flashinfer_paged_kv(none, rows.data(), page_order::nhd, p).validate().message(), "K is null"));
    CHECK(contains(flashinfer_paged_kv(none, page_order::nhd, p).validate().message(), "K is null"));
    const std::int32_t empty[] = {0, 0, 0, 0};
    p.indptr = empty;
    CHECK(flashinfer_paged_kv(none, none, page_order::nhd, p).validate().ok());
    p.n_batch = 0;
    CHECK(flashinfer_paged_kv(none, none, page_order::nhd, p).validate().ok());
  }
  SECTION("a compiled head size that is another") {
    CHECK(contains(flashinfer_paged_kv<16>(rows.data(), rows.data(), page_order::hnd, p).validate().message(),
                   "compiled for dk 16"));
  }
}
