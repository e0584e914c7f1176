// Every kind of policy over views, by name, with a selector that is made for a problem's keys.
#pragma once

#include <string>
#include <vector>

#include "support/layout.hpp"

namespace vattn::test {

using fine_codes = sketch::key_codes<8>;
using coarse_codes = sketch::key_codes<2>;

template <class Selector, class Sampler, class Bound = budget::clt, class Target = budget::output>
struct mixed_policy {
  using selector = Selector;
  using sampler = Sampler;
  using bound = Bound;
  using target = Target;
};

/// Indices of the keys of every sequence and KV head of a cache.
struct indices {
  template <kv_cache KV>
  explicit indices(const KV& cache) {
    for (index_t b = 0; b < cache.n_batch(); ++b) {
      for (index_t h = 0; h < cache.n_kv_heads(); ++h) {
        append_from(fine.emplace_back(cache.dk(), 1), cache.head(b, h));
        append_from(coarse.emplace_back(cache.dk(), 1), cache.head(b, h));
        append_from(pages.emplace_back(cache.dk()), cache.head(b, h));
        append_from(nonsense.emplace_back(), cache.head(b, h));
      }
    }
  }
  std::vector<fine_codes> fine;
  std::vector<coarse_codes> coarse;
  std::vector<select::quest> pages;
  std::vector<select::random_ranking> nonsense;
};

/// The selector over those of the indices that it wants.
template <class S>
[[nodiscard]] S make_selector(const indices& of) {
  if constexpr (std::constructible_from<S, std::span<const fine_codes>> && !std::is_aggregate_v<S>) {
    return S(of.fine);
  } else {
    S s;
    if constexpr (requires { s.coarse.heads = std::span<const coarse_codes>(); }) {
      s.coarse.heads = of.coarse, s.fine.heads = of.fine;
    } else if constexpr (requires { s.base; }) {
      s.base = make_selector<decltype(s.base)>(of);
    } else if constexpr (requires { s.heads = std::span<const fine_codes>(); }) {
      s.heads = of.fine;
    } else if constexpr (requires { s.heads = std::span<const select::quest>(); }) {
      s.heads = of.pages;
    } else if constexpr (requires { s.heads = std::span<const select::random_ranking>(); }) {
      s.heads = of.nonsense;
    }
    if constexpr (requires { s.mass; }) s.mass = 0.3;  // 0.9 would leave nothing to sample
    return s;
  }
}

/// f.template operator()<Policy>(name) for each pipeline and each target of it.
template <class F>
void for_each_policy(F&& f) {
  using sample::by_group_importance, sample::by_importance, sample::in_two_phases, sample::uniform_with_replacement;
  f.template operator()<ranked_policy>("uniform");
  f.template operator()<mixed_policy<select::none, uniform_with_replacement>>("with replacement");
  f.template operator()<verified_denominator>("denominator");
  f.template operator()<verified_numerator>("numerator");
  f.template operator()<verified_sdpa>("sdpa");
  f.template operator()<mixed_policy<select::top_k<>, sample::uniform_without_replacement, budget::bernstein>>(
      "bernstein");
  f.template operator()<mixed_policy<select::indexed<fine_codes>, by_importance>>("importance");
  f.template operator()<mixed_policy<select::calibrated<select::indexed<select::quest>>, by_importance>>("calibrated");
  f.template operator()<mixed_policy<select::indexed<fine_codes>, by_group_importance, budget::student>>("group");
  f.template operator()<mixed_policy<select::two_phase<coarse_codes, fine_codes>, in_two_phases>>("two phases");
  f.template operator()<certified_policy<fine_codes>>("certified");
}

}  // namespace vattn::test
