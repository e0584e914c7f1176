// Threads that stay: an executor for decode steps, which are shorter than starting a thread.
#pragma once

#include <atomic>
#include <thread>
#include <type_traits>
#include <vector>

#include "vattn/config.hpp"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace vattn {

/// `threads` workers, the calling thread among them. Between calls helpers spin for tens of microseconds, which is how
/// far the layers of a decode step are apart, then sleep. `for_each` allocates nothing. One call at a time, and none
/// from inside a task. Where the system has fewer threads to give, there are fewer workers.
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
  ~thread_pool() {
    n_ = 0;
    wake(true);
    for (std::thread& helper : helpers_) helper.join();
  }
  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;

  [[nodiscard]] index_t workers() const noexcept { return static_cast<index_t>(helpers_.size()) + 1; }

  template <class F>
  void for_each(index_t n, F&& f) {
    if (n <= 1 || helpers_.empty()) {
      for (index_t task = 0; task < n; ++task) f(task, index_t{0});
      return;
    }
    using function = std::remove_reference_t<F>;
    function_ = const_cast<std::remove_const_t<function>*>(&f);
    call_ = [](void* g, index_t task, index_t worker) { (*static_cast<function*>(g))(task, worker); };
    n_ = n;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(helpers_.size()), std::memory_order_relaxed);
    wake(false);
    work(0);
    await(busy_, [](int busy) { return busy == 0; });
  }

 private:
  static constexpr int spins = 4096;

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

  void wake(bool stop) noexcept {
    stop_ = stop;
    call_number_.fetch_add(1, std::memory_order_release);
    call_number_.notify_all();
  }

  void work(index_t worker) {
    for (index_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) call_(function_, task, worker);
  }

  void help(index_t worker) {
    for (int done = 0;;) {
      done = await(call_number_, [done](int number) { return number != done; });
      if (stop_) return;
      work(worker);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
    }
  }

  // Of the current call; written before call_number_ is, read after.
  void* function_ = nullptr;
  void (*call_)(void*, index_t, index_t) = nullptr;
  index_t n_ = 0;
  bool stop_ = false;

  alignas(64) std::atomic<int> call_number_{0};
  alignas(64) std::atomic<index_t> next_{0};
  alignas(64) std::atomic<int> busy_{0};
  std::vector<std::thread> helpers_;  // last: they use what is above
};

}  // namespace vattn
