// README's first lines of code, as they stand there: they compile, and do what is said of them.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "vattn/vattn.hpp"

TEST_CASE("README's snippet reads few rows and keeps its promise", "[docs]") {
  const vattn::index_t n = 16384;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> queries(32 * 128), keys(8 * 16384 * 128), values(keys.size()), outputs(queries.size());
  for (float& x : queries) x = normal(random);
  for (float& x : keys) x = normal(random);
  for (float& x : values) x = 1 + normal(random);
  std::vector<vattn::certificate> proofs(32);
  const float *const q = queries.data(), *const k = keys.data(), *const v = values.data();
  float* const o = outputs.data();
  vattn::certificate* const certificates = proofs.data();
  const std::uint32_t step = 0;

#include "snippets/README/top.hpp"

  REQUIRE(s.ok());
  std::vector<float> dense(outputs.size());
  REQUIRE(vattn::exact_attention(query, cache, {.scale = 1 / std::sqrt(128.f)},
                                 {.output = {dense.data(), {1, 1, 32, 128}}}, memory));
  int wrong = 0;
  for (std::size_t h = 0; h < 32; ++h) {
    double off = 0, norm = 0;
    for (std::size_t j = 128 * h; j < 128 * (h + 1); ++j) {
      off += std::pow(double{outputs[j]} - dense[j], 2);
      norm += std::pow(double{dense[j]}, 2);
    }
    wrong += off > 0.05 * 0.05 * norm;
    CHECK(proofs[h].density() < 0.25);
  }
  CHECK(wrong <= 9);  // of 32 draws at δ = 0.1, more once in a thousand times
}
