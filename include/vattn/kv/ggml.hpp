// ggml's tensors as llama.cpp hands them to attention: K, V, mask, q and the result, by ne and nb.
#include "vattn/macros_push.hpp"
#pragma once

#include <array>

#include "vattn/base/tensor.hpp"
#include "vattn/kv/places.hpp"
#include "vattn/options.hpp"

namespace vattn::VATTN_ABI {

/// `data`, `ne` (elements) and `nb` (BYTES) of a ggml_tensor, in ggml's order: innermost axis first. No ggml header is
/// needed here; `ggml_layout(t->data, t->ne, t->nb)` copies them.
struct ggml_layout {
  const void* data = nullptr;
  std::array<index_t, 4> ne{};
  std::array<index_t, 4> nb{};

  ggml_layout() = default;
  ggml_layout(const void* first, const std::array<index_t, 4>& extents, const std::array<index_t, 4>& bytes) noexcept
      : data(first), ne(extents), nb(bytes) {}
  template <class Extent, class Bytes>
  ggml_layout(const void* first, const Extent (&extents)[4], const Bytes (&bytes)[4]) noexcept : data(first) {
    for (std::size_t i = 0; i < 4; ++i)
      ne[i] = static_cast<index_t>(extents[i]), nb[i] = static_cast<index_t>(bytes[i]);
  }
};

/// Cells of a unified cache or of streams. Its factories refuse layouts that contradict themselves in `validate()`.
template <row_format K, row_format V>
class ggml_cache : public placed_kv<padded_sequences, K, V> {
 public:
  using base = placed_kv<padded_sequences, K, V>;

  ggml_cache() = default;
  ggml_cache(const ggml_layout& k, const ggml_layout& v, bool transposed, const K& kf, const V& vf) noexcept
      : base(padded_sequences(k.ne[3], k.ne[1]), k.ne[2], k.ne[0], v.ne[transposed ? 1 : 0],
             {k.data, {.page = k.nb[3], .cell = k.nb[1], .head = k.nb[2]}, kf},
             {v.data, {.page = v.nb[3], .cell = v.nb[transposed ? 0 : 1], .head = v.nb[2]}, vf}),
        n_v_{v.ne[transposed ? 0 : 1], v.ne[2], v.ne[3]},
        n_k_{k.ne[1], k.ne[2], k.ne[3]},
        element_{k.nb[0], v.nb[0]},
        transposed_(transposed) {}

  /// `room`: cells of the whole cache, of which the tensors are a view.
  [[nodiscard]] ggml_cache with_norms(const row_norms& norms, index_t room = 0) const noexcept {
    ggml_cache copy = *this;
    static_cast<base&>(copy) = base::with_norms(norms, room);
    return copy;
  }

  [[nodiscard]] status validate() const noexcept {
    if (n_k_ != n_v_) {
      return status::error(
          errc::invalid_argument, "K has %lld cells, %lld heads, %lld streams but V %lld, %lld, %lld: %s",
          static_cast<long long>(n_k_[0]), static_cast<long long>(n_k_[1]), static_cast<long long>(n_k_[2]),
          static_cast<long long>(n_v_[0]), static_cast<long long>(n_v_[1]), static_cast<long long>(n_v_[2]),
          transposed_ ? "give both permuted, K as [d, n_kv, heads, streams], V as [n_kv, d, heads, "
                        "streams]"
                      : "give both permuted, as [d, n_kv, heads, streams]");
    }
    constexpr std::array<index_t, 2> one{unit<K>(), unit<V>()};
    for (std::size_t side = 0; side < 2; ++side) {
      if (element_[side] == one[side]) continue;
      return status::error(errc::invalid_argument,
                           "nb[0] of %s is %lld, not %lld, the size of its type: is it of another type, or permuted "
                           "or transposed?",
                           side == 0 ? "K" : "V", static_cast<long long>(element_[side]),
                           static_cast<long long>(one[side]));
    }
    return base::validate();
  }

