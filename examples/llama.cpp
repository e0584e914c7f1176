// A Llama-style model whose decode attention is any method of the library: answers, bits per byte, free text.
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <new>
#include <string>

#include "common/report_files.hpp"
#include "llama/options.hpp"
#include "llama/report.hpp"
#include "support/atomic_file.hpp"
#include "support/npy.hpp"

namespace vattn::llama {
namespace {

// One line, whatever a message or a path holds.
std::string one_line(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < ' ') c = ' ';
  }
  return text;
}

// What CLI11 cannot know.
void check_request(const request& r) {
  const auto refuse = [](const char* what) { throw std::runtime_error(what); };
  const int tasks = !r.prompts_path.empty() + (r.bytes > 0) + (r.logits > 0) + (r.generate > 0);
  if (tasks == 0)
    refuse("nothing to do: give --prompts, or --text with --bytes or --logits, or --prompt with --generate");
  if (tasks > 1) refuse("--prompts, --bytes, --logits and --generate are different things to do: give one");
  if ((r.bytes > 0 || r.logits > 0) != !r.text_path.empty()) refuse("--text goes with --bytes or --logits");
  if ((r.generate > 0) != r.prompt.has_value()) refuse("--prompt and --generate go together");
  if ((r.logits > 0) != !r.out_path.empty()) refuse("--logits and --out go together");
  if (r.prompts_path.empty() && (!r.filter.task.empty() || r.filter.length > 0 || r.filter.limit > 0))
    refuse("--task, --length and --limit choose among --prompts");
  examples::refuse_same_file({{"--json", r.json_path}, {"--html", r.html_path}, {"--csv", r.csv_path}});
  std::error_code ignored;
  if (!r.evaluation.cache_folder.empty() && !std::filesystem::is_directory(r.evaluation.cache_folder, ignored))
    throw std::runtime_error("--cache-dir " + r.evaluation.cache_folder + " is no folder: make it first");
}

std::vector<std::int32_t> read_text(const request& r, const tokenizer& tokens, index_t needed) {
  std::vector<std::int32_t> text = tokens.encode(read_file(r.text_path));
  if (static_cast<index_t>(text.size()) < needed)
    throw std::runtime_error(r.text_path + ": " + std::to_string(text.size()) + " tokens, but " +
                             std::to_string(needed) + " are needed");
  text.resize(static_cast<std::size_t>(needed));
  return text;
}

void write_logits(const request& r, const model& m, const tokenizer& tokens, thread_pool& pool) {
  const std::vector<std::int32_t> text = read_text(r, tokens, r.logits);
  npy::writer out(r.out_path, std::vector<std::int64_t>{r.logits, m.config.vocabulary});
  std::vector<layer_cache> caches = make_caches(m.config, cache_type::f32, r.logits);
  const matrix x = prefill(m, text, caches, pool, "prefill");
  for (index_t first = 0; first < r.logits; first += block_tokens) {
    const matrix logits = logits_of(m, x.middleCols(first, std::min(block_tokens, r.logits - first)));
    out.append({logits.data(), static_cast<std::size_t>(logits.size())});
  }
  out.commit();
}

void generate(const request& r, const model& m, const tokenizer& tokens, const method_runs& method, thread_pool& pool) {
  const std::vector<std::int32_t> start = tokens.encode(*r.prompt);
  if (start.empty()) throw std::runtime_error("--prompt is empty: give at least one token to go on from");
  context c = make_context(m, start, r.generate, r.evaluation.type, pool, r.evaluation.cache_folder, "prefill");
  std::vector<std::unique_ptr<layer_attention>> attention;
  for (std::size_t l = 0; l < c.caches.size(); ++l)
    attention.push_back(make_attention(method.choice, r.evaluation.type));
  decoder decode(m, c.caches, attention, pool, {method.settings(method.runs.front(), c.n), r.evaluation.seed, false});
  const matrix first = logits_of(m, c.last);
  std::int32_t token = argmax({first.data(), static_cast<std::size_t>(first.size())});
  for (index_t i = 0; i < r.generate; ++i) {
    std::fputs(tokens.decode(token).c_str(), stdout);
    std::fflush(stdout);
    if (i + 1 < r.generate) token = argmax(decode.step(token, true));
  }
  std::fputs("\n", stdout);
  const decode_record& d = decode.record();
  if (d.tokens > 0)
    std::fprintf(stderr, "llama: %lld tokens of context; %.1f tokens/s, density %.4f\n", static_cast<long long>(c.n),
                 static_cast<double>(d.tokens) / d.seconds, d.density());
}

