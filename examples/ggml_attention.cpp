// Attention inside a ggml graph: ggml_flash_attn_ext, vattn's exact attention and vattn's store, in turn on the same
// tensors of a decode loop.
#include <CLI/CLI.hpp>

#include "common/method_options.hpp"
#include "ggml/graphs.hpp"
#include "ggml/report.hpp"
#include "support/atomic_file.hpp"

namespace vattn::examples {
namespace {

enum class element : std::uint8_t { f16, bf16, f32 };

struct request {
  decode_shape shape;
  element type = element::f16;
  int threads = 2;
  std::string heads = "32/8", regime = "gauss1", json_path;
  config settings;
  std::uint64_t seed = 1;
};

void add_options(CLI::App& app, request& r) {
  const std::map<std::string, element> types{{"f16", element::f16}, {"bf16", element::bf16}, {"f32", element::f32}};
  std::map<std::string, std::string> regimes;
  for (const std::string& name : synthetic::standard_regimes()) regimes[name] = name;
  for (const std::string& name : synthetic::hostile_regimes()) regimes[name] = name;

  add_number(app, "Cache", "--n", r.shape.n, "tokens before the first step; default 131072")
      ->check(CLI::Range(1, 1 << 24));
  add_number(app, "Cache", "--heads", r.heads, "query heads / KV heads; default 32/8");
  add_number(app, "Cache", "--dim", r.shape.dim, "head size; default 128")->check(CLI::Range(8, 1024));
  add_choice(app, "Cache", "--type", r.type, types, "f16|bf16|f32", "of K and V; default f16");
  add_choice(app, "Cache", "--regime", r.regime, regimes, "NAME", "of the logits; default gauss1");
  add_number(app, "Method", "--epsilon", r.settings.epsilon, "error allowed, in (0, 1); default 0.05");
  add_number(app, "Method", "--delta", r.settings.delta, "share of draws that may exceed it; default 0.1");
  add_number(app, "Run", "--steps", r.shape.steps, "tokens to decode; default 10")->check(CLI::Range(1, 100000));
  add_number(app, "Run", "--threads", r.threads, "of every graph; default 2")->check(CLI::Range(1, 256));
  add_number(app, "Run", "--seed", r.seed, "of the cache and the draws; default 1")->check(not_negative());
  app.add_option("--json", r.json_path, "write what was measured")->type_name("FILE")->group("Run");
}

// "32/8" into the shape.
void parse_heads(request& r) {
  decode_shape& s = r.shape;
  long long q = 0, kv = 0;
  char rest = 0;
  if (std::sscanf(r.heads.c_str(), "%lld/%lld%c", &q, &kv, &rest) != 2 || kv < 1 || q < kv || q > 1024 || q % kv != 0 ||
      q / kv > s.dim) {
    throw std::runtime_error("--heads is '" + r.heads +
                             "': give query heads / KV heads, the first a multiple of the second, such as 32/8");
  }
  s.heads = q, s.kv_heads = kv;
}

template <class T>
report measure(const request& r) {
  const decode_shape& s = r.shape;
  const float scale = 1 / std::sqrt(static_cast<float>(s.dim));
  const tensor_memory memory(layer_tensors::bytes<T>(s));
  const layer_tensors t(memory.get(), ggml_type_of<T>, s);
  thread_executor exec(r.threads);
  const coming_tokens coming = fill<T>(t, s, r.regime, r.seed, exec);

  exact_layer<T> exact(r.threads);
  sparse_layer<T> sparse(s, r.settings, r.threads);
  exact.options.scale = sparse.options.scale = scale;
  sparse.key.seed = r.seed;
  report out;

  const graph_threads threads(r.threads);
  decode_graph flash_graph(memory.get(), flash_node(memory.get(), t, s, scale), threads);
  decode_graph exact_graph(memory.get(), exact_node(memory.get(), t, s, exact), threads);
  decode_graph sparse_graph(memory.get(), sparse_node(memory.get(), t, s, sparse), threads);

  // The prefill's n tokens, of a cache with room for more.
  const attention_inputs prefilled(memory.get(), t, s);
  ggml_layout k = layout_of(prefilled.k), v = layout_of(prefilled.v);
  k.ne[1] = v.ne[1] = s.n;
  const auto start = std::chrono::steady_clock::now();
  if (const status a = sparse.store.assign(ggml_kv<T>(k, v)); !a) throw std::runtime_error(a.message());
  out.assign_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  for (index_t step = -1; step < s.steps; ++step) {  // the first again, after a round that warms up
    set_step(t, s, coming, std::max<index_t>(0, step));
    const double flash_ms = flash_graph.compute(), sparse_ms = sparse_graph.compute(), exact_ms = exact_graph.compute();
    sparse.error.check(), exact.error.check();
    if (step < 0) continue;
    out.flash.ms.push_back(flash_ms), out.sparse.ms.push_back(sparse_ms), out.exact.ms.push_back(exact_ms);
    const std::vector<double> errors = relative_errors(sparse_graph.output(), exact_graph.output(), s.heads);
    out.sparse.add(errors);
    out.exact.add(std::vector<double>(errors.size(), 0.0));
    out.flash.add(relative_errors(flash_graph.output(), exact_graph.output(), s.heads));
    for (std::size_t h = 0; h < errors.size(); ++h)
      out.add(sparse.certificates[h], errors[h], sparse.attention.functor().settings().epsilon);
  }

  attention_options masked{.scale = scale};
  masked.mask = ggml_mask<Eigen::half>(layout_of(t.mask), s.heads);
  const auto q = ggml_query<float>(layout_of(prefilled.q));
  const reference truth = exact_reference(q, ggml_kv<T>(layout_of(prefilled.k), layout_of(prefilled.v)), masked, exec);
  const std::vector<float> wanted(truth.output.begin(), truth.output.end());
  for (auto [c, g] : {std::pair{&out.flash, &flash_graph}, std::pair{&out.exact, &exact_graph},
                      std::pair{&out.sparse, &sparse_graph}}) {
    const std::vector<double> errors = relative_errors(g->output(), wanted, s.heads);
    c->reference_error = *std::max_element(errors.begin(), errors.end());
  }
  return out;
}

void run(request& r) {
  parse_heads(r);
  if (const status s = r.settings.validate(); !s) throw std::runtime_error(s.message());
  std::unique_ptr<support::atomic_file> file;
  if (!r.json_path.empty()) file = std::make_unique<support::atomic_file>(r.json_path);
  const report out = r.type == element::f16    ? measure<Eigen::half>(r)
                     : r.type == element::bf16 ? measure<Eigen::bfloat16>(r)
                                               : measure<float>(r);
  const char* type = r.type == element::f16 ? "f16" : r.type == element::bf16 ? "bf16" : "f32";
  std::printf("n %lld, heads %s, dim %lld, %s, %s, %d threads, %lld steps\n", static_cast<long long>(r.shape.n),
              r.heads.c_str(), static_cast<long long>(r.shape.dim), type, r.regime.c_str(), r.threads,
              static_cast<long long>(r.shape.steps));
  out.print(r.settings);
  if (!file) return;
  nlohmann::ordered_json j = {{"n", r.shape.n},           {"heads", r.shape.heads}, {"kv_heads", r.shape.kv_heads},
                              {"dim", r.shape.dim},       {"type", type},           {"regime", r.regime},
                              {"threads", r.threads},     {"steps", r.shape.steps}, {"epsilon", r.settings.epsilon},
                              {"delta", r.settings.delta}};
  j.update(out.json());
  const std::string text = j.dump(2) + "\n";
  file->write(text.data(), text.size());
  file->commit();
}

int fail(int code, const std::string& what, const char* hint = "") {
  std::fprintf(stderr, "ggml_attention: %s%s\n", what.c_str(), hint);
  return code;
}

}  // namespace
}  // namespace vattn::examples

int main(int argc, char** argv) {
  using namespace vattn::examples;
  request r;
  CLI::App app("Attention in a ggml graph: ggml_flash_attn_ext against vattn on the same tensors.", "ggml_attention");
  add_options(app, r);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help
    return fail(2, e.what(), " (see ggml_attention --help)");
  }
  try {
    run(r);
  } catch (const std::bad_alloc&) {
    return fail(1, "out of memory: give fewer tokens or heads");
  } catch (const std::exception& e) {
    return fail(1, e.what());
  }
  return 0;
}
