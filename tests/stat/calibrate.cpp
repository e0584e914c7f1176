// The long statistical suite: every cell of regimes x values x n x (ε, δ), judged by an exact binomial test.
#include <CLI/CLI.hpp>
#include <array>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>

#include "common/report_files.hpp"
#include "common/rows.hpp"
#include "stat/binomial.hpp"
#include "stat/experiment.hpp"
#include "support/progress.hpp"
#include "support/real_tensors.hpp"

namespace {

using namespace vattn;
using namespace vattn::stat;

struct options {
  std::vector<std::string> regimes{"standard", "hostile"}, values{"mean", "zero"}, scales{"output"};
  std::vector<index_t> lengths{8192};
  std::vector<double> epsilons{0.02, 0.05, 0.1, 0.2}, deltas{0.05, 0.1, 0.2};
  index_t dim = 128;
  int bits = 0;
  long draws = 200;
  std::uint64_t seed = 1;
  int threads = 1;
  std::string type = "float", target = "output", bound = "clt", mode = "importance", csv, json, html, real;
  index_t sinks = 128, window = 128;
};

/// One row of the report; a group is what must keep the promise together (a head, a regime).
struct cell {
  std::string regime, values;
  index_t n = 0;
  error_scale scale = error_scale::output;
  double epsilon = 0, delta = 0, coherence = 0;
  summary s;
};

/// Problems are made when their turn comes: at n = 131072 one is 130 MB.
struct source {
  std::string regime, values;
  std::function<synthetic::cache()> make;
};

// Names, with those of a list in place of the list's own.
std::vector<std::string> expand(const std::vector<std::string>& given,
                                const std::map<std::string, std::vector<std::string>>& lists) {
  std::vector<std::string> names;
  for (const std::string& g : given) {
    const auto list = lists.find(g);
    if (list == lists.end()) {
      names.push_back(g);
    } else {
      names.insert(names.end(), list->second.begin(), list->second.end());
    }
  }
  return names;
}

std::vector<source> synthetic_sources(const options& o) {
  const std::vector<std::string> regimes = expand(o.regimes, {{"standard", synthetic::standard_regimes()},
                                                              {"hostile", synthetic::hostile_regimes()},
                                                              {"adversarial", synthetic::adversarial_regimes()}});
  const std::vector<std::string> kinds =
      expand(o.values, {{"all", synthetic::value_kinds()}, {"adversarial", synthetic::adversarial_values()}});
  for (const std::string& regime : regimes) synthetic::check_name("regime", regime, synthetic::all_regimes());
  for (const std::string& values : kinds) synthetic::check_name("kind of values", values, synthetic::all_value_kinds());
  std::vector<source> sources;
  for (const index_t n : o.lengths) {
    for (const std::string& regime : regimes) {
      for (const std::string& values : kinds) {
        sources.push_back({regime, values, [=, dim = o.dim, seed = o.seed] {
                             return synthetic::make_cache(regime, values, n, dim, seed);
                           }});
      }
    }
  }
  return sources;
}

// Every query token and head of `--real` is a problem of its own.
std::vector<source> real_sources(const std::string& prefix) {
  const auto t = std::make_shared<const support::real_tensors>(prefix);
  std::vector<source> sources;
  for (index_t h = 0; h < t->heads(); ++h) {
    for (index_t i = 0; i < t->queries(); ++i) {
      sources.push_back(
          {t->name() + "/head" + std::to_string(h), "query" + std::to_string(i), [=] { return t->cache(h, i); }});
    }
  }
  return sources;
}

template <class Target, class Bound>
struct policy : remembering<ranked_policy> {
  using target = Target;
  using bound = Bound;
};

template <kernel::element T, class Target>
summary run_target(const problem<T>& p, const options& o, const config& c, std::uint64_t seed) {
  if (o.bound == "student") return run_cell<policy<Target, budget::student>>(p, c, o.draws, seed);
  if (o.bound == "bernstein") return run_cell<policy<Target, budget::bernstein>>(p, c, o.draws, seed);
  if (o.bound == "hoeffding") return run_cell<policy<Target, budget::hoeffding>>(p, c, o.draws, seed);
  return run_cell<policy<Target, budget::clt>>(p, c, o.draws, seed);
}

template <kernel::element T, int Bits>
summary run_importance(const problem<T>& p, const options& o, const config& c, std::uint64_t seed) {
  const indexed_problem index(p, sketch::key_codes<Bits>(p.dk(), o.seed));
  if (o.mode == "certified") return run_cell<certified_test_policy>(p, index.bounds(), c, o.draws, seed);
  if (o.mode == "two-phase") {
    const indexed_problem coarse(p, sketch::key_codes<1>(p.dk(), o.seed));
    remembered_phases phases;
    phases.coarse = coarse.selector(), phases.fine = index.selector();
    return run_cell<two_phase_policy>(p, phases, c, o.draws, seed);
  }
  return run_cell<importance_policy>(p, index.selector(), c, o.draws, seed);
}

template <kernel::element T>
summary run(const problem<T>& p, const options& o, const config& c, std::uint64_t seed) {
  if (o.bits == 1) return run_importance<T, 1>(p, o, c, seed);
  if (o.bits == 2) return run_importance<T, 2>(p, o, c, seed);
  if (o.bits == 4) return run_importance<T, 4>(p, o, c, seed);
  if (o.bits == 8) return run_importance<T, 8>(p, o, c, seed);
  if (o.target == "denominator") return run_target<T, budget::denominator>(p, o, c, seed);
  if (o.target == "numerator") return run_target<T, budget::numerator>(p, o, c, seed);
  if (o.target == "sdpa") return run_target<T, budget::sdpa>(p, o, c, seed);
  return run_target<T, budget::output>(p, o, c, seed);
}

template <kernel::element T>
std::vector<cell> run_source(const source& from, const options& o, std::uint64_t seed) {
  const problem<T> p(from.make());
  std::vector<cell> cells;
  for (const std::string& scale : o.scales) {
    for (const double epsilon : o.epsilons) {
      for (const double delta : o.deltas) {
        config c;
        c.epsilon = epsilon;
        c.delta = delta;
        c.sinks = o.sinks;
        c.window = o.window;
        c.scale = scale == "rms" ? error_scale::rms : error_scale::output;
        if (o.target != "output") c.heavy = c.base = 0.02;
        if (const status s = c.validate(); !s) throw std::runtime_error(s.message());
        // Cells are independent: no two share a seed.
        const std::uint64_t first = (seed * 1000 + cells.size()) * 1000000;
        cells.push_back({from.regime, from.values, p.n(), c.scale, epsilon, delta, p.coherence(), run(p, o, c, first)});
      }
    }
  }
  return cells;
}

// The columns of the CSV, and what the JSON has of each.
examples::json row_of(const cell& c, const options& o) {
  const summary& s = c.s;
  return {{"regime", c.regime},
          {"values", c.values},
          {"n", c.n},
          {"dim", o.dim},
          {"type", o.type},
          {"target", o.target},
          {"bound", o.bound},
          {"scale", to_string(c.scale)},
          {"epsilon", c.epsilon},
          {"delta", c.delta},
          {"draws", s.draws},
          {"failures", s.failures},
          {"failure_share", s.failure_share()},
          {"p_value", binomial_upper_tail(s.failures, s.draws, c.delta)},
          {"uncovered", s.uncovered},
          {"density", s.density},
          {"rounds", s.rounds},
          {"exact_share", static_cast<double>(s.exact) / static_cast<double>(s.draws)},
          {"error_p50", s.quantile(0.5)},
          {"error_p90", s.quantile(0.9)},
          {"error_quantile", s.quantile(1 - c.delta)},
          {"achieved_mean", s.achieved_mean},
          {"coherence", c.coherence}};
}

void write_rows(std::ostream& out, const options& o, const std::vector<cell>& cells, bool header) {
  if (header) examples::write_csv_line(out, row_of(cells.front(), o), true);
  for (const cell& c : cells) examples::write_csv_line(out, row_of(c, o), false);
  out.flush();
}

int judge(const std::vector<cell>& cells) {
  constexpr double false_alarm = 1e-3;
  long bad = 0;
  std::map<std::pair<double, double>, std::pair<double, long>> by_promise;
  std::map<std::string, std::array<double, 3>> by_group;  // failures, expected at most, draws of a regime or head
  for (const cell& c : cells) {
    if (binomial_upper_tail(c.s.failures, c.s.draws, c.delta) < false_alarm / static_cast<double>(cells.size())) {
      ++bad;
      std::cout << "FAILED " << c.regime << '/' << c.values << " n " << c.n << " epsilon " << c.epsilon << " delta "
                << c.delta << ": " << c.s.failures << " of " << c.s.draws << " draws\n";
    }
    auto& [sum, count] = by_promise[{c.epsilon, c.delta}];
    sum += c.s.density;
    ++count;
    auto& group = by_group[c.regime];
    group[0] += static_cast<double>(c.s.failures);
    group[1] += c.delta * static_cast<double>(c.s.draws);
    group[2] += static_cast<double>(c.s.draws);
  }
  double worst = 0, worst_share = 0;
  std::string worst_cell;
  for (const cell& c : cells) {
    if (c.s.failure_share() / c.delta > worst) {
      worst = c.s.failure_share() / c.delta;
      worst_share = c.s.failure_share();
      worst_cell = c.regime + '/' + c.values + " n " + std::to_string(c.n) + " epsilon " + std::to_string(c.epsilon) +
                   " delta " + std::to_string(c.delta);
    }
  }
  std::cout << "regime or head: failures / (delta x draws), the sum over its cells\n";
  for (const auto& [name, g] : by_group) {
    std::cout << "  " << name << ": " << g[0] << " / " << g[1] << " of " << g[2] << '\n';
    if (g[0] > g[1] * (1 + 4 / std::sqrt(std::max(1.0, g[1])))) ++bad;
  }
  for (const auto& [promise, d] : by_promise) {
    std::cout << "epsilon " << promise.first << " delta " << promise.second << ": mean density "
              << d.first / static_cast<double>(d.second) << '\n';
  }
  std::cout << cells.size() << " cells, worst share " << worst_share << " (" << worst_cell << "), "
            << (bad ? "PROMISE BROKEN in " + std::to_string(bad) : std::string("promise kept in all")) << '\n';
  return bad ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  options o;
  CLI::App app("Failure shares of the promise over many draws, against delta");
  app.add_option("--regimes", o.regimes, "regime names, 'standard', 'hostile', 'adversarial'")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--values", o.values, "kinds of values, 'all' or 'adversarial'")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--n", o.lengths, "tokens")->delimiter(',')->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--epsilons", o.epsilons)->delimiter(',')->capture_default_str();
  app.add_option("--deltas", o.deltas)->delimiter(',')->capture_default_str();
  app.add_option("--scales", o.scales, "error scales")
      ->delimiter(',')
      ->check(CLI::IsMember({"output", "rms"}))
      ->capture_default_str();
  app.add_option("--dim", o.dim)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--draws", o.draws, "draws of a cell")->check(CLI::Range(1, 1000000))->capture_default_str();
  app.add_option("--type", o.type)->check(CLI::IsMember({"float", "half", "bfloat16"}))->capture_default_str();
  app.add_option("--target", o.target)
      ->check(CLI::IsMember({"denominator", "numerator", "sdpa", "output"}))
      ->capture_default_str();
  app.add_option("--bound", o.bound)
      ->check(CLI::IsMember({"clt", "student", "bernstein", "hoeffding"}))
      ->capture_default_str();
  app.add_option("--bits", o.bits,
                 "importance sampling from key codes of 1, 2, 4 or 8 bits; 0 = uniform sampling, exact ranking")
      ->check(CLI::IsMember({0, 1, 2, 4, 8}))
      ->capture_default_str();
  app.add_option("--mode", o.mode, "with --bits: two-phase scans codes of 1 bit first; certified is finite-sample")
      ->check(CLI::IsMember({"importance", "two-phase", "certified"}))
      ->capture_default_str();
  app.add_option("--sinks", o.sinks)->capture_default_str();
  app.add_option("--window", o.window)->capture_default_str();
  app.add_option("--seed", o.seed, "of the synthetic caches and the draws")->capture_default_str();
  app.add_option("--threads", o.threads)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--real", o.real, "prefix of real tensors: PREFIX_q.npy, PREFIX_k.npy, PREFIX_v.npy (causal)");
  app.add_option("--csv", o.csv, "a row for each cell, written as it goes");
  app.add_option("--json", o.json, "the cells, with the columns' names of --csv");
  app.add_option("--html", o.html, "a page that shows them, in one file");
  CLI11_PARSE(app, argc, argv);

