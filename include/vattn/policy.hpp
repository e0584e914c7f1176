// The four slots of vattention<Policy>, their defaults, and the paper's configurations by name.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/budget/output.hpp"
#include "vattn/budget/targets.hpp"
#include "vattn/index/index_attention.hpp"
#include "vattn/sample/importance.hpp"
#include "vattn/sample/uniform.hpp"
#include "vattn/select/index.hpp"
#include "vattn/select/selector.hpp"
#include "vattn/settings.hpp"

namespace vattn::VATTN_ABI {

/// selector: which tokens are read exactly   (selector_for,     select/selector.hpp)
/// sampler:  which of the rest are read      (uniform_sampler,  sample/uniform.hpp)
/// bound:    how far a sampled sum may be off (bound,           stats/bounds.hpp)
/// target:   what must hold at (ε, δ)        (target_for,       budget/targets.hpp)
/// Derive and redefine what you change. Which go together: `attention_policy` below.
/// As they stand they read what costs least: few rows by a kv_index where the call has one, else all of them, at the
/// speed of `exact_attention`, and the certificate says which. A finite-sample bound and the targets that were
/// published have no use for an index: with them, and without a selector that says more, all rows are read.
struct default_policy {
  using selector = select::cheapest;
  using sampler = sample::uniform_without_replacement;
  using bound = budget::clt;
  using target = budget::output;
};

/// A reference, not a fast way: every key is read to rank the tokens by what they contribute, then few rows are. Shows
/// how few are enough where the ranking is the best there is.
struct ranked_policy : default_policy {
  using selector = select::top_k<select::exact_contributions>;
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

/// The fast one beside any cache: a kv_index for each sequence instead of a selector (index/index_attention.hpp). As
/// default_policy with an index, which this one must be given.
struct index_policy : default_policy {
  using selector = select::beside;
  using sampler = sample::from_index;
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
/// sample::from_store, or derived from it.
template <class S>
concept samples_a_store = requires { requires S::is_store; };
/// sample::from_index, or derived from it.
template <class S>
concept samples_by_index = requires { requires S::is_index; };
/// sample::by_group_importance: one sample for the query heads of a KV head.
template <class S>
concept group_sampler = importance_sampler<S> && requires { requires S::shared; };
/// sample::in_two_phases.
template <class S>
concept phased_sampler = importance_sampler<S> && requires { requires S::two_phases; };

/// Scores estimate the logits, with error scales.
template <class S>
concept estimates_logits = requires { requires S::estimates; };
/// select::two_phase, or with its members.
template <class S>
concept two_phase_selector = requires(const S& s) {
  s.coarse;
  s.fine;
};

/// Every slot holds what its concept asks for; whether they go together is another question.
template <class P>
concept has_sampler = uniform_sampler<typename P::sampler> || importance_sampler<typename P::sampler> ||
                      samples_a_store<typename P::sampler> || samples_by_index<typename P::sampler>;
template <class P>
concept has_selector = selector_for<typename P::selector, query_row<detail::any_head>>;
template <class P>
concept has_target = target_for<typename P::target, typename P::bound>;
template <class P>
concept has_slots = has_sampler<P> && has_selector<P> && has_target<P>;

/// What each sampler goes together with. What the code of a pipeline would ignore, or take for something that it is
/// not, is refused here, so that vattention<Policy> can say what to supply instead.
namespace mix {
template <class P>
inline constexpr bool finite_sample = P::bound::kind == guarantee::finite_sample;
template <class P>
inline constexpr bool from_store = samples_a_store<typename P::sampler>;
template <class P>
inline constexpr bool from_index = samples_by_index<typename P::sampler>;
template <class P>
inline constexpr bool by_importance = importance_sampler<typename P::sampler>;

/// Samples of unequal probability are judged by the output's error alone.
template <class P>
concept target = !(from_store<P> || from_index<P> || by_importance<P>) || P::target::kind == target_kind::output;
/// A store's scores come from its own codes, and bound nothing.
template <class P>
concept store_selector = !from_store<P> || std::same_as<typename P::selector, select::none>;
template <class P>
concept store_bound = !from_store<P> || !finite_sample<P>;
/// The same of an index, which is the selector: and is one to nobody else.
template <class P>
concept index_selector = from_index<P> == std::same_as<typename P::selector, select::beside>;
template <class P>
concept index_bound = !from_index<P> || !finite_sample<P>;
/// Asymptotic importance sampling makes probabilities of estimates and of their errors.
template <class P>
concept estimates = !by_importance<P> || finite_sample<P> || estimates_logits<typename P::selector>;
/// Certified importance sampling makes them of hard bounds, head by head, in one phase, by a Bernstein bound of its
/// own.
template <class P>
concept hard_bounds = !(by_importance<P> && finite_sample<P>) || scores_bound_logits<typename P::selector>;
template <class P>
concept certified_sampler = !(by_importance<P> && finite_sample<P>) ||
                            !(group_sampler<typename P::sampler> || phased_sampler<typename P::sampler>);
template <class P>
concept certified_bound =
    !(by_importance<P> && finite_sample<P>) || std::derived_from<typename P::bound, budget::bernstein>;
/// Two phases take two indices, and nothing else does.
template <class P>
concept phases = (phased_sampler<typename P::sampler> && two_phase_selector<typename P::selector>) ||
                 !(phased_sampler<typename P::sampler> || two_phase_selector<typename P::selector>);
/// Finite-sample promises rest on no score that may be exceeded.
template <class P>
concept sound_scores = !finite_sample<P> || !scores_may_be_exceeded<typename P::selector>;
}  // namespace mix

/// A policy that is served as it says. Uniform samplers go with every selector but two_phase, every bound and every
/// target (a finite-sample bound to which the scores give no range reads all rows); a selector's heavy share is theirs
/// alone: importance samplers take its scores.
template <class P>
concept attention_policy =
    has_slots<P> && mix::target<P> && mix::store_selector<P> && mix::store_bound<P> && mix::index_selector<P> &&
    mix::index_bound<P> && mix::estimates<P> && mix::hard_bounds<P> && mix::certified_sampler<P> &&
    mix::certified_bound<P> && mix::phases<P> && mix::sound_scores<P>;

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
}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
