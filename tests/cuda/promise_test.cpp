// The promise through the device's path: failures against delta, by exact binomial tests, over regimes and values.
#include <cstdlib>

#include "cuda/problem.hpp"
#include "stat/binomial.hpp"

using namespace vattn;
using namespace vattn::test;

namespace {

constexpr double false_alarm = 1e-4;  // of a test case

// Every head of every cell alone, corrected for their number, and all draws of a cell together.
void require_promise(const std::vector<std::pair<std::string, std::string>>& cells, double epsilon, int n, int draws,
                     int bits = 2) {
  if (!has_card()) return;
  const double delta = 0.1;
  constexpr int batch = 4;
  std::uint64_t seed = 1;
  double sampled = 0, all = 0;
  for (const auto& [regime, values] : cells) {
    cuda::settings s;
    s.reads = cuda::reads::sample, s.epsilon = epsilon, s.delta = delta, s.seed = seed, s.bits = bits;
    problem p(
        {.n_batch = batch, .n_kv_heads = 2, .group = 4, .n = n, .regime = regime, .values = values, .seed = seed++}, s);
    const auto heads = static_cast<std::size_t>(p.plan.heads());
    std::vector<long> failures(heads);
    long total = 0;
    for (int step = 0; step < draws; ++step) {
      p.run(static_cast<std::uint32_t>(step));
      const auto e = p.errors();
      const auto certificates = p.certificates.get();
      for (std::size_t h = 0; h < heads; ++h) {
        const bool failed = !(e[h] <= epsilon);
        failures[h] += failed, total += failed;
        sampled += certificates[h].rounds > 0, ++all;
      }
    }
    const long worst = *std::max_element(failures.begin(), failures.end());
    INFO(regime << ", " << values << ": " << total << " of " << draws * static_cast<long>(heads)
                << " failed, worst head " << worst << " of " << draws);
    CHECK(stat::binomial_upper_tail(worst, draws, delta) > false_alarm / static_cast<double>(heads * cells.size()));
    CHECK(stat::binomial_upper_tail(total, draws * static_cast<long>(heads), delta) >
          false_alarm / static_cast<double>(cells.size()));
    std::printf("%-16s %-14s failures %.4f worst %.3f sampled %.2f\n", regime.c_str(), values.c_str(),
                static_cast<double>(total) / static_cast<double>(draws) / static_cast<double>(heads),
                static_cast<double>(worst) / draws, sampled / all);
    sampled = all = 0;
  }
}

int draws() {
  const char* asked = std::getenv("VATTN_CUDA_DRAWS");
  return asked ? std::atoi(asked) : 60;
}

std::vector<std::pair<std::string, std::string>> cells_of(std::vector<std::vector<std::string>> regimes,
                                                          const std::vector<std::string>& values) {
  std::vector<std::pair<std::string, std::string>> cells;
  for (const auto& some : regimes)
    for (const auto& r : some)
      for (const auto& v : values) cells.emplace_back(r, v);
  return cells;
}

}  // namespace

TEST_CASE("the promise holds on a GPU in every regime", "[cuda]") {
  require_promise(
      cells_of({synthetic::standard_regimes(), synthetic::hostile_regimes(), synthetic::adversarial_regimes()},
               {"mean"}),
      0.05, 16384, draws());
}

TEST_CASE("the promise holds on a GPU for values that aim at it", "[cuda]") {
  std::vector<std::string> values = synthetic::adversarial_values();
  values.insert(values.end(), synthetic::value_kinds().begin(), synthetic::value_kinds().end());
  require_promise(cells_of({{"gauss1", "gauss3", "needle"}}, values), 0.05, 16384, draws());
}

TEST_CASE("the promise holds on a GPU for one bit, and for three", "[cuda]") {
  for (const int bits : {1, 3})
    require_promise(cells_of({synthetic::standard_regimes()}, {"mean", "rare_far"}), 0.1, 16384, draws(), bits);
}
