// The four slots of vattention<Policy>, their defaults, and the paper's configurations by name.
#pragma once

#include "vattn/budget/bounds.hpp"
#include "vattn/budget/output.hpp"
#include "vattn/budget/targets.hpp"
#include "vattn/configuration.hpp"
#include "vattn/sample/importance.hpp"
#include "vattn/sample/uniform.hpp"
#include "vattn/select/index.hpp"
#include "vattn/select/selector.hpp"

namespace vattn {

/// selector: which tokens are read exactly   (selector_for,     select/selector.hpp)
/// sampler:  which of the rest are read      (uniform_sampler,  sample/uniform.hpp)
/// bound:    how far a sampled sum may be off (bound,           budget/bounds.hpp)
/// target:   what must hold at (ε, δ)        (target_for,       budget/targets.hpp)
/// Derive and redefine what you change.
struct default_policy {
  using selector = select::top_k<select::exact_contributions>;
  using sampler = sample::uniform_without_replacement;
  using bound = budget::clt;
  using target = budget::output;
};

/// A guarantee with nothing asymptotic in it, from an index whose errors are bounded: codes of 4 bits or more.
template <key_index Index>
struct certified_policy : default_policy {
  using selector = select::hard_bounds<Index>;
  using sampler = sample::by_importance;
  using bound = budget::bernstein;
};

/// The fast one: a shuffled_store's own codes and order instead of a selector (store_attention.hpp).
struct store_policy : default_policy {
  using selector = select::none;
  using sampler = sample::from_store;
};

/// The paper's algorithm: ranking by logits, pilot, one budget from the pilot.
template <class Target>
struct published_policy : default_policy {
  using selector = select::top_k<select::exact_logits>;
  using target = Target;
};
using verified_denominator = published_policy<budget::denominator>;
using verified_numerator = published_policy<budget::numerator>;
using verified_sdpa = published_policy<budget::sdpa>;

namespace detail {
// A head that models the concept, to check selectors before a cache is known.
struct any_head {
  [[nodiscard]] index_t size() const;
  [[nodiscard]] index_t dk() const;
  [[nodiscard]] index_t dv() const;
  [[nodiscard]] std::span<const float> key(index_t) const;
  [[nodiscard]] std::span<const float> value(index_t) const;
};
}  // namespace detail

/// sample::by_importance, or derived from it.
template <class S>
concept importance_sampler = requires {
  { S::shape } -> std::convertible_to<sample::importance_shape>;
};

/// A sampler, and the selector, bound and target that go with it.
template <class P>
concept samples_uniformly = uniform_sampler<typename P::sampler>;
template <class P>
concept samples_by_importance = importance_sampler<typename P::sampler> && P::selector::estimates &&
                                P::bound::kind == guarantee::asymptotic&& P::target::kind == target_kind::output;
/// Certified: by importance from upper bounds of the logits, with a bound that holds at finite n.
template <class P>
concept samples_by_hard_bounds = importance_sampler<typename P::sampler> && scores_bound_logits<typename P::selector> &&
                                 P::bound::kind == guarantee::finite_sample&& P::target::kind == target_kind::output;

/// From a shuffled_store, whose codes take the selector's place.
template <class P>
concept samples_from_store = requires {
  requires P::sampler::is_store;
}
&&P::bound::kind == guarantee::asymptotic&& P::target::kind == target_kind::output;

template <class P>
concept attention_policy =
    (samples_from_store<P> || samples_uniformly<P> || samples_by_importance<P> || samples_by_hard_bounds<P>)&&bound<
        typename P::bound>&& target_for<typename P::target,
                                        typename P::bound>&& selector_for<typename P::selector,
                                                                          query_row<detail::any_head>>;

/// Configurations of the paper's experiments (section 5 and appendix of arXiv 2510.05688): sinks 128,
/// window 128, heavy share and base rate in the ranges it gives, ε = δ. Use with verified_denominator,
/// which is what those experiments certify.
namespace presets {

/// One pilot, one budget, no second opinion: where that leaves ε unreached the certificate says so.
[[nodiscard]] constexpr config published(double epsilon, double delta, double heavy, double base) noexcept {
  config c;
  c.epsilon = epsilon;
  c.delta = delta;
  c.heavy = heavy;
  c.base = base;
  c.max_rounds = 2;
  c.accept_last = true;
  return c;
}

inline constexpr config paper_tight = published(0.05, 0.05, 0.10, 0.05);
inline constexpr config paper_default = published(0.10, 0.10, 0.05, 0.02);
inline constexpr config paper_moderate = published(0.20, 0.20, 0.02, 0.02);
inline constexpr config paper_loose = published(0.30, 0.30, 0.02, 0.01);

}  // namespace presets
}  // namespace vattn
