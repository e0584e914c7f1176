// The pool runs every task once, by workers that do not share.
#include "support/thread_pool.hpp"

#include <atomic>
#include <vector>

#include "support/catch.hpp"
#include "vattn/runtime/executor.hpp"

static_assert(vattn::executor<vattn::support::thread_pool>);

TEST_CASE("every task runs once, job after job", "[thread_pool]") {
  for (const int threads : {1, 2, 5}) {
    vattn::support::thread_pool pool(threads);
    CHECK(pool.workers() == threads);
    for (std::int64_t n : {0, 1, 2, 3, 100}) {
      for (int repeat = 0; repeat < 50; ++repeat) {
        std::vector<int> runs(static_cast<std::size_t>(n));
        std::vector<std::atomic<int>> busy(static_cast<std::size_t>(threads));
        std::atomic<bool> shared{false};
        pool.for_each(n, [&](std::int64_t i, std::int64_t worker) {
          if (busy[static_cast<std::size_t>(worker)].fetch_add(1) != 0) shared = true;
          ++runs[static_cast<std::size_t>(i)];
          busy[static_cast<std::size_t>(worker)].fetch_sub(1);
        });
        REQUIRE(!shared);
        REQUIRE(runs == std::vector<int>(static_cast<std::size_t>(n), 1));
      }
    }
  }
}
