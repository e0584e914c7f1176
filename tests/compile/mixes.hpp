// Every legal type in every slot, and which of them go together: what the compiler must accept, and what it must not.
#pragma once

#include <vattn/vattn.hpp>

namespace vattn::test {

template <class Selector, class Sampler, class Bound, class Target>
struct mix_of {
  using selector = Selector;
  using sampler = Sampler;
  using bound = Bound;
  using target = Target;
};

using mix_codes = sketch::key_codes<8>;
/// Kinds of selectors, by what their scores are.
using ranks_nothing = select::none;                                                        // nothing
using ranks = select::indexed<select::random_ranking>;                                     // an order
using exact_estimates = select::top_k<select::exact_logits>;                               // the logits
using exact_mass = select::top_p<select::exact_logits>;                                    // the logits
using exact_reach = select::top_k<select::exact_contributions>;                            // contributions
using norm_reach = select::top_p<select::contributions<select::norm_bounds>>;              // their bounds
using norms = select::top_k<select::norm_bounds>;                                          // bounds of logits
using estimates = select::indexed<mix_codes>;                                              // with errors
using index_bounds = select::indexed<select::quest>;                                       // bounds of logits
using soft_bounds = select::upper_scores<mix_codes>;                                       // that may be exceeded
using soft_reach = select::top_k<select::contributions<select::upper_scores<mix_codes>>>;  // the same of contributions
using hard = select::hard_bounds<mix_codes>;                                               // that are not
using calibrated_ranks = select::calibrated<ranks>;                                        // with errors
using two = select::two_phase<sketch::key_codes<2>, mix_codes>;                            // twice, with errors

/// What makes the difference; each says it of all four bounds and targets that follow.
enum class serves : std::uint8_t {
  never,
  asymptotic_output,  ///< clt and student, target output
  bernstein_output,   ///< bernstein, target output
  importance,         ///< both of these
  asymptotic,         ///< clt and student, any target
  all,                ///< any bound, any target
};

template <class Selector, class Sampler, serves What>
inline constexpr bool row_of_table = [] {
  const auto check = []<class Bound, class Target>() {
    constexpr bool output = Target::kind == target_kind::output;
    constexpr bool finite = Bound::kind == guarantee::finite_sample;
    constexpr bool want = What == serves::all || (What == serves::asymptotic && !finite) ||
                          ((What == serves::asymptotic_output || What == serves::importance) && !finite && output) ||
                          ((What == serves::bernstein_output || What == serves::importance) &&
                           std::same_as<Bound, budget::bernstein> && output);
    return attention_policy<mix_of<Selector, Sampler, Bound, Target>> == want;
  };
  const auto each_target = [&]<class Bound>() {
    return check.template operator()<Bound, budget::output>() &&
           check.template operator()<Bound, budget::denominator>() &&
           check.template operator()<Bound, budget::numerator>() && check.template operator()<Bound, budget::sdpa>();
  };
  return each_target.template operator()<budget::clt>() && each_target.template operator()<budget::student>() &&
         each_target.template operator()<budget::bernstein>() && each_target.template operator()<budget::hoeffding>();
}();

/// One selector with: a uniform sampler of either kind; by importance; by group; in two phases; from a store.
template <class Selector, serves Uniform, serves Importance, serves Group, serves Phases, serves Store>
inline constexpr bool mixes_are =
    row_of_table<Selector, sample::uniform_without_replacement, Uniform> &&
    row_of_table<Selector, sample::uniform_with_replacement, Uniform> &&
    row_of_table<Selector, sample::by_importance, Importance> &&
    row_of_table<Selector, sample::by_group_importance, Group> &&
    row_of_table<Selector, sample::in_two_phases, Phases> && row_of_table<Selector, sample::from_store, Store>;

}  // namespace vattn::test
