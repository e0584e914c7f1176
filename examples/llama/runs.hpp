// What is compared on one prefill: methods, each at several settings.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "common/method_choice.hpp"

namespace vattn::llama {

/// One setting of a method: ε where it promises something, rows where it does not.
struct run {
  std::optional<double> epsilon;
  std::optional<double> density;  ///< rows to read, a share of the context
};

/// A method and its settings; they share what it keeps of a context.
struct method_runs {
  examples::method_choice choice;
  std::vector<run> runs;

  [[nodiscard]] bool promises() const { return examples::promises(choice.how); }

  /// The settings of a run after a context of n tokens.
  [[nodiscard]] config settings(const run& r, index_t n) const {
    using examples::method;
    config c = choice.settings;
    if (r.epsilon) c.epsilon = *r.epsilon;
    if (!r.density) return c;
    const auto tokens = static_cast<double>(n);
    const double rows = std::clamp(*r.density, 0.0, 1.0) * tokens;
    const double left = std::max(0.0, rows - static_cast<double>(c.sinks + c.window));
    if (choice.how == method::top_k) c.heavy = left / tokens;
    if (choice.how == method::sample) c.base = left / std::max(1.0, tokens - static_cast<double>(c.sinks + c.window));
    if (choice.how == method::sinks_window)
      c.window = std::max<index_t>(1, static_cast<index_t>(std::llround(rows)) - c.sinks);
    return c;
  }
};

/// Every method with every setting that is its own. Throws std::runtime_error where options contradict each other.
[[nodiscard]] inline std::vector<method_runs> make_runs(const examples::method_choice& base,
                                                        const std::vector<examples::method>& methods,
                                                        const std::vector<double>& epsilons,
                                                        const std::vector<double>& densities) {
  using examples::method;
  std::vector<method_runs> all;
  for (const method how : methods) {
    method_runs m{base, {}};
    m.choice.how = how;
    if (m.promises()) {
      for (const double epsilon : epsilons) m.runs.push_back({.epsilon = epsilon, .density = {}});
    } else if (how != method::dense && how != method::magic_pig) {
      for (const double density : densities) {
        if (!(density > 0 && density <= 1))
          throw std::runtime_error("--density is " + std::to_string(density) + ": give shares in (0, 1]");
        m.runs.push_back({.epsilon = {}, .density = density});
      }
    }
    if (m.runs.empty()) m.runs.push_back({});
    for (const run& r : m.runs) {
      method_runs one = m;
      if (r.epsilon) one.choice.settings.epsilon = *r.epsilon;
      examples::settle(one.choice);
      if (status s = examples::check_choice(one.choice); !s) throw std::runtime_error(s.message());
      m.choice.settings = one.choice.settings;
    }
    all.push_back(std::move(m));
  }
  return all;
}

}  // namespace vattn::llama
