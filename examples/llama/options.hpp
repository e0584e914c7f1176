// The command line of llama.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "common/method_options.hpp"
#include "llama/evaluate.hpp"

namespace vattn::llama {

struct request {
  std::string model_path;
  // What to do: one of these.
  std::string prompts_path, text_path;
  std::optional<std::string> prompt;
  index_t bytes = 0, logits = 0, generate = 0;
  prompt_filter filter{};
  index_t context = 4096;
  bool ids = false;
  // With which attention.
  examples::method_choice choice{};
  std::vector<examples::method> methods{examples::method::vattention};
  std::vector<double> epsilons{0.1}, densities;
  evaluation_options evaluation{};
  index_t threads = 1;
  std::string out_path, json_path, html_path, csv_path;
};

inline void add_options(CLI::App& app, request& r) {
  using examples::add_number;
  r.choice.selector = "codes";
  r.choice.sampler = examples::sampler_kind::importance;
  r.choice.settings.sinks = r.choice.settings.window = 16;
  r.threads = std::max<index_t>(1, static_cast<index_t>(std::thread::hardware_concurrency()));

  app.add_option("--model", r.model_path, "folder with config.json and model.safetensors, or its shards")
      ->required()
      ->type_name("DIR");
  const auto file = [&](const char* group, const char* name, std::string& path, const char* text) {
    return app.add_option(name, path, text)->type_name("FILE")->group(group);
  };
  const auto count = [&](const char* group, const char* name, index_t& value, const std::string& text) {
    return app.add_option(name, value, text)->type_name("N")->group(group)->check(CLI::Range(1, 1 << 24));
  };
  const char* what = "What to do";
  file(what, "--prompts", r.prompts_path, "answer questions: a JSON object a line, {task, length, id, context, qa}");
  app.add_option("--task", r.filter.task, "of the prompts: this task alone")->type_name("NAME")->group(what);
  count(what, "--length", r.filter.length, "of the prompts: this length alone");
  count(what, "--limit", r.filter.limit, "of the prompts: the first N of each task and length");
  file(what, "--text", r.text_path, "a text to measure");
  count(what, "--bytes", r.bytes, "bits per byte of the N bytes of --text that follow --context");
  count(what, "--context", r.context, "bytes of --text that are prefilled first; default 4096");
  count(what, "--logits", r.logits,
        "write the logits after each of the first N bytes of --text to --out, [N, vocabulary]");
  app.add_option("--prompt", r.prompt, "a text to go on with")->type_name("TEXT")->group(what);
  count(what, "--generate", r.generate, "print the N most likely tokens after --prompt");
  app.add_flag("--ids", r.ids, "all texts are token ids in decimal, for vocabularies other than bytes")->group(what);

  app.add_option_function<std::vector<std::string>>(
         "--method",
         [&r](const std::vector<std::string>& names) {
           r.methods.clear();
           for (const auto& name : names)
             r.methods.push_back(examples::named("--method", examples::method_names(), name));
         },
         "a list of dense, top-k, sample, sinks-window, magic-pig, vattention (default), store, index: all on one "
         "prefill")
      ->delimiter(',')
      ->type_name("NAME,...")
      ->group("Method");
  app.add_option("--epsilon", r.epsilons, "vattention, store, index: errors allowed, in (0, 1), a list; default 0.1")
      ->delimiter(',')
      ->type_name("X,...")
      ->group("Method");
  app.add_option("--density", r.densities,
                 "top-k, sample, sinks-window: rows to read as a share of the context, a list, instead of --heavy, "
                 "--base, --window")
      ->delimiter(',')
      ->type_name("X,...")
      ->group("Method");
  examples::add_method_options(app, r.choice);

  examples::add_choice(
      app, "Run", "--cache-type", r.evaluation.type,
      std::map<std::string, cache_type>{{"f32", cache_type::f32}, {"f16", cache_type::f16}, {"bf16", cache_type::bf16}},
      "f32|f16|bf16", "elements of the KV cache; default f16");
  app.add_option("--cache-dir", r.evaluation.cache_folder,
                 "keep prefilled caches in this folder, and take them from it")
      ->type_name("DIR")
      ->group("Run");
  app.add_flag("--audit", r.evaluation.audit, "measure every output against the exact one (slow)")->group("Run");
  add_number(app, "Run", "--seed", r.evaluation.seed, "of the draws; default 0")->check(examples::not_negative());
  count("Run", "--threads", r.threads, "results do not depend on it; default: all")->check(CLI::Range(1, 256));
  file("Results", "--out", r.out_path, "the logits, as .npy");
  file("Results", "--json", r.json_path, "write the report, and every layer and head with --audit");
  file("Results", "--html", r.html_path, "write a page that shows that report, in one file");
  file("Results", "--csv", r.csv_path, "write the report's rows");
}

}  // namespace vattn::llama
