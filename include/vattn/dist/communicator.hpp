// What the ranks of a cache that is split need of each other: one collective, an all-gather of bytes.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <concepts>
#include <span>

#include "vattn/base/config.hpp"
#include "vattn/base/status.hpp"

namespace vattn::VATTN_ABI::dist {

/// A group of `size()` ranks that make the same calls in the same order; `rank()` is the caller's, from 0.
/// `all_gather(mine, all)`: every rank gives as many bytes, and gets those of all, in order of rank: `all` has
/// size()·mine.size() bytes. Whatever the transport, each rank then has the same bytes, and what it computes of them in
/// order of rank is the same to the last bit: sums that a transport reduces itself need not be.
/// A transport that fails says so by its status, on each rank that lives; one that waits for ever for a rank that has
/// gone makes the call wait with it. Nothing is sent between calls, and a call allocates nothing once the largest of
/// its kind was made.
template <class C>
concept communicator = requires(C& c, std::span<const std::byte> mine, std::span<std::byte> all) {
  { c.rank() } -> std::convertible_to<int>;
  { c.size() } -> std::convertible_to<int>;
  { c.all_gather(mine, all) } -> std::same_as<status>;
};

/// Ranks of a call, at most: the first exchange is on the stack.
inline constexpr int most_ranks = 256;

/// A cache that is not split.
struct alone {
  [[nodiscard]] int rank() const noexcept { return 0; }
  [[nodiscard]] int size() const noexcept { return 1; }
  [[nodiscard]] status all_gather(std::span<const std::byte> mine, std::span<std::byte> all) noexcept {
    std::copy(mine.begin(), mine.end(), all.begin());
    return {};
  }
};

/// What a call cost this rank.
struct traffic {
  index_t exchanges = 0;
  std::size_t bytes_sent = 0;
};

/// A communicator whose exchanges are counted, from 0.
template <communicator C>
struct counting_communicator {
  counting_communicator(C& to, traffic& counts) noexcept : of(to), cost(counts) { cost = {}; }
  [[nodiscard]] int rank() const noexcept { return of.rank(); }
  [[nodiscard]] int size() const noexcept { return of.size(); }
  [[nodiscard]] status all_gather(std::span<const std::byte> mine, std::span<std::byte> all) noexcept {
    ++cost.exchanges;
    cost.bytes_sent += mine.size();
    return of.all_gather(mine, all);
  }

  C& of;
  traffic& cost;
};

/// Any communicator behind one type, so that what speaks through it is compiled once. It must outlive this.
class communicator_ref {
 public:
  template <communicator C>
  requires(!std::same_as<C, communicator_ref>)
  explicit communicator_ref(C& c) noexcept
      : of_(&c),
        rank_(c.rank()),
        size_(c.size()),
        gather_([](void* of, std::span<const std::byte> mine, std::span<std::byte> all) {
          return static_cast<C*>(of)->all_gather(mine, all);
        }) {}
  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int size() const noexcept { return size_; }
  [[nodiscard]] status all_gather(std::span<const std::byte> mine, std::span<std::byte> all) noexcept {
    return gather_(of_, mine, all);
  }

 private:
  void* of_;
  int rank_, size_;
  status (*gather_)(void*, std::span<const std::byte>, std::span<std::byte>);
};

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
