// Samples from a shuffled_store.
#include "product/policies.hpp"

namespace vattn::product {

void add_store(policy_list& to) {
  to.push_back(entry<store_policy, 5>("store_policy"));
  to.push_back(entry<mixed<select::none, sample::from_store, budget::student>, 6>("none, from store, student"));
}

const policy_list& policies() {
  static const policy_list all = [] {
    policy_list to;
    add_exact(to);
    add_named(to);
    add_uniform(to);
    add_indexed(to);
    add_importance(to);
    add_certified(to);
    add_store(to);
    return to;
  }();
  return all;
}

}  // namespace vattn::product
