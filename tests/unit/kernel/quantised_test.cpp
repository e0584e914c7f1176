// Quantised rows: known bytes, round trips, and the arithmetic against a loop in double precision.
#include "vattn/kernel/quantised.hpp"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

namespace kernel = vattn::kernel;
using kernel::q4_0_block;
using kernel::q8_0_block;

TEST_CASE("q8_0 and q4_0 are the bytes that the format says", "[kernel][quantised]") {
  // d = 0.5 (half 0x3800), little-endian.
  std::uint8_t bytes[34] = {0x00, 0x38};
  for (int j = 0; j < 32; ++j) bytes[2 + j] = static_cast<std::uint8_t>(j * 8 - 128);
  q8_0_block eight;
  std::memcpy(&eight, bytes, sizeof(eight));
  float out[32];
  kernel::load(kernel::block_row<q8_0_block>(&eight, 32), out);
  for (int j = 0; j < 32; ++j) CHECK(out[j] == 0.5f * static_cast<float>(j * 8 - 128));

  // Element j in the low nibble of byte j, element j + 16 in the high one; d = −2 (half 0xc000).
  std::uint8_t small[18] = {0x00, 0xc0};
  for (int j = 0; j < 16; ++j) small[2 + j] = static_cast<std::uint8_t>(j | (15 - j) << 4);
  q4_0_block four;
  std::memcpy(&four, small, sizeof(four));
  kernel::load(kernel::block_row<q4_0_block>(&four, 32), out);
  for (int j = 0; j < 16; ++j) {
    CHECK(out[j] == -2.0f * static_cast<float>(j - 8));
    CHECK(out[j + 16] == -2.0f * static_cast<float>(7 - j));
  }
}

TEST_CASE("quantising keeps every element within its step", "[kernel][quantised]") {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (int trial = 0; trial < 200; ++trial) {
    float x[32], y[32], most = 0;
    for (float& e : x) e = normal(random), most = std::max(most, std::abs(e));
    q8_0_block eight;
    kernel::quantise(x, 32, &eight);
    kernel::load(kernel::block_row<q8_0_block>(&eight, 32), y);
    // Half a step, and the rounding of d to 11 bits.
    for (int j = 0; j < 32; ++j) CHECK(std::abs(x[j] - y[j]) <= most / 127 * 0.5f + most * 0x1p-11f);
    q4_0_block four;
    kernel::quantise(x, 32, &four);
    kernel::load(kernel::block_row<q4_0_block>(&four, 32), y);
    // A whole step at the end that has 7 and not 8 of them.
    for (int j = 0; j < 32; ++j) CHECK(std::abs(x[j] - y[j]) <= most / 8 * 1.001f + most * 0x1p-11f);
  }
  float zero[32] = {}, back[32];
  q8_0_block eight;
  q4_0_block four;
  kernel::quantise(zero, 32, &eight);
  kernel::quantise(zero, 32, &four);
  kernel::load(kernel::block_row<q8_0_block>(&eight, 32), back);
  for (const float b : back) CHECK(b == 0);
  kernel::load(kernel::block_row<q4_0_block>(&four, 32), back);
  for (const float b : back) CHECK(b == 0);
}

TEST_CASE("all 256 bytes of e4m3", "[kernel][quantised]") {
  int wrong = 0;
  for (int bits = 0; bits < 256; ++bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    double want = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    if (bits & 0x80) want = -want;
    const float got = kernel::e4m3_to_float(static_cast<std::uint8_t>(bits));
    wrong += (bits & 0x7f) == 0x7f ? !std::isnan(got) : static_cast<double>(got) != want;
  }
  CHECK(wrong == 0);
  CHECK(kernel::e4m3_to_float(0x7e) == 448.0f);
  CHECK(kernel::e4m3_to_float(0x38) == 1.0f);
}

namespace {
template <class Row>
void check_arithmetic(const Row& row, std::size_t width) {
  CAPTURE(width);
  REQUIRE(row.size() == width);
  std::mt19937 random(static_cast<unsigned>(width));
  std::normal_distribution<float> normal;
  std::vector<float> q(width), x(width + 1, 77.0f), sum(width + 1, 77.0f);
  for (float& e : q) e = normal(random);
  std::copy(q.begin(), q.end(), sum.begin());
  load(row, x.data());
  axpy(-0.75f, row, sum.data());
  double product = 0, magnitude = 0, norm = 0, distance = 0;
  std::size_t wrong = 0;
  for (std::size_t j = 0; j < width; ++j) {
    const double a = static_cast<double>(q[j]), b = static_cast<double>(x[j]);
    product += a * b, magnitude += std::abs(a * b), norm += b * b, distance += (b - a) * (b - a);
    const double want = a - 0.75 * b;
    wrong += !(std::abs(static_cast<double>(sum[j]) - want) <= 2.5e-7 * (std::abs(want) + std::abs(b)));
  }
  CHECK(std::abs(static_cast<double>(dot(q.data(), row)) - product) <= 4e-7 * magnitude);
  CHECK(std::abs(static_cast<double>(squared_norm(row)) - norm) <= 2e-6 * norm);
  CHECK(std::abs(static_cast<double>(squared_distance(row, q.data())) - distance) <= 2e-6 * distance);
  CHECK(wrong == 0);
  CHECK(x[width] == 77.0f);
  CHECK(sum[width] == 77.0f);
}
}  // namespace

TEST_CASE("arithmetic of quantised rows against double precision", "[kernel][quantised]") {
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  for (const std::size_t width : {0u, 32u, 64u, 96u, 128u, 160u, 256u, 512u, 576u}) {
    std::vector<float> source(width);
    for (float& e : source) e = normal(random);
    std::vector<q8_0_block> eight(width / 32);
    std::vector<q4_0_block> four(width / 32);
    kernel::quantise(source.data(), width, eight.data());
    kernel::quantise(source.data(), width, four.data());
    check_arithmetic(kernel::block_row<q8_0_block>(eight.data(), width), width);
    check_arithmetic(kernel::block_row<q4_0_block>(four.data(), width), width);
  }
  for (const std::size_t width : {0u, 1u, 80u, 127u, 128u, 129u, 300u}) {
    std::vector<kernel::e4m3> bytes(width);
    for (auto& b : bytes) b.bits = static_cast<std::uint8_t>(random() & 0xbfu);  // |x| < 2, no NaN
    check_arithmetic(kernel::e4m3_row(bytes.data(), width, 0.03f), width);
  }
}

TEST_CASE("quantised rows carry NaN and infinity to the result", "[kernel][quantised]") {
  std::vector<float> q(160, 1.0f);
  for (const std::uint16_t scale : {std::uint16_t{0x7e00}, std::uint16_t{0x7c00}}) {
    std::vector<q8_0_block> eight(5);
    std::vector<q4_0_block> four(5);
    for (auto& b : eight) b = {}, b.quants[0] = 1;
    for (auto& b : four) b = {};
    eight[4].scale = four[4].scale = scale;
    CHECK_FALSE(std::isfinite(kernel::dot(q.data(), kernel::block_row<q8_0_block>(eight.data(), 160))));
    CHECK_FALSE(std::isfinite(kernel::squared_norm(kernel::block_row<q4_0_block>(four.data(), 160))));
  }
}
