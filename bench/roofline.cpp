// Decode steps against what the memory can do: reads, dense attention and verified sparse modes, in turn, in one run.
//   roofline --json roofline.json --csv roofline.csv && tools/plot_roofline roofline.csv roofline.svg

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "roofline_modes.hpp"
#include "support/atomic_file.hpp"

#if defined(__unix__)
#include <unistd.h>
#endif

namespace {

using namespace vattn;
using namespace vattn::bench;

struct settings {
  std::vector<index_t> n{4096, 16384, 32768, 131072};
  std::vector<std::string> heads{"32/8"}, dtypes{"bf16"}, regimes{"gauss1"}, modes, real;
  std::vector<index_t> dims{128}, threads{1};
  double epsilon = 0.05, delta = 0.1;
  int repeats = 15;
  bool agree = false;
  std::uint64_t seed = 1;
  std::string json, csv;
};

struct row {
  std::string mode, regime, heads, dtype;
  index_t n = 0, dim = 0, threads = 0;
  double ms = 0, ms_min = 0, gbps = 0, read_share = 0, speedup = 0, density = 0, error_p90 = 0;
  double share_of_store = 0, sketch_share = 0;
  index_t failures = 0, draws = 0;
  bool verifies = false, attends = false;
  std::vector<double> stages;  // ms of a step, all threads together
};

// Twice what the last cache holds, where the system says, but no more than a gigabyte.
std::size_t other_bytes() {
  constexpr std::size_t least = std::size_t{96} << 20, most = std::size_t{1} << 30;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return std::clamp(cache > 0 ? 2 * static_cast<std::size_t>(cache) : 0, least, most);
#else
  static_cast<void>(most);
  return least;
#endif
}

// Brings other data into the caches, on all threads: in a model other layers come between two steps of one.
void forget(thread_pool& pool) {
  static const std::vector<std::byte> other(other_bytes());
  static std::atomic<std::uint64_t> sink{0};
  const index_t parts = 4 * pool.workers(), size = static_cast<index_t>(other.size()) / parts / 64 * 64;
  pool.for_each(parts, [&](index_t part, index_t) {
    sink.fetch_add(sum_of_words(other.data() + part * size, static_cast<std::size_t>(size)), std::memory_order_relaxed);
  });
}

double quantile(std::vector<double> v, double p) {
  if (v.empty()) return 0;
  std::sort(v.begin(), v.end());
  const auto rank = static_cast<std::size_t>(std::ceil(p * static_cast<double>(v.size())));
  return v[std::clamp<std::size_t>(rank, 1, v.size()) - 1];
}

// Relative error of each head's output.
void add_errors(const std::vector<float>& output, const std::vector<float>& truth, index_t dim,
                std::vector<double>& errors) {
  for (std::size_t h = 0; h < truth.size(); h += static_cast<std::size_t>(dim)) {
    double miss = 0, norm = 0;
    for (std::size_t d = h; d < h + static_cast<std::size_t>(dim); ++d) {
      const double e = static_cast<double>(output[d]) - truth[d];
      miss += e * e, norm += static_cast<double>(truth[d]) * truth[d];
    }
    errors.push_back(std::sqrt(miss / norm));
  }
}

template <class T>
void measure(const settings& o, roofline_cache<T>& cache, const std::string& heads, const std::string& dtype,
             std::vector<row>& table) {
  const cache_shape& shape = cache.shape();
  std::vector<float> output(static_cast<std::size_t>(shape.heads * shape.dim));
  std::vector<certificate> certificates(static_cast<std::size_t>(shape.heads));
  for (const index_t threads : o.threads) {
    thread_pool pool(threads);
    const roofline_step<T> step{cache, pool, o.epsilon, o.delta, output, certificates};
    const auto fail = [](const status& s) {
      if (!s) throw std::runtime_error(s.message());
    };
    auto modes = make_modes<T>();
    std::erase_if(modes, [&](const auto& m) {
      if (m->name() == "read" || m->name() == "dense") return false;
      if (m->name() == "dense_q8") {
        return std::none_of(o.modes.begin(), o.modes.end(),
                            [](const std::string& name) { return name.find("_q8") != std::string::npos; });
      }
      return o.modes.empty() ? !m->by_default() : std::find(o.modes.begin(), o.modes.end(), m->name()) == o.modes.end();
    });
    for (auto& m : modes) m->prepare(step);
    struct samples {
      std::vector<double> ms, errors;
      double density = 0;
    };
    std::vector<samples> taken(modes.size());
    std::map<std::string, std::vector<float>> truths;      // of the query at hand: what each dense mode has found
    for (int repeat = -1; repeat < o.repeats; ++repeat) {  // the first warms up
      std::fprintf(stderr, "\r%-78s",
                   (shape.regime + " " + dtype + " n " + std::to_string(shape.n) + " threads " +
                    std::to_string(threads) + ": " + std::to_string(repeat + 1) + "/" + std::to_string(o.repeats))
                       .c_str());
      cache.ask(std::max(0, repeat) % cache.n_queries());
      for (std::size_t i = 0; i < modes.size(); ++i) {
        forget(pool);
        const auto start = std::chrono::steady_clock::now();
        fail(modes[i]->run(step, static_cast<std::uint32_t>(repeat + 1)));
        const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
        if (modes[i]->name() == modes[i]->baseline() || modes[i]->name() == "dense") truths[modes[i]->name()] = output;
        if (repeat < 0) {
          static_cast<void>(modes[i]->take_stages(1));
          continue;
        }
        taken[i].ms.push_back(ms / static_cast<double>(modes[i]->parts()));
        if (!modes[i]->attends()) continue;
        add_errors(output, truths.at(modes[i]->baseline()), shape.dim, taken[i].errors);
        for (const certificate& c : certificates)
          taken[i].density += c.density() / static_cast<double>(o.repeats) / static_cast<double>(shape.heads);
      }
    }
    double read = 0, store = 0;
    std::map<std::string, double> dense;
    for (std::size_t i = 0; i < modes.size(); ++i) {
      roofline_mode<T>& m = *modes[i];
      row r;
      r.mode = m.name(), r.regime = shape.regime + (shape.agree ? "+agree" : ""), r.heads = heads, r.dtype = dtype;
      r.n = shape.n, r.dim = shape.dim, r.threads = pool.workers();
      r.ms = quantile(taken[i].ms, 0.5), r.ms_min = quantile(taken[i].ms, 0);
      if (m.name() == "read") read = r.ms;
      if (m.name() == m.baseline()) dense[m.name()] = r.ms;
      if (m.name() == "store") store = r.ms;
      if (m.name().starts_with("append") && store > 0) r.share_of_store = r.ms / store;
      r.sketch_share = m.sketch_share();
      r.gbps = m.bytes() / r.ms / 1e6;
      r.read_share = m.bytes() / static_cast<double>(cache.bytes()) * read / r.ms;
      r.speedup = dense.count(m.baseline()) > 0 ? dense[m.baseline()] / r.ms : 0;
      r.attends = m.attends(), r.verifies = m.verifies();
      r.density = taken[i].density;
      r.error_p90 = quantile(taken[i].errors, 0.9);
      r.draws = static_cast<index_t>(taken[i].errors.size());
      r.failures = m.verifies() ? std::count_if(taken[i].errors.begin(), taken[i].errors.end(),
                                                [&](double e) { return e > o.epsilon; })
                                : 0;
      r.stages = m.take_stages(o.repeats);
      table.push_back(r);
    }
  }
}

nlohmann::ordered_json to_json(const row& r, const settings& o) {
  nlohmann::ordered_json j{{"mode", r.mode},
                           {"regime", r.regime},
                           {"n", r.n},
                           {"heads", r.heads},
                           {"dim", r.dim},
                           {"dtype", r.dtype},
                           {"threads", r.threads},
                           {"ms", r.ms},
                           {"ms_min", r.ms_min},
                           {"gbps", r.gbps},
                           {"read_share", r.read_share},
                           {"speedup_over_dense", r.speedup},
                           {"density", r.density},
                           {"error_p90", r.error_p90},
                           {"failures", r.failures},
                           {"draws", r.draws},
                           {"share_of_store", r.share_of_store},
                           {"sketch_share", r.sketch_share}};
  // What a mode does not know is null, not 0.
  if (r.gbps == 0) j["gbps"] = j["read_share"] = nullptr;
  if (!r.attends) j["speedup_over_dense"] = j["density"] = j["error_p90"] = nullptr;
  if (!r.verifies) j["failures"] = nullptr;
  if (r.share_of_store == 0) j["share_of_store"] = nullptr;
  if (r.sketch_share == 0) j["sketch_share"] = nullptr;
  if (r.verifies) j["epsilon"] = o.epsilon, j["delta"] = o.delta;
  for (std::size_t i = 0; i < r.stages.size(); ++i) j["stages_ms"][stage_names[i]] = r.stages[i];
  return j;
}

// f(T{}) for the element that is named.
template <class F>
void with_element(const std::string& dtype, F&& f) {
  if (dtype == "bf16") f(Eigen::bfloat16());
  if (dtype == "f16") f(Eigen::half());
  if (dtype == "f32") f(0.0f);
  if (dtype == "q8_0") f(kernel::q8_0_block());
}

// Layers of trained models, each in every type of element.
void run_real(const settings& o, std::vector<row>& table) {
  for (const std::string& prefix : o.real) {
    const real_cache real(prefix);
    const cache_shape shape = real.shape();
    for (const std::string& dtype : o.dtypes) {
      with_element(dtype, [&]<class T>(T) {
        roofline_cache<T> cache(real);
        measure(o, cache, std::to_string(shape.heads) + "/" + std::to_string(shape.kv_heads), dtype, table);
      });
    }
  }
}

void run(const settings& o) {
  std::unique_ptr<support::atomic_file> json, csv;  // what cannot be written fails before the work
  if (!o.json.empty()) json = std::make_unique<support::atomic_file>(o.json);
  if (!o.csv.empty()) csv = std::make_unique<support::atomic_file>(o.csv);
  std::vector<row> table;
  run_real(o, table);
  for (const std::string& heads : o.real.empty() ? o.heads : std::vector<std::string>()) {
    long long q = 0, kv = 0;
    char rest = 0;
    if (std::sscanf(heads.c_str(), "%lld/%lld%c", &q, &kv, &rest) != 2 || q < 1 || kv < 1 || q % kv != 0)
      throw std::runtime_error("--heads " + heads + ": give query heads/KV heads, such as 32/8");
    for (const index_t dim : o.dims) {
      for (const std::string& dtype : o.dtypes) {
        if (dtype == "q8_0" && dim % 32 != 0) throw std::runtime_error("q8_0 needs a --dim that is a multiple of 32");
        if (dtype == "q8_0") {
          const std::vector<std::string> known = mode_names<kernel::q8_0_block>();
          for (const std::string& mode : o.modes) {
            if (mode != "none" && std::find(known.begin(), known.end(), mode) == known.end())
              throw std::runtime_error("mode " + mode + " takes no q8_0: use " + CLI::detail::join(known, ", "));
          }
        }
        for (const std::string& regime : o.regimes) {
          for (const index_t n : o.n) {
            const cache_shape shape{regime, n, q, kv, dim, o.agree};
            std::fprintf(stderr, "\r%-78s",
                         (regime + " " + dtype + ": making " + std::to_string(n) + " tokens").c_str());
            const auto of = [&]<class T>(T) {
              roofline_cache<T> cache(shape, o.seed);
              measure(o, cache, heads, dtype, table);
            };
            with_element(dtype, of);
          }
        }
      }
    }
  }
  std::fprintf(stderr, "\r%-78s\r", "");
  std::printf("%-12s %-8s %8s %6s %4s %5s %2s %9s %9s %7s %6s %8s %8s %9s %s\n", "mode", "regime", "n", "heads", "dim",
              "dtype", "t", "ms", "ms_min", "GB/s", "share", "speedup", "density", "error_p90", "failures");
  for (const row& r : table) {
    std::printf("%-12s %-8s %8lld %6s %4lld %5s %2lld %9.3f %9.3f %7.1f %6.3f %8.2f %8.4f %9.2e %lld/%lld\n",
                r.mode.c_str(), r.regime.c_str(), static_cast<long long>(r.n), r.heads.c_str(),
                static_cast<long long>(r.dim), r.dtype.c_str(), static_cast<long long>(r.threads), r.ms, r.ms_min,
                r.gbps, r.read_share, r.speedup, r.density, r.error_p90, static_cast<long long>(r.failures),
                static_cast<long long>(r.draws));
  }
  if (json) {
    nlohmann::ordered_json all{{"isa", kernel::to_string(kernel::active_isa())}, {"repeats", o.repeats}};
    all["rows"] = nlohmann::ordered_json::array();
    for (const row& r : table) all["rows"].push_back(to_json(r, o));
    json->stream() << all.dump(1) << '\n';
    json->commit();
  }
  if (csv) {
    csv->stream() << "mode,regime,n,heads,dim,dtype,threads,ms,ms_min,gbps,read_share,speedup_over_dense,density,"
                     "error_p90,failures,draws,share_of_store,sketch_share";
    for (const char* name : stage_names) csv->stream() << ',' << name << "_ms";
    csv->stream() << '\n';
    for (const row& r : table) {
      std::string line;
      const nlohmann::ordered_json cells = to_json(r, o);
      for (auto cell = cells.begin(); cell != cells.end(); ++cell) {
        if (cell.key() == "epsilon" || cell.key() == "delta" || cell.key() == "stages_ms") continue;
        if (!line.empty()) line += ',';
        if (cell->is_string()) {
          line += cell->template get<std::string>();
        } else if (!cell->is_null()) {
          line += cell->dump();
        }
      }
      for (std::size_t i = 0; i < stage_names.size(); ++i) {
        line += ',';
        if (!r.stages.empty()) line += nlohmann::json(r.stages[i]).dump();
      }
      csv->stream() << line << '\n';
    }
    csv->commit();
  }
}

}  // namespace

