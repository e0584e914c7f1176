// Who runs the independent (batch, query, head) tasks of a call. The library starts no thread of its own accord.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <concepts>
#include <thread>
#include <vector>

#include "vattn/base/config.hpp"
#include "vattn/base/floating_point.hpp"
#include "vattn/base/status.hpp"

namespace vattn::VATTN_ABI {

struct task_probe {
  void operator()(index_t, index_t) const noexcept {}
};

/// `for_each(n, f)` calls f(task, worker) once for every task in [0, n), worker in [0, workers()), and
/// returns when all are done; two tasks never share a worker at the same time. Tasks are independent and
/// draw from streams of their own, so no order or thread count changes a result. f does not throw; for_each may, once
/// no task runs any more. The call then returns errc::executor_failed, as it does if tasks are left out, repeated or
/// made up, or a worker has two at a time. What serves several calls at a time, or calls from within a task, must keep
/// all this for each of them.
template <class E>
concept executor = requires(E& e, index_t n) {
  { e.workers() } -> std::convertible_to<index_t>;
  e.for_each(n, task_probe{});
};

/// Does a part of the tasks on purpose, and leaves the others to its like: `share(n)` says how many. That the parts
/// together are all tasks, each once, is theirs to see to.
template <class E>
concept partial_executor = executor<E> && requires(const E& e, index_t n) {
  { e.share(n) } -> std::convertible_to<index_t>;
};

namespace detail {

// Which workers have a task. Of those from `capacity` on nothing is known.
class busy_workers {
 public:
  /// False: it has one already.
  [[nodiscard]] bool enter(index_t worker) noexcept {
    return worker >= capacity || (word(worker).fetch_or(bit(worker), std::memory_order_acquire) & bit(worker)) == 0;
  }
  void leave(index_t worker) noexcept {
    if (worker < capacity) word(worker).fetch_and(~bit(worker), std::memory_order_release);
  }

 private:
  static constexpr index_t capacity = 1024;
  [[nodiscard]] static std::uint64_t bit(index_t worker) noexcept { return std::uint64_t{1} << worker % 64; }
  [[nodiscard]] std::atomic<std::uint64_t>& word(index_t worker) noexcept {
    return words_[static_cast<std::size_t>(worker / 64)];
  }
  std::array<std::atomic<std::uint64_t>, static_cast<std::size_t>(capacity / 64)> words_{};
};

}  // namespace detail

/// Its workers, for which a call takes memory; 0 if it throws instead.
template <executor E>
[[nodiscard]] index_t workers_of(E& exec) noexcept {
#if VATTN_HAS_EXCEPTIONS
  try {
    return exec.workers();
  } catch (...) {
    return 0;
  }
#else
  return exec.workers();
#endif
}

/// f(task, worker) for every task of [0, tasks), worker of [0, workers), by an executor that may not do what it must:
/// then a status, and f has had no other arguments, and no worker twice at a time. `workers` is what it has said once:
/// it may say more later.
template <executor E, class F>
[[nodiscard]] status run_tasks(E& exec, index_t workers, index_t tasks, F&& f) noexcept {
  if (workers < 1) {
    return status::error(errc::executor_failed,
                         "the executor has %lld workers: it needs 1, the calling thread, or more",
                         static_cast<long long>(workers));
  }
  // Sums of scattered numbers tell sets of tasks apart, in any order and without memory.
  const auto mark = [](index_t task) {
    const std::uint64_t x = (static_cast<std::uint64_t>(task) + 1) * 0x9E3779B97F4A7C15u;
    return (x ^ x >> 32) * 0xBF58476D1CE4E5B9u;
  };
  std::atomic<index_t> done{0};
  std::atomic<std::uint64_t> marks{0};
  std::atomic<bool> at_once{false};
  detail::busy_workers busy;
  const auto run = [&](index_t task, index_t worker) noexcept {
    if (task < 0 || task >= tasks || worker < 0 || worker >= workers) return;
    if (!busy.enter(worker)) {
      at_once = true;
      return;
    }
    done.fetch_add(1, std::memory_order_relaxed);
    marks.fetch_add(mark(task), std::memory_order_relaxed);
    {
      const kernel::floating_point_scope standard;  // of this thread, whoever's it is
      f(task, worker);
    }
    busy.leave(worker);
  };
  index_t share = tasks;
#if VATTN_HAS_EXCEPTIONS
  try {
#endif
    exec.for_each(tasks, run);
    if constexpr (partial_executor<E>) share = exec.share(tasks);
#if VATTN_HAS_EXCEPTIONS
  } catch (...) {
    return status::error(errc::executor_failed,
                         "the executor threw: call again, with vattn::serial_executor if it keeps failing");
  }
#endif
  if (at_once.load()) {
    return status::error(errc::executor_failed,
                         "the executor ran two tasks of one worker at the same time: for_each(n, f) must call "
                         "f(task, worker) with a worker that is free; is it shared by callers that may not share it?");
  }
  std::uint64_t all = marks.load();
  if constexpr (!partial_executor<E>) {
    all = 0;
    for (index_t task = 0; task < tasks; ++task) all += mark(task);
  }
  if (const index_t ran = done.load(); ran != share || all != marks.load()) {
    return status::error(
        errc::executor_failed,
        "the executor ran %lld of %lld tasks%s: for_each(n, f) must call f(task, worker) once for each "
        "task in [0, n), with worker in [0, workers())",
        static_cast<long long>(ran), static_cast<long long>(share),
        ran == share ? ", but some twice and others never" : "");
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
/// (base/thread_pool.hpp), OpenMP's (base/openmp.hpp), or the engine's own threads behind the same two members.
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

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
