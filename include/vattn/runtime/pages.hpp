// Memory for what is large and grows: page-aligned, with huge pages by advice.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "vattn/config.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vattn {

/// Bytes that start at a multiple of 2 MiB where there are that many, else of 64. Pages that were reserved and never
/// touched cost address space alone on most systems, so reserve generously: growth past the reserve moves the bytes.
/// Huge pages are asked for where the system knows them; random rows are then found with fewer page walks.
class page_buffer {
 public:
  page_buffer() = default;
  ~page_buffer() { release(); }
  page_buffer(const page_buffer&) = delete;
  page_buffer& operator=(const page_buffer&) = delete;
  page_buffer(page_buffer&& other) noexcept { swap(other); }
  page_buffer& operator=(page_buffer&& other) noexcept {
    page_buffer moved(std::move(other));
    swap(moved);
    return *this;
  }

  [[nodiscard]] std::byte* data() noexcept { return data_; }
  [[nodiscard]] const std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] std::size_t capacity() const noexcept { return capacity_; }

  /// False where there is no memory; nothing is lost then.
  [[nodiscard]] bool reserve(std::size_t bytes) noexcept {
    if (bytes <= capacity_) return true;
    const std::size_t alignment = bytes >= huge ? huge : small;
    if (bytes > std::numeric_limits<std::size_t>::max() / 2) return false;  // the sum below would wrap around
    const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    auto* fresh = static_cast<std::byte*>(::operator new (rounded, std::align_val_t{alignment}, std::nothrow));
    if (fresh == nullptr) return false;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment == huge) static_cast<void>(::madvise(fresh, rounded, MADV_HUGEPAGE));
#endif
    if (size_ > 0) std::memcpy(fresh, data_, size_);
    const std::size_t size = size_;
    release();
    data_ = fresh, size_ = size, capacity_ = rounded, alignment_ = alignment;
    return true;
  }

  /// New bytes are zero. Grows by half at least. False where there is no memory.
  [[nodiscard]] bool resize(std::size_t bytes) noexcept {
    if (bytes > capacity_ && !reserve(std::max(bytes, capacity_ + capacity_ / 2))) return false;
    if (bytes > size_) std::memset(data_ + size_, 0, bytes - size_);
    size_ = bytes;
    return true;
  }

 private:
  static constexpr std::size_t huge = std::size_t{1} << 21, small = 64;

  void release() noexcept {
    if (data_) ::operator delete (data_, std::align_val_t{alignment_});
    data_ = nullptr, size_ = capacity_ = 0;
  }
  void swap(page_buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
    std::swap(alignment_, other.alignment_);
  }

  std::byte* data_ = nullptr;
  std::size_t size_ = 0, capacity_ = 0, alignment_ = small;
};

}  // namespace vattn
