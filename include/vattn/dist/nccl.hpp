// Ranks that are GPUs, by NCCL.
#include "vattn/macros_push.hpp"
#pragma once

#include <cuda_runtime_api.h>
#include <nccl.h>

#include "vattn/dist/communicator.hpp"

namespace vattn::VATTN_ABI::dist {

/// A `communicator` over a NCCL communicator and a stream, both the caller's, who sees to it that the device is
/// current.
///
/// `gather` is for kernels: device pointers, enqueued on the stream, no waiting and no allocation, so it may be
/// captured into a graph. `all_gather`, for what is judged on the host, goes through a pinned and a device buffer and
/// waits for the stream; buffers grow when a message is larger than all before.
///
/// Errors of NCCL and CUDA are statuses. A rank that dies leaves the others' kernels waiting: set the communicator
/// non-blocking and abort it (ncclCommAbort), as NCCL has it.
class nccl_communicator {
 public:
  nccl_communicator(ncclComm_t comm, cudaStream_t stream) noexcept : comm_(comm), stream_(stream) {
    if (ncclCommUserRank(comm, &rank_) != ncclSuccess || ncclCommCount(comm, &size_) != ncclSuccess) size_ = 0;
  }
  ~nccl_communicator() { release(); }
  nccl_communicator(const nccl_communicator&) = delete;
  nccl_communicator& operator=(const nccl_communicator&) = delete;

  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int size() const noexcept { return size_; }  ///< 0: NCCL did not say

  /// `mine` [bytes] and `all` [size, bytes] on the device; `mine` may be its own place in `all`.
  [[nodiscard]] status gather(const void* mine, void* all, std::size_t bytes) noexcept {
    const ncclResult_t r = ncclAllGather(mine, all, bytes, ncclUint8, comm_, stream_);
    if (r == ncclSuccess) return {};
    return status::error(errc::communication_failed, "ncclAllGather failed: %s", ncclGetErrorString(r));
  }

  [[nodiscard]] status all_gather(std::span<const std::byte> mine, std::span<std::byte> all) noexcept {
    if (status s = reserve(mine.size() + all.size()); !s) return s;
    std::byte* const received = device_ + mine.size();
    std::copy(mine.begin(), mine.end(), host_);
    if (status s = check(cudaMemcpyAsync(device_, host_, mine.size(), cudaMemcpyHostToDevice, stream_)); !s) return s;
    if (status s = gather(device_, received, mine.size()); !s) return s;
    if (status s = check(cudaMemcpyAsync(host_, received, all.size(), cudaMemcpyDeviceToHost, stream_)); !s) return s;
    if (status s = check(cudaStreamSynchronize(stream_)); !s) return s;
    std::copy(host_, host_ + all.size(), all.begin());
    return {};
  }

 private:
  [[nodiscard]] static status check(cudaError_t e) noexcept {
    if (e == cudaSuccess) return {};
    return status::error(errc::communication_failed, "CUDA failed in an exchange: %s", cudaGetErrorString(e));
  }
  [[nodiscard]] status reserve(std::size_t bytes) noexcept {
    if (bytes <= bytes_) return {};
    release();
    void *host = nullptr, *device = nullptr;
    if (status s = check(cudaMallocHost(&host, bytes)); !s) return s;
    host_ = static_cast<std::byte*>(host);
    if (status s = check(cudaMalloc(&device, bytes)); !s) return s;
    device_ = static_cast<std::byte*>(device);
    bytes_ = bytes;
    return {};
  }
  void release() noexcept {
    if (host_) static_cast<void>(cudaFreeHost(host_));
    if (device_) static_cast<void>(cudaFree(device_));
    host_ = device_ = nullptr;
    bytes_ = 0;
  }

  ncclComm_t comm_;
  cudaStream_t stream_;
  int rank_ = 0, size_ = 0;
  std::byte *host_ = nullptr, *device_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
