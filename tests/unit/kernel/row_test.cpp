// Every kernel against a loop in double precision; every bit pattern of the small types.
#include <cmath>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

namespace kernel = vattn::kernel;

TEST_CASE("all 65536 halves convert as Eigen converts them", "[kernel]") {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto pattern = static_cast<std::uint16_t>(bits);
    const float ours = kernel::half_to_float(pattern);
    const float theirs = static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(pattern));
    const bool same = std::isnan(theirs) ? std::isnan(ours)
                                         : std::bit_cast<std::uint32_t>(ours) == std::bit_cast<std::uint32_t>(theirs);
    wrong += !same;
  }
  CHECK(wrong == 0);
  CHECK(kernel::half_to_float(0x0001) == 0x1p-24f);
  CHECK(kernel::half_to_float(0x7bff) == 65504.0f);
  CHECK(kernel::half_to_float(0xfc00) == -vattn::test::infinity);
}

TEST_CASE("all 65536 bfloat16 convert as Eigen converts them", "[kernel]") {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto pattern = static_cast<std::uint16_t>(bits);
    const float ours = kernel::bfloat16_to_float(pattern);
    const float theirs = static_cast<float>(Eigen::numext::bit_cast<Eigen::bfloat16>(pattern));
    const bool same = std::isnan(theirs) ? std::isnan(ours)
                                         : std::bit_cast<std::uint32_t>(ours) == std::bit_cast<std::uint32_t>(theirs);
    wrong += !same;
  }
  CHECK(wrong == 0);
}

namespace {

template <class T, std::size_t E>
void check_width(std::size_t width) {
  CAPTURE(width);
  std::mt19937 random(static_cast<unsigned>(width) + 7);
  std::normal_distribution<float> normal;
  std::vector<T> row(width);
  std::vector<float> q(width), point(width);
  for (auto& x : row) x = T(normal(random));
  for (auto& x : q) x = normal(random);
  for (auto& x : point) x = normal(random);
  const std::span<const T, E> span(row.data(), width);
  const auto at = [&](std::size_t j) { return static_cast<double>(static_cast<float>(row[j])); };

  double dot = 0, magnitude = 0, norm = 0, distance = 0;
  for (std::size_t j = 0; j < width; ++j) {
    const double product = static_cast<double>(q[j]) * at(j), away = at(j) - static_cast<double>(point[j]);
    dot += product;
    magnitude += std::abs(product);
    norm += at(j) * at(j);
    distance += away * away;
  }
  // Pairwise or blocked sums of up to 600 floats: an error of some 2^-24 of the sum of magnitudes.
  CHECK(std::abs(static_cast<double>(kernel::dot(q.data(), span)) - dot) <= 4e-7 * magnitude);
  CHECK(std::abs(static_cast<double>(kernel::squared_norm(span)) - norm) <= 2e-6 * norm);
  CHECK(std::abs(static_cast<double>(kernel::squared_distance(span, point.data())) - distance) <= 2e-6 * distance);

  std::vector<float> loaded(width + 1, 77.0f), sum(width + 1, 77.0f);
  std::copy(q.begin(), q.end(), sum.begin());
  kernel::load(span, loaded.data());
  kernel::axpy(-0.75f, span, sum.data());
  std::size_t wrong = 0;
  for (std::size_t j = 0; j < width; ++j) {
    wrong += static_cast<double>(loaded[j]) != at(j);
    const double want = static_cast<double>(q[j]) - 0.75 * at(j);
    wrong += !(std::abs(static_cast<double>(sum[j]) - want) <= 2.5e-7 * (std::abs(want) + std::abs(at(j))));
  }
  CHECK(wrong == 0);
  CHECK(loaded[width] == 77.0f);  // nothing is written past the end
  CHECK(sum[width] == 77.0f);
}

}  // namespace

TEMPLATE_TEST_CASE("dot, axpy, load and norms against double precision", "[kernel]", float, Eigen::half,
                   Eigen::bfloat16) {
  for (const std::size_t width :
       {std::size_t{0},   std::size_t{1},   std::size_t{2},   std::size_t{3},   std::size_t{7},   std::size_t{8},
        std::size_t{15},  std::size_t{16},  std::size_t{17},  std::size_t{63},  std::size_t{64},  std::size_t{80},
        std::size_t{127}, std::size_t{128}, std::size_t{129}, std::size_t{255}, std::size_t{256}, std::size_t{257},
        std::size_t{512}, std::size_t{576}, std::size_t{600}}) {
    check_width<TestType, std::dynamic_extent>(width);
  }
  check_width<TestType, 1>(vattn::test::opaque(std::size_t{1}));
  check_width<TestType, 64>(64);
  check_width<TestType, 128>(128);
  check_width<TestType, 576>(576);
}

TEST_CASE("kernels carry NaN and infinity to the result", "[kernel]") {
  std::vector<float> q(130, 1.0f);
  for (const float bad : {vattn::test::not_a_number, vattn::test::infinity}) {
    for (const std::size_t at : {std::size_t{0}, std::size_t{129}}) {
      std::vector<Eigen::half> row(130, Eigen::half(1.0f));
      row[at] = Eigen::half(bad);
      const std::span<const Eigen::half> span(row);
      CHECK_FALSE(std::isfinite(kernel::dot(q.data(), span)));
      CHECK_FALSE(std::isfinite(kernel::squared_norm(span)));
    }
  }
}
