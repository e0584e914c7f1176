// Codes by cell: read back by the format's words they estimate products within their stated error, whatever came
// before.
#include "vattn/index/cell_codes.hpp"

#include <cmath>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "vattn/index/cell_tables.hpp"

namespace {

using namespace vattn;

std::vector<float> normal(index_t dim, std::mt19937& random, float size = 1, float shift = 0) {
  std::normal_distribution<float> draw;
  std::vector<float> x(static_cast<std::size_t>(dim));
  for (float& v : x) v = shift + size * draw(random);
  return x;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double s = 0;
  for (std::size_t i = 0; i < a.size(); ++i) s += static_cast<double>(a[i]) * b[i];
  return s;
}

// In units that are twice the largest of some keys, as an index takes them, or `coarse` times that for scales.
cell_codes made(index_t dim, int bits, const std::vector<float>& mean, float coarse = 1) {
  cell_codes c(dim, bits, 7);
  c.measure_from(mean, {});
  std::mt19937 random(8);
  code_units units{.scale = 0, .radius = 0, .reach = 2};
  for (int i = 0; i < 200; ++i) {
    const cell_codes::measured m = c.measure(normal(dim, random, 1.0f, 0.2f));
    units.scale = std::max(units.scale, 2 * coarse * m.scale), units.radius = std::max(units.radius, 2 * m.radius);
  }
  c.measure_from(mean, units);
  return c;
}

}  // namespace

TEST_CASE("scores of codes are products up to the stated error, for every number of bits", "[index]") {
  std::mt19937 random(1);
  for (const index_t dim : {16, 64, 80, 128}) {
    double before = 1e30;
    for (int bits = 1; bits <= 4; ++bits) {
      const std::vector<float> mean = normal(dim, random);
      cell_codes c = made(dim, bits, mean);
      constexpr index_t n = 300;
      REQUIRE(c.resize(n));
      const std::vector<float> q = normal(dim, random, 0.3f);
      std::vector<float> rotated(c.layout().width);
      const float offset = c.rotate(q.data(), rotated);
      CHECK(std::abs(offset - dot(q, mean)) < 1e-4 * (1 + std::abs(dot(q, mean))));
      double miss = 0, stated = 0;
      const double norm = std::sqrt(dot(q, q));
      for (index_t i = 0; i < n; ++i) {
        const std::vector<float> key = normal(dim, random, 1.0f, 0.2f);
        REQUIRE(c.set(i, key, 2.0f + static_cast<float>(i)));
        REQUIRE(c.has_code(i));
        const double off = std::abs(static_cast<double>(c.score(i, rotated)) + offset - dot(q, key));
        REQUIRE(off <= norm * c.radius(i) * (1 + 1e-4) + 1e-4);
        miss += off * off;
        stated += std::pow(norm * c.radius(i), 2) / static_cast<double>(c.layout().width);
        REQUIRE(std::abs(c.reach(i) / (2.0f + static_cast<float>(i)) - 1) < 2e-3f);
      }
      CAPTURE(dim, bits, miss, stated);
      CHECK(miss < 1.4 * stated);
      CHECK(miss > 0.6 * stated);
      CHECK(miss < 0.6 * before);  // a bit more is worth it
      before = miss;
    }
  }
}

TEST_CASE("what is stated of a code has the rounding of its lengths in it, however coarse their units are", "[index]") {
  std::mt19937 random(6);
  for (const float coarse : {1.0f, 20.0f, 50.0f, 150.0f}) {
    const index_t dim = 64;
    cell_codes c = made(dim, 3, std::vector<float>(static_cast<std::size_t>(dim)), coarse);
    REQUIRE(c.resize(1));
    std::vector<float> rotated(c.layout().width);
    for (int i = 0; i < 300; ++i) {
      const std::vector<float> key = normal(dim, random), q = i % 2 == 0 ? key : normal(dim, random);
      if (!c.set(0, key, 1)) {  // its error is beyond the units
        REQUIRE(coarse > 100);
        continue;
      }
      static_cast<void>(c.rotate(q.data(), rotated));
      REQUIRE(std::abs(static_cast<double>(c.score(0, rotated)) - dot(q, key)) <=
              std::sqrt(dot(q, q)) * c.radius(0) * (1 + 1e-4) + 1e-4);
    }
  }
}

TEST_CASE("a cell takes so many bytes", "[index]") {
  CHECK(cell_layout(128, 2).block_bytes() == 37 * 64);
  CHECK(cell_layout(64, 2).block_bytes() == 21 * 64);
  CHECK(cell_layout(64, 1).block_bytes() == 12 * 64);
}

