// The sums that choose a sample's size, over a pilot's rows: evaluated hundreds of times a call.
#pragma once

#include <algorithm>
#include <cstring>

#include "vattn/kernel/block_vectors.hpp"

namespace vattn::kernel {

/// Σ q·o and Σ r·(o − 1)²·o over rows, o = max(1, min(g·inverse, f, most)) the inverse probability of each; and
/// Σ w/o over those of o < most, if asked for.
struct plan_terms {
  const float *q, *r, *g, *f, *w;
  index_t n;  ///< a multiple of 16: pad with q = r = 0
};
struct plan_totals {
  float first = 0, second = 0, picks = 0;
};

namespace detail {

#if defined(__GNUC__)
template <int W>
inline __attribute__((always_inline)) plan_totals plan_sums(const plan_terms& t, float inverse, float most,
                                                            bool picks) noexcept {
  using floats = typename lanes<W>::floats;
  floats first = {}, second = {}, picked = {};
  for (index_t i = 0; i < t.n; i += W) {
    floats q, r, g, f;
    std::memcpy(&q, t.q + i, sizeof q);
    std::memcpy(&r, t.r + i, sizeof r);
    std::memcpy(&g, t.g + i, sizeof g);
    std::memcpy(&f, t.f + i, sizeof f);
    floats o = g * inverse;
    o = o < f ? o : f;
    o = o < most ? o : floats{} + most;
    o = o > 1.0f ? o : floats{} + 1.0f;
    const floats left = o - 1.0f;
    first += q * o;
    second += r * (left * left * o);
    if (!picks) continue;
    floats w;
    std::memcpy(&w, t.w + i, sizeof w);
    picked += o < most ? w / o : floats{};
  }
  return {sum_of<W>(first), sum_of<W>(second), sum_of<W>(picked)};
}
template <int W>
inline __attribute__((always_inline)) float floored_sum(const float* q, const float* g, const float* least, index_t n,
                                                        float inverse) noexcept {
  using floats = typename lanes<W>::floats;
  floats total = {};
  for (index_t i = 0; i < n; i += W) {
    floats weight, o, floor;
    std::memcpy(&weight, q + i, sizeof weight);
    std::memcpy(&o, g + i, sizeof o);
    std::memcpy(&floor, least + i, sizeof floor);
    o *= inverse;
    total += weight * (o > floor ? o : floor);
  }
  return sum_of<W>(total);
}
#if VATTN_DISPATCH
VATTN_TARGET_AVX512 inline float floored_sum_avx512(const float* q, const float* g, const float* least, index_t n,
                                                    float inverse) noexcept {
  return floored_sum<16>(q, g, least, n, inverse);
}
VATTN_TARGET_AVX2 inline float floored_sum_avx2(const float* q, const float* g, const float* least, index_t n,
                                                float inverse) noexcept {
  return floored_sum<8>(q, g, least, n, inverse);
}
VATTN_TARGET_AVX512 inline plan_totals plan_sums_avx512(const plan_terms& t, float inverse, float most,
                                                        bool picks) noexcept {
  return plan_sums<16>(t, inverse, most, picks);
}
VATTN_TARGET_AVX2 inline plan_totals plan_sums_avx2(const plan_terms& t, float inverse, float most,
                                                    bool picks) noexcept {
  return plan_sums<8>(t, inverse, most, picks);
}
#endif
#endif

}  // namespace detail

[[nodiscard]] inline plan_totals plan_sums(isa how, const plan_terms& t, float inverse, float most,
                                           bool picks) noexcept {
#if VATTN_DISPATCH
  if (how >= isa::avx512) return detail::plan_sums_avx512(t, inverse, most, picks);
  if (how == isa::avx2) return detail::plan_sums_avx2(t, inverse, most, picks);
#endif
  static_cast<void>(how);
#if defined(__GNUC__)
  return detail::plan_sums<4>(t, inverse, most, picks);
#else
  plan_totals sum;
  for (index_t i = 0; i < t.n; ++i) {
    const float o = std::max(1.0f, std::min(std::min(t.g[i] * inverse, t.f[i]), most));
    sum.first += t.q[i] * o;
    sum.second += t.r[i] * ((o - 1) * (o - 1) * o);
    if (picks && o < most) sum.picks += t.w[i] / o;
  }
  return sum;
#endif
}

/// Σ q·max(least, g·inverse) over n rows, a multiple of 16.
[[nodiscard]] inline float floored_sum(isa how, const float* q, const float* g, const float* least, index_t n,
                                       float inverse) noexcept {
#if VATTN_DISPATCH
  if (how >= isa::avx512) return detail::floored_sum_avx512(q, g, least, n, inverse);
  if (how == isa::avx2) return detail::floored_sum_avx2(q, g, least, n, inverse);
#endif
  static_cast<void>(how);
#if defined(__GNUC__)
  return detail::floored_sum<4>(q, g, least, n, inverse);
#else
  float sum = 0;
  for (index_t i = 0; i < n; ++i) sum += q[i] * std::max(least[i], g[i] * inverse);
  return sum;
#endif
}

}  // namespace vattn::kernel
