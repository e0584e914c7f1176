// OpenMP's threads as an executor; there where the program is compiled with OpenMP.
#include "vattn/macros_push.hpp"
#pragma once

#if defined(_OPENMP)
#include <omp.h>

#include <algorithm>

#include "vattn/base/config.hpp"

namespace vattn::VATTN_ABI {

/// `threads` of OpenMP's, by default as many as it would use. Tasks are handed out one by one. Holds no state: callers
/// may share it. Called from within a parallel region it runs on the calling thread, unless the program allows nested
/// regions (omp_set_max_active_levels): then each caller gets a team of its own.
class openmp_executor {
 public:
  openmp_executor() : openmp_executor(omp_get_max_threads()) {}
  explicit openmp_executor(index_t threads) : threads_(static_cast<int>(std::clamp<index_t>(threads, 1, 1 << 20))) {}
  [[nodiscard]] index_t workers() const noexcept { return threads_; }
  template <class F>
  void for_each(index_t n, F&& f) {
#pragma omp parallel num_threads(threads_)
    {
      const index_t worker = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
      for (index_t task = 0; task < n; ++task) f(task, worker);
    }
  }

 private:
  int threads_;
};

}  // namespace vattn::VATTN_ABI
#endif

#include "vattn/macros_pop.hpp"
