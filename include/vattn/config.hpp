// Version and feature macros. Every macro is 0 or 1 and may be set by the consumer before including.
#pragma once

#define VATTN_VERSION_MAJOR 0
#define VATTN_VERSION_MINOR 1
#define VATTN_VERSION_PATCH 0

// Checks of what is not finite are comparisons that these flags let a compiler remove: a NaN in a cache would then
// leave an output and a certificate with status ok.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0) || defined(_M_FP_FAST)
#error \
    "vattn: -ffast-math, -Ofast, -ffinite-math-only and /fp:fast remove its checks for NaN and infinity: compile what includes it with -fno-fast-math -fno-finite-math-only, or /fp:precise (docs/mathematics.md, Floating point)"
#endif

#include <cstddef>
#include <cstdint>

// 0 where the consumer forbids exceptions (-fno-exceptions). The library throws none of its own.
#if !defined(VATTN_HAS_EXCEPTIONS)
#if defined(__cpp_exceptions)
#define VATTN_HAS_EXCEPTIONS 1
#else
#define VATTN_HAS_EXCEPTIONS 0
#endif
#endif

// For functions that do nothing but prefetch, whose calls GCC 12 drops as being without effect, and for loops whose
// instructions the caller's target attribute decides.
#if defined(__GNUC__)
#define VATTN_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define VATTN_ALWAYS_INLINE inline
#endif

// Debug-only preconditions inside kernels. They never guard a caller's input: that is `status`' job.
#if !defined(VATTN_CHECKS)
#if defined(NDEBUG)
#define VATTN_CHECKS 0
#else
#define VATTN_CHECKS 1
#endif
#endif

#if VATTN_CHECKS
#include <cassert>
#define VATTN_ASSERT(condition) assert(condition)
#else
#define VATTN_ASSERT(condition) static_cast<void>(0)
#endif

namespace vattn {

/// Signed 64-bit counts, extents and byte offsets: a cache of 1 M tokens x 64 heads x 256 B passes 4 GiB.
using index_t = std::int64_t;

/// Position of a token among the tokens that a query sees. 32 bits halve the selectors' arrays;
/// `population::max_size` is checked at the API's edge.
using ordinal = std::uint32_t;

/// Head size that is known at run time only.
inline constexpr index_t dynamic = -1;

}  // namespace vattn
