// Every named policy, and mixes of slots in which each two of them meet that may. What a mix of them is called follows
// from its slots.
#pragma once

#include <tuple>

#include "product/run.hpp"
#include "vattn/exact_attention.hpp"

namespace vattn::product {

template <class S, class A, class B, class T = budget::output>
struct mixed : default_policy {
  using selector = S;
  using sampler = A;
  using bound = B;
  using target = T;
};

template <class P>
[[nodiscard]] constexpr family family_of() {
  if constexpr (samples_a_store<typename P::sampler>) {
    return family::store;
  } else if constexpr (samples_by_index<typename P::sampler> || std::same_as<typename P::selector, select::cheapest>) {
    return family::index;
  } else if constexpr (uniform_sampler<typename P::sampler>) {
    return family::uniform;
  } else if constexpr (P::bound::kind == guarantee::finite_sample) {
    return family::certified;
  } else if constexpr (phased_sampler<typename P::sampler>) {
    return family::two_phases;
  } else if constexpr (group_sampler<typename P::sampler>) {
    return family::group;
  } else {
    return family::importance;
  }
}

/// `place` >= 0: where the layout and the element are the place's own, types are the library's, as a user has them.
/// Each layout meets every second place so, in one of its elements, another for each place; place 0, exact attention's,
/// meets all layouts.
[[nodiscard]] constexpr bool own_types(int place, int l, int e) {
  if (place < 0 || !stores(l, e) || (place > 0 && (place + l) % 2 != 0)) return false;
  int count = 0, before = 0;
  for (int i = 0; i < n_elements; ++i) count += stores(l, i), before += i < e && stores(l, i);
  return (place / 2 + l) % count == before;
}

template <class P, int place>
void run_policy(call& c) {
  if constexpr (place >= 0) {
    bool done = false;
    with_types(c.of, [&](auto l, auto e) {
      constexpr bool store = family_of<P>() == family::store;
      if constexpr (store ? l.value == shuffled : own_types(place, l.value, e.value)) {
        if (c.of[query_axis] != 0 && !store) return;
        done = true;
        with_layout<l.value, e.value>(c.of, c.rows, [&](const auto& cache, const row_order& order) {
          c.order = order;
          if constexpr (store) {
            perform<P, true>(cache, c);
          } else {
            perform<P, float, true>(cache, c);
          }
        });
      }
    });
    if (done) return;
  }
  if constexpr (family_of<P>() != family::store) {
    with_any_cache(c, [&](const any_kv& cache) { perform<P, false>(cache, c); });
  }
}

template <class P, int place = -1>
[[nodiscard]] policy_entry entry(std::string name) {
  static_assert(attention_policy<P>);
  policy_entry e{.name = std::move(name), .kind = family_of<P>()};
  if constexpr (uniform_sampler<typename P::sampler>) e.with_replacement = P::sampler::with_replacement;
  e.promise = P::bound::kind, e.bound = P::bound::name, e.target = P::target::kind;
  e.run = run_policy<P, place>;
  return e;
}

using policy_list = std::vector<policy_entry>;
// One for each source of policies_*.cpp.
void add_named(policy_list&);
void add_exact(policy_list&);
void add_uniform(policy_list&);
void add_indexed(policy_list&);
void add_importance(policy_list&);
void add_certified(policy_list&);
void add_store(policy_list&);

/// The policy axis.
[[nodiscard]] const policy_list& policies();

}  // namespace vattn::product
