// Two strata, for the heads of a group at once, against direct double-precision sums over explicit rows.
#include "vattn/estimate/strata.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "reference/attention.hpp"
#include "support/catch.hpp"

using namespace vattn::test;
using vattn::index_t;
using vattn::kernel::block_rows;

namespace {

constexpr index_t heads = 2;

struct term {
  std::array<double, heads> x;
  double w, t;
  std::vector<double> v;
};

// Rows of random values, logits and weights, added to a stratum block by block, and kept as they are.
struct rows_of_stratum {
  enum kind { picked, light, certain };

  rows_of_stratum(index_t count, index_t dv, kind how, unsigned seed, const std::vector<float>& centre,
                  float first_axis = 1)
      : storage(vattn::stratum::storage_size(heads, dv)), sums(storage, heads, dv) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<std::size_t>(count * dv)), scratch(heads * block_rows);
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = 1 + normal(random) * (i % static_cast<std::size_t>(dv) == 0 ? first_axis : 1.0f);
    const vattn::kernel::strided_rows all{reinterpret_cast<const std::byte*>(values.data()), dv * 4};
    for (index_t first = 0; first < count; first += block_rows) {
      const index_t width = std::min(block_rows, count - first);
      std::vector<float> x(heads * block_rows), w(block_rows, 1.0f), t(block_rows, 1.0f), r2(block_rows);
      for (index_t i = 0; i < width; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const float probability = 0.1f + 0.01f * static_cast<float>(i);
        if (how == picked) w[at] = 1 / probability, t[at] = (1 - probability) / (probability * probability);
        terms.push_back({{}, w[at], how == certain ? 0 : t[at], {}});
        for (std::size_t h = 0; h < heads; ++h) {
          x[h * block_rows + at] = std::exp(0.3f * normal(random));
          terms.back().x[h] = static_cast<double>(x[h * block_rows + at]);
        }
        for (index_t j = 0; j < dv; ++j) {
          const float v = values[static_cast<std::size_t>((first + i) * dv + j)];
          terms.back().v.push_back(static_cast<double>(v));
          r2[at] += (v - centre[static_cast<std::size_t>(j)]) * (v - centre[static_cast<std::size_t>(j)]);
        }
      }
      sums.add<float>(vattn::kernel::active_isa(), x.data(), w.data(), how == certain ? nullptr : t.data(), r2.data(),
                      {all, first, width}, random() | std::uint64_t{random()} << 32, scratch.data());
    }
  }

  std::vector<float> storage;
  vattn::stratum sums;
  std::vector<term> terms;
};

double distance2(const std::vector<double>& v, const std::vector<float>& point) {
  double sum = 0;
  for (std::size_t j = 0; j < v.size(); ++j) sum += std::pow(v[j] - static_cast<double>(point[j]), 2);
  return sum;
}

void check_scalars(const rows_of_stratum& rows, const std::vector<float>& centre, double factor) {
  CHECK(rows.sums.rows() == static_cast<index_t>(rows.terms.size()));
  for (std::size_t h = 0; h < heads; ++h) {
    vattn::stratum_scalars want;
    std::vector<double> numerator(centre.size());
    for (const term& i : rows.terms) {
      const double x = i.x[h] * (h == 0 ? factor : 1), tx2 = i.t * x * x, r2 = distance2(i.v, centre);
      want.x += i.w * x, want.power += i.w * x * r2;
      want.square += tx2, want.spread += tx2 * r2;
      want.f0 += tx2 * tx2, want.f2 += tx2 * tx2 * r2, want.f4 += tx2 * tx2 * r2 * r2;
      for (std::size_t j = 0; j < centre.size(); ++j) numerator[j] += i.w * x * i.v[j];
    }
    const vattn::stratum_scalars& got = rows.sums.of(static_cast<index_t>(h));
    CAPTURE(h);
    CHECK_THAT(got.x, WithinRel(want.x, 1e-5));
    CHECK_THAT(got.power, WithinRel(want.power, 1e-5));
    CHECK_THAT(got.square, WithinRel(want.square, 1e-5));
    CHECK_THAT(got.spread, WithinRel(want.spread, 1e-5));
    CHECK_THAT(got.f0, WithinRel(want.f0, 1e-4));
    CHECK_THAT(got.f2, WithinRel(want.f2, 1e-4));
    CHECK_THAT(got.f4, WithinRel(want.f4, 1e-4));
    for (std::size_t j = 0; j < centre.size(); ++j)
      CHECK_THAT(static_cast<double>(rows.sums.numerator(static_cast<index_t>(h))[j]), WithinRel(numerator[j], 1e-4));
  }
}

}  // namespace

