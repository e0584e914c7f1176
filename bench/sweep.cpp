// Sparsity against error: every method on every regime, one CSV row per cell, written as it goes.
//   sweep --csv sweep.csv && plot_sweep sweep.csv sweep.svg

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>

#include "contenders.hpp"

namespace {

using namespace vattn;
using namespace vattn::bench;

struct options {
  index_t n = 32768, dim = 128;
  std::vector<double> epsilons{0.02, 0.03, 0.05, 0.1, 0.2, 0.3}, deltas{0.1};
  std::vector<double> densities{0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5};
  std::vector<std::string> regimes = synthetic::standard_regimes();
  std::vector<std::string> names;
  std::string values = "follow", csv = "-";
  error_scale scale = error_scale::output;
  index_t trials = 100;
  std::uint64_t seed = 1;
  bool quick = false;
};

struct summary {
  index_t trials = 0, failures = 0, exact = 0;
  double density = 0, mean = 0, p50 = 0, p90 = 0, ms = 0;
};

// Order statistic ceil(p·n): a tenth of the draws at most lies above the 90 % one.
double quantile(const std::vector<double>& sorted, double p) {
  const auto rank = static_cast<std::size_t>(std::ceil(p * static_cast<double>(sorted.size())));
  return sorted[std::clamp<std::size_t>(rank, 1, sorted.size()) - 1];
}

summary measure(problem& p, const contender& how, const cell& at, index_t trials, std::uint64_t seed) {
  using clock = std::chrono::steady_clock;
  summary s;
  s.trials = how.random ? trials : 1;
  std::vector<double> errors;
  std::vector<double> times;
  // What does not draw is right once, but timed as the others are.
  for (index_t t = how.random ? 0 : 1 - std::min<index_t>(trials, 9); t < s.trials; ++t) {
    const auto start = clock::now();
    const status done = how.attend(p, at, {.seed = seed, .step = static_cast<std::uint32_t>(std::max<index_t>(t, 0))});
    times.push_back(std::chrono::duration<double, std::milli>(clock::now() - start).count());
    if (!done) throw std::runtime_error(done.message());
    if (t < 0) continue;
    errors.push_back(p.error(at.scale));
    s.density += p.proof().density() / static_cast<double>(s.trials);
    s.exact += p.proof().exact();
    s.failures += how.sweeps == knob::epsilon && errors.back() > at.epsilon;
    s.mean += errors.back() / static_cast<double>(s.trials);
  }
  std::sort(errors.begin(), errors.end());
  std::sort(times.begin(), times.end());
  s.p50 = quantile(errors, 0.5);
  s.p90 = quantile(errors, 0.9);
  s.ms = quantile(times, 0.5);
  return s;
}

std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", x);
  return text;
}

void run(const options& o, std::ostream& csv) {
  csv << "regime,values,n,dim,method,epsilon,delta,trials,density,error_mean,error_p50,error_p90,failures,exact_share,"
         "ms\n"
      << std::flush;
  std::vector<const contender*> chosen;
  for (const contender& m : contenders) {
    if (o.names.empty() || std::find(o.names.begin(), o.names.end(), m.name) != o.names.end()) chosen.push_back(&m);
  }
  // Cells of one method, in the order that they are swept.
  const auto cells = [&](const contender& m) {
    std::vector<cell> all;
    if (m.sweeps == knob::none) all.push_back({.scale = o.scale});
    if (m.sweeps == knob::density) {
      for (const double density : o.densities) all.push_back({.density = density, .scale = o.scale});
    }
    if (m.sweeps == knob::epsilon) {
      for (const double delta : o.deltas) {
        for (const double epsilon : o.epsilons) all.push_back({.epsilon = epsilon, .delta = delta, .scale = o.scale});
      }
    }
    return all;
  };
  std::size_t done = 0, total = 0;
  for (const contender* m : chosen) total += cells(*m).size() * o.regimes.size();

  for (const std::string& regime : o.regimes) {
    std::fprintf(
        stderr, "\r%-60s",
        ("[" + std::to_string(done) + "/" + std::to_string(total) + "] " + regime + ": making the cache").c_str());
    problem p(regime, o.values, o.n, o.dim, o.seed);
    for (const contender* m : chosen) {
      for (const cell& at : cells(*m)) {
        const bool verifies = m->sweeps == knob::epsilon;
        std::fprintf(stderr, "\r[%zu/%zu] %-10s %-14s %s %-12g", ++done, total, regime.c_str(), m->name,
                     verifies ? "epsilon" : "density", verifies ? at.epsilon : at.density);
        const summary s = measure(p, *m, at, o.trials, o.seed);
        const auto share = static_cast<double>(s.exact) / static_cast<double>(s.trials);
        csv << regime << ',' << o.values << ',' << o.n << ',' << o.dim << ',' << m->name << ','
            << (verifies ? number(at.epsilon) + ',' + number(at.delta) : ",") << ',' << s.trials << ','
            << number(s.density) << ',' << number(s.mean) << ',' << number(s.p50) << ',' << number(s.p90) << ','
            << (verifies ? std::to_string(s.failures) : "") << ',' << number(share) << ',' << number(s.ms) << '\n'
            << std::flush;
      }
    }
  }
  std::fprintf(stderr, "\n");
}

}  // namespace

