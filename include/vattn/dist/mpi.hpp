// Ranks that are processes of MPI, on one host or several.
#include "vattn/macros_push.hpp"
#pragma once

// The bindings for C++ were removed from MPI 3, and want libraries of their own.
#if !defined(OMPI_SKIP_MPICXX)
#define OMPI_SKIP_MPICXX 1
#endif
#if !defined(MPICH_SKIP_MPICXX)
#define MPICH_SKIP_MPICXX 1
#endif
#include <mpi.h>

#include <limits>

#include "vattn/dist/communicator.hpp"

namespace vattn::VATTN_ABI::dist {

/// A `communicator` over a copy of an MPI communicator (MPI 3.0), so that its messages meet no others. Made by all
/// ranks together, between MPI_Init and MPI_Finalize, and given back before the latter. Calls of one object come from
/// one thread at a time; MPI_Init_thread with MPI_THREAD_SERIALIZED is enough for several objects that take turns.
///
/// Ranks run the same build on machines of the same byte order. What MPI reports is returned as a status; a rank that
/// has died usually ends all of them (mpirun sees to that), and MPI has no timeout: without it the others wait.
class mpi_communicator {
 public:
  explicit mpi_communicator(MPI_Comm of = MPI_COMM_WORLD) noexcept {
    error_ = MPI_Comm_dup(of, &comm_);
    if (error_ == MPI_SUCCESS) error_ = MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
    if (error_ == MPI_SUCCESS) error_ = MPI_Comm_rank(comm_, &rank_);
    if (error_ == MPI_SUCCESS) error_ = MPI_Comm_size(comm_, &size_);
  }
  ~mpi_communicator() {
    int finalized = 1;
    if (comm_ != MPI_COMM_NULL && MPI_Finalized(&finalized) == MPI_SUCCESS && finalized == 0) MPI_Comm_free(&comm_);
  }
  mpi_communicator(const mpi_communicator&) = delete;
  mpi_communicator& operator=(const mpi_communicator&) = delete;

  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int size() const noexcept { return size_; }
  [[nodiscard]] status all_gather(std::span<const std::byte> mine, std::span<std::byte> all) noexcept {
    if (error_ != MPI_SUCCESS) return failed("MPI_Comm_dup");
    if (mine.size() > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
      return status::error(errc::communication_failed, "%zu bytes in an exchange: MPI counts to 2^31 - 1", mine.size());
    }
    const int count = static_cast<int>(mine.size());
    const int error = MPI_Allgather(mine.data(), count, MPI_BYTE, all.data(), count, MPI_BYTE, comm_);
    if (error == MPI_SUCCESS) return {};
    error_ = error;  // what follows would be of no use
    return failed("MPI_Allgather");
  }

 private:
  [[nodiscard]] status failed(const char* what) const noexcept {
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    if (MPI_Error_string(error_, text, &length) != MPI_SUCCESS) length = 0;
    return status::error(errc::communication_failed, "%s failed: %.*s", what, std::min(length, 150), text);
  }

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0, size_ = 1, error_ = MPI_SUCCESS;
};

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
