// Any executor behind one type, so that what runs on it is compiled once.
#pragma once

#include <type_traits>

#include "vattn/vattn.hpp"

namespace vattn::examples {

/// Refers to an executor, which must outlive it. One indirect call a task.
class executor_ref {
 public:
  template <class E>
  requires(!std::is_same_v<E, executor_ref> && executor<E>)
  explicit executor_ref(E& e) noexcept
      : executor_(&e), workers_(e.workers()), run_([](void* exec, index_t n, void* f, task call) {
          static_cast<E*>(exec)->for_each(n, [f, call](index_t i, index_t worker) { call(f, i, worker); });
        }) {}

  [[nodiscard]] index_t workers() const noexcept { return workers_; }
  template <class F>
  void for_each(index_t n, F&& f) const {
    using function = std::remove_reference_t<F>;
    run_(executor_, n, const_cast<std::remove_const_t<function>*>(&f),
         [](void* g, index_t i, index_t worker) { (*static_cast<function*>(g))(i, worker); });
  }

 private:
  using task = void (*)(void*, index_t, index_t);
  void* executor_;
  index_t workers_;
  void (*run_)(void*, index_t, void*, task);
};

}  // namespace vattn::examples
