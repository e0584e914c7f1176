// Sums over columns of numbers, a row's each, that plan a sample's size and judge it: for every instruction set.
#include "vattn/macros_push.hpp"
#pragma once

#include <cstring>

#include "vattn/kernel/block_vectors.hpp"

namespace vattn::VATTN_ABI::kernel {

/// Σ q·o and Σ r·(o − 1)²·o over rows, o = max(1, min(g·inverse, f, most)) the inverse probability of each; and
/// Σ w/o over those of o < most, if asked for.
struct plan_terms {
  const float *q, *r, *g, *f, *w;
  index_t n;  ///< a multiple of 16: pad with q = r = 0
};
struct plan_totals {
  float first = 0, second = 0, picks = 0;
};
/// Σ y and Σ y·r².
struct weighted_totals {
  float sum = 0, far = 0;
};
/// Σ y, Σ y·r², Σ y², Σ y²·r², Σ y²·r⁴.
struct squared_totals {
  float sum = 0, far = 0, f0 = 0, f2 = 0, f4 = 0;
};
/// Σ t and Σ t².
struct variance_totals {
  float sum = 0, squares = 0;
};

namespace detail {

#if !defined(__GNUC__)
template <int W>
struct lanes {
  using floats = float;
};
template <int W>
inline void load_floats(const float* from, float& to) noexcept {
  to = *from;
}
template <int W>
[[nodiscard]] inline float sum_of(float v) noexcept {
  return v;
}
#endif

// Loops over vectors of W floats. What is compiled for an instruction set is inlined into a function of that target.
struct plan_loop {
  template <int W>
  static VATTN_ALWAYS_INLINE plan_totals run(const plan_terms& t, float inverse, float most, bool picks) noexcept {
    using floats = typename lanes<W>::floats;
    floats first = {}, second = {}, picked = {};
    for (index_t i = 0; i < t.n; i += W) {
      floats q, r, g, f;
      load_floats<W>(t.q + i, q);
      load_floats<W>(t.r + i, r);
      load_floats<W>(t.g + i, g);
      load_floats<W>(t.f + i, f);
      floats o = g * inverse;
      o = o < f ? o : f;
      o = o < most ? o : floats{} + most;
      o = o > 1.0f ? o : floats{} + 1.0f;
      const floats left = o - 1.0f;
      first += q * o;
      second += r * (left * left * o);
      if (!picks) continue;
      floats w;
      load_floats<W>(t.w + i, w);
      picked += o < most ? w / o : floats{};
    }
    return {sum_of<W>(first), sum_of<W>(second), sum_of<W>(picked)};
  }
};
struct floored_loop {
  template <int W>
  static VATTN_ALWAYS_INLINE float run(const float* q, const float* g, const float* least, index_t n,
                                       float inverse) noexcept {
    using floats = typename lanes<W>::floats;
    floats total = {};
    for (index_t i = 0; i < n; i += W) {
      floats weight, o, floor;
      load_floats<W>(q + i, weight);
      load_floats<W>(g + i, o);
      load_floats<W>(least + i, floor);
      o *= inverse;
      total += weight * (o > floor ? o : floor);
    }
    return sum_of<W>(total);
  }
};
struct weighted_loop {
  template <int W>
  static VATTN_ALWAYS_INLINE weighted_totals run(const float* x, const float* w, const float* r2, index_t n,
                                                 float* out) noexcept {
    using floats = typename lanes<W>::floats;
    floats sum = {}, far = {};
    for (index_t i = 0; i < n; i += W) {
      floats y, weight, reach;
      load_floats<W>(x + i, y);
      load_floats<W>(w + i, weight);
      load_floats<W>(r2 + i, reach);
      y *= weight;
      std::memcpy(out + i, &y, sizeof y);
      sum += y;
      far += y * reach;
    }
    return {sum_of<W>(sum), sum_of<W>(far)};
  }
};
struct squared_loop {
  template <int W>
  static VATTN_ALWAYS_INLINE squared_totals run(const float* x, const float* t, const float* r2, index_t n,
                                                float* out) noexcept {
    using floats = typename lanes<W>::floats;
    floats sum = {}, far = {}, f0 = {}, f2 = {}, f4 = {};
    for (index_t i = 0; i < n; i += W) {
      floats y, factor, reach;
      load_floats<W>(x + i, y);
      load_floats<W>(t + i, factor);
      load_floats<W>(r2 + i, reach);
      y = y * y * factor;
      std::memcpy(out + i, &y, sizeof y);
      const floats z = y * reach;
      sum += y;
      far += z;
      f0 += y * y;
      f2 += y * z;
      f4 += z * z;
    }
    return {sum_of<W>(sum), sum_of<W>(far), sum_of<W>(f0), sum_of<W>(f2), sum_of<W>(f4)};
  }
};
struct variance_loop {
  template <int W>
  static VATTN_ALWAYS_INLINE variance_totals run(const float* w, const float* o, index_t n, float scale) noexcept {
    using floats = typename lanes<W>::floats;
    floats sum = {}, squares = {};
    for (index_t i = 0; i < n; i += W) {
      floats t, inverse;
      load_floats<W>(w + i, t);
      load_floats<W>(o + i, inverse);
      t = t * t * (inverse * (inverse - 1.0f) * scale);
      sum += t;
      squares += t * t;
    }
    return {sum_of<W>(sum), sum_of<W>(squares)};
  }
};
struct thinning_loop {
  template <int W>
  static VATTN_ALWAYS_INLINE float run(const float* w, const float* o, index_t n, float* q, float* g) noexcept {
    using floats = typename lanes<W>::floats;
    floats total = {};
    for (index_t i = 0; i < n; i += W) {
      floats x, inverse;
      load_floats<W>(w + i, x);
      load_floats<W>(o + i, inverse);
      const floats term = x * x * inverse;
      const floats inverse_weight = 1.0f / (x > 1e-25f ? x : floats{} + 1e-25f);
      std::memcpy(q + i, &term, sizeof term);
      std::memcpy(g + i, &inverse_weight, sizeof inverse_weight);
      total += term;
    }
    return sum_of<W>(total);
  }
};

#if VATTN_DISPATCH
template <class Loop, class... A>
VATTN_TARGET_AVX512 inline auto run_avx512(A... arguments) noexcept {
  return Loop::template run<16>(arguments...);
}
template <class Loop, class... A>
VATTN_TARGET_AVX2 inline auto run_avx2(A... arguments) noexcept {
  return Loop::template run<8>(arguments...);
}
#endif
template <class Loop, class... A>
[[nodiscard]] inline auto run(isa how, A... arguments) noexcept {
#if VATTN_DISPATCH
  if (how >= isa::avx512) return run_avx512<Loop>(arguments...);
  if (how == isa::avx2) return run_avx2<Loop>(arguments...);
#endif
  static_cast<void>(how);
#if defined(__GNUC__)
  return Loop::template run<4>(arguments...);
#else
  return Loop::template run<1>(arguments...);
#endif
}

}  // namespace detail

// Of all these n is a multiple of 16, and columns may be anywhere.

[[nodiscard]] inline plan_totals plan_sums(isa how, const plan_terms& t, float inverse, float most,
                                           bool picks) noexcept {
  return detail::run<detail::plan_loop>(how, t, inverse, most, picks);
}

/// Σ q·max(least, g·inverse).
[[nodiscard]] inline float floored_sum(isa how, const float* q, const float* g, const float* least, index_t n,
                                       float inverse) noexcept {
  return detail::run<detail::floored_loop>(how, q, g, least, n, inverse);
}

/// Of y = w·x, which it writes to `out`.
[[nodiscard]] inline weighted_totals weighted_sums(isa how, const float* x, const float* w, const float* r2, index_t n,
                                                   float* out) noexcept {
  return detail::run<detail::weighted_loop>(how, x, w, r2, n, out);
}

/// Of y = t·x², which it writes to `out`.
[[nodiscard]] inline squared_totals squared_sums(isa how, const float* x, const float* t, const float* r2, index_t n,
                                                 float* out) noexcept {
  return detail::run<detail::squared_loop>(how, x, t, r2, n, out);
}

/// Of t = scale·w²·o·(o − 1): the variance of a sum of w whose terms have the inverse probabilities o.
[[nodiscard]] inline variance_totals variance_sums(isa how, const float* w, const float* o, index_t n,
                                                   float scale) noexcept {
  return detail::run<detail::variance_loop>(how, w, o, n, scale);
}

/// Σ q of q = w²·o; writes it, and g = 1/max(w, 1e-25).
[[nodiscard]] inline float thinning_terms(isa how, const float* w, const float* o, index_t n, float* q,
                                          float* g) noexcept {
  return detail::run<detail::thinning_loop>(how, w, o, n, q, g);
}

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
