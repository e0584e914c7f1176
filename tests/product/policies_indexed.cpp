// Uniform samples beside selectors over indices.
#include "product/policies.hpp"

namespace vattn::product {

namespace {

template <class S, class B, class T, class A>
void add(policy_list& to, const char* name) {
  const std::string text = std::string(name) + ", uniform" + (A::with_replacement ? " with replacement, " : ", ") +
                           B::name + ", " + to_string(T::kind);
  to.push_back(entry<mixed<S, A, B, T>>(text));
  to.back().pilots = std::string(name) == "calibrated";
}

}  // namespace

void add_indexed(policy_list& to) {
  using budget::bernstein, budget::clt, budget::hoeffding, budget::student;
  using budget::denominator, budget::numerator, budget::output, budget::sdpa;
  using with = sample::uniform_with_replacement;
  using without = sample::uniform_without_replacement;
  add<select::indexed<select::quest>, clt, output, without>(to, "quest");
  add<select::indexed<select::quest>, bernstein, sdpa, with>(to, "quest");
  add<select::indexed<fine_codes>, student, numerator, with>(to, "codes");
  add<select::upper_scores<fine_codes>, student, output, without>(to, "upper scores of codes");
  add<select::upper_scores<fine_codes>, student, denominator, with>(to, "upper scores of codes");
  add<select::hard_bounds<sharp_codes>, hoeffding, numerator, without>(to, "hard bounds of codes");
  add<select::hard_bounds<sharp_codes>, clt, denominator, with>(to, "hard bounds of codes");
  add<select::calibrated<select::indexed<select::quest>>, clt, output, with>(to, "calibrated");
}

}  // namespace vattn::product
