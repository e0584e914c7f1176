// Ranks that are threads of one process: for tests, and for hosts whose memory has several parts.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "vattn/dist/communicator.hpp"

namespace vattn::VATTN_ABI::dist {

/// What `size` threads share, each of which is a `thread_rank` of it. It must outlive them. A rank that does not come
/// within `patience` breaks the group: all of its calls, then and later, fail with a message.
class thread_group {
 public:
  /// Allocates; throws what std::vector throws.
  explicit thread_group(int size, std::chrono::milliseconds patience = std::chrono::minutes(1))
      : boards_(static_cast<std::size_t>(std::max(1, size))), patience_(patience) {}

  [[nodiscard]] int size() const noexcept { return static_cast<int>(boards_.size()); }

 private:
  friend class thread_rank;

  // What a rank shows. Two of them in turn: whoever is late reads the last one while the next is written, and nobody
  // is two exchanges ahead.
  struct board {
    std::array<std::vector<std::byte>, 2> shown;
    std::array<bool, 2> ok{};
  };

  [[nodiscard]] status all_gather(int rank, std::uint64_t turn, std::span<const std::byte> mine,
                                  std::span<std::byte> all) noexcept {
    const std::size_t side = turn % 2, width = mine.size();
    board& b = boards_[static_cast<std::size_t>(rank)];
    b.ok[side] = show(mine, b.shown[side]) && all.size() == width * boards_.size();
    if (!wait(turn)) {
      return status::error(errc::communication_failed,
                           "a rank did not come to an exchange of %d threads within %lld ms: has its thread ended?",
                           size(), static_cast<long long>(patience_.count()));
    }
    for (std::size_t r = 0; r < boards_.size(); ++r) {
      const std::vector<std::byte>& shown = boards_[r].shown[side];
      if (!boards_[r].ok[side] || shown.size() != width) {
        return status::error(errc::communication_failed,
                             "rank %zu had %zu bytes in an exchange where rank %d had %zu: all must have as many", r,
                             shown.size(), rank, width);
      }
      std::copy(shown.begin(), shown.end(), all.begin() + static_cast<std::ptrdiff_t>(r * width));
    }
    return {};
  }

  [[nodiscard]] static bool show(std::span<const std::byte> mine, std::vector<std::byte>& to) noexcept {
#if VATTN_HAS_EXCEPTIONS
    try {
      to.assign(mine.begin(), mine.end());
    } catch (const std::bad_alloc&) {
      return false;
    }
#else
    to.assign(mine.begin(), mine.end());
#endif
    return true;
  }

  // Until all ranks have come `turn + 1` times. False: one has not.
  [[nodiscard]] bool wait(std::uint64_t turn) noexcept {
    {
      const std::lock_guard lock(mutex_);
      if (++arrived_ == size()) {
        arrived_ = 0;
        turns_.store(turn + 1, std::memory_order_release);
        all_here_.notify_all();
      }
    }
    for (int i = 0; i < 100 && turns_.load(std::memory_order_acquire) <= turn; ++i) std::this_thread::yield();
    std::unique_lock lock(mutex_);
    const auto here = [&] { return broken_ || turns_.load(std::memory_order_relaxed) > turn; };
    if (!all_here_.wait_until(lock, std::chrono::steady_clock::now() + patience_, here)) {
      broken_ = true;
      all_here_.notify_all();
    }
    return turns_.load(std::memory_order_relaxed) > turn;
  }

  std::vector<board> boards_;
  std::chrono::milliseconds patience_;
  std::mutex mutex_;
  std::condition_variable all_here_;
  std::atomic<std::uint64_t> turns_{0};
  int arrived_ = 0;
  bool broken_ = false;
};

/// One thread's end of a thread_group: a `communicator`. One for each rank, for as long as the group is used.
class thread_rank {
 public:
  thread_rank(thread_group& group, int rank) noexcept : group_(&group), rank_(rank) {}
  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int size() const noexcept { return group_->size(); }
  [[nodiscard]] status all_gather(std::span<const std::byte> mine, std::span<std::byte> all) noexcept {
    return group_->all_gather(rank_, turn_++, mine, all);
  }

 private:
  thread_group* group_;
  int rank_;
  std::uint64_t turn_ = 0;
};

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
