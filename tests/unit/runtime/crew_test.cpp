// Workers that help: every piece once, in ascending order, by several threads where there are, and in any order of
// tasks.
#include <array>
#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <thread>
#include <vattn/base/crew.hpp>
#include <vector>

#include "support/catch.hpp"

using namespace vattn;

TEST_CASE("pieces of a task are done once each, by whoever comes", "[runtime][crew]") {
  constexpr index_t tasks = 2, workers = 4, pieces = 40;
  crew all(tasks, workers);
  std::array<std::array<std::byte, 16>, static_cast<std::size_t>(workers)> memory;
  std::vector<std::atomic<int>> done(static_cast<std::size_t>(tasks * pieces));
  std::mutex lock;
  std::set<std::thread::id> seen;
  std::set<const std::byte*> in_use;
  std::atomic<int> threads{0}, wrong{0};
  const auto lead = [&](index_t task) {
    all.begin();
    for (int job = 0; job < 20; ++job) {
      all.for_each(task, memory[static_cast<std::size_t>(task)], pieces, [&](index_t piece, std::span<std::byte> own) {
        {
          const std::lock_guard guard(lock);
          wrong += !in_use.insert(own.data()).second;  // nobody else's
          if (seen.insert(std::this_thread::get_id()).second) ++threads;
        }
        // Until one has come who has no task of its own.
        for (int i = 0; job == 0 && threads <= tasks && i < 20000; ++i)
          std::this_thread::sleep_for(std::chrono::microseconds(100));
        ++done[static_cast<std::size_t>(task * pieces + piece)];
        const std::lock_guard guard(lock);
        in_use.erase(own.data());
      });
      for (index_t piece = 0; piece < pieces; ++piece)
        wrong += done[static_cast<std::size_t>(task * pieces + piece)] != job + 1;
    }
    all.end();
  };
  std::vector<std::thread> running;
  for (index_t w = 0; w < workers; ++w) {
    running.emplace_back([&, w] {
      if (w < tasks) {
        lead(w);
      } else {
        all.help(memory[static_cast<std::size_t>(w)]);
      }
    });
  }
  for (std::thread& t : running) t.join();
  CHECK(wrong == 0);
  CHECK(threads > tasks);
}

TEST_CASE("nobody waits for a task that has not begun", "[runtime][crew]") {
  crew all(1, 2);
  all.help({});  // on the only thread, before the task
  all.begin();
  int pieces = 0;
  all.for_each(0, {}, 7, [&](index_t piece, std::span<std::byte>) { CHECK(piece == pieces++); });
  all.end();
  all.help({});
  CHECK(pieces == 7);
}
