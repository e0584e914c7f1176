#include "vattn/sample/thinning.hpp"

#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "support/catch.hpp"

using namespace vattn;

namespace {

// Picks with 1/π₁ and weights x R of several heads.
struct picked {
  index_t heads, n;
  std::vector<float> inverse;
  std::vector<std::vector<float>> weight;

  picked(index_t h, index_t count, unsigned seed) : heads(h), n(count) {
    std::mt19937 random(seed);
    std::exponential_distribution<float> below(1);
    std::normal_distribution<float> logit(0, 2);
    for (index_t i = 0; i < n; ++i) inverse.push_back(std::exp(std::max(0.0f, below(random) - 1)));
    weight.resize(static_cast<std::size_t>(heads));
    for (auto& w : weight) {
      for (index_t i = 0; i < n; ++i) w.push_back(std::exp(logit(random)));
    }
  }
  // Σ w²/π₁·(1/π − 1)
  template <class Inverse>
  [[nodiscard]] double variance(index_t h, Inverse&& total) const {
    double sum = 0;
    for (index_t i = 0; i < n; ++i) {
      const auto k = static_cast<std::size_t>(i);
      const double w = weight[static_cast<std::size_t>(h)][k];
      sum += w * w * static_cast<double>(inverse[k]) * (static_cast<double>(total(i)) - 1);
    }
    return sum;
  }
  void fill(thinning& t) const {
    std::copy(inverse.begin(), inverse.end(), t.inverse());
    for (index_t h = 0; h < heads; ++h)
      std::copy(weight[static_cast<std::size_t>(h)].begin(), weight[static_cast<std::size_t>(h)].end(), t.weight(h));
  }
};

}  // namespace

TEST_CASE("picks are thinned until each head's variance is just within its goal", "[sample][thinning]") {
  for (const kernel::isa how : {kernel::isa::portable, kernel::widest_isa()}) {
    for (const index_t heads : {1, 4, 8}) {
      for (const index_t n : {1, 15, 16, 333, 2000}) {
        const picked p(heads, n, static_cast<unsigned>(heads * 10000 + n));
        std::vector<float> memory(thinning::storage_size(heads, n));
        thinning t(how, memory, heads, n);
        p.fill(t);
        std::array<double, kernel::scan_heads> goals{};
        for (index_t h = 0; h < heads; ++h) {
          goals[static_cast<std::size_t>(h)] =
              5 * p.variance(h, [&](index_t i) { return p.inverse[static_cast<std::size_t>(i)]; }) + 1e-3;
        }
        CAPTURE(heads, n, kernel::to_string(how));
        REQUIRE(t.solve(goals));
        double tightest = 0, kept = 0, all = 0;
        for (index_t h = 0; h < heads; ++h) {
          const double share =
              p.variance(h, [&](index_t i) { return t.inverse_probability(i); }) / goals[static_cast<std::size_t>(h)];
          CHECK(share < 1 + 1e-3);
          tightest = std::max(tightest, share);
        }
        for (index_t i = 0; i < n; ++i) {
          const float first = p.inverse[static_cast<std::size_t>(i)];
          CHECK(t.inverse_probability(i) >= first);
          kept += static_cast<double>(first / t.inverse_probability(i)), all += 1;
        }
        if (n >= 333) {
          CHECK(tightest > 0.7);
          CHECK(kept < 0.8 * all);
        }
      }
    }
  }
}

TEST_CASE("a goal that all picks together miss keeps what matters, and is told", "[sample][thinning]") {
  const picked p(2, 500, 3);
  std::vector<float> memory(thinning::storage_size(2, 500));
  thinning t(kernel::widest_isa(), memory, 2, 500);
  p.fill(t);
  const double least = p.variance(0, [&](index_t i) { return p.inverse[static_cast<std::size_t>(i)]; });
  CHECK_FALSE(t.solve({0.5 * least, std::numeric_limits<double>::infinity()}));
  CHECK(p.variance(0, [&](index_t i) { return t.inverse_probability(i); }) < 1.01 * least);
}

TEST_CASE("heads that ask for nothing are given nothing", "[sample][thinning]") {
  const picked p(3, 400, 4);
  std::vector<float> memory(thinning::storage_size(3, 400));
  thinning t(kernel::widest_isa(), memory, 3, 400);
  p.fill(t);
  std::array<double, kernel::scan_heads> none{};
  none.fill(std::numeric_limits<double>::infinity());
  CHECK(t.solve(none));
  double kept = 0;
  for (index_t i = 0; i < 400; ++i)
    kept += static_cast<double>(p.inverse[static_cast<std::size_t>(i)] / t.inverse_probability(i));
  CHECK(kept < 1e-6);
}

TEST_CASE("thinning asks nothing of the memory that it is given", "[sample]") {
  const picked p(3, 83, 5);  // no multiple of 16
  std::array<double, kernel::scan_heads> goals{};
  for (index_t h = 0; h < p.heads; ++h)
    goals[static_cast<std::size_t>(h)] =
        2 * p.variance(h, [&](index_t i) { return p.inverse[static_cast<std::size_t>(i)]; });
  std::vector<float> found[2];
  for (const bool garbage : {false, true}) {
    std::vector<float> storage(thinning::storage_size(p.heads, p.n), garbage ? std::nanf("") : 0.0f);
    thinning t(kernel::active_isa(), storage, p.heads, p.n);
    p.fill(t);
    for (index_t h = 0; h < p.heads; ++h) {
      const double all = goals[static_cast<std::size_t>(h)] / 2;
      CHECK_THAT(t.all_kept(h, 1).sum, test::WithinRel(static_cast<float>(all), 1e-4f));
    }
    CHECK(t.solve(goals));
    for (index_t i = 0; i < p.n; ++i) found[garbage].push_back(t.inverse_probability(i));
  }
  CHECK(found[0] == found[1]);
}
