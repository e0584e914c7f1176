// Codes of keys in blocks: read back by the format's words, they estimate without bias and within their stated radius.
#include "vattn/sketch/block_codes.hpp"

#include <cmath>
#include <random>
#include <vector>

#include "support/catch.hpp"

namespace {

using namespace vattn;
using sketch::block_codes;

std::vector<float> normal(index_t dim, std::mt19937& random, float size = 1) {
  std::normal_distribution<float> draw;
  std::vector<float> x(static_cast<std::size_t>(dim));
  for (float& v : x) v = size * draw(random);
  return x;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double s = 0;
  for (std::size_t i = 0; i < a.size(); ++i) s += static_cast<double>(a[i]) * b[i];
  return s;
}

// What a row's bytes say: its groups' numbers, α in whole units, log reach, radius.
struct decoded {
  std::vector<unsigned> numbers;
  int alpha = 0, reach = 0, radius = 0;
  bool operator==(const decoded&) const = default;
};
decoded decode(const block_codes& c, index_t row) {
  const kernel::code_blocks v = c.view();
  const std::byte* at = v.first + static_cast<std::size_t>(row / 64) * v.stride;
  const auto key = static_cast<int>(row % 64), lane = key % 2 * 32 + key / 2;
  const auto plane = [&](int p) { return std::to_integer<unsigned>(at[p * 64 + key]); };
  decoded d;
  for (int g = 0; g < v.planes; ++g) d.numbers.push_back(plane(g) & 63u);
  for (int e = 0; e < v.groups - v.planes; ++e)
    d.numbers.push_back((plane(3 * e) >> 6) + 4 * (plane(3 * e + 1) >> 6) + 16 * (plane(3 * e + 2) >> 6));
  const auto number = [&](int array) {
    std::int16_t x;
    std::memcpy(&x, at + v.planes * 64 + array * 128 + lane * 2, 2);
    return static_cast<int>(x);
  };
  d.alpha = number(0), d.reach = number(1), d.radius = number(2);
  return d;
}

struct query {
  query(const block_codes& c, std::vector<float> values) : q(std::move(values)) {
    rotated.resize(c.width());
    table.resize(static_cast<std::size_t>(c.groups()) * 64);
    c.tabulate(q.data(), rotated, table);
    for (const float x : q) norm += static_cast<double>(x) * x;
    norm = std::sqrt(norm);
  }
  // ⟨c, Rq⟩
  [[nodiscard]] double product(const decoded& d) const {
    double s = 0;
    for (std::size_t g = 0; g < d.numbers.size(); ++g) s += static_cast<double>(table[g * 64 + d.numbers[g]]);
    return s;
  }
  std::vector<float> q, rotated, table;
  double norm = 0;
};

double estimated_score(const block_codes& c, const query& q, index_t row) {
  const decoded d = decode(c, row);
  return d.alpha * static_cast<double>(c.alpha_unit()) / 32767 * q.product(d);
}

void add(block_codes& c, const std::vector<float>& key, float distance = 1) { REQUIRE(c.append(key, distance)); }

}  // namespace

TEST_CASE("errors are within the stated radius, for every head size", "[sketch][block_codes]") {
  for (index_t dim = 1; dim <= 300; dim += dim < 20 ? 1 : 7) {
    std::mt19937 random(static_cast<unsigned>(dim));
    block_codes c(dim, static_cast<std::uint64_t>(dim));
    const std::vector<float> mean = normal(dim, random);
    c.recentre(mean, 1);
    const query q(c, normal(dim, random));
    std::vector<std::vector<float>> keys;
    const auto with_mean = [&](std::vector<float> x, float by) {
      for (std::size_t j = 0; j < x.size(); ++j) x[j] = mean[j] + by * x[j];
      return x;
    };
    for (int i = 0; i < 20; ++i) keys.push_back(with_mean(normal(dim, random), 1));
    for (const float by : {1.0f, -3.0f, 20.0f, 1e-3f}) keys.push_back(with_mean(q.q, by));  // along the query
    std::vector<float> axis(static_cast<std::size_t>(dim));
    axis[0] = 5;
    keys.push_back(with_mean(axis, 1));
    keys.push_back(mean);
    keys.emplace_back(static_cast<std::size_t>(dim), 0.0f);
    for (const auto& k : keys) add(c, k);
    CAPTURE(dim);
    CHECK(c.size() == static_cast<index_t>(keys.size()));
    double worst = 0, offset = dot(q.q, mean);
    CHECK_THAT(c.offset(q.rotated), test::WithinAbs(offset, 1e-4 * (1 + q.norm * std::sqrt(dot(mean, mean)))));
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const auto row = static_cast<index_t>(i);
      const double error = std::abs(estimated_score(c, q, row) - (dot(q.q, keys[i]) - offset));
      // α is a whole number of units.
      const double rounding = static_cast<double>(c.alpha_unit()) / 32767 * std::abs(q.product(decode(c, row)));
      const double size = q.norm * (std::sqrt(dot(keys[i], keys[i])) + std::sqrt(dot(mean, mean)));
      worst = std::max(worst, error - q.norm * static_cast<double>(c.radius(row)) - rounding - 1e-5 * size);
    }
    CHECK(worst <= 0);
  }
}

