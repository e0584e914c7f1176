// Every method on every synthetic regime: how much it reads, how wrong it is, how often more than it may be, and how
// long a step takes.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "common/methods.hpp"
#include "common/reference.hpp"
#include "common/report_files.hpp"
#include "common/rows.hpp"
#include "common/value_norms.hpp"
#include "support/progress.hpp"
#include "support/regimes.hpp"

namespace vattn::examples {
namespace {

struct settings {
  index_t n = 32768, dim = 128;
  double epsilon = 0.05, delta = 0.1;
  std::int64_t trials = 200, repeats = 7;
  std::string values = "follow", csv, json, html;
  std::vector<std::string> regimes{"standard"};
  std::uint64_t seed = 1;
  index_t threads = 0;
};

/// One method on one regime, over its draws.
struct outcome {
  std::string regime, method, promise;  // promise: what is within epsilon in all but delta of the draws
  double density = 0, error_mean = 0, error_p90 = 0, failures = 0, exact_share = 0;
  double ms = 0;  ///< of a call on one thread, the median
};

/// A cache, its exact output, and what is kept beside a cache: norms of its values for a ranking, or an index.
class bench {
 public:
  bench(const settings& s, const std::string& regime)
      : settings_(s),
        cache_(synthetic::make_cache(regime, s.values, s.n, s.dim, s.seed)),
        query_(cache_.q.data(), {1, 1, 1, s.dim}),
        view_(contiguous_kv(cache_.k.data(), cache_.v.data(), {.n_tokens = s.n, .dk = s.dim, .dv = s.dim})) {
    options_.scale = cache_.scale();
    exact_ = exact_reference(query_, view_, options_);
    norms_ = measure_values(view_, s.n);
    view_ = view_.with_norms(norms_.view());
    index_.emplace_back(index_shape{.n_kv_heads = 1, .dk = s.dim, .dv = s.dim});
    if (const status built = index_[0].build(view_); !built) throw std::runtime_error(built.message());
  }

  [[nodiscard]] std::span<const kv_index> index() const { return index_; }

  using kv = kv_view<float>;
  using call = std::function<status(const tensor_view<const float, 4>& q, const kv& cache, const attention_options&,
                                    const attention_result&, workspace&, const draw_key&)>;

  /// Draw i uses the seed + i, whichever thread makes it.
  [[nodiscard]] outcome measure(const call& attend, std::int64_t trials, support::progress& count) const {
    std::vector<double> errors(static_cast<std::size_t>(trials));
    std::vector<certificate> certificates(errors.size());
    const auto width = static_cast<std::size_t>(settings_.dim);
    const auto workers = static_cast<std::size_t>(settings_.threads);
    std::vector<workspace> memory(workers);
    std::vector<std::vector<float>> outputs(workers, std::vector<float>(width));
    std::mutex lock;
    status failed;
    thread_executor(settings_.threads).for_each(trials, [&](index_t trial, index_t worker) {
      const auto w = static_cast<std::size_t>(worker), t = static_cast<std::size_t>(trial);
      const attention_result result{.output = {outputs[w].data(), {1, 1, 1, settings_.dim}},
                                    .certificates = {&certificates[t], {1, 1, 1}}};
      const draw_key key{.seed = settings_.seed + static_cast<std::uint64_t>(trial)};
      if (const status s = attend(query_, view_, options_, result, memory[w], key); !s) {
        const std::lock_guard guard(lock);
        failed = s;
      }
      errors[t] = error_of(exact_, 0, outputs[w], certificates[t].log_denominator, error_scale::output).output;
      count.step();
    });
    if (!failed) throw std::runtime_error(failed.message());

    outcome o;
    const auto share = 1 / static_cast<double>(trials);
    for (std::size_t t = 0; t < errors.size(); ++t) {
      o.density += share * certificates[t].density();
      o.exact_share += share * certificates[t].exact();
      o.error_mean += share * errors[t];
      o.failures += share * !(errors[t] <= settings_.epsilon);
    }
    std::sort(errors.begin(), errors.end());
    o.error_p90 = errors[static_cast<std::size_t>(std::ceil(0.9 * static_cast<double>(trials))) - 1];
    return o;
  }

