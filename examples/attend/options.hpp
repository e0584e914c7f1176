// The command line of attend.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdio>
#include <map>
#include <string>

#include "attend/problem.hpp"
#include "common/selectors.hpp"

namespace vattn::examples {

inline void add_options(CLI::App& app, request& r) {
  const std::map<std::string, method> methods{{"dense", method::dense},
                                              {"top-k", method::top_k},
                                              {"sample", method::sample},
                                              {"magic-pig", method::magic_pig},
                                              {"vattention", method::vattention}};
  const std::map<std::string, target_kind> targets{{"output", target_kind::output},
                                                   {"denominator", target_kind::denominator},
                                                   {"numerator", target_kind::numerator},
                                                   {"sdpa", target_kind::sdpa}};
  const std::map<std::string, bound_kind> bounds{{"clt", bound_kind::clt},
                                                 {"student", bound_kind::student},
                                                 {"bernstein", bound_kind::bernstein},
                                                 {"hoeffding", bound_kind::hoeffding}};
  const std::map<std::string, sampler_kind> samplers{{"uniform", sampler_kind::uniform},
                                                     {"importance", sampler_kind::importance}};
  const std::map<std::string, error_scale> scales{{"output", error_scale::output}, {"rms", error_scale::rms}};
  const std::map<std::string, bool> kv_types{{"auto", false}, {"bf16", true}};
  // A name of a map, rather than CLI11's transformers: those accept the enumerators' numbers too.
  const auto choice = [&](const char* group, const char* option, auto& value, const auto& names, const char* shown,
                          const char* text) {
    const auto assign = [&value, names, option](const std::string& name) {
      if (const auto found = names.find(name); found != names.end()) {
        value = found->second;
        return;
      }
      std::string all;
      for (const auto& entry : names) all += (all.empty() ? "" : ", ") + entry.first;
      throw CLI::ValidationError(option, "'" + name + "' is none of " + all);
    };
    app.add_option_function<std::string>(option, assign, text)->type_name(shown)->group(group);
  };

  app.add_flag_callback(
      "--list",
      [] {
        for (const selector_entry& entry : selector_catalogue())
          std::printf("%-18s %s\n", entry.name.c_str(), entry.text.c_str());
        throw CLI::Success();
      },
      "name the selectors");

  const auto input = [&](const char* name, std::string& path, const char* text) {
    app.add_option(name, path, text)->required()->type_name("FILE")->group("Arrays");
  };
  input("--q", r.q_path, "queries [T, Hq, Dk], the last T positions of the sequence");
  input("--k", r.k_path, "keys [n, Hkv, Dk]; query head h reads KV head h / (Hq / Hkv)");
  input("--v", r.v_path, "values [n, Hkv, Dv]; .npy of float32, float16, or bfloat16 as uint16");
  choice("Arrays", "--kv-dtype", r.bfloat16, kv_types, "auto|bf16", "bf16: arrays of uint16 hold bfloat16");
  app.add_option("--out", r.out_path, "write the outputs, float32 [trials, T, Hq, Dv]")
      ->type_name("FILE")
      ->group("Arrays");
  app.add_option("--json", r.json_path, "write a summary and every certificate")->type_name("FILE")->group("Arrays");

  const auto number = [&](const char* group, const char* name, auto& value, const std::string& text) {
    return app.add_option(name, value, text)->type_name("X")->group(group);
  };
  number("Attention", "--scale", r.scale, "logit = scale q.k; default 1/sqrt(Dk)");
  number("Attention", "--softcap", r.options.softcap, "cap of the logits, cap tanh(logit/cap); 0 = none");
  app.add_flag("--causal", r.options.causal, "query t of T sees the tokens up to n - T + t")->group("Attention");
  number("Attention", "--sliding-window", r.options.sliding_window, "see the latest X tokens alone; 0 = all");

  choice("Method", "--method", r.how, methods, "dense|top-k|sample|magic-pig|vattention", "default vattention");
  choice("Method", "--target", r.target, targets, "output|denominator|numerator|sdpa",
         "what epsilon and delta promise; default output");
  std::map<std::string, std::string> selectors;
  for (const selector_entry& entry : selector_catalogue()) selectors[entry.name] = entry.name;
  choice("Method", "--selector", r.selector, selectors, "NAME",
         "what scores the tokens, see --list; default exact: their logits and values");
  choice("Method", "--sampler", r.sampler, samplers, "uniform|importance",
         "uniform: heavy tokens and a uniform rest (default); importance: by the scores and their error");
  app.add_flag("--share-group", r.share_group, "importance: one sample for the query heads of a KV head")
      ->group("Method");
  app.add_flag("--two-phase", r.two_phases, "importance: scan codes of 1 bit, then score what they keep")
      ->group("Method");
  number("Method", "--bits", r.bits, "of a coordinate of a quantised key; default 4")
      ->check(CLI::IsMember({1, 2, 4, 8}));
  choice("Method", "--error-scale", r.settings.scale, scales, "output|rms",
         "an output's error is relative to its norm (default) or to the rms of the attended values");
  choice("Method", "--bound", r.bound, bounds, "clt|student|bernstein|hoeffding",
         "default clt; bernstein and hoeffding hold at any sample size");
  number("Method", "--epsilon", r.settings.epsilon, "error allowed, in (0, 1); default 0.05");
  number("Method", "--delta", r.settings.delta, "share of draws that may exceed it, in (0, 1); default 0.1");
  number("Method", "--sinks", r.settings.sinks, "first tokens, read exactly; default 128");
  number("Method", "--window", r.settings.window, "last tokens, read exactly; default 128");
  number("Method", "--heavy", r.heavy,
         "share of the tokens read exactly because they score highest; default: target output chooses, else 0.02");
  number("Method", "--base", r.base,
         "share of the rest that is sampled first (method sample: at all); default: target output chooses, else 0.02");
  number("Method", "--top-p", r.top_p, "instead of --heavy: the share X of the softmax mass, in (0, 1)");
  number("Method", "--max-rounds", r.settings.max_rounds, "looks at the sample before reading everything; default 8");
  app.add_flag("--accept-last", r.settings.accept_last,
               "after the last look keep the sample, marked saturated (the paper: with --max-rounds 2)")
      ->group("Method");
  number("Method", "--max-density", r.settings.max_density, "past this share of the rows read all; default 0.5");

  app.add_flag("--joint", r.settings.joint, "delta is for all queries and heads together, not for each")
      ->group("Method");

  number("Run", "--seed", r.seed, "trial i draws from seed X + i; default 0")
      ->check(CLI::Validator(
          [](const std::string& text) {
            return text.starts_with('-') ? "'" + text + "' is negative: give a whole number, 0 or more" : std::string();
          },
          ""));
  number("Run", "--trials", r.trials, "independent draws; default 1")->check(CLI::Range(1, 1000000));
  number("Run", "--threads", r.threads, "results do not depend on it; default 1")->check(CLI::Range(1, 256));
}

}  // namespace vattn::examples
