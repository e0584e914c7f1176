// The sums that choose a sample's size, at every instruction set, against plain loops.
#include "vattn/kernel/plan_sums.hpp"

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
