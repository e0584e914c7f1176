// The floating-point environment in which the library computes, whatever the caller's is.
#include "vattn/macros_push.hpp"
#pragma once

#include <cstdint>

// 1 where the environment is a register of the thread that this header knows.
#if !defined(VATTN_FLOATING_POINT_SCOPE)
#if defined(__SSE2__) || defined(_M_X64) || (defined(__aarch64__) && defined(__GNUC__))
#define VATTN_FLOATING_POINT_SCOPE 1
#else
#define VATTN_FLOATING_POINT_SCOPE 0
#endif
#endif

#if VATTN_FLOATING_POINT_SCOPE && !defined(__aarch64__)
#include <xmmintrin.h>
#endif

#include "vattn/base/config.hpp"

namespace vattn::VATTN_ABI::kernel {

/// While it lives, the calling thread rounds to nearest, keeps subnormal numbers and traps nothing; then it has back
/// what it had. A host may have set another mode: libraries that were linked with -ffast-math flush subnormals to zero
/// in every thread that loads them, and elements of half, bfloat16 and FP8 caches and scales of q8_0 and q4_0 are, or
/// pass through, subnormals. Every call and every task has a scope of its own, so that results are the same bits in
/// every mode and on every thread. A few nanoseconds, and nested ones cost less. Without effect on targets that are
/// neither x86 with SSE2 nor 64-bit ARM: there the caller's mode is the library's.
class floating_point_scope {
#if VATTN_FLOATING_POINT_SCOPE
 public:
  floating_point_scope() noexcept : caller_(read()) {
    if ((caller_ & control) != standard) write((caller_ & ~control) | standard);
  }
  ~floating_point_scope() {
    if ((caller_ & control) != standard) write(caller_);
  }

 private:
  // The memory clobbers keep what is computed from memory on its side of the change.
#if defined(__aarch64__)
  using word = std::uint64_t;
  // FPCR: alternate half, default NaN, flush to zero (all three), rounding mode, traps, alternate handling.
  static constexpr word control = 0x07c89f07, standard = 0;
  [[nodiscard]] static word read() noexcept {
    word w;
    __asm__ volatile("mrs %0, fpcr" : "=r"(w)::"memory");
    return w;
  }
  static void write(word w) noexcept { __asm__ volatile("msr fpcr, %0" ::"r"(w) : "memory"); }
#else
  using word = std::uint32_t;
  // MXCSR: flush to zero, rounding mode, masks of exceptions, denormals are zero; its flags are no control.
  static constexpr word control = 0xffc0, standard = 0x1f80;
  [[nodiscard]] static word read() noexcept { return _mm_getcsr(); }
  static void write(word w) noexcept {
#if defined(__GNUC__)
    __asm__ volatile("ldmxcsr %0" ::"m"(w) : "memory");
#else
    _mm_setcsr(w);
#endif
  }
#endif
  word caller_;
#else
 public:
  floating_point_scope() noexcept {}
  ~floating_point_scope() {}  // so that one that is not named again is no unused variable
#endif

 public:
  floating_point_scope(const floating_point_scope&) = delete;
  floating_point_scope& operator=(const floating_point_scope&) = delete;
};

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