TEST_CASE("what a cell holds does not depend on what was written before or beside it", "[index]") {
  std::mt19937 random(2);
  const index_t dim = 24;
  for (const int bits : {1, 2, 3, 4}) {
    const std::vector<float> mean = normal(dim, random);
    cell_codes c = made(dim, bits, mean);
    std::vector<std::vector<float>> keys;  // empty: no code
    for (int step = 0; step < 20000; ++step) {
      const auto size = static_cast<index_t>(keys.size());
      const auto cell = static_cast<index_t>(random() % static_cast<unsigned>(size + 1));
      switch (random() % 8) {
        case 0:
          if (size > 0 && random() % 50 == 0) {
            REQUIRE(c.resize(cell));
            keys.resize(static_cast<std::size_t>(cell));
          }
          break;
        case 1:
          if (cell < size) c.erase(cell), keys[static_cast<std::size_t>(cell)].clear();
          break;
        default: {
          if (cell == size && size >= 500) break;
          if (cell == size) {
            REQUIRE(c.resize(size + 1));
            keys.emplace_back();
          }
          auto& key = keys[static_cast<std::size_t>(cell)];
          key = normal(dim, random);
          if (random() % 20 == 0) key[3] = std::numeric_limits<float>::quiet_NaN();
          if (!c.set(cell, key, 1)) key.clear();
        }
      }
    }
    cell_codes again = made(dim, bits, mean);
    REQUIRE(again.resize(static_cast<index_t>(keys.size())));
    index_t codes = 0;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (keys[i].empty()) continue;
      REQUIRE(again.set(static_cast<index_t>(i), keys[i], 1));
      ++codes;
    }
    CHECK(c.codes() == codes);
    CHECK(std::equal(c.coded().begin(), c.coded().end(), again.coded().begin(), again.coded().end()));
    CHECK(std::equal(c.blocks().begin(), c.blocks().end(), again.blocks().begin(), again.blocks().end()));
  }
}

TEST_CASE("keys and values that units cannot express have no code", "[index]") {
  std::mt19937 random(3);
  const index_t dim = 32;
  cell_codes c = made(dim, 2, std::vector<float>(static_cast<std::size_t>(dim)));
  REQUIRE(c.resize(8));
  constexpr float infinity = std::numeric_limits<float>::infinity();
  auto key = normal(dim, random);
  CHECK(c.set(0, key, 1));
  CHECK_FALSE(c.set(0, key, infinity));
  CHECK_FALSE(c.has_code(0));
  CHECK_FALSE(c.set(1, key, std::numeric_limits<float>::quiet_NaN()));
  CHECK_FALSE(c.set(2, normal(dim, random, 100), 1));
  CHECK_FALSE(c.set(3, normal(dim, random, 1e30f), 1));
  key[0] = infinity;
  CHECK_FALSE(c.set(4, key, 1));
  CHECK(c.set(5, std::vector<float>(static_cast<std::size_t>(dim)), 0));  // nothing to code, and no error
  CHECK(c.codes() == 1);
}

TEST_CASE("the scan's scores are those of the words, and the same for every instruction set", "[index]") {
  std::mt19937 random(4);
  for (const index_t dim : {16, 64, 128}) {
    for (int bits = 1; bits <= 4; ++bits) {
      for (const index_t heads : {1, 2, 3, 4, 5, 8}) {
        cell_codes c = made(dim, bits, normal(dim, random));
        constexpr index_t n = 192;
        REQUIRE(c.resize(n));
        for (index_t i = 0; i < n; ++i) {
          const std::vector<float> key = normal(dim, random);
          const cell_codes::measured m = c.measure(key);
          CAPTURE(dim, bits, i, m.scale, m.radius);
          REQUIRE(c.set(i, key, 0.5f + 0.1f * static_cast<float>(i)));
        }
        const std::vector<float> q = normal(heads * dim, random, 0.4f);
        cell_tables tables;
        std::vector<std::uint8_t> entries(cell_tables::table_bytes(c.layout(), heads));
        std::vector<float> scratch(cell_tables::scratch_size(c.layout(), heads));
        REQUIRE(tables.make(c, q.data(), heads, entries, scratch));
        tables.query.scan.numbers = random();
        cell_thresholds t{.base = 0.05, .z = 2, .away = 1};
        for (std::size_t h = 0; h < 8; ++h) t.plain[h] = 1 + 0.1 * static_cast<double>(h), t.floor[h] = 3;
        tables.set(t);
        std::vector<float> rotated(c.layout().width);
        double miss = 0;
        for (index_t block = 0; block < 3; ++block) {
          kernel::scanned_cells portable;
          kernel::detail::scan_cells_portable(tables.query, c.view(), block, portable);
          for (const kernel::isa how : kernel::isa_levels) {
            if (how > kernel::widest_isa()) continue;
            kernel::scanned_cells b;
            kernel::score_cells(how, tables.query, c.view(), block, b);
            REQUIRE(b.even == portable.even);
            REQUIRE(b.odd == portable.odd);
            for (index_t h = 0; h < heads; ++h)
              REQUIRE(std::equal(std::begin(b.score[h]), std::end(b.score[h]), std::begin(portable.score[h])));
          }
          for (index_t h = 0; h < heads; ++h) {
            static_cast<void>(c.rotate(q.data() + h * dim, rotated));
            for (int i = 0; i < 64; ++i) {
              const double off =
                  static_cast<double>(tables.score(portable.score[h][cell_codes::lane(static_cast<std::size_t>(i))]) -
                                      c.score(block * 64 + i, rotated));
              miss += off * off;
            }
          }
        }
        const double rounding = std::sqrt(miss / static_cast<double>(n * heads));
        CAPTURE(dim, bits, heads, rounding, tables.table_error, tables.step);
        CHECK(rounding < 2.0 * static_cast<double>(tables.table_error) + static_cast<double>(tables.step));
      }
    }
  }
}

