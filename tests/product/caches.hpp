// A scenario's cache, in its layout and of its elements, from known rows.
#pragma once

#include <bit>
#include <cmath>
#include <numeric>

#include "product/axes.hpp"
#include "support/layouts.hpp"
#include "vattn/kv/ragged.hpp"
#include "vattn/store/interleaved_store.hpp"
#include "vattn/store/shuffled_store.hpp"

namespace vattn::product {

template <element E>
struct elements {
  using key = float;
  using value = float;
};
template <>
struct elements<f16> {
  using key = Eigen::half;
  using value = Eigen::half;
};
template <>
struct elements<bf16> {
  using key = Eigen::bfloat16;
  using value = Eigen::bfloat16;
};
template <>
struct elements<f16_f32> {
  using key = Eigen::half;
  using value = float;
};
template <>
struct elements<e4m3> {
  using key = kernel::e4m3;
  using value = kernel::e4m3;
};
template <>
struct elements<q8_0> {
  using key = kernel::q8_0_block;
  using value = kernel::q8_0_block;
};
template <>
struct elements<q4_0> {
  using key = kernel::q4_0_block;
  using value = kernel::q4_0_block;
};
template <>
struct elements<q8_0_f16> {
  using key = kernel::q8_0_block;
  using value = Eigen::half;
};

inline constexpr float e4m3_scale = 0.0625f;

/// The nearest element; of e4m3 with `e4m3_scale`.
template <class T>
[[nodiscard]] T converted(float x) {
  if constexpr (std::same_as<T, kernel::e4m3>) {
    if (std::isnan(x)) return {0x7f};
    const auto sign = static_cast<std::uint8_t>(std::signbit(x) ? 0x80 : 0);
    const float a = std::min(std::abs(x) / e4m3_scale, 448.0f);
    if (a < 0x1p-6f) return {static_cast<std::uint8_t>(sign | std::lround(a * 0x1p9f))};
    const int e = std::ilogb(a);
    const long steps = std::lround((std::ldexp(a, -e) - 1) * 8);  // 8: the next exponent, which adding it makes
    return {static_cast<std::uint8_t>(sign | (((e + 7) << 3) + steps))};
  } else {
    return T(x);
  }
}
template <class T>
[[nodiscard]] float widened(T x) {
  if constexpr (std::same_as<T, kernel::e4m3>) {
    return e4m3_scale * kernel::e4m3_to_float(x.bits);
  } else {
    return static_cast<float>(x);
  }
}
template <class T>
[[nodiscard]] std::vector<T> converted(const std::vector<float>& from) {
  std::vector<T> to;
  to.reserve(from.size());
  for (const float x : from) to.push_back(converted<T>(x));
  return to;
}

/// Numbers about the rows of K and V, [batch, kv_heads, n].
struct kept_norms {
  kept_norms(const test::problem<float>& p, const scenario& s) {
    const int level = s[norms_axis];
    if (level == 0) return;
    const auto rows = [&](const std::vector<float>& x, index_t width, const float* from, std::vector<float>& to) {
      for (index_t row = 0; row < p.s.batch * p.s.kv_heads * p.s.n; ++row) {
        double square = 0;
        for (index_t j = 0; j < width; ++j) {
          const double c = from ? double{from[row / p.s.n * width + j]} : 0.0;
          square += std::pow(static_cast<double>(x[static_cast<std::size_t>(row * width + j)]) - c, 2);
        }
        to.push_back(static_cast<float>(std::sqrt(square)));
      }
    };
    if (level == 2) {
      centres.assign(static_cast<std::size_t>(p.s.batch * p.s.kv_heads * p.s.dv),
                     0.9f * all_values[static_cast<std::size_t>(s[values_axis])]);
      rows(p.k, p.s.dk, nullptr, keys);
      keys.push_back(0);  // an address, even of no rows
    }
    rows(p.v, p.s.dv, centres.empty() ? nullptr : centres.data(), values);
    values.push_back(0);
  }
  [[nodiscard]] row_norms view() const {
    const auto at = [](const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); };
    return {.keys = at(keys), .values = at(values), .value_centres = at(centres)};
  }
  std::vector<float> keys, values, centres;
};

/// Row of the cache -> token of the problem, where they differ (shuffled_store), else empty.
using row_order = std::vector<std::int32_t>;

