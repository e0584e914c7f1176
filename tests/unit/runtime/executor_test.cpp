// Executors: every task once, no worker twice at a time, and the same bits from any of them.
#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <numeric>
#include <thread>
#include <vattn/base/executor.hpp>
#include <vattn/base/openmp.hpp>
#include <vattn/base/thread_pool.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

using namespace vattn;

namespace {

template <class E>
void check_tasks(E& exec, index_t n) {
  std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n)), inside(static_cast<std::size_t>(exec.workers()));
  std::atomic<bool> alone{true};
  exec.for_each(n, [&](index_t task, index_t worker) {
    if (worker < 0 || worker >= exec.workers()) {
      alone = false;
      return;
    }
    if (inside[static_cast<std::size_t>(worker)].fetch_add(1) != 0) alone = false;
    ++seen[static_cast<std::size_t>(task)];
    --inside[static_cast<std::size_t>(worker)];
  });
  CHECK(alone);
  CHECK(std::all_of(seen.begin(), seen.end(), [](const std::atomic<int>& s) { return s == 1; }));
}

template <class E>
void check_executor(E& exec) {
  static_assert(executor<E>);
  for (const index_t n : {0, 1, 2, 3, 7, 100, 3000}) check_tasks(exec, n);
  for (int call = 0; call < 300; ++call) check_tasks(exec, 2 + call % 5);
}

// Exact attention over several chunks, of one KV head and of three.
template <class E>
std::vector<float> attend(E& exec, index_t kv_heads, index_t queries) {
  const test::problem<float> p(
      {.queries = queries, .heads = 2 * kv_heads, .kv_heads = kv_heads, .n = 9001, .dk = 8, .dv = 8}, 3);
  test::results r(p.s);
  workspace memory;
  // No assertion: callers are on several threads. A call that failed leaves what no other run does.
  if (!exact_attention(p.query(), p.cache(), p.options, r.view(), memory, exec)) r.output.assign(1, 0);
  r.output.insert(r.output.end(), r.log_sum_exp.begin(), r.log_sum_exp.end());
  return r.output;
}

template <class E>
void check_bits(E& exec) {
  serial_executor serial;
  for (const index_t kv_heads : {1, 3}) {
    for (const index_t queries : {1, 40}) CHECK(attend(exec, kv_heads, queries) == attend(serial, kv_heads, queries));
  }
}

}  // namespace

TEST_CASE("serial, started and pooled threads run every task once", "[runtime][executor]") {
  serial_executor serial;
  check_executor(serial);
  for (const index_t threads : {0, 1, 2, 5}) {
    thread_executor started(threads);
    check_executor(started);
    thread_pool pool(threads);
    CHECK(pool.workers() == std::max<index_t>(1, threads));
    check_executor(pool);
  }
}

TEST_CASE("a pool wakes after it has slept, and ends without having worked", "[runtime][executor]") {
  thread_pool pool(3);
  for (int call = 0; call < 5; ++call) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    check_tasks(pool, 50);
  }
  for (int i = 0; i < 20; ++i) thread_pool idle(4);
}

TEST_CASE("more than one thread of a pool works", "[runtime][executor]") {
  thread_pool pool(2);
  std::atomic<int> waiting{0};
  // Each of the two tasks waits for the other.
  pool.for_each(2, [&](index_t, index_t) {
    ++waiting;
    while (waiting < 2) std::this_thread::yield();
  });
  CHECK(waiting == 2);
}

TEST_CASE("any number of threads gives the same bits", "[runtime][executor]") {
  for (const index_t threads : {2, 3, 7}) {
    thread_executor started(threads);
    check_bits(started);
    thread_pool pool(threads);
    check_bits(pool);
  }
}

TEST_CASE("callers share a pool, and each call does every task once", "[runtime][executor]") {
  thread_pool pool(3);
  std::atomic<int> wrong{0};
  const auto call = [&] {
    for (int i = 0; i < 400; ++i) {
      const index_t n = 2 + i % 40;
      std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n));
      std::array<std::atomic<int>, 3> inside{};
      pool.for_each(n, [&](index_t task, index_t worker) {
        wrong += inside[static_cast<std::size_t>(worker)].fetch_add(1) != 0;
        ++seen[static_cast<std::size_t>(task)];
        --inside[static_cast<std::size_t>(worker)];
      });
      for (const std::atomic<int>& s : seen) wrong += s != 1;
    }
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back(call);
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

TEST_CASE("callers that share a pool get the bits that each gets alone", "[runtime][executor]") {
  serial_executor serial;
  const std::vector<float> want = attend(serial, 3, 1);
  thread_pool pool(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < 5; ++round) wrong += attend(pool, 3, 1) != want;
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

TEST_CASE("a caller does not wait for another's call to end", "[runtime][executor]") {
  thread_pool pool(2);
  std::atomic<bool> begun{false}, over{false};
  std::thread slow([&] {
    pool.for_each(2, [&](index_t, index_t) {
      begun = true;
      while (!over) std::this_thread::yield();
    });
  });
  while (!begun) std::this_thread::yield();
  std::atomic<int> tasks{0};
  pool.for_each(5, [&](index_t, index_t worker) { tasks += worker == 0; });
  CHECK(tasks == 5);
  over = true;
  slow.join();
}

TEST_CASE("a task calls its own executor", "[runtime][executor]") {
  const auto check = [](auto& exec) {
    std::atomic<int> inner{0};
    exec.for_each(6, [&](index_t, index_t) {
      exec.for_each(7, [&](index_t, index_t) { exec.for_each(3, [&](index_t, index_t) { ++inner; }); });
    });
    CHECK(inner == 6 * 7 * 3);
    check_tasks(exec, 20);
  };
  serial_executor serial;
  check(serial);
  thread_executor started(2);
  check(started);
  thread_pool pool(3);
  for (int i = 0; i < 20; ++i) check(pool);
#if defined(_OPENMP)
  for (const int levels : {1, 3}) {
    omp_set_max_active_levels(levels);
    openmp_executor exec(2);
    check(exec);
  }
  omp_set_max_active_levels(1);
#endif
}

TEST_CASE("an exception of the caller's own task leaves the pool usable", "[runtime][executor]") {
  thread_pool pool(3);
  for (int i = 0; i < 50; ++i) {
    std::atomic<int> begun{0}, ended{0};
    CHECK_THROWS_AS(pool.for_each(1000,
                                  [&](index_t, index_t worker) {
                                    if (worker == 0) throw i;
                                    ++begun;
                                    std::this_thread::yield();
                                    ++ended;
                                  }),
                    int);
    CHECK(begun == ended);  // nobody is in a task any more
    check_tasks(pool, 30);
  }
}

#if defined(_OPENMP)
TEST_CASE("OpenMP's threads in a region of OpenMP's", "[runtime][executor]") {
  serial_executor serial;
  const std::vector<float> want = attend(serial, 3, 1);
  for (const int levels : {1, 2}) {
    omp_set_max_active_levels(levels);
    std::atomic<int> wrong{0};
#pragma omp parallel num_threads(3)
    {
      openmp_executor exec(2);
      wrong += attend(exec, 3, 1) != want;
    }
    CHECK(wrong == 0);
  }
  omp_set_max_active_levels(1);
}

TEST_CASE("OpenMP's threads", "[runtime][executor]") {
  for (const index_t threads : {1, 2, 5}) {
    openmp_executor exec(threads);
    check_executor(exec);
    check_bits(exec);
  }
}
#endif