TEST_CASE("a scan takes each cell as often as its level says, nested for lower thresholds", "[index]") {
  std::mt19937 random(5);
  const index_t dim = 64, heads = 3, n = 640;
  cell_codes c = made(dim, 2, std::vector<float>(static_cast<std::size_t>(dim)));
  REQUIRE(c.resize(n));
  for (index_t i = 0; i < n; ++i) REQUIRE(c.set(i, normal(dim, random), 1 + static_cast<float>(i % 7)));
  const std::vector<float> q = normal(heads * dim, random, 0.15f);
  cell_tables tables;
  std::vector<std::uint8_t> entries(cell_tables::table_bytes(c.layout(), heads));
  std::vector<float> scratch(cell_tables::scratch_size(c.layout(), heads));
  REQUIRE(tables.make(c, q.data(), heads, entries, scratch));
  cell_thresholds low{.base = 0.1, .z = 1.5, .away = 0.5}, high;
  low.plain = {2, 2.5, 3}, low.floor = {3, 3, 2.5};
  high = low;
  high.base = 0.02;
  for (double& a : high.plain) a += 0.7;
  for (double& f : high.floor) f += 0.7;
  const std::size_t capacity = 1024;
  std::vector<ordinal> cell(capacity);
  std::vector<std::int16_t> reach(capacity), radius(capacity), noise(capacity), score(3 * capacity), level(capacity);
  std::vector<std::uint64_t> seen(10, ~std::uint64_t{0});
  seen[3] = 0x00ff00ff00ff00ffu, seen[5] = 0;
  std::vector<int> taken(static_cast<std::size_t>(n));
  std::vector<double> stated(static_cast<std::size_t>(n), -1);
  constexpr int draws = 20000;
  for (int d = 0; d < draws; ++d) {
    tables.query.scan.numbers = (std::uint64_t{random()} << 32) | random();
    kernel::cell_candidates found{cell.data(), reach.data(), radius.data(), noise.data(), score.data(), 1024, 0};
    tables.set(low);
    REQUIRE(kernel::scan_cells(kernel::active_isa(), tables.query, c.view(), 0, 10, seen.data(), found));
    tables.set(high);
    kernel::cell_levels(kernel::active_isa(), tables.query, found, level.data());
    for (index_t i = 0; i < found.size; ++i) {
      const auto at = static_cast<std::size_t>(i);
      REQUIRE((seen[cell[at] / 64] >> (cell[at] % 64) & 1) == 1);
      if (level[at] + noise[at] < 0) continue;
      float p[kernel::block_rows];
      kernel::inclusion(kernel::active_isa(), tables.query.scan.noise_factor, std::min<int>(level[at], 0), 1, p);
      stated[cell[at]] = static_cast<double>(p[0]);
      ++taken[cell[at]];
    }
  }
  double square = 0;
  int counted = 0;
  for (std::size_t i = 0; i < taken.size(); ++i) {
    if (stated[i] < 0 || stated[i] >= 1) continue;
    const double expected = draws * stated[i];
    square += std::pow(taken[i] - expected, 2) / (expected * (1 - stated[i]));
    ++counted;
  }
  CAPTURE(square, counted);
  REQUIRE(counted > 400);
  CHECK(square < counted + 5 * std::sqrt(2.0 * counted));
  CHECK(square > counted - 5 * std::sqrt(2.0 * counted));
}