TEST_CASE("a stratum's scalars are the sums they stand for, and rescale with their reference", "[estimate][strata]") {
  const std::vector<float> centre{0.5f, 1, 1.5f, 0, 2};
  for (const auto kind : {rows_of_stratum::picked, rows_of_stratum::light, rows_of_stratum::certain}) {
    rows_of_stratum rows(150, 5, kind, 4, centre);
    check_scalars(rows, centre, 1);
    const std::vector<float> away(5);
    const double dimension = rows.sums.dimension(0, away.data(), 7.5);
    rows.sums.rescale(0, 0.37);
    CHECK_THAT(rows.sums.dimension(0, away.data(), 7.5), WithinRel(dimension, 1e-4));
    check_scalars(rows, centre, 0.37);
    rows.sums.clear();
    CHECK(rows.sums.rows() == 0);
    CHECK(rows.sums.of(0).x == 0);
  }
}

TEST_CASE("strata: output, variance and degrees of freedom by their formulas", "[estimate][strata]") {
  constexpr std::size_t dv = 5;
  const std::vector<float> centre{0.5f, 1, 1.5f, 0, 2};
  // All of the rows take part in the middle term: fewer than most_signed_rows of each.
  rows_of_stratum picked(150, dv, rows_of_stratum::picked, 4, centre);
  rows_of_stratum light(100, dv, rows_of_stratum::light, 5, centre);
  const index_t n = 3000, m = 120;
  for (const bool rescaled : {false, true}) {
    const double factor = rescaled ? 0.37 : 1;
    if (rescaled) {
      for (index_t h = 0; h < heads; ++h) picked.sums.rescale(h, factor), light.sums.rescale(h, factor);
    }
    for (std::size_t h = 0; h < heads; ++h) {
      const double extra = 3 * factor, weight = static_cast<double>(n) / m;
      std::vector<float> output(dv), scratch(2 * dv);
      const auto e = vattn::estimate_strata(picked.sums, light.sums, static_cast<index_t>(h), n, m, extra, centre,
                                            output, scratch.data());
      vattn::reference::weighted_output sums(dv);
      sums.denominator = extra;
      const auto add = [&](const term& i, double w) {
        sums.add(w * i.x[h] * factor, [&](std::size_t j) { return i.v[j]; });
      };
      for (const term& i : picked.terms) add(i, i.w);
      for (const term& i : light.terms) add(i, weight);
      sums.finish();
      const double D = sums.denominator, power = sums.power, output2 = sums.output2;
      const std::vector<double>& o = sums.output;
      for (std::size_t j = 0; j < dv; ++j) CHECK_THAT(static_cast<double>(output[j]), WithinRel(o[j], 1e-5));
      CHECK_THAT(e.denominator, WithinRel(D, 1e-5));
      CHECK_THAT(e.power, WithinRel(power / D, 1e-5));
      CHECK_THAT(e.output2, WithinRel(output2, 1e-5));
      CHECK_THAT(e.away2, WithinRel(distance2(o, centre), 1e-4));

      double part_p = 0, ones_p = 0, light2 = 0, light_x = 0, light_x2 = 0;
      std::vector<double> light_sum(dv);
      double fourth_p = 0, fourth_l = 0;
      const auto fourth = [&](const term& i) {
        const double r2 = distance2(i.v, centre), u2 = e.away2, x = i.x[h] * factor;
        return std::pow(i.t * x * x, 2) * (r2 * r2 + 6 * r2 * u2 + u2 * u2);
      };
      for (const term& i : picked.terms) {
        const double x = i.x[h] * factor;
        part_p += i.t * x * x * distance2(i.v, output), ones_p += i.t * x * x, fourth_p += fourth(i);
      }
      for (const term& i : light.terms) {
        const double x = i.x[h] * factor;
        light2 += x * x * distance2(i.v, output), light_x += x, light_x2 += x * x, fourth_l += fourth(i);
        for (std::size_t j = 0; j < dv; ++j) light_sum[j] += x * (i.v[j] - o[j]);
      }
      double mean2 = 0;
      for (const double x : light_sum) mean2 += x * x / m;
      const double spread = weight * weight * (1 - static_cast<double>(m) / n) * m / (m - 1.0);
      const double part_l = spread * (light2 - mean2);
      CHECK_THAT(e.light, WithinRel(part_l / (D * D), 1e-4));
      CHECK_THAT(e.variance, WithinRel((part_p + part_l) / (D * D), 1e-4));
      CHECK_THAT(e.denominator_variance,
                 WithinRel((ones_p + spread * (light_x2 - light_x * light_x / m)) / (D * D), 1e-4));
      CHECK_THAT(e.dof, WithinRel(2 * std::pow(part_p + part_l, 2) / (fourth_p + spread * spread * fourth_l), 1e-3));
      CHECK(e.dimension >= 1);
      CHECK(e.dimension <= dv);
      CHECK(e.finite());
      const double rp = part_p / std::sqrt(picked.sums.dimension(static_cast<index_t>(h), output.data(), e.away2));
      const double rl = part_l / std::sqrt(light.sums.dimension(static_cast<index_t>(h), output.data(), e.away2));
      CHECK_THAT(e.dimension, WithinRel(std::clamp(std::pow((part_p + part_l) / (rp + rl), 2), 1.0, 5.0), 1e-3));
    }
  }
}

