// Evidence from sums about a fixed centre against direct double-precision sums over explicit rows, and that parts
// merge.
#include "vattn/stats/evidence.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "support/catch.hpp"

using namespace vattn::test;
using vattn::index_t;
namespace stats = vattn::stats;

namespace {

struct row {
  double logit;
  stats::row_weight weight;
  std::vector<float> value;
};

// Sums with their memory.
struct held {
  std::vector<float> memory;
  stats::sample_sums sums;
  explicit held(index_t dv, int groups = stats::most_groups)
      : memory(static_cast<std::size_t>(stats::sample_sums::storage(dv, groups))), sums{{}, memory.data(), dv, groups} {
    sums.clear();
  }
  held(held&&) = default;
  held(const held&) = delete;
};

std::vector<row> poisson_rows(std::size_t count, std::size_t dv, unsigned seed, double spread = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<row> rows;
  for (std::size_t i = 0; i < count; ++i) {
    const bool certain = i % 5 == 0;
    row r{3 + 2 * normal(random),
          certain ? stats::certain_row() : stats::poisson_row(1.2 + static_cast<double>(i % 7)),
          {}};
    for (std::size_t j = 0; j < dv; ++j) r.value.push_back(static_cast<float>(1 + spread * normal(random)));
    rows.push_back(r);
  }
  return rows;
}

void add(stats::sample_sums& to, const std::vector<row>& rows, std::size_t first, std::size_t last,
         const std::vector<float>& centre, std::uint64_t key = 7) {
  for (std::size_t i = first; i < last; ++i)
    to.add(rows[i].logit, rows[i].value.data(), centre.data(), rows[i].weight, stats::deal(key, i, to.groups));
}

void check_same(const stats::sample_sums& got, const stats::sample_sums& want) {
  const double f = std::exp(got.s.reference - want.s.reference);
  const auto near = [&](double a, double b, int power) {
    CHECK_THAT(a * std::pow(f, power), WithinRel(b, 1e-9) || WithinAbs(b, 1e-12));
  };
  near(got.s.x, want.s.x, 1), near(got.s.power, want.s.power, 1);
  near(got.s.square, want.s.square, 2), near(got.s.spread, want.s.spread, 2);
  near(got.s.third0, want.s.third0, 3), near(got.s.third2, want.s.third2, 3);
  near(got.s.f0, want.s.f0, 4), near(got.s.f2, want.s.f2, 4), near(got.s.f4, want.s.f4, 4);
  for (int g = 0; g < got.groups; ++g) {
    CHECK_THAT(got.s.signed_x[g] * f, WithinAbs(want.s.signed_x[g], 1e-9 * want.s.x));
    CHECK_THAT(got.s.signed_one[g], WithinAbs(want.s.signed_one[g], 1e-9));
  }
  CHECK(got.s.rows == want.s.rows);
  CHECK(got.s.certain == want.s.certain);
  for (int i = 0; i < 3 + got.groups; ++i) {
    double largest = 0;
    for (index_t j = 0; j < got.dv; ++j) largest = std::max(largest, std::abs(static_cast<double>(want.vector(i)[j])));
    const double scale = std::pow(f, i == 1 ? 2 : i == 2 ? 3 : 1);
    for (index_t j = 0; j < got.dv; ++j)
      CHECK_THAT(static_cast<double>(got.vector(i)[j]) * scale,
                 WithinAbs(static_cast<double>(want.vector(i)[j]), 3e-5 * largest));
  }
}

double squared(const std::vector<double>& v) {
  double sum = 0;
  for (const double x : v) sum += x * x;
  return sum;
}

// The evidence as it is defined: row by row, about ô itself. `light` rows are a uniform sample, `sink` a logit.
struct direct {
  double denominator = 0, power = 0, output2 = 0, variance = 0, light = 0, fourth = 0, third = 0, dimension = 1;
  double ones = 0, ones_fourth = 0, values = 0;
  std::vector<double> output;