  /// Milliseconds of a call on one thread: medians. The methods take turns, so that a machine that slows down slows
  /// all.
  [[nodiscard]] std::vector<double> time(const std::vector<call>& methods, support::progress& count) const {
    std::vector<std::vector<double>> taken(methods.size());
    std::vector<float> output(static_cast<std::size_t>(settings_.dim));
    const attention_result result{.output = {output.data(), {1, 1, 1, settings_.dim}}};
    workspace memory;
    for (std::int64_t turn = -1; turn < settings_.repeats; ++turn) {  // the first one warms up
      for (std::size_t m = 0; m < methods.size(); ++m) {
        using clock = std::chrono::steady_clock;
        const draw_key key{.seed = settings_.seed + static_cast<std::uint64_t>(turn + 1)};
        const auto start = clock::now();
        if (const status s = methods[m](query_, view_, options_, result, memory, key); !s)
          throw std::runtime_error(s.message());
        if (turn >= 0) taken[m].push_back(std::chrono::duration<double, std::milli>(clock::now() - start).count());
      }
      count.step();
    }
    std::vector<double> medians;
    for (auto& ms : taken) {
      std::nth_element(ms.begin(), ms.begin() + settings_.repeats / 2, ms.end());
      medians.push_back(ms[static_cast<std::size_t>(settings_.repeats / 2)]);
    }
    return medians;
  }

 private:
  const settings& settings_;
  synthetic::cache cache_;
  tensor_view<const float, 4> query_;
  kv view_;
  attention_options options_;
  reference exact_;
  value_norms norms_;
  std::vector<kv_index> index_;
};

bench::call fixed(const row_budget& rows) {
  return [rows](const auto& q, const auto& cache, const auto& options, const auto& result, auto& memory,
                const auto& key) { return fixed_budget(q, cache, options, result, memory, rows, key); };
}

template <class Policy>
bench::call verified(const config& c) {
  return [c](const auto& q, const auto& cache, const auto& options, const auto& result, auto& memory, const auto& key) {
    return vattention<Policy>(c)(q, cache, options, result, memory, key);
  };
}

bench::call from_index(const config& c, std::span<const kv_index> index) {
  return [c, index](const auto& q, const auto& cache, const auto& options, const auto& result, auto& memory,
                    const auto& key) {
    return vattention<index_policy>(c, {index})(q, cache, options, result, memory, key);
  };
}

constexpr const char* method_names[] = {"dense", "sinks+window", "top-k", "sampling", "paper", "ranked", "vattention"};
constexpr const char* promises[] = {"none", "none", "none", "none", "denominator", "output", "output"};
constexpr int random_methods = 4, fixed_methods = 3;

std::vector<outcome> run_regime(const settings& s, const std::string& regime, support::progress& count) {
  const bench b(s, regime);
  config ours;
  ours.epsilon = s.epsilon;
  ours.delta = s.delta;
  config paper = presets::paper_default;
  paper.epsilon = s.epsilon;
  paper.delta = s.delta;
  // First ours: top-k and sampling get as many rows as it took.
  const bench::call fast = from_index(ours, b.index());
  const outcome own = b.measure(fast, s.trials, count);
  const bench::call dense = [](const auto& q, const auto& cache, const auto& options, const auto& result, auto& memory,
                               const auto&) { return exact_attention(q, cache, options, result, memory); };
  const std::vector<bench::call> calls{dense,
                                       fixed({.sinks = ours.sinks, .window = ours.window}),
                                       fixed({.heavy = own.density}),
                                       fixed({.sampled = own.density}),
                                       verified<verified_denominator>(paper),
                                       verified<ranked_policy>(ours),
                                       fast};
  std::vector<outcome> all;
  for (std::size_t i = 0; i + 1 < calls.size(); ++i)
    all.push_back(b.measure(calls[i], i < fixed_methods ? 1 : s.trials, count));
  all.push_back(own);
  const std::vector<double> ms = b.time(calls, count);
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i].regime = regime;
    all[i].method = method_names[i];
    all[i].promise = promises[i];
    all[i].ms = ms[i];
  }
  return all;
}