 private:
  // Bytes of an element, or of a block.
  template <row_format F>
  static constexpr index_t unit() noexcept {
    return unit_of(F{});
  }
  template <class T, index_t D>
  static constexpr index_t unit_of(plain_rows<T, D>) noexcept {
    return sizeof(T);
  }
  template <class T>
  static constexpr index_t unit_of(grouped_rows<T>) noexcept {
    return sizeof(T);
  }
  template <class B>
  static constexpr index_t unit_of(quantised_rows<B>) noexcept {
    return sizeof(B);
  }

  std::array<index_t, 3> n_v_{}, n_k_{};
  std::array<index_t, 2> element_{};
  bool transposed_ = false;
};

template <class T>
concept ggml_element = kernel::element<T> || kernel::quantised_block<T>;

/// K [dk, n_kv, n_kv_heads, streams] and V [dv, n_kv, n_kv_heads, streams], as attention sees them (permuted views of
/// the cache). TK and TV by the tensors' types: float, Eigen::half, Eigen::bfloat16, kernel::q8_0_block,
/// kernel::q4_0_block. V may be a view of K (MLA). One stream is one sequence of the batch; which cells belong to a
/// query, the mask says.
template <ggml_element TK, ggml_element TV = TK, index_t DK = dynamic, index_t DV = DK>
[[nodiscard]] ggml_cache<rows_of<TK, DK>, rows_of<TV, DV>> ggml_kv(const ggml_layout& k,
                                                                   const ggml_layout& v) noexcept {
  return {k, v, false, {}, {}};
}

/// V transposed, [n_kv, dv, n_kv_heads, streams], as caches are kept where flash attention is off. Each element of a
/// value is on a cache line of its own: gathering one reads dv lines, and saves little over reading all.
template <ggml_element TK, kernel::element TV = float, index_t DK = dynamic>
[[nodiscard]] ggml_cache<rows_of<TK, DK>, grouped_rows<TV>> ggml_transposed_kv(const ggml_layout& k,
                                                                               const ggml_layout& v) noexcept {
  return {k, v, true, {}, {.group = 1, .stride = v.nb[1]}};
}

/// The mask [n_kv, n_queries or more, 1 or n_q_heads, 1 or streams], T = Eigen::half (flash attention) or float.
template <class T>
requires std::same_as<T, float> || std::same_as<T, Eigen::half>
[[nodiscard]] mask_view ggml_mask(const ggml_layout& m, index_t n_q_heads, index_t streams = 1) noexcept {
  const auto axis = [&](std::size_t i, index_t wanted) {
    return m.ne[i] == 1 ? std::pair<index_t, index_t>{wanted, 0} : std::pair<index_t, index_t>{m.ne[i], m.nb[i]};
  };
  const std::pair<index_t, index_t> head = axis(2, n_q_heads), stream = axis(3, streams);
  return mask_view(tensor_view<const T, 4>(static_cast<const T*>(m.data), {stream.first, head.first, m.ne[1], m.ne[0]},
                                           {stream.second, head.second, m.nb[1], m.nb[0]}));
}

/// q [dk, n_queries, n_q_heads, streams] (permuted) as the functors take it.
template <class T>
[[nodiscard]] tensor_view<const T, 4> ggml_query(const ggml_layout& q) noexcept {
  return {static_cast<const T*>(q.data), {q.ne[3], q.ne[1], q.ne[2], q.ne[0]}, {q.nb[3], q.nb[1], q.nb[2], q.nb[0]}};
}

/// The result [dv, n_q_heads, n_queries, streams], the shape of ggml_flash_attn_ext's.
[[nodiscard]] inline tensor_view<float, 4> ggml_output(float* data, const ggml_layout& o) noexcept {
  return {data, {o.ne[3], o.ne[2], o.ne[1], o.ne[0]}, {o.nb[3], o.nb[2], o.nb[1], o.nb[0]}};
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
