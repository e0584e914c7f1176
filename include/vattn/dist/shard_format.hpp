// What ranks send of a look: its form on the wire, and what is in it besides sums.
#include "vattn/macros_push.hpp"
#pragma once

#include <cstring>
#include <span>

#include "vattn/stats/quantile.hpp"

namespace vattn::VATTN_ABI::dist {

/// Writes numbers and arrays one behind the other.
class wire_writer {
 public:
  explicit wire_writer(std::span<std::byte> to) noexcept : to_(to) {}
  template <class T>
  void put(const T* from, index_t count) noexcept {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    VATTN_ASSERT(at_ + bytes <= to_.size());
    std::memcpy(to_.data() + at_, from, bytes);
    at_ += bytes;
  }
  template <class T>
  void put(const T& x) noexcept {
    put(&x, 1);
  }
  /// Where the next `count` numbers belong, which must be aligned there.
  template <class T>
  [[nodiscard]] T* room(index_t count) noexcept {
    auto* const here = reinterpret_cast<T*>(to_.data() + at_);
    at_ += static_cast<std::size_t>(count) * sizeof(T);
    VATTN_ASSERT(at_ <= to_.size());
    return here;
  }

 private:
  std::span<std::byte> to_;
  std::size_t at_ = 0;
};
/// Reads them back in the same order.
class wire_reader {
 public:
  explicit wire_reader(const std::byte* from) noexcept : from_(from) {}
  template <class T>
  void get(T* to, index_t count) noexcept {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    std::memcpy(to, from_, bytes);
    from_ += bytes;
  }
  template <class T>
  [[nodiscard]] T get() noexcept {
    T x;
    get(&x, 1);
    return x;
  }
  /// `count` numbers where they lie, which must be aligned.
  template <class T>
  [[nodiscard]] const T* look(index_t count) noexcept {
    const auto* const here = reinterpret_cast<const T*>(from_);
    from_ += static_cast<std::size_t>(count) * sizeof(T);
    return here;
  }

 private:
  const std::byte* from_;
};

/// What one rank sends of a group of heads in a look: for each head the scalars of `stats::sample_sums`, Σ w x (v − c)
/// in float, the other vectors in 16 bits of a unit of their own, which only the evidence rests on. At head size 128
/// that is 13.2 kB for 4 heads and 22.1 kB for 8, whatever the number of tokens.
struct look_format {
  index_t heads = 1, dv = 1;
  int groups = 4;  ///< of random signs

  static constexpr std::size_t most_bytes = 24000;  ///< where 4 groups of signs allow it
  // More of them say little more of ν₁, and cost judging the square of their number.
  static constexpr int most_signs = 8, fewest_groups = 4;

  look_format() = default;
  look_format(index_t of_heads, index_t width) noexcept : heads(of_heads), dv(width), groups(most_signs) {
    while (groups > fewest_groups && bytes() > most_bytes) --groups;
  }
  [[nodiscard]] std::size_t bytes() const noexcept { return group_bytes + static_cast<std::size_t>(heads) * head(); }
  /// Where a head's part begins.
  [[nodiscard]] std::size_t offset(index_t h) const noexcept {
    return group_bytes + static_cast<std::size_t>(h) * head();
  }

  static constexpr int scalars = 14;

 private:
  static constexpr std::size_t group_bytes = 6 * sizeof(double);
  [[nodiscard]] std::size_t head() const noexcept {
    const auto width = static_cast<std::size_t>(dv), signs = static_cast<std::size_t>(groups);
    const std::size_t all = (scalars + signs) * sizeof(double) + width * sizeof(float) +
                            (2 + signs) * (sizeof(float) + width * sizeof(std::int16_t));
    return (all + 7) / 8 * 8;
  }
};

/// Of a group, besides its heads' sums.
struct look_counts {
  double away = 0;  ///< distance of an output from the shard's own centre that its probabilities allow for
  index_t certain = 0, picks = 0, breaches = 0;
  std::uint64_t samples = 0;  ///< 0: all rows were read
  std::uint64_t unsound = 0;  ///< scores do not know their errors: not to be judged
};

/// Of a head, besides its sums.
struct look_scalars {
  double reach = 0;                 ///< Σ w x‖v − c‖ over what was sampled, relative to exp(reference)
  double floor = -stats::infinity;  ///< log of x‖v − ô‖ that no unread token exceeds but by chance; −∞: none is unread
};

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
