// Selectors of the product, with the indices that they need, one for each KV head.
#pragma once

#include <vattn/select/calibrated.hpp>
#include <vattn/select/quest.hpp>
#include <vattn/vattn.hpp>
#include <vector>

namespace vattn::product {

using coarse_codes = sketch::key_codes<2>;
using fine_codes = sketch::key_codes<4>;
using sharp_codes = sketch::key_codes<8>;

template <class Index, kv_cache KV>
[[nodiscard]] std::vector<Index> indices_of(const KV& cache) {
  std::vector<Index> heads;
  if (!cache.validate()) return heads;
  for (index_t b = 0; b < cache.n_batch(); ++b) {
    for (index_t h = 0; h < cache.n_kv_heads(); ++h) {
      heads.emplace_back(cache.dk());
      append_from(heads.back(), cache.head(b, h));
    }
  }
  return heads;
}

/// Selectors without indices.
template <class Selector>
struct indices {
  template <class KV>
  indices(const KV&, unsigned) {}
  [[nodiscard]] Selector selector() const {
    Selector s;
    if constexpr (requires { s.mass; }) s.mass = 0.3;  // 0.9 would leave nothing to sample
    return s;
  }
};

/// Beside each sequence; for the default policy in every second case, which has none in the others.
template <class Selector>
struct indices_beside {
  template <class KV>
  indices_beside(const KV& cache, bool wanted) {
    for (index_t b = 0; wanted && b < cache.n_batch(); ++b) {
      sequences.emplace_back(index_shape{.n_kv_heads = cache.n_kv_heads(), .dk = cache.dk(), .dv = cache.dv()});
      if (!sequences.back().build(cache, b)) sequences.back() = {};  // which the call then says
    }
  }
  [[nodiscard]] Selector selector() const { return {sequences, {}}; }
  std::vector<kv_index> sequences;
};
template <>
struct indices<select::beside> : indices_beside<select::beside> {
  template <class KV>
  indices(const KV& cache, unsigned) : indices_beside(cache, true) {}
};
template <>
struct indices<select::cheapest> : indices_beside<select::cheapest> {
  template <class KV>
  indices(const KV& cache, unsigned seed) : indices_beside(cache, seed % 2 == 0) {}
};

template <template <class> class Selector, class Index>
struct indices_for {
  template <class KV>
  indices_for(const KV& cache, unsigned) : heads(indices_of<Index>(cache)) {}
  [[nodiscard]] Selector<Index> selector() const { return Selector<Index>{std::span<const Index>(heads)}; }
  std::vector<Index> heads;
};
template <class Index>
struct indices<select::indexed<Index>> : indices_for<select::indexed, Index> {
  using indices_for<select::indexed, Index>::indices_for;
};
template <class Index>
struct indices<select::upper_scores<Index>> : indices_for<select::upper_scores, Index> {
  using indices_for<select::upper_scores, Index>::indices_for;
};
template <class Index>
struct indices<select::hard_bounds<Index>> : indices_for<select::hard_bounds, Index> {
  using indices_for<select::hard_bounds, Index>::indices_for;
};
template <class Ranking>
struct indices<select::calibrated<Ranking>> {
  template <class KV>
  indices(const KV& cache, unsigned seed) : base(cache, seed) {}
  [[nodiscard]] select::calibrated<Ranking> selector() const { return {base.selector(), 64}; }
  indices<Ranking> base;
};
template <class Coarse, class Fine>
struct indices<select::two_phase<Coarse, Fine>> {
  template <class KV>
  indices(const KV& cache, unsigned) : coarse(indices_of<Coarse>(cache)), fine(indices_of<Fine>(cache)) {}
  [[nodiscard]] select::two_phase<Coarse, Fine> selector() const {
    return {{std::span<const Coarse>(coarse)}, {std::span<const Fine>(fine)}};
  }
  std::vector<Coarse> coarse;
  std::vector<Fine> fine;
};

}  // namespace vattn::product
