// Counter-based randomness: a draw is a pure function of (seed, layer, head, step, number of the draw),
// so results do not depend on threads, order or history, nor on what else a batch holds.
#include "vattn/macros_push.hpp"
#pragma once

#include <array>
#include <cmath>
#include <numbers>
#include <span>

#include "vattn/base/config.hpp"
#include "vattn/base/status.hpp"

namespace vattn::VATTN_ABI {

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

/// Names the randomness of one sequence of a batch: a request's own seed, or a number that no other request has, and
/// its own count of decoded tokens.
struct sequence_key {
  std::uint64_t seed = 0;
  std::uint32_t step = 0;
};

/// Names a call's randomness. Use a fresh `step` for every decoded token: errors of different steps
/// are independent only if their draws are. Query t of several draws as the one query of step + t does, so that a
/// token that is checked with others gets what it would get alone.
///
/// A sequence's place in the batch is no part of it, nor are its neighbours: sequence b draws by sequences[b], and
/// its output, certificate and decision are, bit for bit, those of a call for it alone, with that seed and step.
/// Without `sequences` all draw by `seed` and `step`: each keeps its promise, but their errors are not independent, and
/// equal sequences get equal outputs.
struct draw_key {
  std::uint64_t seed = 0;
  std::uint32_t layer = 0;  ///< below 2^24
  std::uint32_t step = 0;
  std::span<const sequence_key> sequences{};  ///< [n_batch], in place of `seed` and `step`; or empty
  std::uint32_t first_head = 0;  ///< in the model, of the call's first query head: for shards of a model's heads

  /// Of query t of sequence b.
  [[nodiscard]] constexpr draw_key at(index_t b, index_t t) const noexcept {
    const sequence_key one = sequences.empty() ? sequence_key{seed, step} : sequences[static_cast<std::size_t>(b)];
    return {.seed = one.seed, .layer = layer, .step = one.step + static_cast<std::uint32_t>(t)};
  }

  /// For a call of n_batch sequences and n_heads query heads.
  [[nodiscard]] status check(index_t n_batch, index_t n_heads) const noexcept {
    if (!sequences.empty() && static_cast<index_t>(sequences.size()) != n_batch) {
      return status::error(errc::invalid_argument,
                           "the draw key has keys of %zu sequences, q has n_batch %lld: give one for each, or none",
                           sequences.size(), static_cast<long long>(n_batch));
    }
    if (layer >> 24 != 0) {
      return status::error(errc::invalid_argument, "the draw key's layer is %lu: layers end at 2^24",
                           static_cast<unsigned long>(layer));
    }
    if (n_heads + index_t{first_head} > index_t{1} << 16) {
      return status::error(errc::invalid_argument,
                           "query heads %lld to %lld of the model: heads whose draws are named end at 2^16",
                           static_cast<long long>(first_head), static_cast<long long>(first_head + n_heads - 1));
    }
    return {};
  }
};

/// The stream of one (key, stream) pair; `stream` is the query head in the model. Copyable; a copy
/// repeats the same numbers.
///
/// No two streams share a block of numbers, because each name has bits of its own: Philox's key is the seed, and its
/// counter is, in words of 32 bits,
///   number of the block | step | purpose << 16, query head | layer
/// Layers from 2^24 on, with a token or a row in place of the head, are the library's own: orders, rotations,
/// codebooks.
class random_stream {
 public:
  constexpr random_stream() = default;
  constexpr random_stream(const draw_key& key, std::uint32_t stream) noexcept
      : key_{static_cast<std::uint32_t>(key.seed), static_cast<std::uint32_t>(key.seed >> 32)},
        counter_{0, key.step, stream, key.layer} {}

  /// The query's stream for another purpose, from its beginning; `purpose` below 2^16, 0 is that of a stream itself.
  [[nodiscard]] constexpr random_stream fork(std::uint32_t purpose) const noexcept {
    random_stream other = *this;
    other.counter_[0] = 0;
    other.counter_[2] = (counter_[2] & 0xFFFF) | purpose << 16;
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

  /// N(0, 1), by Box and Muller.
  double normal() noexcept {
    const double u = (next() + 0.5) * 0x1p-32, angle = next() * (2 * std::numbers::pi * 0x1p-32);  // 0 is never drawn
    return std::sqrt(-2 * std::log(u)) * std::cos(angle);
  }

 private:
  std::array<std::uint32_t, 2> key_{};
  std::array<std::uint32_t, 4> counter_{};
  std::array<std::uint32_t, 4> block_{};
  std::uint32_t used_ = 4;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