int main(int argc, char** argv) {
  settings o;
  CLI::App app{
      "Decode steps against the memory's limits. In turn, in one run: a plain read of K and V, random rows, dense "
      "attention, verified sparse modes. `failures` counts outputs further than epsilon from the dense one."};
  const auto list = [](CLI::Option* option) { return option->delimiter(',')->capture_default_str(); };
  list(app.add_option("--n", o.n, "Tokens"))->check(CLI::Range(1, 1 << 24));
  list(app.add_option("--heads", o.heads, "Query heads/KV heads"));
  list(app.add_option("--dim", o.dims, "Elements of a key and of a value"))->check(CLI::Range(1, 1024));
  list(app.add_option("--dtype", o.dtypes, "Of the cache"))->check(CLI::IsMember({"bf16", "f16", "f32", "q8_0"}));
  list(app.add_option("--threads", o.threads, "Threads"))->check(CLI::Range(1, 256));
  list(app.add_option("--regime", o.regimes, "Regimes of the logits"))
      ->check(CLI::IsMember(synthetic::standard_regimes()));
  std::vector<std::string> modes = mode_names<float>();
  modes.push_back("none");
  list(app.add_option("--modes", o.modes, "Modes besides read and dense, or none; default random_rows, uniform, store"))
      ->check(CLI::IsMember(modes));
  list(app.add_option("--real", o.real,
                      "Layers of trained models instead of regimes: PREFIX_q.npy, PREFIX_k.npy, PREFIX_v.npy, whose "
                      "queries the steps take in turn"));
  app.add_option("--epsilon", o.epsilon, "Error to promise")->check(CLI::Range(1e-6, 1.0))->capture_default_str();
  app.add_option("--delta", o.delta, "Share of outputs that may exceed it")
      ->check(CLI::Range(1e-9, 0.999))
      ->capture_default_str();
  app.add_option("--repeats", o.repeats, "Steps that are timed")->check(CLI::Range(1, 10000))->capture_default_str();
  app.add_flag("--agree", o.agree, "Heads of a group have the same logits up to small noise");
  app.add_option("--seed", o.seed, "Of the caches")->capture_default_str();
  app.add_option("--json", o.json, "File to write");
  app.add_option("--csv", o.csv, "File to write");
  CLI11_PARSE(app, argc, argv);
  const bool none = std::find(o.modes.begin(), o.modes.end(), "none") != o.modes.end();
  if (none && o.modes.size() > 1) {
    std::cerr << "roofline: --modes none stands alone\n";
    return 2;
  }
  try {
    run(o);
  } catch (const std::exception& e) {
    std::cerr << "\nroofline: " << e.what() << '\n';
    return 1;
  }
  return 0;
}
