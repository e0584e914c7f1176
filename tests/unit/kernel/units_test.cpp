// Rows in a unit: squares of numbers that float does not hold, with the digits of those that it does.
#include <array>
#include <cmath>
#include <vattn/kernel/units.hpp>
#include <vector>

#include "support/catch.hpp"

using namespace vattn;

TEST_CASE("units: norms and distances at any scale have the same digits", "[kernel][units]") {
  std::vector<float> x(77), centre(77);
  for (std::size_t j = 0; j < x.size(); ++j) {
    x[j] = 0.37f * static_cast<float>(j % 13) - 1.1f;
    centre[j] = 0.11f * static_cast<float>(j % 7);
  }
  const float norm = kernel::norm_of(std::span<const float>(x));
  const float away = kernel::distance_of(std::span<const float>(x), centre.data());
  for (const int e : {-120, -100, -64, -41, -1, 1, 40, 50, 64, 100, 118}) {
    auto y = x, c = centre;
    for (float& v : y) v = std::ldexp(v, e);
    for (float& v : c) v = std::ldexp(v, e);
    const std::span<const float> row(y);
    CAPTURE(e);
    CHECK(kernel::norm_of(row) == std::ldexp(norm, e));
    CHECK(kernel::distance_of(row, c.data()) == std::ldexp(away, e));
    const kernel::unit_row<std::span<const float>> in{row, std::ldexp(1.0f, -e)};
    CHECK(squared_norm(in) == kernel::squared_norm(std::span<const float>(x)));
    CHECK(squared_distance(in, centre.data()) == kernel::squared_distance(std::span<const float>(x), centre.data()));
    std::vector<float> loaded(77), sum(77);
    load(in, loaded.data());
    CHECK(loaded == x);
    axpy(1, in, sum.data());
    CHECK(sum == x);
  }
  CHECK(kernel::norm_of(std::span<const float>(std::vector<float>(5))) == 0);
}

TEST_CASE("units: powers of two, 1 where nothing is to be gained, and no slave of one outlier", "[kernel][units]") {
  CHECK(kernel::unit_for(1.0f) == 1);
  CHECK(kernel::unit_for(0.0f) == 1);
  CHECK(kernel::unit_for(INFINITY) == 1);
  CHECK(kernel::unit_for(0x1.8p-80f) == 0x1p80f);
  CHECK(kernel::unit_for(0x1.8p60f) == 0x1p-60f);
  CHECK(std::isfinite(1 / kernel::unit_for(0x1p-149f)));
  std::array<float, 5> one_is_huge{1, 0, 2, 1e30f, 1};
  CHECK(kernel::unit_for(one_is_huge) == 1);
  std::array<float, 4> zeros_do_not_count{0, 0, 0, 0x1p-90f};
  CHECK(kernel::unit_for(zeros_do_not_count) == 0x1p90f);
}
