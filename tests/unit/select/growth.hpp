// What every index owes its users, checked on random keys.
#pragma once

#include <random>
#include <vattn/vattn.hpp>
#include <vector>

#include "support/catch.hpp"

namespace vattn::test {

/// Random keys and a query.
struct vectors {
  index_t n, dim;
  std::vector<float> keys, query;
  vectors(index_t count, index_t width, unsigned seed) : n(count), dim(width) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (index_t i = 0; i < n * dim; ++i) keys.push_back(normal(random));
    for (index_t j = 0; j < dim; ++j) query.push_back(normal(random));
  }
  [[nodiscard]] std::span<const float> key(index_t i) const {
    return std::span<const float>(keys).subspan(static_cast<std::size_t>(i * dim), static_cast<std::size_t>(dim));
  }
};

template <class Index>
std::vector<float> scores_of(const Index& index, const vectors& v, index_t first = 0) {
  std::vector<float> scores(static_cast<std::size_t>(index.size() - first)), scratch(index.scratch_size());
  index.score(v.query.data(), first, scores, {}, scratch);
  return scores;
}

/// What every index owes: state that depends on its keys alone, however they came, and survives a file.
template <class Index>
void check_growth(const Index& empty, const vectors& v) {
  static_assert(key_index<Index>);
  static_assert(archivable<Index>);
  Index whole = empty, grown = empty;
  for (index_t i = 0; i < v.n; ++i) whole.append(v.key(i));
  for (index_t i = 0; i < v.n / 2; ++i) grown.append(v.key(i));
  for (index_t i = 0; i < 9; ++i) grown.append(v.key(0));  // a draft that is rejected
  grown.truncate(v.n / 2);
  for (index_t i = v.n / 2; i < v.n; ++i) grown.append(v.key(i));
  CHECK(scores_of(whole, v) == scores_of(grown, v));
  CHECK(save(whole) == save(grown));
  const std::vector<float> all = scores_of(whole, v), tail = scores_of(whole, v, 7);
  CHECK(std::vector<float>(all.begin() + 7, all.end()) == tail);
  Index loaded;
  REQUIRE(load(save(whole), loaded).ok());
  CHECK(scores_of(loaded, v) == all);
  std::vector<std::byte> cut = save(whole);
  cut.pop_back();
  CHECK_FALSE(load(cut, loaded).ok());
  whole.truncate(v.n + 5);
  CHECK(whole.size() == v.n);
  whole.clear();
  CHECK(whole.size() == 0);
  CHECK(whole.bytes() == 0);
}

}  // namespace vattn::test
