// Attention on tensors from files, measured against the exact result: outputs, certificates, a summary.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <new>
#include <string>

#include "attend/engine.hpp"
#include "attend/input.hpp"
#include "attend/options.hpp"
#include "attend/report.hpp"

namespace vattn::examples {
namespace {

void require(const status& s) {
  if (!s) throw std::runtime_error(s.message());
}

// What the library cannot know: options that contradict each other, files that would overwrite each other.
void check_request(request& r) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const auto same = [&](const std::string& a, const std::string& b) {
    if (a.empty() || b.empty()) return false;
    return fs::equivalent(a, b, ignored) || fs::weakly_canonical(a, ignored) == fs::weakly_canonical(b, ignored);
  };
  for (const auto& [name, out] :
       {std::pair{"--out", r.out_path}, std::pair{"--json", r.json_path}, std::pair{"--html", r.html_path}}) {
    for (const auto& in : {r.q_path, r.k_path, r.v_path}) {
      if (same(out, in)) throw std::runtime_error(std::string(name) + " would overwrite the input " + in);
    }
  }
  refuse_same_file({{"--out", r.out_path}, {"--json", r.json_path}, {"--html", r.html_path}});
  settle(r);
}

void print_summary(const json& s, const request& r) {
  const auto value = [&](const char* key) { return s[key].is_number() ? s[key].get<double>() : 0.0; };
  const std::string promise = promises(r.how) ? s["target"].get<std::string>() + ", " + s["bound"].get<std::string>()
                                              : std::string("promises nothing");
  std::printf("method       %s (%s)\n", s["method"].get<std::string>().c_str(),
              r.how == method::dense ? "exact" : promise.c_str());
  std::printf("density      %.4f   (%.1f rows of %.0f tokens in the cache; exact share %.3f)\n", value("density"),
              value("rows"), value("n"), value("exact_share"));
  std::printf("error        mean %.3g, 90 %% %.3g   (%s)\n", value("error_mean"), value("error_p90"),
              s["error_is"].get<std::string>().c_str());
  std::printf("failures     %.4f of the draws, worst head %.4f   (%s > %g; delta %g)\n", value("failures"),
              value("worst_head_failures"), s["target_error_is"].get<std::string>().c_str(), r.settings.epsilon,
              r.settings.delta);
  std::printf("draws        %lld trials x %.0f queries x %.0f heads, %.1f s\n", static_cast<long long>(r.trials),
              value("queries"), value("heads"), value("seconds"));
}

void run(request r) {
  check_request(r);
  element_type type{};
  const problem p = load_problem(r, type);
  r.options.scale = r.scale.value_or(1 / std::sqrt(static_cast<float>(p.dk)));
  // More tokens than there are means all of them; and the sum of the two must not overflow.
  r.settings.sinks = std::min(r.settings.sinks, p.n);
  r.settings.window = std::min(r.settings.window, p.n);

  const engine e = type == element_type::float32   ? make_engine<float>(p, r)
                   : type == element_type::float16 ? make_engine<Eigen::half>(p, r)
                                                   : make_engine<Eigen::bfloat16>(p, r);
  const auto width = static_cast<std::size_t>(p.dv);
  std::vector<float> output(p.rows() * width);
  std::vector<certificate> certificates(p.rows());
  const attention_result result{.output = {output.data(), {1, p.queries, p.heads, p.dv}},
                                .certificates = {certificates.data(), {1, p.queries, p.heads}}};
  require(e.check(result));

  // Open the results before the work: a path that cannot be written is known now.
  std::unique_ptr<npy::writer> out;
  if (!r.out_path.empty()) {
    out = std::make_unique<npy::writer>(r.out_path, std::vector<std::int64_t>{r.trials, p.queries, p.heads, p.dv});
  }
  report rep(r, p);
  const auto rows = static_cast<std::int64_t>(p.rows());
  support::progress count("attend, rows", (r.trials + 1) * rows);
  const reference exact = e.exact(count);
  for (std::int64_t trial = 0; trial < r.trials; ++trial) {
    require(e.call(result, {.seed = r.seed + static_cast<std::uint64_t>(trial)}, count));
    for (std::size_t row = 0; row < p.rows(); ++row) {
      const auto at = static_cast<index_t>(row);
      const certificate& c = certificates[row];
      rep.add(trial, at / p.heads, at % p.heads, c,
              error_of(exact, row, std::span(output).subspan(row * width, width), c.log_denominator, r.settings.scale));
    }
    if (out) out->append(output);
  }
  count.finish();
  const json summary = rep.finish(count.elapsed());
  if (out) out->commit();
  rep.publish();
  if (r.out_path != "/dev/stdout" && r.json_path != "/dev/stdout" && r.html_path != "/dev/stdout")
    print_summary(summary, r);
}

// One line, whatever a message or a path holds.
int fail(int code, const std::string& what, const char* hint = "") {
  std::string line = what;
  for (char& c : line) {
    if (static_cast<unsigned char>(c) < ' ') c = ' ';
  }
  std::fprintf(stderr, "attend: %s%s\n", line.c_str(), hint);
  return code;
}

}  // namespace
}  // namespace vattn::examples

int main(int argc, char** argv) {
  using namespace vattn::examples;
  request r;
  CLI::App app("Verified sparse attention on .npy files, measured against the exact result.", "attend");
  add_options(app, r);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help
    return fail(2, e.what(), " (see attend --help)");
  }
  try {
    run(r);
  } catch (const std::bad_alloc&) {
    return fail(1, "out of memory: give fewer tokens or queries at a time");
  } catch (const std::exception& e) {
    return fail(1, e.what());
  }
  return 0;
}
