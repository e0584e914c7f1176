// Every selector with every sampler: what it knows of the tokens, what that costs, and what it saves.
//   compare --csv compare.csv && plot_compare compare.csv compare.svg

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <numeric>

#include "common/selectors.hpp"
#include "contenders.hpp"
#include "support/real_tensors.hpp"

namespace {

using namespace vattn;
using namespace vattn::bench;
using examples::index_variant;

struct options {
  index_t n = 32768, dim = 128;
  std::vector<std::string> regimes = synthetic::standard_regimes(), real, selectors;
  std::vector<double> epsilons{0.02, 0.05, 0.1, 0.2}, densities{0.005, 0.01, 0.02, 0.05, 0.1, 0.2};
  std::vector<int> bits{1, 2, 4, 8};
  double delta = 0.1;
  index_t draws = 40, queries = 8, sinks = 128, window = 128;
  std::uint64_t seed = 1;
  std::string values = "mean", csv = "-";
};

// Scores of one query, computed once: draws of one query differ in their randomness alone.
struct remembered {
  static constexpr bool estimates = true, upper_bounds = true;
  const std::vector<float>* scores = nullptr;
  const std::vector<float>* errors = nullptr;
  score_kind kind = score_kind::ranking;
  index_t rows_read = 0;

  template <class Row>
  score_result score(const Row&, const population& tokens, const score_buffers& out) const noexcept {
    for (index_t j = 0; j < tokens.size(); ++j) {
      const auto to = static_cast<std::size_t>(j), from = static_cast<std::size_t>(tokens[j]);
      out.scores[to] = (*scores)[from];
      if (!out.errors.empty() && !errors->empty()) out.errors[to] = (*errors)[from];
    }
    score_result r{.kind = kind};
    r.rows_read = rows_read;
    return r;
  }
  index_t heavy_count(const ranking& r, index_t n, const config& c) const noexcept {
    return select::top_k<select::exact_logits>{}.heavy_count(r, n, c);
  }
};

template <class Sampler, class Bound = budget::clt, class Selector = remembered>
struct policy : default_policy {
  using selector = Selector;
  using sampler = Sampler;
  using bound = Bound;
};

/// What a selector says of one query's tokens.
struct scored {
  std::vector<float> scores, errors;  ///< as they are
  std::vector<float> logits, sigma;   ///< as estimates, calibrated where the scores are none
  std::vector<float> bounds;          ///< upper bounds of the logits, or empty
  std::vector<float> above;           ///< bounds as far as the stated errors are true, or empty
  index_t rows_read = 0;              ///< by the calibration
  double ns_per_token = 0;
};

template <class Index, class Head>
scored score_with(const std::vector<Index>& index, const query_row<Head>& row, index_t n) {
  scored s;
  const select::indexed<Index> selector{index};
  const population tokens(0, n);
  const auto size = static_cast<std::size_t>(n);
  s.scores.resize(size);
  if (Index::estimates) s.errors.resize(size);
  std::vector<float> scratch(selector.scratch_size() + 4096), centre(static_cast<std::size_t>(row.dv()));
  const score_buffers out{s.scores, s.errors, centre, scratch};
  double best = 1e30;
  for (int i = 0; i < 3; ++i) {
    const auto start = std::chrono::steady_clock::now();
    static_cast<void>(selector.score(row, tokens, out));
    best = std::min(best, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
  }
  s.ns_per_token = best / static_cast<double>(n);
  s.logits = s.scores;
  s.sigma.resize(size);
  if constexpr (Index::estimates) {
    s.sigma = s.errors;
    s.above.resize(size);
    for (std::size_t i = 0; i < size; ++i) s.above[i] = s.scores[i] + select::upper_scores<Index>{}.times * s.errors[i];
    const float times = index[0].bound_over_error();
    if (std::isfinite(times)) {
      s.bounds.resize(size);
      for (std::size_t i = 0; i < size; ++i) s.bounds[i] = s.scores[i] + times * s.errors[i];
    }
  } else {
    const select::calibrated<select::indexed<Index>> fitted{selector};
    scratch.resize(fitted.scratch_size());
    s.rows_read = fitted.score(row, tokens, {s.logits, s.sigma, centre, scratch}).rows_read;
    if (Index::upper_bounds) s.bounds = s.above = s.scores;
  }
  return s;
}

// Share of the k tokens of highest logit that are among the k of highest score.
double recall(const std::vector<double>& logits, const std::vector<float>& scores, std::size_t k) {
  std::vector<std::size_t> by_logit(logits.size()), by_score(logits.size());
  std::iota(by_logit.begin(), by_logit.end(), 0u);
  by_score = by_logit;
  const auto top = static_cast<std::ptrdiff_t>(k);
  std::nth_element(by_logit.begin(), by_logit.begin() + top, by_logit.end(),
                   [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
  std::nth_element(by_score.begin(), by_score.begin() + top, by_score.end(), [&](std::size_t a, std::size_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  std::sort(by_logit.begin(), by_logit.begin() + top);
  std::size_t both = 0;
  for (std::ptrdiff_t i = 0; i < top; ++i)
    both += std::binary_search(by_logit.begin(), by_logit.begin() + top, by_score[static_cast<std::size_t>(i)]);
  return static_cast<double>(both) / static_cast<double>(k);
}

/// One line of the result, over the problems of a source.
struct line {
  std::string source, selector, sampler;
  double epsilon = 0, budget = 0;
  index_t draws = 0, failures = 0, exact = 0;
  double density = 0, recall = 0, bytes = 0, ns = 0;
  std::vector<double> errors;
  std::map<std::string, std::pair<index_t, index_t>> heads;  // failures, draws
};

/// A head's cache, the queries that ask it, and the indices over its keys.
struct source {
  std::string name, head;
  std::vector<std::unique_ptr<problem>> problems;
};

class comparison {
 public:
  explicit comparison(const options& o) : o_(o) {}

  void add(const source& s, const std::string& selector, const index_variant& index, double bytes) {
    std::visit([&](const auto& each) { run(s, selector, each, bytes); }, index);
  }

  /// What needs no selector: a uniform sample alone, the oracle, top-p, MagicPIG's own estimator.
  void add_others(const source& s) {
    for (const auto& p : s.problems) {
      for (const double density : o_.densities) {
        measure(s, *p, "none", "sample", 0, density, {}, [&](const draw_key& key) {
          return attend_rows(*p, {.sinks = o_.sinks, .window = o_.window, .sampled = density}, key);
        });
      }
      scored oracle;
      for (const double l : p->logits()) oracle.scores.push_back(static_cast<float>(l));
      oracle.logits = oracle.bounds = oracle.above = oracle.scores;
      oracle.errors.assign(oracle.scores.size(), 0);
      oracle.sigma = oracle.errors;
      methods(s, *p, "oracle", oracle, {.recall = 1});
      for (const double epsilon : o_.epsilons) {
        measure(s, *p, "oracle top-p", "uniform", epsilon, 0, {.recall = 1}, [&](const draw_key& key) {
          return attend<policy<sample::uniform_without_replacement, budget::clt, select::top_p<>>>(*p, epsilon, {},
                                                                                                   key);
        });
      }
      std::vector<select::magic_pig> pig;
      const auto head = p->view().head(0, 0);
      pig.emplace_back(p->dim(), 10, 150, o_.seed, examples::prefill_of(head, 4, o_.seed).centre);
      append_from(pig[0], head);
      measure(s, *p, "magic-pig", "its own", 0, 0, {}, [&](const draw_key& key) {
        return examples::magic_pig_attention(p->query(), p->view(), p->options(), p->result(), p->memory(), pig,
                                             {.sinks = o_.sinks, .window = o_.window}, key);
      });
    }
  }

  void write(std::ostream& csv) {
    for (; written_ < order_.size(); ++written_) {
      const line& l = lines_.at(order_[written_]);
      std::vector<double> errors = l.errors;
      std::sort(errors.begin(), errors.end());
      const double n = static_cast<double>(l.draws);
      double mean = 0, worst = 0;
      for (const double e : errors) mean += e / n;
      for (const auto& [name, head] : l.heads)
        worst = std::max(worst, static_cast<double>(head.first) / static_cast<double>(head.second));
      csv << l.source << ',' << l.selector << ',' << l.sampler << ',';
      if (l.epsilon > 0) csv << l.epsilon << ',' << o_.delta;
      if (l.epsilon <= 0) csv << ',';
      csv << ',' << l.draws << ',' << l.density / n << ',' << mean << ','
          << errors[static_cast<std::size_t>(std::ceil(0.9 * n)) - 1] << ',';
      if (l.epsilon > 0) csv << static_cast<double>(l.failures) / n << ',' << worst;
      if (l.epsilon <= 0) csv << ',';
      csv << ',' << static_cast<double>(l.exact) / n << ',' << l.recall / n << ',' << l.bytes / n << ',' << l.ns / n
          << '\n';
    }
    csv << std::flush;
  }

  static void header(std::ostream& csv) {
    csv << "source,selector,sampler,epsilon,delta,draws,density,error_mean,error_p90,failures,worst_head_failures,"
           "exact_share,recall,bytes_per_token,ns_per_token\n";
  }

 private:
  struct facts {
    double recall = 0, bytes = 0, ns = 0;
  };

  template <class Index>
  void run(const source& s, const std::string& selector, const Index& index, double bytes) {
    const std::vector<Index> heads(1, index);
    for (const auto& p : s.problems) {
      const auto head = p->view().head(0, 0);
      std::vector<float> query(static_cast<std::size_t>(p->dim()));
      for (std::size_t j = 0; j < query.size(); ++j)
        query[j] = p->query().data[j] * static_cast<float>(p->options().scale);
      const query_row<std::remove_cvref_t<decltype(head)>> row{.head = head, .scaled_query = query.data()};
      const scored said = score_with(heads, row, p->n());
      const auto k = static_cast<std::size_t>(std::max<index_t>(1, p->n() / 64));
      methods(s, *p, selector, said, {recall(p->logits(), said.scores, k), bytes, said.ns_per_token});
    }
  }

  void methods(const source& s, problem& p, const std::string& selector, const scored& said, const facts& f) {
    const remembered ranks{&said.scores, &said.errors};
    for (const double density : o_.densities) {
      measure(s, p, selector, "top-k", 0, density, f, [&](const draw_key& key) {
        return examples::fixed_budget(p.query(), p.view(), p.options(), p.result(), p.memory(),
                                      {.sinks = o_.sinks, .window = o_.window, .heavy = density}, key,
                                      serial_executor{}, ranks);
      });
    }
    const remembered estimates{&said.logits, &said.sigma, score_kind::logit, said.rows_read};
    for (const double epsilon : o_.epsilons) {
      measure(s, p, selector, "uniform", epsilon, 0, f, [&](const draw_key& key) {
        using uniform = sample::uniform_without_replacement;
        if (said.above.empty()) return attend<policy<uniform>>(p, epsilon, ranks, key);
        select::top_k<select::contributions<remembered>> guarded;
        static_cast<remembered&>(guarded) = {&said.above, &said.errors, score_kind::logit, 0};
        return attend<policy<uniform, budget::clt, decltype(guarded)>>(p, epsilon, guarded, key);
      });
      measure(s, p, selector, "importance", epsilon, 0, f,
              [&](const draw_key& key) { return attend<policy<sample::by_importance>>(p, epsilon, estimates, key); });
      if (said.bounds.empty()) continue;
      const remembered bounds{&said.bounds, &said.sigma, score_kind::logit, 0};
      measure(s, p, selector, "certified", epsilon, 0, f, [&](const draw_key& key) {
        return attend<policy<sample::by_importance, budget::bernstein>>(p, epsilon, bounds, key);
      });
    }
  }

  template <class Policy>
  [[nodiscard]] status attend(problem& p, double epsilon, const typename Policy::selector& selector,
                              const draw_key& key) const {
    config c;
    c.epsilon = epsilon, c.delta = o_.delta, c.sinks = o_.sinks, c.window = o_.window;
    return vattention<Policy>(c, selector)(p.query(), p.view(), p.options(), p.result(), p.memory(), key);
  }

  template <class Call>
  void measure(const source& s, problem& p, const std::string& selector, const std::string& sampler, double epsilon,
               double budget, const facts& f, Call&& call) {
    const bool random = sampler != "top-k" && sampler != "its own";
    const index_t draws = random ? o_.draws : 1;
    const std::string key =
        s.name + '|' + selector + '|' + sampler + '|' + std::to_string(epsilon) + '|' + std::to_string(budget);
    auto [at, fresh] = lines_.try_emplace(key);
    line& l = at->second;
    if (fresh) {
      order_.push_back(key);
      l.source = s.name, l.selector = selector, l.sampler = sampler, l.epsilon = epsilon, l.budget = budget;
    }
    for (index_t d = 0; d < draws; ++d) {
      const status ok = call(draw_key{.seed = o_.seed, .step = static_cast<std::uint32_t>(d)});
      if (!ok) throw std::runtime_error(ok.message());
      const double error = p.error(error_scale::output);
      const bool failed = epsilon > 0 && error > epsilon;
      ++l.draws;
      l.failures += failed, l.exact += p.proof().exact(), l.density += p.proof().density();
      l.recall += f.recall, l.bytes += f.bytes, l.ns += f.ns;
      l.errors.push_back(error);
      auto& head = l.heads[s.head];
      head.first += failed, ++head.second;
    }
  }

  const options& o_;
  std::map<std::string, line> lines_;
  std::vector<std::string> order_;
  std::size_t written_ = 0;
};

// A code of each size is a selector of its own here.
std::vector<std::pair<std::string, int>> chosen_selectors(const options& o) {
  std::vector<std::pair<std::string, int>> chosen;
  for (const examples::selector_entry& e : examples::selector_catalogue()) {
    if (!e.make || e.learned) continue;  // no weights, nothing to compare
    if (!o.selectors.empty() && std::find(o.selectors.begin(), o.selectors.end(), e.name) == o.selectors.end())
      continue;
    if (e.name == "codes" || e.name == "product-codes") {
      for (const int b : o.bits) {
        if (e.name == "codes" || b <= 2) chosen.emplace_back(e.name, b);
      }
    } else {
      chosen.emplace_back(e.name, 0);
    }
  }
  return chosen;
}

void run(const options& o, std::ostream& csv) {
  const auto chosen = chosen_selectors(o);
  std::size_t done = 0, total = 0;
  comparison all(o);
  comparison::header(csv);
  const auto visit = [&](const source& s) {
    const auto head = s.problems.back()->view().head(0, 0);  // the longest: it holds what the others see
    for (const auto& [name, bits] : chosen) {
      std::fprintf(stderr, "\r[%zu/%zu] %-24s %-18s", ++done, total, (s.name + ' ' + s.head).c_str(), name.c_str());
      index_variant index = examples::find_selector(name)->make(examples::prefill_of(head, bits, o.seed));
      double bytes = 0;
      std::visit(
          [&](auto& i) {
            append_from(i, head);
            bytes = static_cast<double>(i.bytes()) / static_cast<double>(i.size());
          },
          index);
      all.add(s, bits ? name + ' ' + std::to_string(bits) : name, index, bytes);
    }
    all.add_others(s);
  };
  total = chosen.size() * o.regimes.size();
  std::vector<std::unique_ptr<support::real_tensors>> tensors;
  for (const std::string& prefix : o.real) {
    tensors.push_back(std::make_unique<support::real_tensors>(prefix));
    total += chosen.size() * static_cast<std::size_t>(tensors.back()->heads());
  }
  for (const std::string& regime : o.regimes) {
    source s{regime, "0", {}};
    s.problems.push_back(std::make_unique<problem>(synthetic::make_cache(regime, o.values, o.n, o.dim, o.seed)));
    visit(s);
    all.write(csv);
  }
  for (const auto& t : tensors) {
    for (index_t h = 0; h < t->heads(); ++h) {
      source s{t->name(), std::to_string(h), {}};
      const index_t count = std::min(o.queries, t->queries());
      for (index_t i = 0; i < count; ++i)
        s.problems.push_back(std::make_unique<problem>(t->cache(h, (i + 1) * t->queries() / count - 1)));
      visit(s);
    }
    all.write(csv);
  }
  std::fprintf(stderr, "\n");
}

}  // namespace

int main(int argc, char** argv) {
  options o;
  CLI::App app{"Selectors against each other: recall, cost, and the density that each sampler needs with them."};
  const auto list = [](CLI::Option* option) { return option->delimiter(',')->capture_default_str(); };
  app.add_option("--n", o.n, "Tokens of a synthetic cache")->check(CLI::Range(1024, 1 << 24))->capture_default_str();
  app.add_option("--dim", o.dim, "Head size of a synthetic cache")->check(CLI::Range(1, 4096))->capture_default_str();
  list(app.add_option("--regimes", o.regimes, "Synthetic regimes, or `none`"));
  app.add_option("--real", o.real, "Prefixes of real tensors: PREFIX_q.npy, PREFIX_k.npy, PREFIX_v.npy (causal)");
  app.add_option("--queries", o.queries, "Queries of each real head")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  list(app.add_option("--selectors", o.selectors, "Default: all"));
  list(app.add_option("--bits", o.bits, "Bits of the codes"))->check(CLI::IsMember({1, 2, 4, 8}));
  list(app.add_option("--epsilons", o.epsilons, "Errors to promise"))->check(CLI::Range(1e-9, 1.0));
  list(app.add_option("--densities", o.densities, "Budgets of what promises nothing"))->check(CLI::Range(1e-9, 1.0));
  app.add_option("--delta", o.delta, "Share of draws that may fail")
      ->check(CLI::Range(1e-9, 1.0))
      ->capture_default_str();
  app.add_option("--draws", o.draws, "Draws of each query")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--sinks", o.sinks)->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--window", o.window)->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--values", o.values)->check(CLI::IsMember(synthetic::value_kinds()))->capture_default_str();
  app.add_option("--seed", o.seed)->capture_default_str();
  app.add_option("--csv", o.csv, "File to write; - is the standard output")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  if (o.regimes == std::vector<std::string>{"none"}) o.regimes.clear();
  try {
    for (const std::string& name : o.selectors) {
      std::vector<std::string> known;
      for (const examples::selector_entry& e : examples::selector_catalogue())
        if (e.make && !e.learned) known.push_back(e.name);
      synthetic::check_name("selector", name, known);
    }
    for (const std::string& regime : o.regimes) synthetic::check_name("regime", regime, synthetic::all_regimes());
    if (o.csv == "-") {
      run(o, std::cout);
      return 0;
    }
    std::ofstream file(o.csv);
    if (!file) throw std::runtime_error("cannot write " + o.csv);
    run(o, file);
    if (!file) throw std::runtime_error("writing " + o.csv + " failed: is the disk full?");
  } catch (const std::exception& e) {
    std::cerr << "\ncompare: " << e.what() << '\n';
    return 1;
  }
  return 0;
}
