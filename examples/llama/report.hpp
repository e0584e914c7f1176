// Scores as rows of a report, and as a table.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "common/rows.hpp"
#include "llama/evaluate.hpp"

namespace vattn::llama {

using examples::dump;
using examples::json;

/// A score as a row of the report; what a run does not have is null.
[[nodiscard]] inline json row_of(const score& s, index_t heads) {
  const auto share = [](double part, double of) { return of > 0 ? json(part / of) : json(nullptr); };
  const decode_record& d = s.decode;
  const auto tokens = static_cast<double>(d.tokens), total = static_cast<double>(s.total);
  const bool text = s.task == "text", promised = s.method->promises();
  json j;
  j["task"] = s.task, j["length"] = s.length, j["method"] = to_string(s.method->choice.how);
  j["epsilon"] = s.setting->epsilon ? json(*s.setting->epsilon) : json(nullptr);
  j["budget"] = s.setting->density ? json(*s.setting->density) : json(nullptr);
  j["delta"] = promised ? json(s.method->choice.settings.delta) : json(nullptr);
  j["correct"] = text ? json(nullptr) : json(s.correct), j["total"] = s.total;
  j["accuracy"] = text ? json(nullptr) : share(static_cast<double>(s.correct), total);
  j["bits_per_byte"] = text ? share(s.bits, total) : json(nullptr);
  j["density"] = d.density();

  // Of the heads' errors against the exact output: shares of the tokens.
  json layers = json::array();
  double violations = 0, error = 0, worst = 0, worst_head = 0;
  for (std::size_t first = 0; first < d.heads.size(); first += static_cast<std::size_t>(heads)) {
    json layer, of_heads = json::array();
    double layer_violations = 0, layer_error = 0, layer_density = 0;
    for (std::size_t h = first; h < first + static_cast<std::size_t>(heads); ++h) {
      const head_record& r = d.heads[h];
      const double share_of_head = static_cast<double>(r.violations) / std::max(1.0, tokens);
      layer_violations += share_of_head / static_cast<double>(heads);
      worst_head = std::max(worst_head, share_of_head);
      layer_error += r.error / std::max(1.0, tokens) / static_cast<double>(heads);
      layer_density += r.density / std::max(1.0, tokens) / static_cast<double>(heads);
      json head;
      head["error_mean"] = share(r.error, tokens), head["error_max"] = r.largest_error;
      head["violations"] = promised ? json(share_of_head) : json(nullptr);
      head["density"] = share(r.density, tokens);
      of_heads.push_back(std::move(head));
    }
    const auto of = static_cast<double>(d.heads.size()) / static_cast<double>(heads);
    violations += layer_violations / of, error += layer_error / of, worst = std::max(worst, layer_violations);
    layer["layer"] = layers.size(), layer["density"] = layer_density, layer["error_mean"] = layer_error;
    layer["violations"] = promised ? json(layer_violations) : json(nullptr);
    layer["heads"] = std::move(of_heads);
    layers.push_back(std::move(layer));
  }
  const bool judged = d.audited && promised;
  j["violations"] = judged ? json(violations) : json(nullptr);
  j["worst_layer_violations"] = judged ? json(worst) : json(nullptr);
  j["worst_head_violations"] = judged ? json(worst_head) : json(nullptr);
  j["error_mean"] = d.audited ? json(error) : json(nullptr);
  j["tokens"] = d.tokens;
  j["decode_ms_per_token"] = share(1e3 * d.seconds, tokens);
  j["attention_ms_per_token"] = share(1e3 * d.attention_seconds, tokens);
  j["tokens_per_second"] = share(tokens, d.seconds);
  j["prefill_s"] = share(s.prefill_seconds, static_cast<double>(s.contexts));
  j["index_s"] = share(s.index_seconds, static_cast<double>(s.contexts));
  if (d.audited) j["layers"] = std::move(layers);
  return j;
}

inline void print_table(const std::vector<json>& rows) {
  std::printf("%-8s %6s  %-12s %7s  %8s  %9s  %8s  %10s  %8s  %9s  %8s  %9s\n", "task", "length", "method", "epsilon",
              "accuracy", "correct", "density", "violations", "ms/token", "attention", "tokens/s", "prefill s");
  const auto number = [](const json& x, const char* format) {
    char text[32] = "-";
    if (x.is_number()) std::snprintf(text, sizeof text, format, x.get<double>());
    return std::string(text);
  };
  for (const json& r : rows) {
    const bool text = r["accuracy"].is_null();
    const std::string correct =
        text ? "-"
             : std::to_string(r["correct"].get<std::int64_t>()) + "/" + std::to_string(r["total"].get<std::int64_t>());
    std::printf("%-8.8s %6lld  %-12s %7s  %8s  %9s  %8s  %10s  %8s  %9s  %8s  %9s\n",
                r["task"].get<std::string>().c_str(), static_cast<long long>(r["length"].get<index_t>()),
                r["method"].get<std::string>().c_str(), number(r["epsilon"], "%.3g").c_str(),
                text ? (number(r["bits_per_byte"], "%.5f") + "b").c_str() : number(r["accuracy"], "%.3f").c_str(),
                correct.c_str(), number(r["density"], "%.4f").c_str(), number(r["violations"], "%.4f").c_str(),
                number(r["decode_ms_per_token"], "%.2f").c_str(), number(r["attention_ms_per_token"], "%.2f").c_str(),
                number(r["tokens_per_second"], "%.1f").c_str(), number(r["prefill_s"], "%.1f").c_str());
  }
}

}  // namespace vattn::llama
