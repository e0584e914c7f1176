// The record of a decision by itself: what is written, where it stops, which buffers fit.
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "vattn/certify/decision.hpp"

using namespace vattn::test;
using vattn::chosen_rows;
using vattn::decision_result;
using vattn::index_t;
using vattn::ordinal;
using vattn::population;

namespace {

using tokens_list = std::vector<std::int32_t>;

struct record {
  explicit record(index_t places)
      : tokens(static_cast<std::size_t>(places) + 1, -1), weights(tokens.size(), -1.0f), capacity(places) {}
  [[nodiscard]] chosen_rows rows() { return {tokens.data(), weights.data(), &count, capacity}; }
  [[nodiscard]] tokens_list seen() const { return {tokens.begin(), tokens.begin() + count}; }
  tokens_list tokens;
  std::vector<float> weights;
  std::int32_t count = 0;
  index_t capacity;
};

}  // namespace

TEST_CASE("chosen rows are written in turn, with their weights, and never past the end", "[certify][decision]") {
  record r(3);
  const chosen_rows rows = r.rows();
  CHECK(static_cast<bool>(rows));
  rows.add(7, 1);
  rows.add(0, 2.5);
  CHECK(r.seen() == tokens_list{7, 0});
  rows.add(9, 0.5);
  rows.add(4, 8);  // there is no place for it
  CHECK(r.seen() == tokens_list{7, 0, 9});
  CHECK(r.weights == std::vector<float>{1, 2.5f, 0.5f, -1});
  CHECK(r.tokens.back() == -1);
  rows.clear();
  CHECK(r.count == 0);
}

TEST_CASE("the ends of a population are its sinks and its window, each once", "[certify][decision]") {
  record r(20);
  r.rows().add_ends(population(10, 20), 2, 3);
  CHECK(r.seen() == tokens_list{10, 11, 17, 18, 19});
  for (std::size_t i = 0; i < 5; ++i) CHECK(r.weights[i] == 1);
  r.rows().all(population(10, 14));  // in the place of what was there
  CHECK(r.seen() == tokens_list{10, 11, 12, 13});
  for (std::size_t i = 0; i < 4; ++i) CHECK(r.weights[i] == 1);
  const std::array<ordinal, 4> list{3, 5, 8, 9};
  r.rows().clear();
  r.rows().add_ends(population(list), 1, 0);
  r.rows().add_ends(population(list), 0, 1);
  CHECK(r.seen() == tokens_list{3, 9});
}

TEST_CASE("where nothing is recorded nothing is written", "[certify][decision]") {
  const chosen_rows none;
  CHECK_FALSE(static_cast<bool>(none));
  none.clear();
  none.add(1, 1);
  none.add_ends(population(0, 4), 1, 1);
  none.all(population(0, 4));
  CHECK_FALSE(static_cast<bool>(decision_result{}.at(0, 0, 0)));
  CHECK(decision_result{}.check({1, 2, 3}, 100).ok());
}

TEST_CASE("a decision has a line for each query and head", "[certify][decision]") {
  constexpr std::array<index_t, 4> shape{2, 3, 4, 5};
  std::vector<std::int32_t> tokens(2 * 3 * 4 * 5, -1), counts(2 * 3 * 4, 0);
  std::vector<float> weights(tokens.size(), -1.0f);
  decision_result all{{tokens.data(), shape}, {weights.data(), shape}, {counts.data(), {2, 3, 4}}};
  REQUIRE(all.check({2, 3, 4}, 5).ok());
  all.at(1, 2, 3).add(42, 0.25);
  CHECK(tokens[(1 * 3 + 2) * 4 * 5 + 3 * 5] == 42);
  CHECK(weights[(1 * 3 + 2) * 4 * 5 + 3 * 5] == 0.25f);
  CHECK(counts[(1 * 3 + 2) * 4 + 3] == 1);
  // The shorter of the two buffers is the capacity.
  decision_result narrow = all;
  narrow.weights.extents[3] = 2;
  for (int i = 0; i < 5; ++i) narrow.at(0, 0, 0).add(i, 1);
  CHECK(counts[0] == 2);
}

TEST_CASE("buffers of a decision fit in every extent and lie in one piece, or are refused", "[certify][decision]") {
  constexpr std::array<index_t, 4> shape{2, 3, 4, 5};
  std::vector<std::int32_t> tokens(2 * 3 * 4 * 5), counts(2 * 3 * 4);
  std::vector<float> weights(tokens.size());
  const decision_result good{{tokens.data(), shape}, {weights.data(), shape}, {counts.data(), {2, 3, 4}}};
  const auto fits = [](const decision_result& d, index_t n = 5) { return d.check({2, 3, 4}, n).ok(); };
  CHECK(fits(good));
  CHECK(fits(good, 4));
  CHECK_FALSE(fits(good, 6));
  for (std::size_t axis = 0; axis < 4; ++axis) {
    CAPTURE(axis);
    decision_result bad = good;
    bad.tokens.extents[axis] -= 1;
    CHECK_FALSE(fits(bad));
    bad = good;
    bad.weights.extents[axis] -= 1;
    CHECK_FALSE(fits(bad));
    if (axis == 3) continue;
    bad = good;
    bad.counts.extents[axis] -= 1;
    CHECK_FALSE(fits(bad));
  }
  decision_result bad = good;
  bad.tokens.strides[3] = 8;
  CHECK_FALSE(fits(bad));
  bad = good;
  bad.weights.strides[3] = 8;
  CHECK_FALSE(fits(bad));
  // One or two of the three.
  for (int given = 1; given < 7; ++given) {
    CAPTURE(given);
    bad = {};
    if (given & 1) bad.tokens = good.tokens;
    if (given & 2) bad.weights = good.weights;
    if (given & 4) bad.counts = good.counts;
    CHECK_FALSE(fits(bad));
  }
}

TEST_CASE("a mask has the logarithm of each weight, summed over draws of the same row", "[certify][decision]") {
  const std::vector<std::int32_t> tokens{4, 1, 4, 0};
  const std::vector<float> weights{2, 3, 2.5f, 1};
  std::vector<float> mask(6, 77.0f);
  vattn::additive_mask(tokens, weights, mask);
  constexpr float infinite = std::numeric_limits<float>::infinity();
  CHECK(mask[0] == 0);
  CHECK_THAT(static_cast<double>(mask[1]), WithinRel(std::log(3.0), 1e-6));
  CHECK_THAT(static_cast<double>(mask[4]), WithinRel(std::log(4.5), 1e-6));
  for (const std::size_t none : {2u, 3u, 5u}) CHECK(mask[none] == -infinite);
}
