// Block kernels: every instruction set that the machine has against naive loops in double.
#include <cmath>
#include <random>
#include <vattn/kernel/block.hpp>
#include <vector>

#include "support/catch.hpp"

namespace {

using namespace vattn;
using kernel::block_rows;
using kernel::isa;

std::vector<isa> available() {
  std::vector<isa> all;
  for (const isa i : kernel::isa_levels) {
    if (i <= kernel::widest_isa()) all.push_back(i);
  }
  return all;
}

// Row `row` of `stride` bytes begins with `dim` random elements; the rest is NaN, or 0xff.
template <class T>
std::vector<std::byte> random_rows(index_t total, index_t dim, index_t stride, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<std::byte> rows(static_cast<std::size_t>(total * stride), std::byte{0xff});
  std::vector<float> x(static_cast<std::size_t>(dim));
  for (index_t row = 0; row < total; ++row) {
    for (float& e : x) e = normal(random);
    T* to = reinterpret_cast<T*>(rows.data() + row * stride);
    if constexpr (kernel::quantised_block<T>) {
      kernel::quantise(x.data(), x.size(), to);
    } else {
      for (std::size_t d = 0; d < x.size(); ++d) to[d] = T(x[d]);
    }
  }
  return rows;
}

template <class T>
void check(index_t dim, index_t groups, index_t count, bool gathered, bool short_queries = false) {
  std::mt19937 random(static_cast<unsigned>(dim * 100 + groups * 10 + count));
  std::normal_distribution<float> normal;
  const index_t total = 200, first = 5;
  const index_t stride = kernel::row_bytes<T>(dim) + 3 * static_cast<index_t>(sizeof(T));  // of odd alignment
  const std::vector<std::byte> rows = random_rows<T>(total, dim, stride, random);
  std::vector<float> q(static_cast<std::size_t>(groups * dim)), x(static_cast<std::size_t>(groups * block_rows));
  const float scale = 0.31f;
  for (float& v : q) v = scale * (short_queries ? static_cast<float>(Eigen::bfloat16(normal(random))) : normal(random));
  std::vector<float> storage(kernel::query_storage(groups, dim), std::nanf(""));
  for (float& v : x) v = normal(random);
  std::vector<ordinal> places;
  for (index_t i = 0; i < count; ++i) places.push_back(static_cast<ordinal>((i * 37 + 11) % total));
  const kernel::strided_rows all{rows.data(), stride};
  const kernel::block_of_rows block =
      gathered ? kernel::block_of_rows::gathered(all, places.data(), count) : kernel::block_of_rows(all, first, count);
  const auto element = [&](index_t i, index_t d) {
    const index_t row = gathered ? index_t{places[static_cast<std::size_t>(i)]} : first + i;
    const T* from = reinterpret_cast<const T*>(rows.data() + row * stride);
    if constexpr (kernel::quantised_block<T>) {
      float decoded[kernel::block_elements];
      kernel::decode_block(from[d / 32], decoded);
      return static_cast<double>(decoded[d % 32]);
    } else {
      return static_cast<double>(static_cast<float>(from[d]));
    }
  };
  for (const isa how : available()) {
    CAPTURE(to_string(how), dim, groups, count, gathered);
    std::vector<float> out(static_cast<std::size_t>(groups * block_rows), -7),
        acc(static_cast<std::size_t>(groups * dim), 2);
    const kernel::block_queries queries = kernel::prepare_queries<T>(how, q.data(), groups, dim, scale, storage);
    CHECK((queries.halves != nullptr) ==
          (short_queries && how == isa::avx512_bf16 && std::same_as<T, Eigen::bfloat16>));
#if VATTN_DISPATCH
    CHECK((queries.digits != nullptr) ==
          (how == isa::avx512_bf16 && kernel::quantised_block<T> && dim <= kernel::detail::widest_widened));
#endif
    kernel::block_logits<T>(queries, block, out.data());
    kernel::block_add<T>(how, x.data(), groups, block, dim, acc.data());
    double worst = 0;
    for (index_t g = 0; g < groups; ++g) {
      for (index_t i = 0; i < count; ++i) {
        const float got = out[static_cast<std::size_t>(g * block_rows + i)];
        double want = 0, size = 0;
        for (index_t d = 0; d < dim; ++d) {
          const double term = static_cast<double>(q[static_cast<std::size_t>(g * dim + d)]) * element(i, d);
          want += term, size += std::abs(term);
        }
        worst = std::max(worst, std::abs(static_cast<double>(got) - want) / size);
      }
      for (index_t d = 0; d < dim; ++d) {
        double want = 2, size = 2;
        for (index_t i = 0; i < count; ++i) {
          const double term = static_cast<double>(x[static_cast<std::size_t>(g * block_rows + i)]) * element(i, d);
          want += term, size += std::abs(term);
        }
        worst =
            std::max(worst, std::abs(static_cast<double>(acc[static_cast<std::size_t>(g * dim + d)]) - want) / size);
      }
    }
    CHECK(worst < 1e-6);
  }
}

}  // namespace

