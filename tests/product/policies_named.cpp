// The policies that have names.
#include "product/policies.hpp"

namespace vattn::product {

void add_named(policy_list& to) {
  to.push_back(entry<ranked_policy, 7>("ranked_policy"));
  to.push_back(entry<default_policy>("default_policy"));
  to.push_back(entry<index_policy, 8>("index_policy"));
  to.push_back(entry<verified_denominator>("verified_denominator"));
  to.push_back(entry<verified_numerator>("verified_numerator"));
  to.push_back(entry<verified_sdpa>("verified_sdpa"));
}

}  // namespace vattn::product
