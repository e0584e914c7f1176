// Importance samples whose guarantee holds at their own size.
#include "product/policies.hpp"

namespace vattn::product {

void add_certified(policy_list& to) {
  using quest = select::indexed<select::quest>;
  to.push_back(entry<certified_policy<sharp_codes>, 4>("certified_policy of 8-bit codes"));
  to.push_back(entry<mixed<select::hard_bounds<fine_codes>, sample::by_importance, budget::bernstein>>(
      "hard bounds of 4-bit codes, by importance, bernstein"));
  to.push_back(entry<mixed<quest, sample::by_importance, budget::bernstein>>("quest, by importance, bernstein"));
}

}  // namespace vattn::product