void print_row(const char* regime, const outcome& o, double dense_ms) {
  std::printf("%-9s %-13s %8.4f %10.2g %10.2g %9.3f %7.3f %8.2f %8.1f\n", regime, o.method.c_str(), o.density,
              o.error_mean, o.error_p90, o.failures, o.exact_share, o.ms, dense_ms / o.ms);
}

void print_heading(const settings& s) {
  std::printf("n = %lld, dim = %lld, values '%s', epsilon = %g, delta = %g, %lld draws\n\n",
              static_cast<long long>(s.n), static_cast<long long>(s.dim), s.values.c_str(), s.epsilon, s.delta,
              static_cast<long long>(s.trials));
  std::printf("%-9s %-13s %8s %10s %10s %9s %7s %8s %8s\n", "regime", "method", "density", "mean error", "90 % error",
              "failures", "exact", "ms", "speed-up");
}

// Means over the regimes; of the failures, the worst; of the speed-ups, that of all time taken.
void print_summary(const std::vector<outcome>& all, const settings& s) {
  const double share = static_cast<double>(std::size(method_names)) / static_cast<double>(all.size());
  double dense_ms = 0;
  for (const char* name : method_names) {
    outcome mean;
    mean.method = name;
    for (const outcome& o : all) {
      if (o.method != name) continue;
      mean.density += share * o.density;
      mean.error_mean += share * o.error_mean;
      mean.error_p90 = std::max(mean.error_p90, o.error_p90);
      mean.failures = std::max(mean.failures, o.failures);
      mean.exact_share += share * o.exact_share;
      mean.ms += share * o.ms;
    }
    if (name == method_names[0]) dense_ms = mean.ms;
    print_row(name == method_names[0] ? "all (*)" : "", mean, dense_ms);
  }
  std::printf(
      "\n(*) means over the regimes, but the worst 90 %% error and the worst failures.\n"
      "density   share of the rows of K and V that the output is made of\n"
      "error     |o^ - o| / |o| against double precision\n"
      "failures  share of draws with error > %g. ranked and vattention promise at most %g; paper promises that of the\n"
      "          denominator alone; the others promise nothing. dense, sinks+window and top-k do not draw: 0 or 1.\n"
      "ms        of a step of one head on one thread, choosing and verifying included; speed-up over dense\n"
      "top-k and sampling read as many rows as vattention did. top-k, paper and ranked choose by exact scores, which "
      "takes\n"
      "every key: the best choice that there is, and no time saved. vattention chooses by an index of 2-bit codes.\n",
      s.epsilon, s.delta);
}

// The columns of the CSV, and what the JSON has of each.
json row_of(const outcome& o, const settings& s) {
  return {{"regime", o.regime},     {"method", o.method},           {"n", s.n},
          {"dim", s.dim},           {"values", s.values},           {"epsilon", s.epsilon},
          {"delta", s.delta},       {"trials", s.trials},           {"seed", s.seed},
          {"density", o.density},   {"error_mean", o.error_mean},   {"error_p90", o.error_p90},
          {"failures", o.failures}, {"exact_share", o.exact_share}, {"ms", o.ms},
          {"promise", o.promise}};
}

void write_csv(std::ostream& csv, const std::vector<outcome>& rows, const settings& s, bool header) {
  if (header) write_csv_line(csv, row_of(rows.front(), s), true);
  for (const outcome& o : rows) write_csv_line(csv, row_of(o, s), false);
  if (!csv.flush()) throw std::runtime_error("the CSV file cannot be written: is the disk full?");
}

// Replaces the names of sets by their members, and checks every name before the first cache is made.
std::vector<std::string> expand(const std::vector<std::string>& names) {
  std::vector<std::string> all = synthetic::standard_regimes();
  all.insert(all.end(), synthetic::hostile_regimes().begin(), synthetic::hostile_regimes().end());
  std::vector<std::string> out;
  const auto add = [&](const auto& from) { out.insert(out.end(), from.begin(), from.end()); };
  for (const std::string& name : names) {
    if (name == "standard") {
      add(synthetic::standard_regimes());
    } else if (name == "hostile") {
      add(synthetic::hostile_regimes());
    } else if (name == "all") {
      add(all);
    } else if (std::find(all.begin(), all.end(), name) != all.end()) {
      out.push_back(name);
    } else {
      std::string known;
      for (const std::string& r : all) known += r + ", ";
      throw std::runtime_error("no regime '" + name + "': give some of " + known + "standard, hostile, all");
    }
  }
  return out;
}

