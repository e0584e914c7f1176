// Whether δ holds in production: on a share of heads also the exact output, and a count of those that were off by more.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/cuda/dense.cuh"

namespace vattn::VATTN_ABI::cuda {

/// Counts in device memory; zero them at first. A row is one query of one head. `largest` is the largest error/ε, the
/// bits of a float. Read the served output, so are right for what users got, in whatever precision.
struct device_audit {
  unsigned long long audited, exact, violations;
  unsigned largest;
};

namespace detail {

// Marks a share of the heads as if they were open, for the dense kernel.
template <class T>
__global__ void choose_audited_kernel(const __grid_constant__ kernel_arguments k, int heads, float share) {
  const int id = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  after_last_kernel();
  if (id >= heads) return;
  std::uint32_t words[2];
  draw_words(k.seed, k.a.layer, k.a.step ? *k.a.step : 0u, static_cast<std::uint32_t>(id), 0x4155u << 16, words);
  k.w.open[id] = static_cast<float>(words[0] >> 8) * 0x1p-24f < share ? 2 : 0;
}

// A warp a head.
template <class T, int D>
__global__ __launch_bounds__(256) void count_audited_kernel(const __grid_constant__ kernel_arguments k, int heads,
                                                            const float* exact, device_audit* audit) {
  const int id = static_cast<int>(blockIdx.x * 8 + threadIdx.x / 32), lane = static_cast<int>(threadIdx.x) & 31;
  after_last_kernel();
  if (id >= heads || __ldcg(k.w.open + id) != 2) return;
  float off2 = 0, norm2 = 0;
  for (int j = lane; j < D; j += 32) {
    const std::int64_t at = static_cast<std::int64_t>(id) * D + j;
    float served;
    if (k.a.output_float)
      served = static_cast<const float*>(k.a.output)[at];
    else
      served = static_cast<float>(static_cast<const T*>(k.a.output)[at]);
    off2 += (served - exact[at]) * (served - exact[at]), norm2 += exact[at] * exact[at];
  }
  off2 = sum_warp(off2), norm2 = sum_warp(norm2);
  if (lane != 0) return;
  const device_certificate c = k.a.certificates[id];
  atomicAdd(&audit->audited, 1ull);
  if (c.rounds == 0) {
    atomicAdd(&audit->exact, 1ull);
    return;
  }
  // ε relative to the mean square of the values is the certificate's goal.
  const float goal = k.rms ? c.goal : k.epsilon * k.epsilon * norm2, ratio = sqrtf(off2 / goal);
  if (!(ratio <= 1 + 1e-4f)) atomicAdd(&audit->violations, 1ull);
  if (ratio >= 0) atomicMax(&audit->largest, __float_as_uint(ratio));  // in the order of their bits
}

}  // namespace detail
}  // namespace vattn::VATTN_ABI::cuda

#include "vattn/macros_pop.hpp"
