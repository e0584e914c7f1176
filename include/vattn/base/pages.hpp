// Memory for what is large and grows: page-aligned, with huge pages by advice.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "vattn/base/config.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// 1 where pages can be given another address.
#if !defined(VATTN_HAS_PAGE_MOVES)
#if defined(__linux__) && defined(MREMAP_MAYMOVE) && defined(MREMAP_FIXED)
#define VATTN_HAS_PAGE_MOVES 1
#else
#define VATTN_HAS_PAGE_MOVES 0
#endif
#endif

namespace vattn::VATTN_ABI {

/// Bytes that start at a multiple of 2 MiB where there are that many, else of 64. Pages that were reserved and never
/// touched cost address space alone on most systems. Growth past the reserve copies the bytes; on Linux it moves the
/// pages of what is larger than 2 MiB to other addresses instead and copies nothing. Huge pages are asked for where the
/// system knows them; random rows are then found with fewer page walks.
class page_buffer {
 public:
  /// Bytes from which on memory is made of huge pages.
  static constexpr std::size_t huge = std::size_t{1} << 21;

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

  /// Room for so many; the first size() stay as they are. False where there is no memory; nothing is lost then.
  [[nodiscard]] bool reserve(std::size_t bytes) noexcept {
    if (bytes <= capacity_) return true;
    const std::size_t alignment = bytes >= huge ? huge : small;
    if (bytes > std::numeric_limits<std::size_t>::max() / 2) return false;  // the sum below would wrap around
    const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
#if VATTN_HAS_PAGE_MOVES
    if (alignment_ == huge) {  // so are the pages that there are
      std::byte* to = address_range(rounded, PROT_NONE);
      // Both ends are aligned: huge pages move whole. Where the system refuses, it may have freed the range already,
      // for someone else to take: leaving it reserved costs address space alone.
      if (to == nullptr || ::mremap(data_, capacity_, rounded, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED)
        return false;
      data_ = to, capacity_ = rounded;
      return true;
    }
#endif
    std::byte* fresh = allocate(rounded, alignment);
    if (fresh == nullptr) return false;
    if (size_ > 0) std::memcpy(fresh, data_, size_);
    const std::size_t size = size_;
    release();
    data_ = fresh, size_ = size, capacity_ = rounded, alignment_ = alignment;
    return true;
  }

  /// As resize, but new bytes hold anything.
  [[nodiscard]] bool resize_for_overwrite(std::size_t bytes) noexcept {
    if (bytes > capacity_ && !reserve(std::max(bytes, capacity_ + capacity_ / 2))) return false;
    size_ = bytes;
    return true;
  }
  /// New bytes are zero. Grows by half at least. False where there is no memory.
  [[nodiscard]] bool resize(std::size_t bytes) noexcept {
    const std::size_t before = size_;
    if (!resize_for_overwrite(bytes)) return false;
    if (bytes > before) std::memset(data_ + before, 0, bytes - before);
    return true;
  }

 private:
  static constexpr std::size_t small = 64;

#if VATTN_HAS_PAGE_MOVES
  // Addresses from a multiple of `huge` on, as many as asked for, of pages that are zero. Null where there are none.
  [[nodiscard]] static std::byte* address_range(std::size_t bytes, int protection) noexcept {
    void* all = ::mmap(nullptr, bytes + huge, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    const std::size_t before = (huge - reinterpret_cast<std::uintptr_t>(all) % huge) % huge;
    auto* first = static_cast<std::byte*>(all) + before;
    if (before > 0) static_cast<void>(::munmap(all, before));
    static_cast<void>(::munmap(first + bytes, huge - before));
    return first;
  }
#endif

  [[nodiscard]] static std::byte* allocate(std::size_t bytes, std::size_t alignment) noexcept {
#if VATTN_HAS_PAGE_MOVES
    if (alignment == huge) {
      std::byte* fresh = address_range(bytes, PROT_READ | PROT_WRITE);
#if defined(MADV_HUGEPAGE)
      if (fresh) static_cast<void>(::madvise(fresh, bytes, MADV_HUGEPAGE));
#endif
      return fresh;
    }
#endif
    return static_cast<std::byte*>(::operator new(bytes, std::align_val_t{alignment}, std::nothrow));
  }

  void release() noexcept {
#if VATTN_HAS_PAGE_MOVES
    if (data_ && alignment_ == huge) {
      static_cast<void>(::munmap(data_, capacity_));
      data_ = nullptr;
    }
#endif
    if (data_) ::operator delete(data_, std::align_val_t{alignment_});
    data_ = nullptr, size_ = capacity_ = 0, alignment_ = small;
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

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
