// The command line of attend.
#pragma once

#include <map>
#include <string>

#include "attend/problem.hpp"
#include "common/method_options.hpp"

namespace vattn::examples {

inline void add_options(CLI::App& app, request& r) {
  const std::map<std::string, bool> kv_types{{"auto", false}, {"bf16", true}};
  const auto input = [&](const char* name, std::string& path, const char* text) {
    app.add_option(name, path, text)->required()->type_name("FILE")->group("Arrays");
  };
  input("--q", r.q_path, "queries [T, Hq, Dk], the last T positions of the sequence");
  input("--k", r.k_path, "keys [n, Hkv, Dk]; query head h reads KV head h / (Hq / Hkv)");
  input("--v", r.v_path, "values [n, Hkv, Dv]; .npy of float32, float16, or bfloat16 as uint16");
  add_choice(app, "Arrays", "--kv-dtype", r.bfloat16, kv_types, "auto|bf16", "bf16: arrays of uint16 hold bfloat16");
  app.add_option("--out", r.out_path, "write the outputs, float32 [trials, T, Hq, Dv]")
      ->type_name("FILE")
      ->group("Arrays");
  app.add_option("--json", r.json_path, "write a summary and every certificate")->type_name("FILE")->group("Arrays");
  app.add_option("--html", r.html_path, "write a page that shows them, in one file")
      ->type_name("FILE")
      ->group("Arrays");

  add_number(app, "Attention", "--scale", r.scale, "logit = scale q.k; default 1/sqrt(Dk)");
  add_number(app, "Attention", "--softcap", r.options.softcap, "cap of the logits, cap tanh(logit/cap); 0 = none");
  app.add_flag("--causal", r.options.causal, "query t of T sees the tokens up to n - T + t")->group("Attention");
  add_number(app, "Attention", "--sliding-window", r.options.sliding_window,
             "see the X tokens up to the own position alone; 0 = all");

  add_choice(app, "Method", "--method", r.how, method_names(),
             "dense|top-k|sample|sinks-window|magic-pig|vattention|store|index", "default vattention");
  add_number(app, "Method", "--epsilon", r.settings.epsilon, "error allowed, in (0, 1); default 0.05");
  add_method_options(app, r);
  app.add_flag("--joint", r.settings.joint, "delta is for all queries and heads together, not for each")
      ->group("Method");

  add_number(app, "Run", "--seed", r.seed, "trial i draws from seed X + i; default 0")->check(not_negative());
  add_number(app, "Run", "--trials", r.trials, "independent draws; default 1")->check(CLI::Range(1, 1000000));
  add_number(app, "Run", "--threads", r.threads, "results do not depend on it; default 1")->check(CLI::Range(1, 256));
}

}  // namespace vattn::examples