  direct(const std::vector<row>& picked, const std::vector<row>& light_rows, const stats::uniform_draw& draw,
         double sink, double reference, std::size_t dv) {
    const auto x = [&](const row& r) { return std::exp(r.logit - reference); };
    const auto v = [](const row& r, std::size_t j) { return static_cast<double>(r.value[j]); };
    const double weight = light_rows.empty() ? 0 : draw.weight(), factor = light_rows.empty() ? 0 : draw.factor();
    output.assign(dv, 0);
    denominator = std::exp(sink - reference);
    const auto sum = [&](const row& r, double w) {
      denominator += w * x(r);
      for (std::size_t j = 0; j < dv; ++j) {
        output[j] += w * x(r) * v(r, j);
        power += w * x(r) * v(r, j) * v(r, j);
      }
    };
    for (const row& r : picked) sum(r, r.weight.w);
    for (const row& r : light_rows) sum(r, weight);
    for (double& o : output) o /= denominator;
    power /= denominator;
    output2 = squared(output);

    std::vector<double> matrix(dv * dv), light_matrix(dv * dv), mean(dv), value_mean(dv), cubes(dv);
    double mean_x = 0;
    const double n = draw.drawn;
    for (const row& r : light_rows) {
      mean_x += x(r) / n;
      for (std::size_t j = 0; j < dv; ++j) {
        mean[j] += x(r) * (v(r, j) - output[j]) / n;
        value_mean[j] += x(r) * v(r, j) / n;
      }
    }
    const auto spread = [&](const row& r, double t, std::vector<double>& to, const std::vector<double>& about) {
      double square = 0;
      for (std::size_t j = 0; j < dv; ++j) {
        const double yj = x(r) * (v(r, j) - output[j]) - about[j];
        square += t * yj * yj;
        for (std::size_t i = 0; i < dv; ++i) to[i * dv + j] += t * yj * (x(r) * (v(r, i) - output[i]) - about[i]);
      }
      return square;
    };
    const std::vector<double> zero(dv);
    double light_square = 0, light_ones = 0, light_values = 0, light_fourth = 0, light_ones_fourth = 0;
    for (const row& r : picked) {
      const double square = spread(r, r.weight.t, matrix, zero), tx2 = r.weight.t * x(r) * x(r);
      variance += square, fourth += square * square, ones += tx2, ones_fourth += tx2 * tx2;
      for (std::size_t j = 0; j < dv; ++j) {
        values += tx2 * v(r, j) * v(r, j);
        if (r.weight.t > 0) cubes[j] += r.weight.s / r.weight.t * square * x(r) * (v(r, j) - output[j]);
      }
    }
    for (const row& r : light_rows) {
      const double tx2 = x(r) * x(r);
      double uncentred = 0;
      for (std::size_t j = 0; j < dv; ++j) {
        uncentred += tx2 * std::pow(v(r, j) - output[j], 2);
        light_values += tx2 * v(r, j) * v(r, j);
      }
      static_cast<void>(spread(r, 1, light_matrix, mean));
      light_square += uncentred, light_ones += tx2;
      light_fourth += uncentred * uncentred, light_ones_fourth += tx2 * tx2;
    }
    // Rows that were drawn and are of the other stratum are zeros.
    for (std::size_t k = light_rows.size(); k < static_cast<std::size_t>(n); ++k)
      for (std::size_t i = 0; i < dv; ++i)
        for (std::size_t j = 0; j < dv; ++j) light_matrix[i * dv + j] += mean[i] * mean[j];
    light = factor * (light_square - n * squared(mean));
    variance += light;
    ones += factor * (light_ones - n * mean_x * mean_x);
    values += factor * (light_values - n * squared(value_mean));
    fourth += factor * factor * light_fourth;
    ones_fourth += factor * factor * light_ones_fourth;
    third = std::sqrt(squared(cubes));
    for (std::size_t i = 0; i < matrix.size(); ++i) matrix[i] += factor * light_matrix[i];
    const double frobenius = squared(matrix);
    if (frobenius > 0) dimension = variance * variance / frobenius;
  }
};

stats::evidence evidence_of(held& picked, held* light, const stats::uniform_draw& draw,
                            const std::vector<float>& centre, double sink, std::vector<float>& output) {
  std::vector<float> offset(output.size());
  return stats::estimate(picked.sums, light ? &light->sums : nullptr, draw, centre.data(), sink, output.data(),
                         offset.data());
}

}  // namespace