TEST_CASE("strata: a sample of all, or of one row, adds no variance of its own", "[estimate][strata]") {
  const std::vector<float> centre{0.5f, 1, 1.5f};
  rows_of_stratum picked(64, 3, rows_of_stratum::certain, 4, centre), light(32, 3, rows_of_stratum::light, 5, centre);
  std::vector<float> output(3), scratch(6);
  const auto estimate = [&](index_t n, index_t m) {
    return vattn::estimate_strata(picked.sums, light.sums, 0, n, m, 0, centre, output, scratch.data());
  };
  const auto all = estimate(40, 40);
  CHECK(all.variance == 0);
  CHECK(all.denominator_variance == 0);
  CHECK(std::isinf(all.dof));
  CHECK(all.dimension == 1);
  CHECK(estimate(40, 1).variance == 0);
  CHECK(estimate(40, 2).variance > 0);
  // Nothing drawn: the light stratum has no weight.
  CHECK_THAT(estimate(40, 0).denominator, WithinRel(picked.sums.of(0).x, 1e-12));
  // Nothing read: no number.
  picked.sums.clear(), light.sums.clear();
  CHECK_FALSE(estimate(40, 0).finite());
}

TEST_CASE("a stratum's dimension is that of its values", "[estimate][strata]") {
  const auto inverse_mean = [](index_t dv, float first_axis, float output = 1) {
    const std::vector<float> centre(static_cast<std::size_t>(dv), 1.0f);
    double inverse = 0;
    constexpr unsigned trials = 300;
    for (unsigned seed = 0; seed < trials; ++seed) {
      const rows_of_stratum rows(384, dv, rows_of_stratum::light, seed, centre, first_axis);
      const std::vector<float> o(centre.size(), output);
      const double away2 = static_cast<double>(dv) * std::pow(static_cast<double>(output) - 1, 2);
      inverse += 1 / rows.sums.dimension(0, o.data(), away2) / trials;
    }
    return 1 / inverse;
  };
  CHECK_THAT(inverse_mean(1, 1), WithinRel(1, 1e-4));
  CHECK_THAT(inverse_mean(8, 1), WithinRel(8, 0.15));
  // About 0 instead of their mean of ones: I + 11ᵀ, of trace 16 and eigenvalues 9 and seven ones.
  CHECK_THAT(inverse_mean(8, 1, 0), WithinRel(16.0 * 16 / (81 + 7), 0.2));
  CHECK(inverse_mean(8, 20) < 2);  // 1.04, but for the scatter of eight sums
}

