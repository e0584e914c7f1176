// The sums that choose a sample's size, at every instruction set, against plain loops.
#include "vattn/kernel/row_sums.hpp"

#include <algorithm>
#include <random>
#include <vector>

#include "support/catch.hpp"

namespace {

using namespace vattn;
using kernel::isa;
using test::WithinRel;

// Columns of n rows, whose inverse probabilities lie on both sides of 1, of the floors and of the slice's.
struct columns {
  std::vector<float> q, r, g, f, w;
  columns(std::size_t n, unsigned seed) : q(n), r(n), g(n), f(n), w(n) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> unit(0, 1);
    for (std::size_t i = 0; i < n; ++i) {
      q[i] = unit(random), r[i] = unit(random), g[i] = 20 * unit(random);
      f[i] = 1 + 8 * unit(random), w[i] = 1 + unit(random);
    }
  }
  [[nodiscard]] kernel::plan_terms terms() const {
    return {q.data(), r.data(), g.data(), f.data(), w.data(), static_cast<index_t>(q.size())};
  }
};

}  // namespace

TEST_CASE("plan_sums are their sums at every instruction set", "[kernel][plan]") {
  for (const isa how : kernel::isa_levels) {
    if (how > kernel::widest_isa()) continue;
    CAPTURE(kernel::to_string(how));
    for (const std::size_t n : {std::size_t{16}, std::size_t{48}, std::size_t{768}}) {
      const columns c(n, static_cast<unsigned>(n));
      const float inverse = 0.4f, most = 6;
      double first = 0, second = 0, picks = 0;
      for (std::size_t i = 0; i < n; ++i) {
        const double o = std::max(1.0f, std::min({c.g[i] * inverse, c.f[i], most}));
        first += c.q[i] * o;
        second += c.r[i] * (o - 1) * (o - 1) * o;
        picks += o < static_cast<double>(most) ? static_cast<double>(c.w[i]) / o : 0;
      }
      REQUIRE(picks > 0);
      const kernel::plan_totals all = kernel::plan_sums(how, c.terms(), inverse, most, true);
      CHECK_THAT(all.first, WithinRel(static_cast<float>(first), 1e-5f));
      CHECK_THAT(all.second, WithinRel(static_cast<float>(second), 1e-5f));
      CHECK_THAT(all.picks, WithinRel(static_cast<float>(picks), 1e-5f));
      CHECK(kernel::plan_sums(how, c.terms(), inverse, most, false).picks == 0);
    }
  }
}

TEST_CASE("floored_sum is its sum at every instruction set", "[kernel][plan]") {
  for (const isa how : kernel::isa_levels) {
    if (how > kernel::widest_isa()) continue;
    CAPTURE(kernel::to_string(how));
    const columns c(208, 5);
    double sum = 0;
    for (std::size_t i = 0; i < c.q.size(); ++i)
      sum += static_cast<double>(c.q[i]) * static_cast<double>(std::max(c.f[i], c.g[i] * 0.5f));
    const auto n = static_cast<index_t>(c.q.size());
    CHECK_THAT(kernel::floored_sum(how, c.q.data(), c.g.data(), c.f.data(), n, 0.5f),
               WithinRel(static_cast<float>(sum), 1e-5f));
  }
}

TEST_CASE("weighted, squared and variance sums are what they say at every instruction set", "[kernel][plan]") {
  for (const isa how : kernel::isa_levels) {
    if (how > kernel::widest_isa()) continue;
    CAPTURE(kernel::to_string(how));
    for (const std::size_t size : {std::size_t{16}, std::size_t{64}, std::size_t{208}}) {
      const columns c(size, 3 + static_cast<unsigned>(size));  // x, t and r² are q, g and f
      const auto n = static_cast<index_t>(size);
      std::vector<float> y(size), g(size);
      const auto check = [](float got, double want) { CHECK_THAT(got, WithinRel(static_cast<float>(want), 1e-5f)); };
      double sum[5] = {};
      for (std::size_t i = 0; i < size; ++i) {
        const double a = static_cast<double>(c.g[i]) * static_cast<double>(c.q[i]), r2 = static_cast<double>(c.f[i]);
        sum[0] += a, sum[1] += a * r2;
      }
      const kernel::weighted_totals weighted =
          kernel::weighted_sums(how, c.q.data(), c.g.data(), c.f.data(), n, y.data());
      check(weighted.sum, sum[0]);
      check(weighted.far, sum[1]);
      for (std::size_t i = 0; i < size; ++i) CHECK(y[i] == c.q[i] * c.g[i]);

      std::fill_n(sum, 5, 0.0);
      for (std::size_t i = 0; i < size; ++i) {
        const double x = static_cast<double>(c.q[i]), a = static_cast<double>(c.g[i]) * x * x,
                     r2 = static_cast<double>(c.f[i]);
        sum[0] += a, sum[1] += a * r2, sum[2] += a * a, sum[3] += a * a * r2, sum[4] += a * a * r2 * r2;
      }
      const kernel::squared_totals squared = kernel::squared_sums(how, c.q.data(), c.g.data(), c.f.data(), n, y.data());
      check(squared.sum, sum[0]);
      check(squared.far, sum[1]);
      check(squared.f0, sum[2]);
      check(squared.f2, sum[3]);
      check(squared.f4, sum[4]);
      for (std::size_t i = 0; i < size; ++i) CHECK_THAT(y[i], WithinRel(c.q[i] * c.q[i] * c.g[i], 1e-6f));

      std::fill_n(sum, 5, 0.0);
      for (std::size_t i = 0; i < size; ++i) {  // f >= 1 is an inverse probability
        const double w = static_cast<double>(c.q[i]), o = static_cast<double>(c.f[i]), t = 0.25 * w * w * o * (o - 1);
        sum[0] += t, sum[1] += t * t, sum[2] += w * w * o;
      }
      const kernel::variance_totals variance = kernel::variance_sums(how, c.q.data(), c.f.data(), n, 0.25f);
      check(variance.sum, sum[0]);
      check(variance.squares, sum[1]);
      check(kernel::thinning_terms(how, c.q.data(), c.f.data(), n, y.data(), g.data()), sum[2]);
      for (std::size_t i = 0; i < size; ++i) {
        CHECK_THAT(y[i], WithinRel(c.q[i] * c.q[i] * c.f[i], 1e-6f));
        CHECK_THAT(g[i], WithinRel(1 / c.q[i], 1e-6f));
      }
    }
    const std::vector<float> none(16, 0.0f), one(16, 1.0f);
    std::vector<float> q(16), g(16);
    CHECK(kernel::thinning_terms(how, none.data(), one.data(), 16, q.data(), g.data()) == 0);
    CHECK((g[0] == 1 / 1e-25f && g[15] == g[0]));  // a number, whose product with 0 is 0
  }
}
