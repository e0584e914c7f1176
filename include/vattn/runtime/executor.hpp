// Who runs the independent (batch, query, head) tasks of a call. The library starts no thread of its own accord.
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <thread>
#include <vector>

#include "vattn/config.hpp"
#include "vattn/kernel/floating_point.hpp"
#include "vattn/status.hpp"

namespace vattn {

struct task_probe {
  void operator()(index_t, index_t) const noexcept {}
};

/// `for_each(n, f)` calls f(task, worker) once for every task in [0, n), worker in [0, workers()), and
/// returns when all are done; two tasks never share a worker at the same time. Tasks are independent and
/// draw from streams of their own, so no order or thread count changes a result. It may throw, once no task runs any
/// more: the call then returns errc::executor_failed, as it does if tasks are left out, repeated or made up.
/// One that does a part of the tasks on purpose says how many: `share(n)`.
template <class E>
concept executor = requires(E& e, index_t n) {
  { e.workers() } -> std::convertible_to<index_t>;
  e.for_each(n, task_probe{});
};

/// Does a part of the tasks on purpose, and leaves the others to its like.
template <class E>
concept partial_executor = executor<E> && requires(const E& e, index_t n) {
  { e.share(n) } -> std::convertible_to<index_t>;
};

/// f(task, worker) for every task of [0, tasks), by an executor that may not do what it must: then a status.
template <executor E, class F>
[[nodiscard]] status run_tasks(E& exec, index_t tasks, F&& f) noexcept {
  const index_t workers = exec.workers();
  std::atomic<index_t> done{0};
  const auto run = [&](index_t task, index_t worker) {
    if (task < 0 || task >= tasks || worker < 0 || worker >= workers) return;
    done.fetch_add(1, std::memory_order_relaxed);
    const kernel::floating_point_scope standard;  // of this thread, whoever's it is
    f(task, worker);
  };
#if VATTN_HAS_EXCEPTIONS
  try {
    exec.for_each(tasks, run);
  } catch (...) {
    return status::error(errc::executor_failed,
                         "the executor threw: call again, with vattn::serial_executor if it keeps failing");
  }
#else
  exec.for_each(tasks, run);
#endif
  index_t share = tasks;
  if constexpr (partial_executor<E>) share = exec.share(tasks);
  if (const index_t ran = done.load(); ran != share) {
    return status::error(errc::executor_failed,
                         "the executor ran %lld of %lld tasks: for_each(n, f) must call f(task, worker) once for each "
                         "task in [0, n), with worker in [0, workers())",
                         static_cast<long long>(ran), static_cast<long long>(share));
  }
  return {};
}

/// The calling thread. Allocates nothing.
struct serial_executor {
  [[nodiscard]] index_t workers() const noexcept { return 1; }
  template <class F>
  void for_each(index_t n, F&& f) {
    for (index_t task = 0; task < n; ++task) f(task, index_t{0});
  }
};

/// std::threads started for each call: simple, for prefill-sized work and tests. A decode loop wants a pool
/// (runtime/thread_pool.hpp), OpenMP's (runtime/openmp.hpp), or the engine's own threads behind the same two members.
class thread_executor {
 public:
  explicit thread_executor(index_t threads) : threads_(threads < 1 ? 1 : threads) {}
  [[nodiscard]] index_t workers() const noexcept { return threads_; }
  template <class F>
  void for_each(index_t n, F&& f) {
    std::atomic<index_t> next{0};
    const auto work = [&](index_t worker) {
      for (index_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(task, worker);
    };
    std::vector<std::thread> helpers;
    const auto start = [&] {
      for (index_t worker = 1; worker < std::min(threads_, n); ++worker) helpers.emplace_back(work, worker);
    };
#if VATTN_HAS_EXCEPTIONS
    try {
      start();
    } catch (...) {  // no more threads to be had: those that run do all tasks
    }
#else
    start();
#endif
    work(0);
    for (std::thread& helper : helpers) helper.join();
  }

 private:
  index_t threads_;
};

}  // namespace vattn