TEST_CASE("a stratum of gathered rows is that of the same rows side by side", "[estimate][strata]") {
  constexpr index_t dv = 5, spread = 3;
  constexpr auto width = static_cast<std::size_t>(dv);
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  std::vector<float> values(spread * block_rows * width), packed(block_rows * width), x(heads * block_rows),
      w(block_rows), t(block_rows), r2(block_rows), scratch(heads * block_rows);
  for (float& v : values) v = normal(random);
  std::vector<vattn::ordinal> index(block_rows);
  for (std::size_t i = 0; i < index.size(); ++i) {
    index[i] = static_cast<vattn::ordinal>(spread * (index.size() - 1 - i));
    std::copy_n(values.data() + index[i] * width, width, packed.data() + i * width);
    w[i] = 2, t[i] = 2,
    r2[i] = static_cast<float>(
        distance2({packed.data() + i * width, packed.data() + (i + 1) * width}, std::vector<float>(width)));
    for (std::size_t h = 0; h < heads; ++h) x[h * block_rows + i] = std::exp(normal(random));
  }
  const auto rows = [](const std::vector<float>& of) {
    return vattn::kernel::strided_rows{reinterpret_cast<const std::byte*>(of.data()), dv * 4};
  };
  const auto how = vattn::kernel::active_isa();
  const std::uint64_t coins = random() | std::uint64_t{random()} << 32;
  std::vector<float> memory[2];
  vattn::stratum sums[2];
  for (std::size_t k = 0; k < 2; ++k) {
    memory[k].resize(vattn::stratum::storage_size(heads, dv));
    sums[k] = vattn::stratum(memory[k], heads, dv);
    const vattn::kernel::block_of_rows block =
        k == 0 ? vattn::kernel::block_of_rows(rows(packed), 0, block_rows)
               : vattn::kernel::block_of_rows::gathered(rows(values), index.data(), block_rows);
    sums[k].add<float>(how, x.data(), w.data(), t.data(), r2.data(), block, coins, scratch.data());
  }
  // Every vector: the sums, the tilts and the signed groups.
  for (std::size_t i = 0; i < memory[0].size(); ++i) CHECK_THAT(memory[1][i], WithinAbs(memory[0][i], 1e-4f));
  const std::vector<float> origin(width);
  CHECK_THAT(sums[1].dimension(0, origin.data(), 1), WithinRel(sums[0].dimension(0, origin.data(), 1), 1e-4));
  CHECK(sums[0].dimension(0, origin.data(), 1) > 1);
}

TEST_CASE("a stratum's dimension is that of its terms, whose weights may go with a direction", "[estimate][strata]") {
  // Rows in turn: π = 1/2 and variance 16 along four axes, π = 0.162 and variance 1 along four others.
  // sqrt(t) x (v − o) has the same spread along all eight.
  constexpr index_t dv = 16;
  const std::vector<float> centre(dv, 0.0f);
  double inverse = 0;
  constexpr unsigned trials = 200;
  for (unsigned seed = 0; seed < trials; ++seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> storage(vattn::stratum::storage_size(heads, dv)), scratch(heads * block_rows);
    std::vector<float> values(384 * dv, 0.0f);
    vattn::stratum sums(storage, heads, dv);
    const vattn::kernel::strided_rows all{reinterpret_cast<const std::byte*>(values.data()), dv * 4};
    for (index_t first = 0; first < 384; first += block_rows) {
      std::vector<float> x(heads * block_rows, 1.0f), w(block_rows), t(block_rows), r2(block_rows);
      for (index_t i = 0; i < block_rows; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const bool rare = i % 2 == 1;
        for (index_t j = rare ? 4 : 0; j < (rare ? 8 : 4); ++j) {
          const float v = normal(random) * (rare ? 1.0f : 4.0f);
          values[static_cast<std::size_t>((first + i) * dv + j)] = v;
          r2[at] += v * v;
        }
        w[at] = rare ? 6.18f : 2.0f;
        t[at] = rare ? 32.0f : 2.0f;  // (1 − π)/π²
      }
      sums.add<float>(vattn::kernel::active_isa(), x.data(), w.data(), t.data(), r2.data(), {all, first, block_rows},
                      random() | std::uint64_t{random()} << 32, scratch.data());
    }
    inverse += 1 / sums.dimension(0, centre.data(), 0) / trials;
  }
  CHECK_THAT(1 / inverse, WithinRel(8, 0.1));
}