TEST_CASE("block kernels are the naive loops, for every type, size, group and fill", "[kernel][block]") {
  for (const index_t dim : {1, 7, 16, 64, 80, 96, 128, 256, 576}) {
    for (const index_t groups : {1, 2, 3, 4, 5, 8}) {
      for (const index_t count : {1, 3, 17, 64}) {
        check<float>(dim, groups, count, false);
        check<Eigen::half>(dim, groups, count, groups % 2 == 0);
        check<Eigen::bfloat16>(dim, groups, count, true);
        if (dim % 32 == 0) {
          check<kernel::q8_0_block>(dim, groups, count, groups % 2 == 1);
          check<kernel::q8_0_block>(dim, groups, count, groups % 2 == 0, true);
          check<kernel::q4_0_block>(dim, groups, count, groups % 2 == 1);
        }
        check<Eigen::bfloat16>(dim, groups, count, groups % 2 == 1, true);
      }
    }
  }
}

TEST_CASE("rows of q4_0 that are widened a few at a time, and ones too wide for that", "[kernel][block]") {
  for (const index_t dim : {512, 1024, 1056, 2048}) {
    for (const index_t count : {1, 33, 64}) {
      check<kernel::q4_0_block>(dim, 3, count, false);
      check<kernel::q4_0_block>(dim, 2, count, true);
    }
  }
}

TEST_CASE("logits of q8_0 at the ends of quants, scales and queries", "[kernel][block]") {
  std::mt19937 random(3);
  const auto uniform = [&] { return static_cast<float>(random() % 20001) / 10000 - 1; };
  constexpr index_t count = 40, dim = 64;
  std::vector<kernel::q8_0_block> rows(count * 2);
  for (kernel::q8_0_block& b : rows) {
    b.scale = static_cast<std::uint16_t>(random() % 0x7c00 | (random() % 2 << 15));  // any that is finite
    for (auto& q : b.quants) q = static_cast<std::int8_t>(random() % 3 == 0 ? random() % 2 * 255 + 128 : random());
  }
  const kernel::block_of_rows block({reinterpret_cast<const std::byte*>(rows.data()), 2 * sizeof rows[0]}, 0, count);
  std::vector<float> q(dim), out(block_rows), storage(kernel::query_storage(1, dim));
  for (const isa how : available()) {
    for (const int kind : {0, 1, 2, 3, 4}) {
      CAPTURE(to_string(how), kind);
      for (float& v : q) {
        v = kind == 0   ? 0
            : kind == 1 ? uniform() * std::ldexp(1.0f, -static_cast<int>(random() % 24))  // beyond the digits' range
            : kind == 2 ? (uniform() < 0 ? -255.0f : 255.0f) / 256                        // the largest digits
            : kind == 3 ? uniform() * 1e20f
                        : uniform() * 1e-20f;
      }
      const auto queries =
          kernel::prepare_queries<kernel::q8_0_block>(how, q.data(), 1, dim, kind == 2 ? 1 : 0.31f, storage);
      kernel::block_logits<kernel::q8_0_block>(queries, block, out.data());
      for (std::size_t i = 0; i < count; ++i) {
        double want = 0, size = 0, top = 0;
        for (std::size_t d = 0; d < dim; ++d) {
          const kernel::q8_0_block& b = rows[2 * i + d / 32];
          const double k = static_cast<double>(kernel::half_to_float(b.scale)) * b.quants[d % 32];
          want += static_cast<double>(q[d]) * k, size += std::abs(static_cast<double>(q[d]) * k);
          top = std::max(top, std::abs(static_cast<double>(kernel::half_to_float(b.scale))) * 128);
        }
        double most = 0;
        for (const float v : q) most = std::max(most, std::abs(static_cast<double>(v)));
        CHECK(std::abs(static_cast<double>(out[i]) - want) <= 1e-6 * size + 0x1p-23 * most * top);
      }
    }
    // What is not finite stays so, in a query or in a scale.
    for (const float odd : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
      std::fill(q.begin(), q.end(), 1.0f);
      q[37] = odd;
      const auto queries = kernel::prepare_queries<kernel::q8_0_block>(how, q.data(), 1, dim, 0.31f, storage);
      kernel::block_logits<kernel::q8_0_block>(queries, block, out.data());
      for (std::size_t i = 0; i < count; ++i) CHECK_FALSE(std::isfinite(out[i]));
      std::fill(q.begin(), q.end(), 1.0f);
      std::vector<kernel::q8_0_block> damaged = rows;
      damaged[2 * 17 + 1].scale = Eigen::numext::bit_cast<std::uint16_t>(Eigen::half(odd));
      const kernel::block_of_rows all({reinterpret_cast<const std::byte*>(damaged.data()), block.stride}, 0, count);
      const auto ones = kernel::prepare_queries<kernel::q8_0_block>(how, q.data(), 1, dim, 0.31f, storage);
      kernel::block_logits<kernel::q8_0_block>(ones, all, out.data());
      for (std::size_t i = 0; i < count; ++i) CHECK(std::isfinite(out[i]) == (i != 17));
    }
  }
}

