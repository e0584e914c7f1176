// Which instructions the kernels may use: found out once, when the program runs.
#include "vattn/macros_push.hpp"
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vattn/base/config.hpp"

// 1 where kernels are compiled for several instruction sets and chosen among at run time.
#if !defined(VATTN_DISPATCH)
#if defined(__x86_64__) && defined(__GNUC__)
#define VATTN_DISPATCH 1
#else
#define VATTN_DISPATCH 0
#endif
#endif

// 1 where NEON's intrinsics are: 64-bit ARM has it always.
#if !defined(VATTN_NEON)
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__) && defined(__GNUC__)
#define VATTN_NEON 1
#else
#define VATTN_NEON 0
#endif
#endif

// Kernels are functions with a target attribute of their own, so that no flag is asked of the consumer. What
// they call must be inlined into them and carry the same attribute (lambdas do not inherit it under GCC 12).
#if VATTN_DISPATCH
#define VATTN_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define VATTN_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define VATTN_TARGET_AVX512_BF16 \
  __attribute__((target(         \
      "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma,f16c,popcnt,bmi2")))
#endif

// Before a loop whose sums are to stay in registers: they do only if the loop is gone, at -O2 too.
#if defined(__clang__)
#define VATTN_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define VATTN_UNROLL _Pragma("GCC unroll 16")
#else
#define VATTN_UNROLL
#endif

namespace vattn::VATTN_ABI::kernel {

/// What kernels are compiled for, each level with all that the ones before it have.
enum class isa : std::uint8_t {
  portable,     ///< what every compiler makes of 16-byte vectors: SSE2, NEON
  neon,         ///< and, for the scan of codes, NEON's table lookup
  avx2,         ///< AVX2, FMA, F16C
  avx512,       ///< AVX-512 F, BW, DQ, VL
  avx512_bf16,  ///< and VBMI, VBMI2, VNNI, BF16: Zen 4, Sapphire Rapids
};

[[nodiscard]] constexpr const char* to_string(isa i) noexcept {
  switch (i) {
    case isa::neon:
      return "neon";
    case isa::avx2:
      return "avx2";
    case isa::avx512:
      return "avx512";
    case isa::avx512_bf16:
      return "avx512_bf16";
    case isa::portable:
      break;
  }
  return "portable";
}

/// Those of this architecture.
#if VATTN_NEON
inline constexpr isa isa_levels[] = {isa::portable, isa::neon};
#else
inline constexpr isa isa_levels[] = {isa::portable, isa::avx2, isa::avx512, isa::avx512_bf16};
#endif

/// The highest that this machine, and its operating system, have.
[[nodiscard]] inline isa widest_isa() noexcept {
#if VATTN_DISPATCH
  __builtin_cpu_init();
  // GCC knows no name for F16C here; every CPU with AVX2 has it.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return isa::portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return isa::avx2;
  }
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                 __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
                 __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi2")
             ? isa::avx512_bf16
             : isa::avx512;
#elif VATTN_NEON
  return isa::neon;
#else
  return isa::portable;
#endif
}

/// What kernels use: the highest, or the level that the environment variable VATTN_ISA names if the machine has
/// it. Read once a process. Results differ between levels by rounding, and where one level samples a store and another
/// reads it all (`read_costs`); never between threads.
[[nodiscard]] inline isa active_isa() noexcept {
  static const isa chosen = [] {
    const isa widest = widest_isa();
    const char* asked = std::getenv("VATTN_ISA");
    for (const isa i : isa_levels) {
      if (asked && std::strcmp(asked, to_string(i)) == 0 && i < widest) return i;
    }
    return widest;
  }();
  return chosen;
}

/// Whether rows that are read in order are best asked for a whole row at a time, far ahead: not on Intel's cores, where
/// what is asked for takes one of the first cache's few buffers until it comes from memory (docs/performance.md).
[[nodiscard]] inline bool fetches_far() noexcept {
#if VATTN_DISPATCH
  static const bool far = [] {
    __builtin_cpu_init();
    return !__builtin_cpu_is("intel");
  }();
  return far;
#else
  return true;
#endif
}

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
