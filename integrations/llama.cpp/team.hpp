// ggml's own threads as an executor of the library's.
#pragma once

#include <array>
#include <atomic>
#include <thread>

#include "vattn/base/config.hpp"

namespace vattn_ggml {

/// A custom op is entered by all threads of a graph, with neither barrier nor work queue. Thread 0 makes the library's
/// calls and the others serve it: `lead` on thread 0, `serve` on the rest. Good for one op at a time; used again only
/// when all have left it, which ggml's barrier between nodes sees to.
class team {
 public:
  /// Thread 0 of `threads`: calls work(executor&) and sends the others away.
  template <class Work>
  void lead(int threads, Work&& work) {
    executor_of_team e{*this, threads};
    work(e);
    call_ = nullptr;
    if (threads > 1) publish(threads);
  }
  /// Thread `ith`: works off tasks until `lead` is done.
  void serve(int ith) {
    const unsigned start = begun_.load(std::memory_order_relaxed);
    for (unsigned round = start;; ++round) {
      wait([&] { return generation_.load(std::memory_order_acquire) != round; });
      if (call_ == nullptr) break;
      work(ith);
      busy_.fetch_sub(1, std::memory_order_release);
    }
    busy_.fetch_sub(1, std::memory_order_release);
  }
  /// Before a graph: no thread is in the op.
  void reset() noexcept { begun_.store(generation_.load()); }

  struct executor_of_team {
    team& t;
    int threads;
    [[nodiscard]] vattn::index_t workers() const noexcept { return threads; }
    template <class F>
    void for_each(vattn::index_t n, F&& f) {
      using function = std::remove_reference_t<F>;
      if (threads == 1 || n == 1) {
        for (vattn::index_t i = 0; i < n; ++i) f(i, vattn::index_t{0});
        return;
      }
      t.function_ = const_cast<void*>(static_cast<const void*>(&f));
      t.call_ = [](void* g, vattn::index_t task, vattn::index_t worker) { (*static_cast<function*>(g))(task, worker); };
      t.tasks_ = n;
      t.publish(threads);
      t.work(0);
      t.wait([&] { return t.busy_.load(std::memory_order_acquire) == 0; });
    }
  };

 private:
  void publish(int threads) {
    next_.store(0, std::memory_order_relaxed);
    busy_.store(threads - 1, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    if (call_ == nullptr) wait([&] { return busy_.load(std::memory_order_acquire) == 0; });
  }
  void work(vattn::index_t worker) {
    for (vattn::index_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) call_(function_, i, worker);
  }
  // As ggml's threads wait at their barrier, but giving way where there are more threads than cores.
  template <class Done>
  static void wait(Done&& done) {
    for (int spins = 0; !done(); ++spins) {
      if (spins < 4096) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

  alignas(64) std::atomic<unsigned> generation_{0};
  alignas(64) std::atomic<vattn::index_t> next_{0};
  alignas(64) std::atomic<int> busy_{0};
  std::atomic<unsigned> begun_{0};
  vattn::index_t tasks_ = 0;
  void* function_ = nullptr;
  void (*call_)(void*, vattn::index_t, vattn::index_t) = nullptr;
};

}  // namespace vattn_ggml
