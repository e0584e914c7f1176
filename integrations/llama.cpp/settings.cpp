#include "settings.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string_view>

namespace vattn_ggml {
namespace {

std::optional<std::string_view> variable(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

// The whole text as a number, whatever the locale says of decimal points.
std::optional<double> number(std::string_view text) {
  double value = 0, unit = 1;
  bool point = false, digits = false;
  for (const char c : text) {
    if (c == '.' && !point) {
      point = true;
    } else if (c >= '0' && c <= '9') {
      digits = true;
      value = 10 * value + (c - '0');
      if (point) unit *= 10;
    } else {
      return std::nullopt;
    }
  }
  if (!digits) return std::nullopt;
  return value / unit;
}

}  // namespace

bool read_settings(settings& to, std::string& problem) {
  const auto refuse = [&](const char* name, std::string_view value, const char* rule) {
    problem = std::string(name) + " is \"" + std::string(value) + "\": " + rule;
    return false;
  };
  if (const auto v = variable("VATTN_MODE")) {
    if (*v == "verified") {
      to.mode = run_mode::verified;
    } else if (*v == "exact") {
      to.mode = run_mode::exact;
    } else if (*v == "off") {
      to.mode = run_mode::off;
    } else {
      return refuse("VATTN_MODE", *v, "give verified, exact or off");
    }
  }
  const auto share = [&](const char* name, double& value, bool ends, const char* rule) {
    const auto v = variable(name);
    if (!v) return true;
    const auto x = number(*v);
    if (!x || !(*x < 1 || (ends && *x <= 1)) || !(*x > 0 || ends)) return refuse(name, *v, rule);
    value = *x;
    return true;
  };
  if (!share("VATTN_EPSILON", to.epsilon, false, "give a relative error between 0 and 1, such as 0.1")) return false;
  if (!share("VATTN_DELTA", to.delta, false, "give a probability between 0 and 1, such as 0.1")) return false;
  if (!share("VATTN_AUDIT", to.audit, true, "give a share of outputs from 0 to 1, such as 0.01")) return false;
  if (const auto v = variable("VATTN_REPORT")) {
    to.report = *v;
    if (to.report != "stderr") {
      std::FILE* const file = std::fopen(to.report.c_str(), "a");
      if (file == nullptr) return refuse("VATTN_REPORT", *v, "give stderr, or a file that can be written");
      std::fclose(file);
    }
  }
  return true;
}

std::string promise_of(const settings& s) {
  if (s.mode == run_mode::exact) return "exact attention of decode steps by vattn's kernels";
  char line[240];
  std::snprintf(
      line, sizeof line,
      "verified sparse attention of decode steps: each head's output within %g of its length with probability "
      "%g (asymptotic bound); VATTN_MODE=exact for exact attention",
      s.epsilon, 1 - s.delta);
  return line;
}

}  // namespace vattn_ggml