TEST_CASE("parts of any size merge into the whole, whatever their references", "[stats][sums]") {
  constexpr std::size_t dv = 9, count = 211;
  const std::vector<float> centre(dv, 0.5f);
  const std::vector<row> rows = poisson_rows(count, dv, 3);
  held whole(dv);
  add(whole.sums, rows, 0, count, centre);
  std::mt19937 random(4);
  for (std::size_t parts = 1; parts <= 17; ++parts) {
    CAPTURE(parts);
    std::vector<std::size_t> cuts(parts + 1);  // some parts are empty
    cuts[1] = count;
    for (std::size_t i = 2; i <= parts; ++i) cuts[i] = i % 4 == 0 ? cuts[i - 1] : random() % (count + 1);
    std::sort(cuts.begin(), cuts.end());
    std::vector<held> split;
    for (std::size_t i = 0; i < parts; ++i) {
      split.emplace_back(static_cast<index_t>(dv));
      add(split[i].sums, rows, cuts[i], cuts[i + 1], centre);
      if (i % 3 == 1) split[i].sums.raise(static_cast<double>(i) + 9);  // as if it had met a larger logit
    }
    held merged(dv), again(dv);
    for (const held& part : split) merged.sums.merge(part.sums), again.sums.merge(part.sums);
    check_same(merged.sums, whole.sums);
    // The same order, the same bits.
    CHECK(std::memcmp(&merged.sums.s, &again.sums.s, sizeof(merged.sums.s)) == 0);
    CHECK(merged.memory == again.memory);
    // By lanes, as the threads of a warp do it.
    held lanes(dv);
    for (const held& part : split) {
      const stats::scalar_sums before = lanes.sums.s;
      for (index_t lane = 0; lane < 4; ++lane) {
        lanes.sums.s = before;
        lanes.sums.merge(part.sums, {lane, 4});
      }
    }
    CHECK(lanes.memory == merged.memory);
  }
}

TEST_CASE("empty parts merge into nothing, and logits that are not finite into no number", "[stats][sums]") {
  const std::vector<float> centre(3, 0.0f), value{1, 2, 3};
  held a(3), b(3);
  a.sums.merge(b.sums);
  CHECK(a.sums.s.rows == 0);
  CHECK(a.sums.s.reference == -stats::infinity);
  std::vector<float> output(3);
  CHECK_FALSE(evidence_of(a, nullptr, {}, centre, -stats::infinity, output).finite());
  for (const double odd : {stats::infinity, std::nan("")}) {
    held c(3);
    c.sums.add(1, value.data(), centre.data(), stats::certain_row(), {});
    c.sums.add(odd, value.data(), centre.data(), stats::poisson_row(2), {});
    c.sums.add(2, value.data(), centre.data(), stats::certain_row(), {});
    CHECK_FALSE(evidence_of(c, nullptr, {}, centre, -stats::infinity, output).finite());
  }
}

TEST_CASE("sums survive logits far apart", "[stats][sums]") {
  const std::vector<float> centre(2, 0.0f), a{1, 0}, b{0, 1};
  held sums(2);
  std::vector<float> output(2);
  sums.sums.add(-5000, a.data(), centre.data(), stats::poisson_row(3), {0, false});
  sums.sums.add(4000, b.data(), centre.data(), stats::poisson_row(3), {1, true});
  sums.sums.add(-90000, a.data(), centre.data(), stats::poisson_row(3), {2, true});
  const auto e = evidence_of(sums, nullptr, {}, centre, -stats::infinity, output);
  CHECK(e.finite());
  CHECK(output[1] == 1.0f);
  CHECK(output[0] == 0.0f);
}

TEST_CASE("evidence is what is defined row by row about the output", "[stats][evidence]") {
  constexpr std::size_t dv = 12;
  constexpr index_t width = dv;
  for (const unsigned seed : {1u, 2u, 3u}) {
    const std::vector<row> picked = poisson_rows(240, dv, seed);
    std::vector<row> light = poisson_rows(90, dv, seed + 50);
    for (row& r : light) r.weight = stats::uniform_row(), r.logit -= 2;
    for (const float at : {1.0f, 0.7f}) {
      for (const bool both : {false, true}) {
        for (const bool replaced : {false, true}) {
          CAPTURE(seed, at, both, replaced);
          const std::vector<float> centre(dv, at);
          const stats::uniform_draw draw{3000, 128, replaced};
          held p(width), l(width);
          add(p.sums, picked, 0, picked.size(), centre);
          add(l.sums, light, 0, light.size(), centre);
          std::vector<float> output(dv);
          const auto e = evidence_of(p, both ? &l : nullptr, draw, centre, 2.5, output);
          const direct want(picked, both ? light : std::vector<row>{}, draw, 2.5, e.reference, dv);
          const double d2 = want.denominator * want.denominator;
          CHECK(e.finite());
          for (std::size_t j = 0; j < dv; ++j)
            CHECK_THAT(static_cast<double>(output[j]), WithinAbs(want.output[j], 1e-5));
          CHECK_THAT(e.denominator, WithinRel(want.denominator, 1e-9));
          CHECK_THAT(e.output2, WithinRel(want.output2, 1e-5));
          CHECK_THAT(e.power, WithinRel(want.power, 1e-5));
          CHECK_THAT(e.variance, WithinRel(want.variance / d2, 1e-4));
          CHECK_THAT(e.light, WithinRel(want.light / d2, 1e-4));
          CHECK_THAT(e.denominator_variance, WithinRel(want.ones / d2, 1e-9));
          CHECK_THAT(e.denominator_dof, WithinRel(2 * want.ones * want.ones / want.ones_fourth, 1e-9));
          CHECK_THAT(e.numerator_variance, WithinRel(want.values / (d2 * want.output2), 1e-4));
          CHECK(e.rows == static_cast<index_t>(240 + (both ? 90 : 0)));
          CHECK(e.certain == 48);
          // Never better than they are by more than the odd terms' scatter; the test below has the exact case.
          const double dof = 2 * want.variance * want.variance / want.fourth;
          CHECK(e.dof < 1.1 * dof);
          CHECK(e.dof > (at == 1 ? 0.25 : 0.1) * dof);
          const double skew = want.third / (want.variance * want.denominator);
          CHECK(e.skew > 0.85 * skew);
          CHECK(e.skew < 2.5 * skew);
          CHECK(e.dimension >= 1);
          CHECK(e.dimension <= static_cast<double>(dv));
        }
      }
    }
  }
}

