// Covering arrays: few rows such that every wanted combination of values stands in one of them. Greedy, row by row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace vattn::product {

inline constexpr int unset = -1;

/// The level of each axis, or `unset` while it is being made.
using levels = std::vector<int>;

/// What is to be covered. `sizes[a]` levels of axis a; every pair of levels of two axes, and of the two `corner` axes
/// every triple with each axis of `carried`. `allowed(row)`: whether a row, of which some levels may be unset, can
/// still become one that is served. `weight(axis, level)`: how gladly a level is taken where it covers no more than
/// others.
struct covering_problem {
  std::vector<int> sizes;
  std::pair<int, int> corner{0, 1};
  std::vector<int> carried;
  std::function<bool(const levels&)> allowed;
  std::function<double(int, int)> weight = [](int, int) { return 1.0; };
  unsigned seed = 1;
};

/// A pair (a third axis of −1) or a triple of levels.
struct combination {
  int axis[3] = {unset, unset, unset}, level[3] = {unset, unset, unset};
  [[nodiscard]] bool in(const levels& row) const {
    for (int i = 0; i < 3; ++i) {
      if (axis[i] != unset && row[static_cast<std::size_t>(axis[i])] != level[i]) return false;
    }
    return true;
  }
};

class covering_array {
 public:
  explicit covering_array(covering_problem p) : p_(std::move(p)), axes_(static_cast<int>(p_.sizes.size())) {
    for (int a = 0, at = 0; a < axes_; at += size(a), ++a) offset_.push_back(at), values_ = at + size(a);
    pair_.assign(static_cast<std::size_t>(values_) * static_cast<std::size_t>(values_), 0);
    triple_.assign(static_cast<std::size_t>(size(p_.corner.first) * size(p_.corner.second) * values_), 0);
    build();
  }

  [[nodiscard]] const std::vector<levels>& rows() const { return rows_; }
  /// Combinations that no served row can hold, as far as was tried.
  [[nodiscard]] const std::vector<combination>& impossible() const { return impossible_; }

  /// Every pair and every triple that is wanted.
  template <class Visit>
  void for_each_wanted(Visit&& visit) const {
    for (int a = 0; a < axes_; ++a) {
      for (int b = a + 1; b < axes_; ++b) {
        for (int i = 0; i < size(a); ++i) {
          for (int j = 0; j < size(b); ++j) visit(combination{{a, b, unset}, {i, j, unset}});
        }
      }
    }
    const auto [x, y] = p_.corner;
    for (const int c : p_.carried) {
      for (int i = 0; i < size(x); ++i) {
        for (int j = 0; j < size(y); ++j) {
          for (int k = 0; k < size(c); ++k) visit(combination{{x, y, c}, {i, j, k}});
        }
      }
    }
  }

 private:
  [[nodiscard]] int size(int axis) const { return p_.sizes[static_cast<std::size_t>(axis)]; }
  [[nodiscard]] int value(int axis, int level) const { return offset_[static_cast<std::size_t>(axis)] + level; }
  [[nodiscard]] char& pair(int v, int w) {
    return pair_[static_cast<std::size_t>(std::min(v, w)) * static_cast<std::size_t>(values_) +
                 static_cast<std::size_t>(std::max(v, w))];
  }
  [[nodiscard]] char& triple(int x, int y, int v) {
    return triple_[static_cast<std::size_t>((x * size(p_.corner.second) + y) * values_ + v)];
  }
  [[nodiscard]] bool covered(const combination& c) {
    if (c.axis[2] == unset) return pair(value(c.axis[0], c.level[0]), value(c.axis[1], c.level[1])) != 0;
    return triple(c.level[0], c.level[1], value(c.axis[2], c.level[2])) != 0;
  }

  // What `level` of `axis` would newly cover with the levels that are set.
  [[nodiscard]] int gain(const levels& row, int axis, int level) {
    int count = 0;
    const int v = value(axis, level);
    for (int a = 0; a < axes_; ++a) {
      const int l = row[static_cast<std::size_t>(a)];
      if (a != axis && l != unset) count += pair(v, value(a, l)) == 0;
    }
    const auto [x, y] = p_.corner;
    const int i = axis == x ? level : row[static_cast<std::size_t>(x)];
    const int j = axis == y ? level : row[static_cast<std::size_t>(y)];
    if (i == unset || j == unset) return count;
    for (const int c : p_.carried) {
      const int k = axis == c ? level : row[static_cast<std::size_t>(c)];
      if (k != unset && (axis == c || axis == x || axis == y)) count += triple(i, j, value(c, k)) == 0;
    }
    return count;
  }

  [[nodiscard]] bool fill(levels& row, std::mt19937& random) {
    std::vector<int> order;
    for (int a = 0; a < axes_; ++a) {
      if (row[static_cast<std::size_t>(a)] == unset) order.push_back(a);
    }
    std::shuffle(order.begin(), order.end(), random);
    for (const int axis : order) {
      int best = unset;
      double most = -1;
      for (int level = 0; level < size(axis); ++level) {
        row[static_cast<std::size_t>(axis)] = level;
        if (!p_.allowed(row)) continue;
        row[static_cast<std::size_t>(axis)] = unset;
        const double luck = std::uniform_real_distribution<double>(0, 1)(random);
        const double worth = gain(row, axis, level) + luck * p_.weight(axis, level);
        if (worth > most) most = worth, best = level;
      }
      row[static_cast<std::size_t>(axis)] = best;
      if (best == unset) return false;
    }
    return true;
  }

  void take(const levels& row) {
    rows_.push_back(row);
    for (int a = 0; a < axes_; ++a) {
      for (int b = a + 1; b < axes_; ++b)
        pair(value(a, row[static_cast<std::size_t>(a)]), value(b, row[static_cast<std::size_t>(b)])) = 1;
    }
    for (const int c : p_.carried) {
      triple(row[static_cast<std::size_t>(p_.corner.first)], row[static_cast<std::size_t>(p_.corner.second)],
             value(c, row[static_cast<std::size_t>(c)])) = 1;
    }
  }

  void build() {
    std::mt19937 random(p_.seed);
    std::vector<combination> open;
    for_each_wanted([&](const combination& c) { open.push_back(c); });
    std::shuffle(open.begin(), open.end(), random);
    for (const combination& c : open) {
      if (covered(c)) continue;
      levels row(static_cast<std::size_t>(axes_), unset), best;
      for (int i = 0; i < 3; ++i) {
        if (c.axis[i] != unset) row[static_cast<std::size_t>(c.axis[i])] = c.level[i];
      }
      bool made = false;
      if (p_.allowed(row)) {
        for (int attempt = 0; attempt < 20 && !made; ++attempt) made = fill(best = row, random);
      }
      if (made) {
        take(best);
      } else {
        impossible_.push_back(c);
      }
    }
  }

  covering_problem p_;
  int axes_, values_ = 0;
  std::vector<int> offset_;
  std::vector<char> pair_, triple_;
  std::vector<levels> rows_;
  std::vector<combination> impossible_;
};

}  // namespace vattn::product
