// Importance samples: for a head, for a group, in two phases.
#include "product/policies.hpp"

namespace vattn::product {

void add_importance(policy_list& to) {
  using budget::clt, budget::student;
  using sample::by_group_importance, sample::by_importance, sample::in_two_phases;
  using codes = select::indexed<fine_codes>;
  using fitted = select::calibrated<select::indexed<select::quest>>;
  using phases = select::two_phase<coarse_codes, sharp_codes>;
  to.push_back(entry<mixed<codes, by_importance, clt>, 1>("codes, by importance, clt"));
  to.push_back(entry<mixed<codes, by_group_importance, student>, 2>("codes, by group importance, student"));
  to.push_back(entry<mixed<phases, in_two_phases, clt>, 3>("two_phase, in two phases, clt"));
  to.push_back(entry<mixed<phases, in_two_phases, student>>("two_phase, in two phases, student"));
  to.push_back(
      entry<mixed<select::top_k<select::exact_logits>, by_importance, student>>("logits, by importance, student"));
  to.push_back(
      entry<mixed<select::top_k<select::exact_logits>, by_group_importance, clt>>("logits, by group importance, clt"));
  to.push_back(entry<mixed<fitted, by_importance, clt>>("calibrated, by importance, clt"));
  to.back().pilots = true;
  to.push_back(entry<mixed<fitted, by_group_importance, student>>("calibrated, by group importance, student"));
  to.back().pilots = true;
}

}  // namespace vattn::product