TEST_CASE("degrees of freedom and skew are exact about the output, and skew for a single row about any centre",
          "[stats][evidence]") {
  constexpr std::size_t dv = 6;
  constexpr index_t width = dv;
  const std::vector<row> picked = poisson_rows(150, dv, 8);
  std::vector<float> centre(dv), output(dv);
  for (int pass = 0; pass < 2; ++pass) {
    held p(width);
    add(p.sums, picked, 0, picked.size(), centre);
    const auto e = evidence_of(p, nullptr, {}, centre, -stats::infinity, output);
    if (pass == 1) {
      const direct want(picked, {}, {}, -stats::infinity, e.reference, dv);
      CHECK_THAT(e.dof, WithinRel(2 * want.variance * want.variance / want.fourth, 1e-4));
      CHECK_THAT(e.skew, WithinRel(want.third / (want.variance * want.denominator), 1e-4));
    }
    centre.swap(output);
  }
  // One row of chance beside a certain one, about a centre that is neither.
  std::vector<row> two = poisson_rows(2, dv, 5);
  two[0].weight = stats::certain_row(), two[1].weight = stats::poisson_row(3);
  const std::vector<float> away(dv, 2.0f);
  held p(width);
  add(p.sums, two, 0, 2, away);
  const auto e = evidence_of(p, nullptr, {}, away, -stats::infinity, output);
  const direct want(two, {}, {}, -stats::infinity, e.reference, dv);
  CHECK_THAT(e.variance, WithinRel(want.variance / (want.denominator * want.denominator), 1e-4));
  CHECK(e.dof <= 2 + 1e-4);
  CHECK_THAT(e.skew, WithinRel(want.third / (want.variance * want.denominator), 1e-3));
}

TEST_CASE("the dimension is that of the terms, of either kind of sample", "[stats][evidence]") {
  const auto inverse_mean = [](std::size_t dv, double first_axis, float centre_at, bool uniform) {
    const std::vector<float> centre(dv, centre_at);
    const auto width = static_cast<index_t>(dv);
    double inverse = 0, exact = 0;
    constexpr unsigned trials = 200;
    for (unsigned seed = 0; seed < trials; ++seed) {
      std::vector<row> rows = poisson_rows(300, dv, seed);
      for (row& r : rows) {
        r.value[0] = static_cast<float>(1 + (static_cast<double>(r.value[0]) - 1) * first_axis);
        r.weight = uniform ? stats::uniform_row() : stats::poisson_row(4);
        r.logit = 0;
      }
      held p(width), l(width);
      add(uniform ? l.sums : p.sums, rows, 0, rows.size(), centre, seed);
      const std::vector<row> anchor = {{0, stats::certain_row(), std::vector<float>(dv)}};
      add(p.sums, anchor, 0, 1, centre);
      std::vector<float> output(dv);
      const stats::uniform_draw draw{4000, 300, false};
      const auto e = evidence_of(p, uniform ? &l : nullptr, draw, centre, 9, output);  // a sink takes ô off the mean
      rows.push_back(anchor[0]);
      if (uniform) rows.pop_back();
      const direct want(uniform ? anchor : rows, uniform ? rows : std::vector<row>{}, draw, 9, e.reference, dv);
      inverse += 1 / e.dimension / trials;
      exact += 1 / want.dimension / trials;
    }
    CAPTURE(dv, first_axis, centre_at, uniform, exact);
    CHECK(inverse > 0.85 * exact);  // which counts each row's product with itself: 1/300 here
    CHECK(inverse < 1.15 * exact);  // that ν₁ is at most dv counts here
    return inverse;
  };
  for (const bool uniform : {false, true}) {
    CHECK_THAT(inverse_mean(1, 1, 0.5f, uniform), WithinRel(1, 1e-3));
    static_cast<void>(inverse_mean(8, 1, 1, uniform));
    static_cast<void>(inverse_mean(8, 1, 0.3f, uniform));
    static_cast<void>(inverse_mean(8, 6, 0.3f, uniform));
    static_cast<void>(inverse_mean(64, 1, 1, uniform));
  }
}

