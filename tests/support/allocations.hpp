// Everything that a program allocates, counted; one of it may be made to fail. Included by one source of a program: it
// replaces operator new.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace vattn::test {

/// How many allocations there were; which of them fails, counted from 1.
inline std::atomic<long> allocations{0}, fail_at{-1};

[[nodiscard]] inline void* allocate(std::size_t size, std::size_t alignment) noexcept {
  if (++allocations == fail_at) return nullptr;
  const std::size_t rounded = (size + alignment - 1) / alignment * alignment;
  return alignment > alignof(std::max_align_t) ? std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded)
                                               : std::malloc(size == 0 ? 1 : size);
}

[[nodiscard]] inline void* allocate_or_throw(std::size_t size, std::size_t alignment) {
  void* p = allocate(size, alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

// Not inlined: GCC would see free() of what operator new has returned, and take the two for mismatched.
[[gnu::noinline]] inline void release(void* p) noexcept { std::free(p); }

}  // namespace vattn::test

// malloc and free fit each other whatever the alignment.
void* operator new(std::size_t size) { return vattn::test::allocate_or_throw(size, 1); }
void* operator new[](std::size_t size) { return vattn::test::allocate_or_throw(size, 1); }
void* operator new(std::size_t size, std::align_val_t a) {
  return vattn::test::allocate_or_throw(size, std::size_t(a));
}
void* operator new[](std::size_t size, std::align_val_t a) {
  return vattn::test::allocate_or_throw(size, std::size_t(a));
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return vattn::test::allocate(size, 1); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return vattn::test::allocate(size, 1); }
void* operator new(std::size_t size, std::align_val_t a, const std::nothrow_t&) noexcept {
  return vattn::test::allocate(size, std::size_t(a));
}
void* operator new[](std::size_t size, std::align_val_t a, const std::nothrow_t&) noexcept {
  return vattn::test::allocate(size, std::size_t(a));
}
void operator delete(void* p) noexcept { vattn::test::release(p); }
void operator delete[](void* p) noexcept { vattn::test::release(p); }
void operator delete(void* p, std::size_t) noexcept { vattn::test::release(p); }
void operator delete[](void* p, std::size_t) noexcept { vattn::test::release(p); }
void operator delete(void* p, std::align_val_t) noexcept { vattn::test::release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { vattn::test::release(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { vattn::test::release(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { vattn::test::release(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { vattn::test::release(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { vattn::test::release(p); }
void operator delete(void* p, std::align_val_t, const std::nothrow_t&) noexcept { vattn::test::release(p); }
void operator delete[](void* p, std::align_val_t, const std::nothrow_t&) noexcept { vattn::test::release(p); }
