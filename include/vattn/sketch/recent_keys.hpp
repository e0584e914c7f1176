// Which keys an index was last given: so that it is seen when a cache has overwritten them.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <span>
#include <vector>

#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI {

/// Fingerprints of the newest keys of an index, 64 bits each. An index calls `add` with each key that it appends, and
/// offers its object as `recent()`; append_from then finds tokens whose keys the cache has overwritten, as it does
/// with rejected drafts, and forgets them by itself. Not saved with the index: after loading, nothing is known until
/// keys are appended.
class recent_keys {
 public:
  static constexpr index_t kept = 16;  ///< more than the drafts of a step

  /// `token` is the index's size before the key. Less than there was: it has been truncated.
  void add(index_t token, std::span<const float> key) noexcept {
    if (token > size_) first_ = token;
    size_ = token + 1;
    first_ = std::clamp<index_t>(first_, std::max<index_t>(0, size_ - kept), token);
    prints_[slot(token)] = fingerprint(key);
  }

  /// How many of the first n tokens may stay: up to the first one whose key in `head` is another than it was. None if
  /// that is the oldest that is known, since those before may be others too.
  template <class Head>
  [[nodiscard]] index_t unchanged(index_t n, const Head& head) {
    using kernel::load;
    for (index_t token = first_; token < std::min(n, size_); ++token) {
      const auto key = head.key(token);
      key_.resize(static_cast<std::size_t>(key.size()));
      load(key, key_.data());
      if (fingerprint(key_) != prints_[slot(token)]) return token == first_ ? 0 : token;
    }
    return n;
  }

 private:
  [[nodiscard]] static std::size_t slot(index_t token) noexcept { return static_cast<std::size_t>(token % kept); }
  // FNV-1a by words, on two lanes; the last shift brings the high bits down.
  [[nodiscard]] static std::uint64_t fingerprint(std::span<const float> key) noexcept {
    std::uint64_t a = 0xCBF29CE484222325u, b = key.size();
    for (std::size_t j = 0; j < key.size(); ++j) {
      a = (a ^ std::bit_cast<std::uint32_t>(key[j])) * 0x9E3779B97F4A7C15u;
      std::swap(a, b);
    }
    a = (a ^ std::rotl(b, 32)) * 0xBF58476D1CE4E5B9u;
    return a ^ a >> 32;
  }

  std::array<std::uint64_t, static_cast<std::size_t>(kept)> prints_{};
  index_t first_ = 0, size_ = 0;  // tokens [first_, size_) are known
  std::vector<float> key_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
