// Counter-based randomness: a draw is a pure function of (seed, layer, head, step, number of the draw),
// so results do not depend on threads, order or history.
#pragma once

#include <array>

#include "vattn/config.hpp"

namespace vattn {

/// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
/// A bijection of 128-bit counters for each 64-bit key. Pinned by the authors' known-answer vectors.
[[nodiscard]] constexpr std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                                                std::array<std::uint32_t, 2> key) noexcept {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9u;  // 2^32 / golden ratio
    key[1] += 0xBB67AE85u;  // sqrt(3) - 1
  }
  return counter;
}

/// Names a call's randomness. Use a fresh `step` for every decoded token: errors of different steps
/// are independent only if their draws are.
struct draw_key {
  std::uint64_t seed = 0;
  std::uint32_t layer = 0;
  std::uint32_t step = 0;
};

/// The stream of one (key, stream) pair; `stream` numbers (batch, query, head). Copyable; a copy
/// repeats the same numbers.
class random_stream {
 public:
  constexpr random_stream() = default;
  constexpr random_stream(const draw_key& key, std::uint32_t stream) noexcept
      : key_{static_cast<std::uint32_t>(key.seed), static_cast<std::uint32_t>(key.seed >> 32)},
        counter_{0, key.step, stream, key.layer} {}

  /// A stream of its own for another purpose of the same query: the counter's top half of the layer word.
  [[nodiscard]] constexpr random_stream fork(std::uint32_t purpose) const noexcept {
    random_stream other = *this;
    other.counter_[0] = 0;
    other.counter_[3] ^= purpose << 16;
    other.used_ = 4;
    return other;
  }

  constexpr std::uint32_t next() noexcept {
    if (used_ == 4) {
      block_ = philox4x32(counter_, key_);
      ++counter_[0];
      used_ = 0;
    }
    return block_[used_++];
  }

  /// Uniform on [0, bound), bound >= 1, without bias (Lemire: "Fast random integer generation in an
  /// interval", 2019): rejects the 2^32 mod bound smallest fractions.
  constexpr std::uint32_t below(std::uint32_t bound) noexcept {
    std::uint64_t product = std::uint64_t{next()} * bound;
    if (static_cast<std::uint32_t>(product) < bound) {
      const std::uint32_t threshold = (0u - bound) % bound;
      while (static_cast<std::uint32_t>(product) < threshold) product = std::uint64_t{next()} * bound;
    }
    return static_cast<std::uint32_t>(product >> 32);
  }

 private:
  std::array<std::uint32_t, 2> key_{};
  std::array<std::uint32_t, 4> counter_{};
  std::array<std::uint32_t, 4> block_{};
  std::uint32_t used_ = 4;
};

}  // namespace vattn
