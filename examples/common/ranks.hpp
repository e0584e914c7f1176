// Ranks of a program: the processes that mpirun has started, or threads of this one.
#pragma once

#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "vattn/dist/threads.hpp"

#if defined(VATTN_MPI)
#include "vattn/dist/mpi.hpp"
#endif

namespace vattn::examples {

/// `f(communicator)` on each rank, which throws what it has to say; every rank must throw where one does. `ranks`
/// threads, or the processes of MPI where it is 0. Rethrows the first exception of a thread.
template <class F>
void on_ranks(int ranks, int& argc, char**& argv, F&& f) {
  if (ranks > 0) {
    static_cast<void>(argc), static_cast<void>(argv);
    dist::thread_group group(ranks, std::chrono::hours(1));
    std::vector<std::exception_ptr> thrown(static_cast<std::size_t>(ranks));
    std::vector<std::thread> threads;
    for (int r = 0; r < ranks; ++r) {
      threads.emplace_back([&, r] {
        try {
          dist::thread_rank comm(group, r);
          f(dist::communicator_ref(comm));
        } catch (...) {
          thrown[static_cast<std::size_t>(r)] = std::current_exception();
        }
      });
    }
    for (std::thread& t : threads) t.join();
    for (const std::exception_ptr& e : thrown) {
      if (e) std::rethrow_exception(e);
    }
    return;
  }
#if defined(VATTN_MPI)
  int given = 0;
  if (MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &given) != MPI_SUCCESS)
    throw std::runtime_error("MPI_Init_thread failed");
  std::exception_ptr thrown;
  {
    dist::mpi_communicator comm;
    try {
      f(dist::communicator_ref(comm));
    } catch (...) {
      thrown = std::current_exception();
    }
  }
  MPI_Finalize();
  if (thrown) std::rethrow_exception(thrown);
#else
  throw std::runtime_error("built without MPI: give --ranks, a number of threads");
#endif
}

/// All ranks go on together.
inline void barrier(dist::communicator_ref& comm) {
  std::vector<std::byte> all(static_cast<std::size_t>(comm.size()));
  const std::byte mine{};
  if (status s = comm.all_gather({&mine, 1}, all); !s) throw std::runtime_error(s.message());
}

/// The largest of all ranks' numbers.
inline double largest(dist::communicator_ref& comm, double mine) {
  std::vector<double> all(static_cast<std::size_t>(comm.size()));
  if (status s = comm.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all))); !s)
    throw std::runtime_error(s.message());
  return *std::max_element(all.begin(), all.end());
}

}  // namespace vattn::examples
