// Threads that stay: an executor for decode steps, which are shorter than starting a thread.
#include "vattn/macros_push.hpp"
#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "vattn/base/config.hpp"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace vattn::VATTN_ABI {

/// `threads` workers, the calling thread among them. Between calls helpers spin for tens of microseconds, which is how
/// far the layers of a decode step are apart, then sleep. `for_each` allocates nothing. Where the system has fewer
/// threads to give, there are fewer workers.
///
/// Callers may share a pool, and a task may call it again: the helpers serve one call at a time, and a call that finds
/// them taken does all of its tasks itself, as worker 0, without waiting. So sharing a pool is safe, but callers that
/// are to run in parallel, each with threads, want a pool each. A task that throws on a helper ends the program; on the
/// calling thread the exception leaves `for_each`, once no task runs any more. Not to be used in a child of fork().
class thread_pool {
 public:
  explicit thread_pool(index_t threads) {
#if VATTN_HAS_EXCEPTIONS
    try {
      start(threads);
    } catch (...) {  // no more threads to be had: those that run do all tasks
    }
#else
    start(threads);
#endif
  }
  /// No call may be under way.
  ~thread_pool() {
    stop_.store(true, std::memory_order_relaxed);
    wake();
    for (std::thread& helper : helpers_) helper.join();
  }
  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;

  [[nodiscard]] index_t workers() const noexcept { return static_cast<index_t>(helpers_.size()) + 1; }

  template <class F>
  void for_each(index_t n, F&& f) {
    if (n <= 1 || helpers_.empty() || taken_.exchange(true, std::memory_order_acquire)) {
      for (index_t task = 0; task < n; ++task) f(task, index_t{0});
      return;
    }
    using function = std::remove_reference_t<F>;
    function_ = const_cast<void*>(static_cast<const void*>(std::addressof(f)));
    call_ = [](void* g, index_t task, index_t worker) { (*static_cast<function*>(g))(task, worker); };
    n_ = n;
    next_.store(0, std::memory_order_relaxed);
    guests_.store(open, std::memory_order_release);
    const call_end end{*this};
    wake();
    work(0);
  }

 private:
  static constexpr int spins = 4096;
  static constexpr int open = 1 << 30;  // of guests_: helpers may join the call

  // When the caller finds no more tasks: no helper may join any more, and those that did have still to end theirs.
  // Helpers that sleep are not waited for.
  struct call_end {
    thread_pool& pool;
    ~call_end() {
      pool.next_.store(pool.n_, std::memory_order_relaxed);  // after an exception: what was not begun is left out
      if (pool.guests_.fetch_sub(open, std::memory_order_acq_rel) != open)
        await(pool.guests_, [](int guests) { return guests == 0; });
      pool.taken_.store(false, std::memory_order_release);
    }
  };

  // Spins, then sleeps, until the value is as wanted; returns it.
  template <class Wanted>
  static int await(const std::atomic<int>& value, Wanted&& wanted) noexcept {
    int seen = 0;
    for (int i = 0; i < spins; ++i) {
      seen = value.load(std::memory_order_acquire);
      if (wanted(seen)) return seen;
#if defined(__x86_64__) || defined(__i386__)
      _mm_pause();
#endif
    }
    while (!wanted(seen)) {
      value.wait(seen, std::memory_order_acquire);
      seen = value.load(std::memory_order_acquire);
    }
    return seen;
  }

  void start(index_t threads) {
    for (index_t worker = 1; worker < threads; ++worker) helpers_.emplace_back([this, worker] { help(worker); });
  }

  void wake() noexcept {
    call_number_.fetch_add(1, std::memory_order_release);
    call_number_.notify_all();
  }

  void work(index_t worker) {
    for (index_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) call_(function_, task, worker);
  }

  // True: the call cannot end before leave().
  [[nodiscard]] bool join() noexcept {
    int guests = guests_.load(std::memory_order_relaxed);
    while (guests >= open) {
      if (guests_.compare_exchange_weak(guests, guests + 1, std::memory_order_acquire, std::memory_order_relaxed))
        return true;
    }
    return false;
  }
  void leave() noexcept {
    if (guests_.fetch_sub(1, std::memory_order_release) == 1) guests_.notify_one();
  }

  void help(index_t worker) noexcept {
    for (int done = 0;;) {
      done = await(call_number_, [done](int number) { return number != done; });
      if (stop_.load(std::memory_order_relaxed)) return;
      if (!join()) continue;
      work(worker);
      leave();
    }
  }

  // Of the current call; written before guests_ is opened, read by those who have joined.
  void* function_ = nullptr;
  void (*call_)(void*, index_t, index_t) = nullptr;
  index_t n_ = 0;

  std::atomic<bool> stop_{false};
  std::atomic<bool> taken_{false};  // by a caller, for its call
  alignas(64) std::atomic<int> call_number_{0};
  alignas(64) std::atomic<index_t> next_{0};
  alignas(64) std::atomic<int> guests_{0};  // helpers in the call, + `open`
  std::vector<std::thread> helpers_;        // last: they use what is above
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