void publish(const request& r, const model& m, const std::vector<score>& scores, examples::report_files& files,
             std::unique_ptr<support::atomic_file> csv_file) {
  std::vector<json> rows;
  for (const score& s : scores) rows.push_back(row_of(s, m.config.heads));
  if (files) {
    json j;
    j["program"] = "llama";
    j["model"] = r.model_path, j["cache_type"] = to_string(r.evaluation.type), j["threads"] = r.threads;
    j["selector"] = r.choice.selector, j["sampler"] = examples::to_string(r.choice.sampler), j["bits"] = r.choice.bits;
    j["bound"] = examples::to_string(r.choice.bound), j["target"] = to_string(r.choice.target);
    j["scale"] = to_string(r.choice.settings.scale), j["share_group"] = r.choice.share_group;
    j["sinks"] = r.choice.settings.sinks, j["window"] = r.choice.settings.window, j["seed"] = r.evaluation.seed;
    j["rows"] = rows;
    files.write(dump(j, 1) + '\n');
    files.commit();
  }
  if (csv_file) {
    if (!rows.empty()) examples::write_csv_line(csv_file->stream(), rows.front(), true);
    for (const json& row : rows) examples::write_csv_line(csv_file->stream(), row, false);
    csv_file->commit();
  }
  if (r.json_path != "/dev/stdout" && r.html_path != "/dev/stdout" && r.csv_path != "/dev/stdout") print_table(rows);
}

void execute(const request& r) {
  check_request(r);
  const std::vector<method_runs> methods = make_runs(r.choice, r.methods, r.epsilons, r.densities);
  const model m = load_model(r.model_path);
  const tokenizer tokens(m.config.vocabulary, r.ids);
  thread_pool pool(r.threads);
  if (r.logits > 0) return write_logits(r, m, tokens, pool);
  if (r.generate > 0) return generate(r, m, tokens, methods.front(), pool);

  // Read all that can be wrong, and open the results, before the work.
  std::vector<prompt> prompts;
  std::vector<std::int32_t> text;
  if (r.bytes > 0) {
    text = read_text(r, tokens, r.context + r.bytes + 1);
  } else {
    prompts = read_prompts(r.prompts_path, r.filter, tokens);
  }
  examples::report_files files(r.json_path, r.html_path, "llama: " + r.model_path);
  std::unique_ptr<support::atomic_file> csv_file;
  if (!r.csv_path.empty()) csv_file = std::make_unique<support::atomic_file>(r.csv_path);
  const std::vector<score> scores =
      r.bytes > 0 ? evaluate_text(m, text, r.context, methods, r.evaluation, pool)
                  : evaluate(m, prompts, methods, r.evaluation, pool, [](const std::string& line) {
                      std::fprintf(stderr, "llama: %s\n", one_line(line).c_str());
                    });
  publish(r, m, scores, files, std::move(csv_file));
}

int fail(int code, const std::string& what, const char* hint = "") {
  std::fprintf(stderr, "llama: %s%s\n", one_line(what).c_str(), hint);
  return code;
}

}  // namespace
}  // namespace vattn::llama

int main(int argc, char** argv) {
  using namespace vattn::llama;
  request r;
  CLI::App app("Llama-style models with verified sparse attention.", "llama");
  add_options(app, r);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help
    return fail(2, e.what(), " (see llama --help)");
  }
  try {
    execute(r);
  } catch (const std::bad_alloc&) {
    return fail(1, "out of memory: give a smaller model or a shorter context");
  } catch (const std::exception& e) {
    return fail(1, e.what());
  }
  return 0;
}
