// The options of a method_choice, the same for every program. A program adds --method and --epsilon itself: it may
// take one, or a list.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "common/method_choice.hpp"
#include "common/selectors.hpp"

namespace vattn::examples {

[[nodiscard]] inline const std::map<std::string, method>& method_names() {
  static const std::map<std::string, method> names = [] {
    std::map<std::string, method> all;
    for (const method m : {method::dense, method::top_k, method::sample, method::sinks_window, method::magic_pig,
                           method::vattention, method::store, method::index})
      all[to_string(m)] = m;
    return all;
  }();
  return names;
}

/// The value of a name; a name of a map, rather than CLI11's transformers: those accept the enumerators' numbers too.
template <class Names>
[[nodiscard]] auto named(const char* option, const Names& names, const std::string& name) {
  if (const auto found = names.find(name); found != names.end()) return found->second;
  std::string all;
  for (const auto& entry : names) all += (all.empty() ? "" : ", ") + entry.first;
  throw CLI::ValidationError(option, "'" + name + "' is none of " + all);
}

template <class Value, class Names>
void add_choice(CLI::App& app, const char* group, const char* option, Value& value, const Names& names,
                const char* shown, const std::string& text) {
  app.add_option_function<std::string>(
         option, [&value, names, option](const std::string& name) { value = named(option, names, name); }, text)
      ->type_name(shown)
      ->group(group);
}

template <class Value>
CLI::Option* add_number(CLI::App& app, const char* group, const char* name, Value& value, const std::string& text) {
  return app.add_option(name, value, text)->type_name("X")->group(group);
}

/// Defaults are those that `m` has now.
inline void add_method_options(CLI::App& app, method_choice& m) {
  const std::map<std::string, target_kind> targets{{"output", target_kind::output},
                                                   {"denominator", target_kind::denominator},
                                                   {"numerator", target_kind::numerator},
                                                   {"sdpa", target_kind::sdpa}};
  const std::map<std::string, sampler_kind> samplers{{"uniform", sampler_kind::uniform},
                                                     {"importance", sampler_kind::importance}};
  const std::map<std::string, bound_kind> bounds{{"clt", bound_kind::clt},
                                                 {"student", bound_kind::student},
                                                 {"bernstein", bound_kind::bernstein},
                                                 {"hoeffding", bound_kind::hoeffding}};
  const std::map<std::string, error_scale> scales{{"output", error_scale::output}, {"rms", error_scale::rms}};
  std::map<std::string, std::string> selectors;
  for (const selector_entry& entry : selector_catalogue()) selectors[entry.name] = entry.name;

  app.add_flag_callback(
      "--list",
      [] {
        for (const selector_entry& entry : selector_catalogue())
          std::printf("%-18s %s\n", entry.name.c_str(), entry.text.c_str());
        throw CLI::Success();
      },
      "name the selectors");
  const char* const group = "Method";
  const auto number = [&](const char* name, auto& value, const std::string& text) {
    return add_number(app, group, name, value, text);
  };
  const auto by_default = [](const auto value) { return "; default " + std::to_string(value); };
  add_choice(app, group, "--target", m.target, targets, "output|denominator|numerator|sdpa",
             "what epsilon and delta promise; default output");
  add_choice(app, group, "--selector", m.selector, selectors, "NAME",
             "what scores the tokens, see --list (exact: their logits and values); default " + m.selector);
  app.add_option("--weights", m.weights, "selector hash-attention: one file for all KV heads, or one for each")
      ->type_name("FILE")
      ->group(group);
  add_choice(app, group, "--sampler", m.sampler, samplers, "uniform|importance",
             std::string("uniform: heavy tokens and a uniform rest; importance: by the scores and their error; "
                         "default ") +
                 to_string(m.sampler));
  app.add_flag("--share-group", m.share_group, "importance: one sample for the query heads of a KV head")->group(group);
  app.add_flag("--two-phase", m.two_phases, "importance: scan codes of 1 bit, then score what they keep")->group(group);
  number("--bits", m.bits, "of a coordinate of a quantised key" + by_default(m.bits))
      ->check(CLI::IsMember({1, 2, 4, 8}));
  add_choice(app, group, "--error-scale", m.settings.scale, scales, "output|rms",
             "an output's error is relative to its norm (default) or to the rms of the attended values");
  add_choice(app, group, "--bound", m.bound, bounds, "clt|student|bernstein|hoeffding",
             "default clt; bernstein and hoeffding hold at any sample size");
  number("--delta", m.settings.delta, "share of draws that may exceed epsilon, in (0, 1); default 0.1");
  number("--sinks", m.settings.sinks, "first tokens, read exactly" + by_default(m.settings.sinks));
  number("--window", m.settings.window, "last tokens, read exactly" + by_default(m.settings.window));
  number("--heavy", m.heavy,
         "share of the tokens read exactly because they score highest; default: target output chooses, else 0.02");
  number("--base", m.base,
         "share of the rest that is sampled first (method sample: at all); default: target output chooses, else 0.02");
  number("--top-p", m.top_p, "instead of --heavy: the share X of the softmax mass, in (0, 1)");
  number("--max-rounds", m.settings.max_rounds, "looks at the sample before reading everything; default 8");
  app.add_flag("--accept-last", m.settings.accept_last,
               "after the last look keep the sample, marked saturated (the paper: with --max-rounds 2)")
      ->group(group);
  number("--max-density", m.settings.max_density, "past this share of the rows read all; default 0.5");
}

/// A whole number from 0: CLI11 reads -1 as 2^64 - 1.
[[nodiscard]] inline CLI::Validator not_negative() {
  return {[](const std::string& text) {
            return text.starts_with('-') ? "'" + text + "' is negative: give a whole number, 0 or more" : std::string();
          },
          ""};
}

}  // namespace vattn::examples
