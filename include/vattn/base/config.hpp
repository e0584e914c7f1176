// Version and feature macros. Every macro is 0 or 1 and may be set by the consumer before including.
#include "vattn/macros_push.hpp"
#pragma once

#define VATTN_VERSION_MAJOR 1
#define VATTN_VERSION_MINOR 0
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

// Before functions that kernels on a GPU call too: nothing where the compiler is a host's.
#if !defined(VATTN_FN)
#if defined(__CUDACC__) || defined(__HIPCC__)
#define VATTN_FN __host__ __device__
#else
#define VATTN_FN
#endif
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

// `inline` and the namespace of everything in vattn, headers open it by `namespace vattn::VATTN_ABI`: vattn::workspace
// is vattn::v1_0_0_i0110000000_e1c0::workspace to the linker. So two versions of the library in one program, and units
// of it that are compiled for different instruction sets (one with -march=native, say), with and without exceptions or
// checks, do not take each other's inline functions. An object of one is not an object of the other: pass plain data
// between such units. Eigen's functions have no such names: docs/engines.md.
#if !defined(VATTN_ABI)
#if defined(__SSE3__) || defined(__SSSE3__) || defined(__SSE4_1__)
#define VATTN_ABI_SSE3 1
#else
#define VATTN_ABI_SSE3 0
#endif
#if defined(__SSE4_2__) || defined(__POPCNT__)
#define VATTN_ABI_SSE42 1
#else
#define VATTN_ABI_SSE42 0
#endif
#if defined(__AVX__)
#define VATTN_ABI_AVX 1
#else
#define VATTN_ABI_AVX 0
#endif
#if defined(__F16C__)
#define VATTN_ABI_F16C 1
#else
#define VATTN_ABI_F16C 0
#endif
#if defined(__FMA__)
#define VATTN_ABI_FMA 1
#else
#define VATTN_ABI_FMA 0
#endif
#if defined(__AVX2__)
#define VATTN_ABI_AVX2 1
#else
#define VATTN_ABI_AVX2 0
#endif
#if defined(__BMI__) || defined(__BMI2__) || defined(__LZCNT__)
#define VATTN_ABI_BMI 1
#else
#define VATTN_ABI_BMI 0
#endif
#if defined(__AVX512F__)
#define VATTN_ABI_AVX512 1
#else
#define VATTN_ABI_AVX512 0
#endif
#if defined(__AVX512VL__) || defined(__AVX512BW__) || defined(__AVX512DQ__)
#define VATTN_ABI_AVX512VL 1
#else
#define VATTN_ABI_AVX512VL 0
#endif
#if defined(__AVX512BF16__) || defined(__AVX512FP16__) || defined(__AVX512VNNI__) || defined(__ARM_FEATURE_SVE) || \
    defined(__ARM_FEATURE_DOTPROD) || defined(__ARM_FEATURE_BF16)
#define VATTN_ABI_NEWER 1
#else
#define VATTN_ABI_NEWER 0
#endif
#define VATTN_ABI_PASTE(a, b, c, i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, e, k) \
  v##a##_##b##_##c##_i##i0##i1##i2##i3##i4##i5##i6##i7##i8##i9##_e##e##c##k
#define VATTN_ABI_NAME(...) VATTN_ABI_PASTE(__VA_ARGS__)
#define VATTN_ABI                                                                                                     \
  inline VATTN_ABI_NAME(VATTN_VERSION_MAJOR, VATTN_VERSION_MINOR, VATTN_VERSION_PATCH, VATTN_ABI_SSE3,                \
                        VATTN_ABI_SSE42, VATTN_ABI_AVX, VATTN_ABI_F16C, VATTN_ABI_FMA, VATTN_ABI_AVX2, VATTN_ABI_BMI, \
                        VATTN_ABI_AVX512, VATTN_ABI_AVX512VL, VATTN_ABI_NEWER, VATTN_HAS_EXCEPTIONS, VATTN_CHECKS)
#endif

namespace vattn::VATTN_ABI {

/// Signed 64-bit counts, extents and byte offsets: a cache of 1 M tokens x 64 heads x 256 B passes 4 GiB.
using index_t = std::int64_t;

/// Position of a token among the tokens that a query sees. 32 bits halve the selectors' arrays;
/// `population::max_size` is checked at the API's edge.
using ordinal = std::uint32_t;

/// Head size that is known at run time only.
inline constexpr index_t dynamic = -1;

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