TEST_CASE("halves of every kind are converted as in a row", "[kernel][block]") {
  // Zeros, subnormals, normals, infinities: the product with 1 is the element.
  std::vector<Eigen::half> rows;
  for (unsigned bits = 0; bits < 65536; bits += 7) {
    if ((bits & 0x7c00u) == 0x7c00u && (bits & 0x3ffu) != 0) continue;  // NaN
    rows.push_back(std::bit_cast<Eigen::half>(static_cast<std::uint16_t>(bits)));
  }
  const float one = 1;
  for (const isa how : available()) {
    for (std::size_t first = 0; first + 64 <= rows.size(); first += 64) {
      float acc[64] = {};
      // One row of 64 elements.
      const kernel::block_of_rows row({reinterpret_cast<const std::byte*>(rows.data() + first), 128}, 0, 1);
      float x[block_rows] = {one};
      kernel::block_add<Eigen::half>(how, x, 1, row, 64, acc);
      for (std::size_t d = 0; d < 64; ++d)
        REQUIRE(acc[d] == kernel::half_to_float(std::bit_cast<std::uint16_t>(rows[first + d])));
    }
  }
}

TEST_CASE("block exponentials to 5e-7, and 0 far below", "[kernel][block]") {
  for (const isa how : available()) {
    CAPTURE(to_string(how));
    double worst = 0;
    for (int start = 0; start < 400; ++start) {
      float x[block_rows];
      const index_t n = 1 + start % 64;
      for (index_t i = 0; i < n; ++i) x[i] = 3.25f - static_cast<float>(start * 64 + i) * 0.0034f;
      std::vector<float> before(x, x + n);
      double sum = 0;
      const float total = kernel::block_exponentials(how, x, n, 3.25f);
      for (index_t i = 0; i < n; ++i) {
        const float below = before[static_cast<std::size_t>(i)] - 3.25f;  // rounds, for some: not by exp
        const double want = std::exp(static_cast<double>(below));
        worst = std::max(worst, std::abs(static_cast<double>(x[i]) - want) / want);
        sum += static_cast<double>(x[i]);
      }
      CHECK(std::abs(static_cast<double>(total) - sum) <= 1e-5 * sum);
    }
    CHECK(worst < 5e-7);
    float far[block_rows] = {0, -88, -200, -std::numeric_limits<float>::infinity()};
    CHECK(kernel::block_exponentials(how, far, 4, 0) == 1);
    CHECK(far[0] == 1);
    CHECK((far[1] == 0 && far[2] == 0 && far[3] == 0));
  }
}

TEST_CASE("exponentials of many rows are those of their blocks", "[kernel][block]") {
  for (const isa how : available()) {
    CAPTURE(to_string(how));
    for (const index_t n : {1, 63, 64, 65, 200}) {
      std::vector<float> x(static_cast<std::size_t>((n + 15) / 16 * 16), 7.0f);
      for (index_t i = 0; i < n; ++i) x[static_cast<std::size_t>(i)] = 2 - 0.03f * static_cast<float>(i);
      const std::vector<float> before = x;
      kernel::exponentials(how, x.data(), n, 2);
      for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i)
        CHECK(std::abs(x[i] - std::exp(before[i] - 2)) <= 1e-6f * x[i]);
    }
  }
}

TEST_CASE("the block maximum sees every place, and every number that is not finite", "[kernel][block]") {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const isa how : available()) {
    CAPTURE(to_string(how));
    for (index_t n = 1; n <= block_rows; ++n) {
      for (index_t at = 0; at < n; ++at) {
        std::vector<float> x(block_rows, infinity);  // what lies behind n is not looked at
        std::fill_n(x.begin(), n, -3.0f);
        float top = 0;
        x[static_cast<std::size_t>(at)] = -2;
        REQUIRE(kernel::block_maximum(how, x.data(), n, top));
        REQUIRE(top == -2);
        for (const float odd : {infinity, -infinity, std::nanf("")}) {
          x[static_cast<std::size_t>(at)] = odd;
          REQUIRE_FALSE(kernel::block_maximum(how, x.data(), n, top));
        }
      }
    }
  }
}
