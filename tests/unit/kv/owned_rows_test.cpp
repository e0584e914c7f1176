// Rows of several heads that grow: what they hold, and where they lie.
#include "vattn/store/owned_rows.hpp"

#include "support/catch.hpp"

namespace {

using namespace vattn;

constexpr index_t heads = 3, width = 64;

float value(index_t h, index_t i, index_t j) { return static_cast<float>(h * 1000003 + i * 64 + j); }

void fill(detail::owned_rows<float>& rows, index_t from, index_t to) {
  for (index_t h = 0; h < heads; ++h) {
    for (index_t i = from; i < to; ++i) {
      for (index_t j = 0; j < width; ++j) rows.row(h, i)[j] = value(h, i, j);
    }
  }
}
bool holds(const detail::owned_rows<float>& rows, index_t n) {
  for (index_t h = 0; h < heads; ++h) {
    for (index_t i = 0; i < n; ++i) {
      for (index_t j = 0; j < width; ++j) {
        if (rows.row(h, i)[j] != value(h, i, j)) return false;
      }
    }
  }
  return true;
}

}  // namespace

TEST_CASE("owned rows are kept as they grow, from memory that heads share to memory of their own", "[kv][store]") {
  detail::owned_rows<float> rows(heads, width);
  constexpr index_t row_bytes = width * static_cast<index_t>(sizeof(float));
  constexpr auto own = static_cast<index_t>(page_buffer::huge) / row_bytes;  // rows of one huge page
  index_t n = 0;
  for (const index_t capacity : {index_t{1}, index_t{100}, index_t{99}, own - 1, own, own + 1, 3 * own}) {
    REQUIRE(rows.reserve(capacity, n));
    REQUIRE(holds(rows, n));
    const index_t before = n;
    n = std::max(n, capacity);
    fill(rows, before, n);
    REQUIRE(holds(rows, n));
    for (index_t h = 0; h < heads; ++h) {  // large ones begin a huge page of their own
      const bool begins = reinterpret_cast<std::uintptr_t>(rows.row(h, 0)) % page_buffer::huge == 0;
      if (capacity >= own) CHECK(begins);
      if (capacity < own && h > 0) CHECK(rows.row(h, 0) - rows.row(h - 1, 0) >= n * width);
    }
  }
  const detail::owned_rows<float> moved = std::move(rows);
  CHECK(holds(moved, n));
}

TEST_CASE("small heads lie one after another, so that they share huge pages", "[kv][store]") {
  detail::owned_rows<float> rows(heads, width);
  REQUIRE(rows.reserve(4096, 0));  // 1 MiB each
  CHECK(rows.row(1, 0) == rows.row(0, 4096));
  CHECK(rows.row(2, 0) == rows.row(1, 4096));
  CHECK(reinterpret_cast<std::uintptr_t>(rows.row(0, 0)) % 64 == 0);
}
