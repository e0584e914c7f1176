// Workers of a call that have no task left help those that do: a task's pieces, cut among threads.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <thread>
#include <type_traits>

#include "vattn/base/config.hpp"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace vattn::VATTN_ABI {

/// What the workers of one call share. A task, the leader, offers pieces by `for_each` and does them itself as far as
/// nobody comes; a worker without a task of its own comes by `help` and stays while tasks are under way. So nobody
/// waits for a thread that may never run: whatever the executor's order, a leader ends by itself. Which thread does a
/// piece must change no result. Allocates nothing.
class crew {
 public:
  /// `tasks` will lead; `workers` of the executor.
  crew(index_t tasks, index_t workers) noexcept : tasks_(tasks), workers_(std::min(workers, most_boards)) {}
  crew(const crew&) = delete;
  crew& operator=(const crew&) = delete;

  /// Around a task.
  void begin() noexcept {
    active_.fetch_add(1, std::memory_order_relaxed);
    begun_.fetch_add(1, std::memory_order_release);
  }
  void end() noexcept { active_.fetch_sub(1, std::memory_order_release); }

  /// f(piece, memory) for every piece of [0, n), by the calling task and whoever comes; `memory` is that of the worker
  /// that does it, the caller's own or what it gave to `help`. Pieces begin in ascending order. Returns when all are
  /// done.
  template <class F>
  void for_each(index_t worker, std::span<std::byte> memory, index_t n, F&& f) noexcept {
    if (workers_ <= 1 || n <= 1 || worker >= workers_) {
      for (index_t piece = 0; piece < n; ++piece) f(piece, memory);
      return;
    }
    board& b = boards_[static_cast<std::size_t>(worker)];
    using function = std::remove_reference_t<F>;
    b.context = const_cast<void*>(static_cast<const void*>(std::addressof(f)));
    b.call = [](void* g, index_t piece, std::span<std::byte> own) { (*static_cast<function*>(g))(piece, own); };
    b.pieces = n;
    b.next.store(0, std::memory_order_relaxed);
    b.guests.store(open, std::memory_order_release);
    b.work(memory);
    b.guests.fetch_sub(open, std::memory_order_acq_rel);
    wait([&b] { return b.guests.load(std::memory_order_acquire) == 0; });
  }

  /// Does pieces of others until no task is under way.
  void help(std::span<std::byte> memory) noexcept {
    // Tasks that were handed out a moment ago may not have begun; others never will before this returns.
    constexpr int patience = 4096;
    for (int idle = 0;;) {
      bool found = false;
      for (index_t w = 0; w < workers_; ++w) {
        board& b = boards_[static_cast<std::size_t>(w)];
        if (!b.join()) continue;
        found = b.work(memory) || found;
        b.guests.fetch_sub(1, std::memory_order_release);
      }
      const bool all_begun = begun_.load(std::memory_order_acquire) == tasks_;
      if (active_.load(std::memory_order_acquire) == 0 && (all_begun || idle > patience)) return;
      idle = found ? 0 : idle + 1;
      if (!found) relax(idle);
    }
  }

  /// Until `ready()`, which another worker that is running brings about.
  template <class F>
  static void wait(F&& ready) noexcept {
    for (int i = 0; !ready(); ++i) relax(i);
  }

 private:
  static constexpr index_t most_boards = 64;  // of workers behind these, tasks are their own
  static constexpr int open = 1 << 30;        // of guests: others may join

  struct alignas(64) board {
    void* context = nullptr;
    void (*call)(void*, index_t, std::span<std::byte>) = nullptr;
    index_t pieces = 0;
    std::atomic<index_t> next{0};
    std::atomic<int> guests{0};  // workers at it but the leader, + `open`

    // True: what is offered stays so until the guest leaves.
    [[nodiscard]] bool join() noexcept {
      int seen = guests.load(std::memory_order_relaxed);
      while (seen >= open) {
        if (guests.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire, std::memory_order_relaxed))
          return true;
      }
      return false;
    }
    bool work(std::span<std::byte> memory) noexcept {
      bool any = false;
      for (index_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces; any = true)
        call(context, piece, memory);
      return any;
    }
  };

  static void relax(int turn) noexcept {
    if (turn > 256) return std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#endif
  }

  index_t tasks_, workers_;
  std::atomic<index_t> active_{0}, begun_{0};
  std::array<board, static_cast<std::size_t>(most_boards)> boards_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
