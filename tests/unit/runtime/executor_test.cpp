// Executors: every task once, no worker twice at a time, and the same bits from any of them.
#include <atomic>
#include <chrono>
#include <memory>
#include <numeric>
#include <thread>
#include <vattn/runtime/executor.hpp>
#include <vattn/runtime/openmp.hpp>
#include <vattn/runtime/thread_pool.hpp>
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
  REQUIRE(exact_attention(p.query(), p.cache(), p.options, r.view(), memory, exec).ok());
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

#if defined(_OPENMP)
TEST_CASE("OpenMP's threads", "[runtime][executor]") {
  for (const index_t threads : {1, 2, 5}) {
    openmp_executor exec(threads);
    check_executor(exec);
    check_bits(exec);
  }
}
#endif