TEST_CASE("products of lanes add to those of all elements", "[stats][evidence]") {
  constexpr std::size_t dv = 37;
  constexpr index_t width = dv;
  const std::vector<float> centre(dv, 0.4f), offset(dv, 0.3f);
  const std::vector<row> rows = poisson_rows(60, dv, 2);
  held p(width, 5);
  add(p.sums, rows, 0, rows.size(), centre);
  stats::sum_products all, parts;
  all.add(p.sums, offset.data(), centre.data());
  for (index_t lane = 0; lane < 8; ++lane) {
    stats::sum_products part;
    part.add(p.sums, offset.data(), centre.data(), {lane, 8});
    parts.add(part);
  }
  CHECK_THAT(parts.hb, WithinRel(all.hb, 1e-9));
  CHECK_THAT(parts.nc, WithinRel(all.nc, 1e-9));
  for (int i = 0; i < 15; ++i) CHECK_THAT(parts.zz[i], WithinRel(all.zz[i], 1e-9));
  for (int g = 0; g < 5; ++g) {
    CHECK_THAT(parts.zu[g], WithinRel(all.zu[g], 1e-9));
    CHECK_THAT(parts.zn[g], WithinRel(all.zn[g], 1e-9));
  }
}

TEST_CASE("a uniform sample of all rows adds no variance, and of one row shows none", "[stats][evidence]") {
  constexpr std::size_t dv = 3;
  constexpr index_t width = dv;
  const std::vector<float> centre(dv, 0.0f);
  std::vector<row> rows = poisson_rows(40, dv, 6);
  for (row& r : rows) r.weight = stats::uniform_row();
  held p(width), l(width);
  add(l.sums, rows, 0, rows.size(), centre);
  std::vector<float> output(dv);
  const auto all = evidence_of(p, &l, {40, 40}, centre, -stats::infinity, output);
  CHECK(all.variance == 0);
  CHECK(all.denominator_variance == 0);
  CHECK(all.dof == stats::infinity);
  CHECK(all.skew == 0);
  CHECK(evidence_of(p, &l, {400, 1}, centre, -stats::infinity, output).variance == 0);
  CHECK(evidence_of(p, &l, {400, 40}, centre, -stats::infinity, output).variance > 0);
}

TEST_CASE("signs and groups of rows are even, and of the place alone", "[stats][sums]") {
  int count[4] = {}, negative = 0;
  for (std::uint64_t i = 0; i < 40000; ++i) {
    const stats::dealt d = stats::deal(99, i, 4);
    ++count[d.group];
    negative += d.negative;
  }
  for (const int c : count) CHECK(std::abs(c - 10000) < 500);
  CHECK(std::abs(negative - 20000) < 600);
  CHECK(stats::deal(99, 5, 4).group == stats::deal(99, 5, 4).group);
}

TEST_CASE("an error along one direction is added to the evidence", "[stats][evidence]") {
  stats::evidence e;
  e.variance = 3, e.dimension = 4, e.dof = 10, e.skew = 0.2;
  stats::add_direction(e, 0);
  CHECK(e.variance == 3);
  stats::add_direction(e, 1);
  CHECK(e.variance == 4);
  CHECK_THAT(e.dimension, WithinRel(16 / (9.0 / 4 + 1), 1e-12));
  CHECK_THAT(e.dof, WithinRel(10 * 16.0 / 9, 1e-12));
  CHECK_THAT(e.skew, WithinRel(0.15, 1e-12));
  stats::add_direction(e, stats::infinity);
  CHECK(e.dimension == 1);
  // Of an error that is not a number nothing is known, and such evidence meets no promise.
  stats::evidence lost;
  lost.denominator = lost.output2 = lost.power = 1, lost.variance = 1e-9;
  CHECK(lost.finite());
  stats::add_direction(lost, std::nan(""));
  CHECK_FALSE(lost.finite());
}