/// Makes the cache and calls f(view, order). Rounds the rows of `r` to what is stored.
template <layout L, element E, class F>
void with_layout(const scenario& s, test::ragged<float>& r, F&& f) {
  using TK = typename elements<E>::key;
  using TV = typename elements<E>::value;
  const test::shape& d = r.p.s;
  if constexpr (E < q8_0) {
    for (float& x : r.p.k) x = widened(converted<TK>(x));
    for (float& x : r.p.v) x = widened(converted<TV>(x));
  }
  const row_scales scales{.k = e4m3_scale, .v = e4m3_scale};
  const index_t page = paged(L) ? all_pages[static_cast<std::size_t>(s[page_axis])] : 0;

  if constexpr (L == contiguous || L == token_major || L == padded_rows || L == ragged_rows) {
    const kept_norms norms(r.p, s);
    if constexpr (L == token_major) {
      std::vector<float> k(r.p.k.size()), v(r.p.v.size());
      const auto permute = [&](const std::vector<float>& from, index_t width, std::vector<float>& to) {
        for (index_t b = 0; b < d.batch; ++b) {
          for (index_t h = 0; h < d.kv_heads; ++h) {
            for (index_t i = 0; i < d.n; ++i)
              std::copy_n(from.data() + ((b * d.kv_heads + h) * d.n + i) * width, width,
                          to.data() + ((b * d.n + i) * d.kv_heads + h) * width);
          }
        }
      };
      permute(r.p.k, d.dk, k);
      permute(r.p.v, d.dv, v);
      const auto ks = converted<TK>(k);
      const auto vs = converted<TV>(v);
      f(token_major_kv(ks.data(), vs.data(), r.p.cache_shape()).with_norms(norms.view()), row_order{});
    } else if constexpr (L == padded_rows) {  // K and V in one buffer of floats, heads outermost
      const index_t unit = static_cast<index_t>(std::max(sizeof(TK), sizeof(TV))), row = (d.dk + d.dv + 3) * unit;
      std::vector<std::byte> both(static_cast<std::size_t>(row * (d.batch * d.kv_heads * d.n + 1)), std::byte{0xff});
      const kv_strides strides{.token = row * d.batch, .head = row * d.batch * d.n, .batch = row};
      for (index_t b = 0; b < d.batch; ++b) {
        for (index_t h = 0; h < d.kv_heads; ++h) {
          for (index_t i = 0; i < d.n; ++i) {
            std::byte* at = both.data() + b * strides.batch + h * strides.head + i * strides.token;
            const auto k = converted<TK>(std::vector<float>(r.key(b, h, i), r.key(b, h, i) + d.dk));
            const auto v = converted<TV>(std::vector<float>(r.value(b, h, i), r.value(b, h, i) + d.dv));
            std::memcpy(at, k.data(), k.size() * sizeof(TK));
            std::memcpy(at + d.dk * unit, v.data(), v.size() * sizeof(TV));
          }
        }
      }
      const kv_view<TK, TV> view(reinterpret_cast<const TK*>(both.data()), strides,
                                 reinterpret_cast<const TV*>(both.data() + d.dk * unit), strides, r.p.cache_shape());
      f(view.with_norms(norms.view()), row_order{});
    } else {
      const auto k = converted<TK>(r.p.k);
      const auto v = converted<TV>(r.p.v);
      if constexpr (L == contiguous) {
        f(contiguous_kv(k.data(), v.data(), r.p.cache_shape()).with_norms(norms.view()), row_order{});
      } else {
        f(padded_kv(k.data(), v.data(), r.p.cache_shape(), r.lengths.data(), scales).with_norms(norms.view()),
          row_order{});
      }
    }
  } else if constexpr (L == flashinfer_nhd || L == flashinfer_hnd || L == flashinfer_fused) {
    const test::pages t(r.lengths, page);
    const page_order order = L == flashinfer_nhd ? page_order::nhd : page_order::hnd;
    const std::vector<float> kf = test::paged(r, t, order, true), vf = test::paged(r, t, order, false);
    if constexpr (L == flashinfer_fused) {
      std::vector<float> both;
      const auto width = static_cast<std::ptrdiff_t>(t.size * d.kv_heads * d.dk);
      for (std::ptrdiff_t i = 0; i < t.count; ++i) {
        both.insert(both.end(), kf.begin() + i * width, kf.begin() + (i + 1) * width);
        both.insert(both.end(), vf.begin() + i * width, vf.begin() + (i + 1) * width);
      }
      const auto kv = converted<TK>(both);
      f(flashinfer_paged_kv(kv.data(), order, t.view(d)), row_order{});
    } else {
      const auto k = converted<TK>(kf);
      const auto v = converted<TV>(vf);
      f(flashinfer_paged_kv(k.data(), v.data(), order, t.view(d), scales), row_order{});
    }
  } else if constexpr (L == vllm || L == vllm_fused) {
    const test::table t(r.lengths, page);
    const auto kv = converted<TK>(L == vllm ? test::flash_layout(r, t) : test::fused_layout(r, t));
    if constexpr (L == vllm) {
      f(vllm_kv(kv.data(), t.view(d), scales), row_order{});
    } else {
      f(vllm_fused_kv(kv.data(), t.view(d)), row_order{});
    }
  } else if constexpr (L == vllm_x_packed) {
    const test::table t(r.lengths, page);
    test::problem<TK> same({});
    same.s = d, same.k = converted<TK>(r.p.k), same.v = converted<TK>(r.p.v);
    const auto [k, v] = test::x_packed_layout(test::ragged<TK>(std::move(same), r.lengths), t);
    f(vllm_x_packed_kv(k.data(), v.data(), t.view(d)), row_order{});
  } else if constexpr (L == ggml) {
    const test::tensor<TK> k(r, true, 36);
    const test::tensor<TV> v(r, false, sizeof(TV) % 4 == 0 ? 4 : 2);
    const kept_norms norms(r.p, s);
    f(ggml_kv<TK, TV>(k.layout, v.layout).with_norms(norms.view()), row_order{});
  } else if constexpr (L == ggml_transposed) {
    const test::tensor<TK> k(r, true);
    const index_t room = d.n + 5;
    std::vector<TV> v(static_cast<std::size_t>(room * d.dv * d.kv_heads * d.batch), converted<TV>(test::not_a_number));
    r.for_each_row([&](index_t b, index_t h, index_t t) {
      for (index_t j = 0; j < d.dv; ++j)
        v[static_cast<std::size_t>(((b * d.kv_heads + h) * d.dv + j) * room + t)] = converted<TV>(r.value(b, h, t)[j]);
    });
    const auto one = static_cast<index_t>(sizeof(TV));
    const ggml_layout transposed(v.data(), {d.n, d.dv, d.kv_heads, d.batch},
                                 {one, room * one, room * d.dv * one, room * d.dv * d.kv_heads * one});
    const kept_norms norms(r.p, s);
    f(ggml_transposed_kv<TK, TV>(k.layout, transposed).with_norms(norms.view()), row_order{});
  } else if constexpr (L == gemma_ring) {
    const gemma_cpp_layer l{.n_rows = d.n + 7,
                            .row_stride = (2 * d.kv_heads * 2 * d.dk + 5) * 4,
                            .layer = 1,
                            .n_kv_heads = d.kv_heads,
                            .d = d.dk,
                            .first_position = d.n / 2 + 3,
                            .n_tokens = d.n};
    const std::vector<float> cells = test::ring(r, l);
    f(gemma_cpp_kv(cells.data(), l), row_order{});
  } else {
    // The last tokens come one by one.
    const auto k = converted<TK>(r.p.k);
    const auto v = converted<TV>(r.p.v);
    const index_t late = s.seed % 2 == 0 ? 0 : std::min<index_t>(d.n, 40);
    const auto first = static_cast<std::int32_t>(d.n - late);
    const auto prefilled = padded_kv(k.data(), v.data(), r.p.cache_shape(), &first);
    const auto append = [&](auto& store) {
      status st = store.assign(prefilled);
      for (index_t i = first; i < d.n && st; ++i)
        st = store.append(k.data() + i * d.dk, d.n * d.dk, v.data() + i * d.dv, d.n * d.dv);
      return st.ok();
    };
    if constexpr (L == interleaved) {
      interleaved_store<TK> store({.n_kv_heads = d.kv_heads, .dk = d.dk, .dv = d.dv});
      if (append(store)) f(store, row_order{});
    } else {
      shuffled_store<TK> store({.n_kv_heads = d.kv_heads, .dk = d.dk, .dv = d.dv, .seed = s.seed});
      if (!append(store)) return;
      row_order order;
      for (index_t row = 0; row < d.n; ++row) order.push_back(static_cast<std::int32_t>(store.position(row)));
      f(store, order);
    }
  }
}

/// f(index constants of the layout and of the element) for the scenario's.
template <class F, int L = 0, int E = 0>
void with_types(const scenario& s, F&& f) {
  if constexpr (L == n_layouts) {
    return;
  } else if constexpr (E == n_elements) {
    with_types<F, L + 1, 0>(s, std::forward<F>(f));
  } else {
    if constexpr (stores(L, E)) {
      if (s[layout_axis] == L && s[element_axis] == E)
        return f(std::integral_constant<layout, layout(L)>{}, std::integral_constant<element, element(E)>{});
    }
    with_types<F, L, E + 1>(s, std::forward<F>(f));
  }
}

}  // namespace vattn::product