void run(settings s) {
  s.regimes = expand(s.regimes);
  config c;
  c.epsilon = s.epsilon;
  c.delta = s.delta;
  if (const status bad = c.validate(); !bad) throw std::runtime_error(bad.message());
  if (s.threads == 0) s.threads = std::clamp<index_t>(std::thread::hardware_concurrency(), 1, 64);

  refuse_same_file({{"--json", s.json}, {"--html", s.html}, {"--csv", s.csv}});
  report_files files(s.json, s.html, "synthetic: n = " + std::to_string(s.n) + ", values '" + s.values + "'");
  std::ofstream csv;
  if (!s.csv.empty()) {
    csv.open(s.csv);
    if (!csv) throw std::runtime_error("cannot write " + s.csv + ": does its folder exist?");
  }
  print_heading(s);
  support::progress count("synthetic", static_cast<std::int64_t>(s.regimes.size()) *
                                           (random_methods * s.trials + fixed_methods + s.repeats + 1));
  std::vector<outcome> all;
  for (const std::string& regime : s.regimes) {
    count.label("synthetic, " + regime);
    const std::vector<outcome> rows = run_regime(s, regime, count);
    count.pause();
    for (const outcome& o : rows) print_row(&o == rows.data() ? regime.c_str() : "", o, rows[0].ms);
    std::printf("\n");
    std::fflush(stdout);
    if (csv.is_open()) write_csv(csv, rows, s, all.empty());
    all.insert(all.end(), rows.begin(), rows.end());
  }
  count.finish();
  print_summary(all, s);
  if (files) {
    json j{{"program", "synthetic"}, {"threads", s.threads}, {"repeats", s.repeats}, {"rows", json::array()}};
    for (const outcome& o : all) j["rows"].push_back(row_of(o, s));
    files.write(dump(j, 1) + '\n');
    files.commit();
  }
}

}  // namespace
}  // namespace vattn::examples

int main(int argc, char** argv) {
  using namespace vattn::examples;
  settings s;
  CLI::App app("Verified sparse attention and its alternatives on synthetic KV caches.", "synthetic");
  app.add_option("--n", s.n, "tokens; default 32768")->check(CLI::Range(1, 16777216))->type_name("N");
  app.add_option("--dim", s.dim, "head size; default 128")->check(CLI::Range(1, 4096))->type_name("D");
  app.add_option("--epsilon", s.epsilon, "error allowed, in (0, 1); default 0.05")->type_name("E");
  app.add_option("--delta", s.delta, "share of draws that may exceed it, in (0, 1); default 0.1")->type_name("D");
  app.add_option("--trials", s.trials, "draws for each method; default 200")
      ->check(CLI::Range(1, 10000000))
      ->type_name("N");
  app.add_option("--repeats", s.repeats, "calls that are timed; default 7")
      ->check(CLI::Range(1, 100000))
      ->type_name("N");
  app.add_option("--values", s.values, "default follow: values that depend on logits, as models' do")
      ->check(CLI::IsMember(vattn::synthetic::value_kinds()));
  app.add_option("--regimes", s.regimes, "names, or standard (default), hostile, all; separated by commas")
      ->delimiter(',')
      ->type_name("LIST");
  app.add_option("--seed", s.seed, "of the caches and the draws; default 1")->type_name("S");
  app.add_option("--threads", s.threads, "results do not depend on it; default 0, all cores")
      ->check(CLI::Range(0, 64))
      ->type_name("T");
  app.add_option("--csv", s.csv, "write the table as it grows")->type_name("FILE");
  app.add_option("--json", s.json, "write the table, with the columns' names of --csv")->type_name("FILE");
  app.add_option("--html", s.html, "write a page that shows it, in one file")->type_name("FILE");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help
    std::fprintf(stderr, "synthetic: %s (see synthetic --help)\n", e.what());
    return 2;
  }
  try {
    run(s);
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "synthetic: out of memory: a cache takes 8 n dim bytes, give fewer tokens\n");
    return 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "synthetic: %s\n", e.what());
    return 1;
  }
  return 0;
}
