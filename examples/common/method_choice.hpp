// A method of attention, chosen at run time: what the programs' command lines have in common.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "vattn/vattn.hpp"

namespace vattn::examples {

enum class method : std::uint8_t { dense, top_k, sample, sinks_window, magic_pig, vattention, store, index };
enum class sampler_kind : std::uint8_t { uniform, importance };
enum class bound_kind : std::uint8_t { clt, student, bernstein, hoeffding };

[[nodiscard]] constexpr const char* to_string(method m) {
  constexpr const char* names[] = {"dense",     "top-k",      "sample", "sinks-window",
                                   "magic-pig", "vattention", "store",  "index"};
  return names[static_cast<std::size_t>(m)];
}
/// Whether a method has an ε and a δ to keep.
[[nodiscard]] constexpr bool promises(method m) {
  return m == method::vattention || m == method::store || m == method::index;
}
[[nodiscard]] constexpr const char* to_string(sampler_kind s) {
  return s == sampler_kind::importance ? "importance" : "uniform";
}
[[nodiscard]] constexpr const char* to_string(bound_kind b) {
  constexpr const char* names[] = {"clt", "student", "bernstein", "hoeffding"};
  return names[static_cast<std::size_t>(b)];
}

struct method_choice {
  method how = method::vattention;
  std::optional<double> heavy, base;  ///< default: the target chooses, or 0.02
  target_kind target = target_kind::output;
  bound_kind bound = bound_kind::clt;
  sampler_kind sampler = sampler_kind::uniform;
  std::string selector = "exact";    ///< of selector_catalogue()
  std::vector<std::string> weights;  ///< files of learned weights, one for all KV heads or one for each
  int bits = 4;                      ///< of the codes
  bool share_group = false;          ///< one sample for the query heads of a KV head
  bool two_phases = false;           ///< scan codes of 1 bit, then the selector's for what they keep
  double top_p = 0;                  ///< share of the softmax mass to read exactly; 0 = `heavy` decides
  config settings{};
};

/// Whether the choices go together, and the settings' own rules.
[[nodiscard]] inline status check_choice(const method_choice& m) {
  if (status s = m.settings.validate(); !s) return s;
  const bool finite_sample = m.bound == bound_kind::bernstein || m.bound == bound_kind::hoeffding;
  const bool importance = m.sampler == sampler_kind::importance;
  const auto refuse = [](const char* what) { return status::error(errc::invalid_argument, "%s", what); };
  if (m.how == method::store || m.how == method::index) {
    if (m.target != target_kind::output || m.bound != bound_kind::clt)
      return refuse(m.how == method::store ? "--method store goes with --target output and --bound clt"
                                           : "--method index goes with --target output and --bound clt");
    return {};  // their codes score and sample
  }
  if ((m.selector != "exact" || importance) && (m.target != target_kind::output || m.top_p > 0))
    return refuse("--selector and --sampler importance go with --target output, and without --top-p");
  if ((m.share_group || m.two_phases) && !importance)
    return refuse("--share-group and --two-phase go with --sampler importance");
  if (finite_sample && importance && (m.share_group || m.two_phases))
    return refuse("--share-group and --two-phase are asymptotic: --bound clt or student");
  if (finite_sample && (importance || m.selector != "exact")) {
    if (m.bound == bound_kind::hoeffding) return refuse("with a selector the finite-sample bound is bernstein");
    if (!importance)
      return refuse("a selector with --bound bernstein needs --sampler importance (certified attention)");
    if (m.selector != "codes" && m.selector != "quest" && m.selector != "exact")
      return refuse("--bound bernstein needs scores that bound the logits: --selector codes, quest or exact");
  }
  if (m.two_phases && m.selector != "codes") return refuse("--two-phase goes with --selector codes, of 2 bits or more");
  return {};
}

/// Puts what was left open into the settings. Throws std::runtime_error with one line where options contradict.
inline void settle(method_choice& m) {
  if (m.top_p != 0 && !(m.top_p > 0 && m.top_p < 1))
    throw std::runtime_error("--top-p is " + std::to_string(m.top_p) + ": give a share of the mass in (0, 1)");
  if (m.top_p != 0 && m.heavy) throw std::runtime_error("--top-p and --heavy both say what is read exactly: give one");
  if (m.top_p != 0 && m.how != method::vattention) throw std::runtime_error("--top-p needs --method vattention");
  if ((m.selector == "hash-attention") == m.weights.empty())
    throw std::runtime_error("--selector hash-attention and --weights FILE go together: give both or none");
  for (const auto& [name, share] : {std::pair{"--heavy", m.heavy}, std::pair{"--base", m.base}}) {
    // The library's `automatic` is a negative number, which is no share.
    if (share && *share < 0) throw std::runtime_error(std::string(name) + " is negative: give a share in [0, 1]");
  }
  const bool chooses = m.how == method::vattention && m.target == target_kind::output;
  m.settings.heavy = m.heavy.value_or(chooses && m.top_p == 0 ? config::automatic : 0.02);
  m.settings.base = m.base.value_or(chooses ? config::automatic : 0.02);
  if (status s = m.settings.validate(); !s) throw std::runtime_error(s.message());
}

}  // namespace vattn::examples