TEST_CASE("a query along what a code misses finds the radius sharp", "[sketch][block_codes]") {
  for (const index_t dim : {16, 64, 128, 256}) {
    std::mt19937 random(static_cast<unsigned>(dim));
    block_codes c(dim, 3);
    c.recentre(std::vector<float>(static_cast<std::size_t>(dim)), 1);
    const std::vector<float> key = normal(dim, random);
    add(c, key);
    // y − αc back in the key's space, coordinate by coordinate: its product with each axis.
    std::vector<float> residual(static_cast<std::size_t>(dim));
    for (std::size_t j = 0; j < residual.size(); ++j) {
      std::vector<float> axis(residual.size());
      axis[j] = 1;
      residual[j] = key[j] - static_cast<float>(estimated_score(c, query(c, axis), 0));
    }
    const double rho = static_cast<double>(c.radius(0)), norm = std::sqrt(dot(residual, residual));
    CHECK(norm <= rho * 1.001);
    CHECK(norm >= rho * 0.98);  // bfloat16, rounded up, and α rounded
    const query q(c, residual);
    CHECK(std::abs(estimated_score(c, q, 0) - dot(residual, key)) <= q.norm * rho * 1.001);
    CHECK(std::abs(estimated_score(c, q, 0) - dot(residual, key)) >= q.norm * rho * 0.97);
  }
}

TEST_CASE("estimates are without bias over rotations", "[sketch][block_codes]") {
  for (const index_t dim : {16, 32, 64, 80, 128, 200}) {
    std::mt19937 random(static_cast<unsigned>(dim));
    const std::vector<float> mean = normal(dim, random), q = normal(dim, random);
    std::vector<float> key = normal(dim, random);
    for (std::size_t j = 0; j < key.size(); ++j) key[j] += 0.2f * q[j];
    const double want = dot(q, key) - dot(q, mean);
    constexpr int seeds = 3000;
    double sum = 0, square = 0;
    for (int seed = 0; seed < seeds; ++seed) {
      block_codes c(dim, static_cast<std::uint64_t>(seed) + 1000);
      c.recentre(mean, 1);
      add(c, key);
      const double error = estimated_score(c, query(c, q), 0) - want;
      sum += error, square += error * error;
    }
    const double deviation = std::sqrt(square / seeds);
    CAPTURE(dim, want, sum / seeds, deviation);
    CHECK(std::abs(sum / seeds) < 4.5 * deviation / std::sqrt(seeds));
    CHECK(deviation > 0.01);
  }
}

TEST_CASE("hostile keys have an honest radius", "[sketch][block_codes]") {
  constexpr float inf = std::numeric_limits<float>::infinity();
  for (const index_t dim : {16, 64, 128}) {
    std::mt19937 random(static_cast<unsigned>(dim));
    const query plain(block_codes(dim, 2), normal(dim, random));
    const auto key_of = [&](float size) { return normal(dim, random, size); };
    for (const float size : {1e-30f, 1e-20f, 1e-10f, 1.0f, 1e10f, 1e16f, 1e17f, 3e17f, 1e18f, 3e18f, 1e19f}) {
      block_codes c(dim, 2);
      c.recentre(std::vector<float>(static_cast<std::size_t>(dim)), 1);
      for (int repeat = 0; repeat < 10; ++repeat) {
        const std::vector<float> key = key_of(size);
        add(c, key);
        const double error = std::abs(estimated_score(c, plain, repeat) - dot(plain.q, key));
        const double rounding =
            static_cast<double>(c.alpha_unit()) / 32767 * std::abs(plain.product(decode(c, repeat)));
        CAPTURE(dim, size, c.radius(repeat));
        CHECK(error <= plain.norm * static_cast<double>(c.radius(repeat)) * (1 + 1e-4) + rounding + 1e-18);
      }
    }
    block_codes c(dim, 2);
    c.recentre(std::vector<float>(static_cast<std::size_t>(dim)), 1);
    const std::vector<float> zero(static_cast<std::size_t>(dim));
    add(c, zero);
    CHECK(c.radius(0) == 0);
    CHECK(estimated_score(c, plain, 0) == 0);
    add(c, key_of(1));
    CHECK(std::isfinite(c.largest_radius(0)));
    for (const float bad : {std::nanf(""), inf, -inf, 3e38f}) {
      std::vector<float> key = key_of(1);
      key[static_cast<std::size_t>(dim / 2)] = bad;
      const index_t row = c.size();
      add(c, key);
      CHECK(c.radius(row) == inf);
      CHECK(c.largest_radius(0) == inf);
      c.pop();
      CHECK(std::isfinite(c.largest_radius(0)));
      add(c, key_of(1), bad == 3e38f ? inf : bad);  // its value is not finite
      CHECK(c.radius(row) == inf);
      c.pop();
    }
  }
}

