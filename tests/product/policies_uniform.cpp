// Uniform samples beside selectors that read keys, or none.
#include "product/policies.hpp"

namespace vattn::product {

namespace {

using sample::uniform_with_replacement, sample::uniform_without_replacement;

template <class S, class B, class T, class A>
void add(policy_list& to, const char* name) {
  const std::string text = std::string(name) + ", uniform" + (A::with_replacement ? " with replacement, " : ", ") +
                           B::name + ", " + to_string(T::kind);
  to.push_back(entry<mixed<S, A, B, T>>(text));
}

}  // namespace

void add_uniform(policy_list& to) {
  using budget::bernstein, budget::clt, budget::hoeffding, budget::student;
  using budget::denominator, budget::numerator, budget::output, budget::sdpa;
  using with = uniform_with_replacement;
  using without = uniform_without_replacement;
  using select::top_k, select::top_p, select::exact_contributions, select::exact_logits, select::contributions,
      select::norm_bounds, select::none;
  add<top_k<exact_contributions>, student, output, with>(to, "top_k of contributions");
  add<top_k<exact_contributions>, bernstein, numerator, without>(to, "top_k of contributions");
  add<top_k<exact_logits>, clt, output, with>(to, "top_k of logits");
  add<top_k<exact_logits>, hoeffding, sdpa, without>(to, "top_k of logits");
  add<top_k<contributions<norm_bounds>>, clt, numerator, without>(to, "top_k of norm bounds");
  add<top_k<contributions<norm_bounds>>, hoeffding, denominator, with>(to, "top_k of norm bounds");
  add<top_p<exact_logits>, student, denominator, without>(to, "top_p of logits");
  add<top_p<exact_logits>, bernstein, output, with>(to, "top_p of logits");
  add<top_p<exact_contributions>, clt, sdpa, with>(to, "top_p of contributions");
  add<none, student, sdpa, without>(to, "none");
  add<none, hoeffding, output, with>(to, "none");
}

}  // namespace vattn::product
