// Changes to an index beside a cache, in any number and order, against one that saw the rows once.
#pragma once

#include <random>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "vattn/index/kv_index.hpp"

namespace vattn::test {

inline bool same(const kv_index& a, const kv_index& b) {
  if (a.size() != b.size() || a.bits() != b.bits()) return false;
  for (index_t h = 0; h < a.shape().n_kv_heads; ++h) {
    const auto x = a.codes(h).blocks(), y = b.codes(h).blocks();
    const auto u = a.codes(h).coded(), v = b.codes(h).coded();
    if (!std::equal(x.begin(), x.end(), y.begin(), y.end()) || !std::equal(u.begin(), u.end(), v.begin(), v.end()))
      return false;
  }
  return true;
}

/// Random appends, overwrites, erasures and truncations of an index of few cells.
inline void check_index_changes(int changes) {
  problem<float> p(shape{.heads = 2, .kv_heads = 2, .n = 900, .dk = 16, .dv = 8});
  kv_index index({.n_kv_heads = 2, .dk = 16, .dv = 8, .bits = 2});
  REQUIRE(index.build(p.cache()).ok());
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<bool> empty(900, false);
  const auto view = [&](index_t n) {
    kv_shape s = p.cache_shape();
    s.n_tokens = n;
    const kv_strides k{.token = 64, .head = 64 * 900}, v{.token = 32, .head = 32 * 900};
    return kv_view<float>(p.k.data(), k, p.v.data(), v, s);
  };
  index_t n = 900;
  for (int step = 0; step < changes; ++step) {
    const auto cell = static_cast<index_t>(random() % 900);
    switch (random() % 4) {
      case 0:  // another token in a cell
        if (cell >= n) break;
        for (index_t h = 0; h < 2; ++h) {
          for (index_t j = 0; j < 16; ++j) p.k[static_cast<std::size_t>((h * 900 + cell) * 16 + j)] = normal(random);
          for (index_t j = 0; j < 8; ++j) p.v[static_cast<std::size_t>((h * 900 + cell) * 8 + j)] = normal(random);
        }
        REQUIRE(index.update(view(n), cell, cell + 1).ok());
        empty[static_cast<std::size_t>(cell)] = false;
        break;
      case 1:
        if (cell >= n) break;
        index.erase(cell, cell + 1);
        empty[static_cast<std::size_t>(cell)] = true;
        break;
      case 2:
        if (random() % 64 == 0) index.truncate(n = cell);
        break;
      default:
        if (n == 900) break;
        n = std::min<index_t>(900, n + static_cast<index_t>(random() % 20));
        for (index_t c = index.size(); c < n; ++c) empty[static_cast<std::size_t>(c)] = false;
        REQUIRE(index.append_from(view(n)).ok());
    }
  }
  kv_index again;
  REQUIRE(load(save(index), again).ok());
  CHECK(same(index, again));
  REQUIRE(again.update(view(n), 0, n).ok());
  for (index_t c = 0; c < n; ++c) {
    if (empty[static_cast<std::size_t>(c)]) again.erase(c, c + 1);
  }
  CHECK(same(index, again));
}

}  // namespace vattn::test