TEST_CASE("one key of another size does not spoil the others", "[sketch][block_codes]") {
  std::mt19937 random(1);
  block_codes c(128, 2), alone(128, 2);
  const std::vector<float> mean(128);
  c.recentre(mean, 1), alone.recentre(mean, 1);
  const query q(c, normal(128, random));
  std::vector<std::vector<float>> keys;
  for (int i = 0; i < 200; ++i) keys.push_back(normal(128, random, i == 100 ? 50.0f : 1.0f));
  for (const auto& k : keys) add(c, k);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const auto row = static_cast<index_t>(i);
    const double unit = static_cast<double>(c.alpha_unit()) / 32767 * std::abs(q.product(decode(c, row)));
    CHECK(std::abs(estimated_score(c, q, row) - dot(q.q, keys[i])) <=
          q.norm * static_cast<double>(c.radius(row)) + unit);
    if (i < 100) add(alone, keys[i]);
  }
  // The rescaled α are those of codes that knew the unit from the start, within the two roundings.
  for (index_t row = 0; row < 100; ++row)
    CHECK(std::abs(estimated_score(c, q, row) - estimated_score(alone, q, row)) <=
          1.5 * static_cast<double>(c.alpha_unit()) / 32767 * std::abs(q.product(decode(c, row))));
}

TEST_CASE("a row's code is a function of the row, wherever it goes", "[sketch][block_codes]") {
  for (const index_t dim : {3, 16, 64, 128, 256}) {
    std::mt19937 random(static_cast<unsigned>(dim));
    block_codes c(dim, 7), in_order(dim, 7);
    const std::vector<float> mean = normal(dim, random);
    std::vector<std::vector<float>> keys;
    std::vector<float> distances;
    for (int i = 0; i < 300; ++i) {
      keys.push_back(normal(dim, random));
      distances.push_back(std::exp(normal(1, random)[0]));
    }
    c.recentre(mean, 0.7f), in_order.recentre(mean, 0.7f);
    const std::vector<float> first = normal(dim, random, 4);
    add(c, first), add(in_order, first);  // sets the same unit of α for both
    std::vector<std::size_t> at{300};     // which key each row holds
    for (std::size_t i = 0; i < 300; ++i) {
      add(c, keys[i], distances[i]);
      add(in_order, keys[i], distances[i]);
      at.push_back(i);
      const std::size_t to = 1 + random() % (i + 1);
      c.swap(static_cast<index_t>(to), static_cast<index_t>(i) + 1);
      std::swap(at[to], at[i + 1]);
      if (i % 17 == 16) {
        const std::size_t again = at.back();
        c.pop();
        CHECK(c.size() == static_cast<index_t>(i) + 1);
        add(c, keys[again], distances[again]);
      }
    }
    CAPTURE(dim);
    CHECK(c.alpha_unit() == in_order.alpha_unit());
    CHECK(c.bytes() == static_cast<std::size_t>(5) * c.view().stride);
    std::vector<float> largest(5);
    for (std::size_t row = 1; row < at.size(); ++row) {
      const auto r = static_cast<index_t>(row), other = static_cast<index_t>(at[row]) + 1;
      CHECK(decode(c, r) == decode(in_order, other));
      CHECK(c.radius(r) == in_order.radius(other));
      CHECK_THAT(c.reach(r), test::WithinRel(distances[at[row]], 2e-3f));
      largest[row / 64] = std::max(largest[row / 64], c.radius(r));
    }
    for (index_t b = 1; b < 5; ++b) CHECK(c.largest_radius(b) == largest[static_cast<std::size_t>(b)]);
    c.clear();
    CHECK(c.size() == 0);
    CHECK(c.bytes() == 0);
  }
}

TEST_CASE("a table holds the product of every code of a group with the query", "[sketch][block_codes]") {
  for (const index_t dim : {16, 64, 128}) {
    std::mt19937 random(static_cast<unsigned>(dim));
    const block_codes c(dim, 5);
    const query q(c, normal(dim, random));
    const unsigned bits = dim >= 128 ? 1 : 3;
    double worst = 0;
    for (std::size_t g = 0; g < static_cast<std::size_t>(c.groups()); ++g) {
      for (unsigned e = 0; e < 64; ++e) {
        double want = 0;
        for (unsigned j = 0; j < 6 / bits; ++j) {
          const int level = 2 * static_cast<int>(e >> (j * bits) & ((1u << bits) - 1)) - ((1 << bits) - 1);
          want += level * static_cast<double>(q.rotated[g * (6 / bits) + j]);
        }
        worst = std::max(worst, std::abs(want - static_cast<double>(q.table[g * 64 + e])));
      }
    }
    CHECK(worst < 1e-4);
  }
}
