// Workspaces, arenas and executors.
#include <atomic>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

using vattn::arena;
using vattn::errc;
using vattn::index_t;
using vattn::workspace;
using vattn::test::contains;

TEST_CASE("a fixed workspace refuses with both numbers of bytes", "[runtime][workspace]") {
  std::vector<std::byte> memory(100);
  workspace w{std::span(memory)};
  CHECK(w.reserve(100).ok());
  const vattn::status s = w.reserve(101);
  CHECK(s.code() == errc::workspace_too_small);
  CHECK(contains(s.message(), "has 100 bytes but the call needs 101"));
  CHECK(w.memory().data() == memory.data());
}

TEST_CASE("an owning workspace grows, keeps what it has, and moves", "[runtime][workspace]") {
  workspace w;
  CHECK(w.size() == 0);
  REQUIRE(w.reserve(1000).ok());
  const auto* first = w.memory().data();
  CHECK(reinterpret_cast<std::uintptr_t>(first) % workspace::alignment == 0);
  REQUIRE(w.reserve(10).ok());
  CHECK(w.memory().data() == first);
  CHECK(w.size() == 1000);
  REQUIRE(w.reserve(4000).ok());
  CHECK(w.size() == 4000);

  const auto* grown = w.memory().data();
  workspace moved(std::move(w));
  CHECK(moved.memory().data() == grown);
  CHECK(w.size() == 0);  // NOLINT: a moved-from workspace is an empty one
  REQUIRE(w.reserve(64).ok());
  moved = std::move(w);
  CHECK(moved.size() == 64);
  CHECK(moved.reserve(static_cast<std::size_t>(-1) / 2).code() == errc::out_of_memory);
  CHECK(moved.size() == 64);
}

TEST_CASE("an arena counts over nothing what it takes over memory", "[runtime][workspace]") {
  const auto take = [](arena& a) {
    return std::vector<std::uintptr_t>{reinterpret_cast<std::uintptr_t>(a.take<float>(3).data()),
                                       reinterpret_cast<std::uintptr_t>(a.take<std::uint64_t>(17).data()),
                                       reinterpret_cast<std::uintptr_t>(a.take<char>(0).data()),
                                       reinterpret_cast<std::uintptr_t>(a.take<std::uint32_t>(16).data())};
  };
  arena count;
  take(count);
  CHECK(count.used() == 64 + 192 + 0 + 64);
  std::vector<std::byte> memory(count.used() + 2 * workspace::alignment);
  for (std::size_t shift = 0; shift < 64; shift += 8) {  // a span of the caller's need not be aligned
    arena real{std::span(memory).subspan(shift)};
    for (const std::uintptr_t at : take(real)) {
      CHECK(at % workspace::alignment == 0);
      CHECK(at >= reinterpret_cast<std::uintptr_t>(memory.data()));
    }
    CHECK(real.used() == count.used());
  }
}

TEST_CASE("executors run every task once, and no two on one worker at a time", "[runtime][executor]") {
  const auto check = [](auto exec, index_t workers) {
    REQUIRE(exec.workers() == workers);
    for (const index_t n : {0, 1, 7, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(n)), busy(static_cast<std::size_t>(workers));
      std::atomic<int> wrong{0};
      exec.for_each(n, [&](index_t task, index_t worker) {
        if (worker < 0 || worker >= workers) {
          ++wrong;
          return;
        }
        wrong += busy[static_cast<std::size_t>(worker)].fetch_add(1) != 0;
        ++runs[static_cast<std::size_t>(task)];
        --busy[static_cast<std::size_t>(worker)];
      });
      CHECK(wrong == 0);
      int not_once = 0;
      for (const auto& r : runs) not_once += r != 1;
      CHECK(not_once == 0);
    }
  };
  check(vattn::serial_executor{}, 1);
  for (const index_t threads : {1, 2, 3, 5}) check(vattn::thread_executor(threads), threads);
  check(vattn::thread_executor(0), 1);
  check(vattn::thread_executor(-3), 1);
}

TEST_CASE("workspace_bytes is what a call takes, and a byte less is refused", "[runtime][workspace]") {
  using namespace vattn::test;
  for (const bool masked : {false, true}) {
    for (const index_t workers : {1, 3}) {
      problem<float> p({.queries = 2, .heads = 4, .kv_heads = 2, .n = 1500, .dk = 8, .dv = 12}, 4);
      if (masked) p.set_mask(std::vector<float>(static_cast<std::size_t>(2 * 4 * 1500), 0.5f));
      vattn::config settings;
      settings.sinks = settings.window = 16;
      const vattn::vattention<vattn::ranked_policy> attend(settings);
      const std::size_t bytes = attend.workspace_bytes(1500, 8, 12, masked, workers);
      std::vector<std::byte> memory(bytes);
      results r(p.s);
      vattn::thread_executor exec(workers);

      workspace enough{std::span(memory)};
      const vattn::status ok = attend(p.query(), p.cache(), p.options, r.view(), enough, {}, exec);
      CAPTURE(ok.message());
      CHECK(ok.ok());
      CHECK(compare(p, r).output < 0.2);

      workspace less{std::span(memory).first(bytes - 1)};
      const vattn::status s = attend(p.query(), p.cache(), p.options, r.view(), less, {}, exec);
      CHECK(s.code() == errc::workspace_too_small);
      CHECK(contains(s.message(), "needs " + std::to_string(bytes) + ":"));

      // A workspace of the caller's may start anywhere.
      std::vector<std::byte> odd(bytes + 1);
      workspace shifted{std::span(odd).subspan(1)};
      results again(p.s);
      CHECK(attend(p.query(), p.cache(), p.options, again.view(), shifted, {}, exec).ok());
      CHECK(again.output == r.output);
    }
  }
}