  try {
    const std::vector<source> sources = o.real.empty() ? synthetic_sources(o) : real_sources(o.real);
    examples::refuse_same_file({{"--json", o.json}, {"--html", o.html}, {"--csv", o.csv}});
    examples::report_files files(o.json, o.html, "calibrate: " + (o.real.empty() ? "synthetic caches" : o.real));
    std::ofstream csv;
    if (!o.csv.empty()) {
      csv.open(o.csv);
      if (!csv) throw std::runtime_error("cannot write " + o.csv);
    }
    std::mutex mutex;
    std::vector<std::vector<cell>> of_source(sources.size());
    bool header = true;
    std::string failure;
    {
      support::progress progress("calibrate: caches", static_cast<std::int64_t>(sources.size()));
      thread_executor threads(o.threads);
      threads.for_each(static_cast<index_t>(sources.size()), [&](index_t i, index_t) {
        try {
          const source& from = sources[static_cast<std::size_t>(i)];
          const std::uint64_t seed = o.seed * 100000 + static_cast<std::uint64_t>(i);
          std::vector<cell> cells = o.type == "half"       ? run_source<Eigen::half>(from, o, seed)
                                    : o.type == "bfloat16" ? run_source<Eigen::bfloat16>(from, o, seed)
                                                           : run_source<float>(from, o, seed);
          const std::lock_guard lock(mutex);
          if (csv.is_open()) write_rows(csv, o, cells, std::exchange(header, false));
          of_source[static_cast<std::size_t>(i)] = std::move(cells);
        } catch (const std::exception& e) {
          const std::lock_guard lock(mutex);
          failure = e.what();
        }
        progress.step();
      });
    }
    if (!failure.empty()) throw std::runtime_error(failure);
    std::vector<cell> all;
    for (const auto& cells : of_source) all.insert(all.end(), cells.begin(), cells.end());
    const int verdict = judge(all);
    if (files) {
      examples::json j{{"program", "calibrate"}, {"kept", verdict == 0}, {"rows", examples::json::array()}};
      for (const cell& c : all) j["rows"].push_back(row_of(c, o));
      files.write(examples::dump(j, 1) + '\n');
      files.commit();
    }
    return verdict;
  } catch (const std::exception& e) {
    std::cerr << "calibrate: " << e.what() << '\n';
    return 2;
  }
}
