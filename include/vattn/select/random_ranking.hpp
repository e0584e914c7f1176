// A ranking that knows nothing: the baseline of every comparison of selectors.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <span>
#include <string_view>

#include "vattn/base/philox.hpp"
#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI::select {

/// Scores are pseudo-random numbers in [0, 1), a function of (seed, token) alone. Keeps nothing of the keys. When to
/// use: to see what another selector is worth.
class random_ranking {
 public:
  static constexpr bool estimates = false;

  random_ranking() = default;
  explicit random_ranking(std::uint64_t seed) : seed_(seed) {}

  [[nodiscard]] index_t size() const noexcept { return size_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return 0; }
  [[nodiscard]] std::size_t scratch_size() const noexcept { return 0; }
  template <kernel::row R>
  void append(const R&) {
    ++size_;
  }
  void truncate(index_t n) { size_ = std::clamp<index_t>(n, 0, size_); }
  void clear() { size_ = 0; }

  void score(const float*, index_t first, std::span<float> scores, std::span<float>, std::span<float>) const noexcept {
    for (std::size_t i = 0; i < scores.size(); ++i) {
      random_stream at({.seed = seed_, .layer = 0x52414e44},
                       static_cast<std::uint32_t>(static_cast<std::size_t>(first) + i));
      scores[i] = static_cast<float>(at.next() >> 8) * 0x1p-24f;
    }
  }

  static constexpr std::string_view format() noexcept { return "random v1"; }
  template <class Archive>
  void archive(Archive& a) {
    a(seed_, size_);
  }
  [[nodiscard]] bool valid() const noexcept { return size_ >= 0; }

 private:
  std::uint64_t seed_ = 0;
  index_t size_ = 0;
};

}  // namespace vattn::VATTN_ABI::select

#include "vattn/macros_pop.hpp"
