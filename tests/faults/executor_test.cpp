// Executors that do not do what they must: a status, whatever the outputs hold.
#include <atomic>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "vattn/vattn.hpp"

namespace {

using vattn::index_t;
using namespace vattn::test;

// Runs what `next` makes of each task; `next` may throw.
template <class Next>
struct executor_of {
  Next next;
  [[nodiscard]] index_t workers() const noexcept { return 2; }
  template <class F>
  void for_each(index_t n, F&& f) {
    for (index_t task = 0; task < n; ++task) next(task, n, f);
  }
};

// The even or the odd tasks; `too_many` more are claimed.
struct every_other {
  index_t ith, too_many;
  [[nodiscard]] index_t workers() const noexcept { return 1; }
  [[nodiscard]] index_t share(index_t n) const noexcept { return (n - ith + 1) / 2 + too_many; }
  template <class F>
  void for_each(index_t n, F&& f) const {
    for (index_t task = ith; task < n; task += 2) f(task, index_t{0});
  }
};

// Runs another task while one is under way, on the same worker.
struct nested_executor {
  std::function<void(index_t, index_t)> f;
  [[nodiscard]] index_t workers() const noexcept { return 2; }
  template <class F>
  void for_each(index_t n, F&& g) {
    f = [&g](index_t task, index_t worker) { g(task, worker); };
    for (index_t task = 0; task < n; ++task) f(task, task % 2);
  }
  void again(index_t task, index_t worker) const { f(task, worker); }
};

// Has other workers when it runs than it said at first.
struct fickle_executor {
  index_t at_first, later;
  bool asked = false;
  [[nodiscard]] index_t workers() noexcept { return std::exchange(asked, true) ? later : at_first; }
  template <class F>
  void for_each(index_t n, F&& f) {
    for (index_t task = 0; task < n; ++task) f(task, later - 1);
  }
};

struct throwing_executor {
  [[nodiscard]] index_t workers() const { throw std::runtime_error("no"); }
  template <class F>
  void for_each(index_t, F&&) {}
};

template <class Next>
vattn::status call_with(Next next) {
  problem<float> p({.queries = 2, .heads = 4, .kv_heads = 2, .n = 600, .dk = 8, .dv = 8});
  results r(p.s);
  vattn::workspace memory;
  static_assert(vattn::executor<executor_of<Next>>);
  const vattn::status exact =
      vattn::exact_attention(p.query(), p.cache(), p.options, r.view(), memory, executor_of<Next>{next});
  const vattn::status s = vattn::vattention<vattn::ranked_policy>({.sinks = 8, .window = 8})(
      p.query(), p.cache(), p.options, r.view(), memory, {}, executor_of<Next>{next});
  CHECK(exact.code() == s.code());
  if (s.ok()) CHECK(compare(p, r).output < 0.3);
  return s;
}

}  // namespace

TEST_CASE("an executor in order, backwards or on another thread is none that fails", "[faults]") {
  CHECK(call_with([](index_t task, index_t, auto& f) { f(task, index_t{0}); }).ok());
  CHECK(call_with([](index_t task, index_t n, auto& f) { f(n - 1 - task, task % 2); }).ok());
  CHECK(call_with([](index_t task, index_t, auto& f) { std::thread([&] { f(task, index_t{1}); }).join(); }).ok());
}

TEST_CASE("an executor that throws", "[faults]") {
  for (const bool at_once : {true, false}) {
    const vattn::status s = call_with([at_once](index_t task, index_t n, auto& f) {
      if (task == (at_once ? 0 : n - 1)) throw std::runtime_error("no more threads");
      f(task, index_t{0});
    });
    CHECK(s.code() == vattn::errc::executor_failed);
    CHECK(contains(s.message(), "the executor threw: call again, with vattn::serial_executor"));
  }
}

TEST_CASE("an executor that leaves out, repeats or makes up tasks", "[faults]") {
  const auto why = [](auto next) {
    const vattn::status s = call_with(next);
    CHECK(s.code() == vattn::errc::executor_failed);
    return std::string(s.message());
  };
  CHECK(contains(why([](index_t, index_t, auto&) {}), "ran 0 of "));
  CHECK(contains(why([](index_t task, index_t n, auto& f) {
                   if (task + 1 < n) f(task, index_t{0});
                 }),
                 "call f(task, worker) once for each task in [0, n)"));
  CHECK(contains(why([](index_t task, index_t, auto& f) {
                   f(task, index_t{0});
                   if (task == 0) f(task, index_t{0});
                 }),
                 "the executor ran "));
  CHECK(contains(why([](index_t task, index_t n, auto& f) { f(task + 1 < n ? task : 0, index_t{0}); }),
                 ", but some twice and others never"));
  // Tasks and workers that there are not: neither runs, so nothing is written where it must not be.
  CHECK(contains(why([](index_t task, index_t n, auto& f) { f(task + n, index_t{0}); }), "ran 0 of "));
  CHECK(contains(why([](index_t task, index_t, auto& f) { f(-1 - task, index_t{0}); }), "ran 0 of "));
  CHECK(contains(why([](index_t task, index_t, auto& f) { f(task, index_t{2}); }), "with worker in [0, workers())"));
  CHECK(contains(why([](index_t task, index_t, auto& f) { f(task, index_t{-1}); }), "ran 0 of "));
}

TEST_CASE("an executor that gives a worker two tasks at a time", "[faults]") {
  std::atomic<bool> first{true};
  nested_executor exec;
  const vattn::status s = vattn::run_tasks(exec, 2, 4, [&](index_t task, index_t worker) {
    if (first.exchange(false)) exec.again(task + 1, worker);  // before this one ends
  });
  CHECK(s.code() == vattn::errc::executor_failed);
  CHECK(contains(s.message(), "two tasks of one worker at the same time"));
}

TEST_CASE("an executor without workers, with other ones later, or that throws when asked", "[faults]") {
  problem<float> p({.heads = 4, .kv_heads = 2, .n = 600, .dk = 8, .dv = 8});
  results r(p.s);
  vattn::workspace memory;
  for (const fickle_executor& exec : {fickle_executor{0, 0}, fickle_executor{-3, -3}, fickle_executor{1, 9}}) {
    fickle_executor e = exec;
    CHECK(vattn::exact_attention(p.query(), p.cache(), p.options, r.view(), memory, e).code() ==
          vattn::errc::executor_failed);
    e = exec;
    CHECK(vattn::vattention<vattn::ranked_policy>()(p.query(), p.cache(), p.options, r.view(), memory, {}, e).code() ==
          vattn::errc::executor_failed);
  }
  throwing_executor t;
  CHECK(vattn::exact_attention(p.query(), p.cache(), p.options, r.view(), memory, t).code() ==
        vattn::errc::executor_failed);
}

TEST_CASE("an executor that says that it does a part of the tasks has to do that part", "[faults]") {
  problem<float> p({.queries = 2, .heads = 4, .kv_heads = 2, .n = 600, .dk = 8, .dv = 8});
  results r(p.s);
  vattn::workspace memory;
  const auto call = [&](index_t ith, index_t too_many) {
    return vattn::exact_attention(p.query(), p.cache(), p.options, r.view(), memory, every_other{ith, too_many});
  };
  CHECK(call(0, 0).ok());
  CHECK(call(1, 0).ok());
  CHECK(compare(p, r).output < 1e-4);  // both halves
  CHECK(call(0, 1).code() == vattn::errc::executor_failed);
}