int main(int argc, char** argv) {
  options o;
  CLI::App app{
      "Sparsity against error. One CSV row per cell; `failures` counts the trials whose error, against double "
      "precision, exceeds epsilon (methods that promise none are swept over their density)."};
  const auto list = [](CLI::Option* option) { return option->delimiter(',')->capture_default_str(); };
  const CLI::Range share(1e-9, 1.0);
  std::vector<std::string> names;
  for (const contender& m : contenders) names.push_back(m.name);

  app.add_option("--n", o.n, "Tokens in the cache")->check(CLI::Range(2, 1 << 24))->capture_default_str();
  app.add_option("--dim", o.dim, "Elements of a key and of a value")->check(CLI::Range(1, 4096))->capture_default_str();
  CLI::Option* epsilons = list(app.add_option("--epsilons", o.epsilons, "Errors to promise"))->check(share);
  list(app.add_option("--deltas", o.deltas, "Shares of draws that may exceed epsilon"))->check(share);
  CLI::Option* densities =
      list(app.add_option("--densities", o.densities, "Densities of the methods that promise nothing"))->check(share);
  list(app.add_option("--regimes", o.regimes, "Regimes, or `hostile`, or `all`"));
  list(app.add_option("--methods", o.names, "Methods; default all"))->check(CLI::IsMember(names));
  app.add_option("--values", o.values, "Kind of values")
      ->check(CLI::IsMember(synthetic::value_kinds()))
      ->capture_default_str();
  app.add_option("--error-scale", o.scale, "What the error is relative to: output or rms")
      ->transform(CLI::CheckedTransformer(
          std::map<std::string, error_scale>{{"output", error_scale::output}, {"rms", error_scale::rms}}));
  CLI::Option* trials =
      app.add_option("--trials", o.trials, "Draws per cell")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--seed", o.seed, "Seed of the caches and the draws")->capture_default_str();
  app.add_option("--csv", o.csv, "File to write; - is the standard output")->capture_default_str();
  app.add_flag("--quick", o.quick, "A look in under a minute: 20 draws, three epsilons, five densities");
  CLI11_PARSE(app, argc, argv);

  if (o.quick) {
    if (trials->empty()) o.trials = 20;
    if (epsilons->empty()) o.epsilons = {0.05, 0.1, 0.2};
    if (densities->empty()) o.densities = {0.002, 0.01, 0.05, 0.2, 0.5};
  }
  std::vector<std::string> known = synthetic::standard_regimes();
  known.insert(known.end(), synthetic::hostile_regimes().begin(), synthetic::hostile_regimes().end());
  if (o.regimes == std::vector<std::string>{"hostile"}) o.regimes = synthetic::hostile_regimes();
  if (o.regimes == std::vector<std::string>{"all"}) o.regimes = known;
  for (const std::string& regime : o.regimes) {
    if (std::find(known.begin(), known.end(), regime) != known.end()) continue;
    std::cerr << "sweep: unknown regime '" << regime << "': use " << CLI::detail::join(known, ", ") << '\n';
    return 2;
  }
  try {
    if (o.csv == "-") {
      run(o, std::cout);
      return 0;
    }
    std::ofstream file(o.csv);
    if (!file) throw std::runtime_error("cannot write " + o.csv);
    run(o, file);
    if (!file) throw std::runtime_error("writing " + o.csv + " failed: is the disk full?");
  } catch (const std::exception& e) {
    std::cerr << "\nsweep: " << e.what() << '\n';
    return 1;
  }
  return 0;
}
