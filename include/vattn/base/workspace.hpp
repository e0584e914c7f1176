// Scratch memory of a call: the caller's, sized by a dry run; nothing is allocated on the decode path.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>
#include <span>
#include <utility>

#include "vattn/base/config.hpp"
#include "vattn/base/status.hpp"

namespace vattn::VATTN_ABI {

/// Bytes for a call. Default-constructed it owns its memory and grows when a call needs more (so a call
/// of no larger shape than an earlier one allocates nothing); over a caller's span it never allocates
/// and a call that needs more returns `errc::workspace_too_small`. One call at a time: two that run at once, nested
/// ones included, need a workspace each. That they share one is not found, and corrupts the results of both.
class workspace {
 public:
  workspace() = default;
  explicit workspace(std::span<std::byte> memory) noexcept : memory_(memory), owned_(nullptr), fixed_(true) {}
  ~workspace() { release(); }
  workspace(const workspace&) = delete;
  workspace& operator=(const workspace&) = delete;
  workspace(workspace&& other) noexcept { swap(other); }
  workspace& operator=(workspace&& other) noexcept {
    workspace moved(static_cast<workspace&&>(other));
    swap(moved);
    return *this;
  }

  [[nodiscard]] std::size_t size() const noexcept { return memory_.size(); }
  [[nodiscard]] std::span<std::byte> memory() const noexcept { return memory_; }

  /// Makes `bytes` available. Contents are lost when it grows.
  status reserve(std::size_t bytes) noexcept {
    if (bytes <= memory_.size()) return {};
    if (fixed_) {
      return status::error(
          errc::workspace_too_small,
          "the workspace has %zu bytes but the call needs %zu: size it with workspace_bytes(), or pass a "
          "default-constructed workspace",
          memory_.size(), bytes);
    }
    auto* fresh = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{alignment}, std::nothrow));
    if (fresh == nullptr) return status::error(errc::out_of_memory, "no memory for a workspace of %zu bytes", bytes);
    release();
    owned_ = fresh;
    memory_ = {fresh, bytes};
    return {};
  }

  static constexpr std::size_t alignment = 64;

 private:
  void release() noexcept {
    if (owned_) ::operator delete(owned_, std::align_val_t{alignment});
    owned_ = nullptr;
  }
  void swap(workspace& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(owned_, other.owned_);
    std::swap(fixed_, other.fixed_);
  }

  std::span<std::byte> memory_;
  std::byte* owned_ = nullptr;
  bool fixed_ = false;
};

/// Hands out 64-byte aligned spans from a block. Over an empty block it only counts: the dry run and the
/// run are the same code, so they cannot disagree.
class arena {
 public:
  arena() = default;
  explicit arena(std::span<std::byte> memory) noexcept : memory_(memory) {
    const auto past = reinterpret_cast<std::uintptr_t>(memory.data()) % workspace::alignment;
    if (past != 0) memory_ = memory.subspan(std::min(memory.size(), workspace::alignment - past));
  }

  template <class T>
  [[nodiscard]] std::span<T> take(std::size_t count) noexcept {
    const std::size_t at = used_;
    used_ += (count * sizeof(T) + workspace::alignment - 1) / workspace::alignment * workspace::alignment;
    VATTN_ASSERT(memory_.data() == nullptr || used_ <= memory_.size());  // what was counted is what is taken
    if (used_ > memory_.size()) return {};
    return {reinterpret_cast<T*>(memory_.data() + at), count};
  }
  [[nodiscard]] std::size_t used() const noexcept { return used_; }

 private:
  std::span<std::byte> memory_;
  std::size_t used_ = 0;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
