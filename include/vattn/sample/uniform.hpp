// Uniform samples of [0, n) that grow: every prefix of the sequence is itself a valid sample.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <span>

#include "vattn/base/philox.hpp"

namespace vattn::VATTN_ABI {

/// A sequence of places in [0, n) whose every prefix, and every prefix of what is left after dropping a
/// fixed subset, is a uniform sample: so the residual may shrink after the draw.
template <class S>
concept uniform_sampler = requires(S s, ordinal n, const random_stream& stream, std::span<std::uint64_t> table) {
  S(n, stream, table);
  { s.next() } -> std::same_as<ordinal>;
  { S::table_size(n) } -> std::convertible_to<std::size_t>;
  { S::with_replacement } -> std::convertible_to<bool>;
};

namespace sample {

/// A random permutation, revealed one place at a time: Fisher-Yates on an array that is the identity
/// except where a small hash table says otherwise. Exactly uniform given the stream; O(1) a draw,
/// memory touched in proportion to the draws. At most n draws.
class uniform_without_replacement {
 public:
  static constexpr bool with_replacement = false;

  /// Words of `table` for n places: room for all of them at a load of at most 2/3.
  [[nodiscard]] static constexpr std::size_t table_size(ordinal n) noexcept {
    return std::bit_ceil(static_cast<std::size_t>(n) + n / 2 + minimum_table);
  }

  uniform_without_replacement(ordinal n, const random_stream& stream, std::span<std::uint64_t> table) noexcept
      : n_(n), start_(stream), storage_(table) {
    restart(minimum_table);
  }

  ordinal next() noexcept {
    VATTN_ASSERT(drawn_ < n_);
    // The table is kept at most half full while there is room. Draws are a function of the counter, so
    // a larger table is filled by replaying them: twice the work at most, and no second buffer.
    if (2 * (std::size_t{drawn_} + 1) > table_.size() && table_.size() < storage_.size()) {
      const ordinal drawn = drawn_;
      restart(std::min(storage_.size(), 4 * table_.size()));
      while (drawn_ < drawn) step();
    }
    return step();
  }

 private:
  static constexpr std::size_t minimum_table = 1024;

  void restart(std::size_t size) noexcept {
    stream_ = start_;
    drawn_ = 0;
    table_ = storage_.first(std::min(size, storage_.size()));
    std::fill(table_.begin(), table_.end(), empty);
  }

  ordinal step() noexcept {
    const ordinal at = drawn_ + stream_.below(n_ - drawn_);
    const ordinal moved = lookup(drawn_);
    std::uint64_t& slot = find(at);
    const ordinal result = slot == empty ? at : static_cast<ordinal>(slot);
    slot = std::uint64_t{at} << 32 | moved;
    ++drawn_;
    return result;
  }

  static constexpr std::uint64_t empty = ~std::uint64_t{0};

  // Slot of key `at`: high half the place, low half what stands there now.
  std::uint64_t& find(ordinal at) noexcept {
    const std::size_t mask = table_.size() - 1;
    std::size_t slot = (std::uint64_t{at} * 0x9E3779B97F4A7C15u >> 32) & mask;
    while (table_[slot] != empty && static_cast<ordinal>(table_[slot] >> 32) != at) slot = (slot + 1) & mask;
    return table_[slot];
  }
  ordinal lookup(ordinal at) noexcept {
    const std::uint64_t slot = find(at);
    return slot == empty ? at : static_cast<ordinal>(slot);
  }

  ordinal n_;
  ordinal drawn_ = 0;
  random_stream start_, stream_;
  std::span<std::uint64_t> storage_, table_;
};

/// Independent uniform draws. A row drawn twice counts twice in the estimate: dropping the duplicate
/// would bias it.
class uniform_with_replacement {
 public:
  static constexpr bool with_replacement = true;
  [[nodiscard]] static constexpr std::size_t table_size(ordinal) noexcept { return 0; }

  uniform_with_replacement(ordinal n, const random_stream& stream, std::span<std::uint64_t>) noexcept
      : n_(n), stream_(stream) {}

  ordinal next() noexcept { return stream_.below(n_); }

 private:
  ordinal n_;
  random_stream stream_;
};

}  // namespace sample
}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
