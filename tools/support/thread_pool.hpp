// Threads that wait for work: an executor for a decode loop, where starting a thread costs more than a task.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace vattn::support {

/// An executor (vattn/runtime/executor.hpp). `for_each` may be called by one thread at a time, and not from a task.
/// Tasks must not throw.
class thread_pool {
 public:
  /// `threads` in all, the calling one included.
  explicit thread_pool(std::int64_t threads) {
    for (std::int64_t worker = 1; worker < threads; ++worker) helpers_.emplace_back([this, worker] { serve(worker); });
  }
  ~thread_pool() {
    size_ = -1;
    announce();
    for (std::thread& helper : helpers_) helper.join();
  }
  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;

  [[nodiscard]] std::int64_t workers() const noexcept { return static_cast<std::int64_t>(helpers_.size()) + 1; }

  template <class F>
  void for_each(std::int64_t n, F&& f) {
    using function = std::remove_reference_t<F>;
    if (n <= 1 || helpers_.empty()) {
      for (std::int64_t i = 0; i < n; ++i) f(i, std::int64_t{0});
      return;
    }
    function_ = const_cast<std::remove_const_t<function>*>(&f);
    call_ = [](void* g, std::int64_t i, std::int64_t worker) { (*static_cast<function*>(g))(i, worker); };
    size_ = n;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<std::int32_t>(helpers_.size()), std::memory_order_relaxed);
    announce();
    work(0);
    for (std::int32_t left; (left = busy_.load(std::memory_order_acquire)) != 0;) busy_.wait(left);
  }

 private:
  void announce() {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }
  void work(std::int64_t worker) {
    for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < size_;) call_(function_, i, worker);
  }
  void serve(std::int64_t worker) {
    for (std::int32_t seen = 0;;) {
      generation_.wait(seen, std::memory_order_acquire);
      // Not more than one ahead: the next job begins after this one's `busy_` has come to 0.
      seen = generation_.load(std::memory_order_acquire);
      if (size_ < 0) return;
      work(worker);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
    }
  }

  std::vector<std::thread> helpers_;
  std::atomic<std::int32_t> generation_{0}, busy_{0};
  std::atomic<std::int64_t> next_{0};
  std::int64_t size_ = 0;
  void* function_ = nullptr;
  void (*call_)(void*, std::int64_t, std::int64_t) = nullptr;
};

}  // namespace vattn::support
