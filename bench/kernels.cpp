// Time of each stage and of the whole. Inputs are the regimes of tools/support/regimes.hpp.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support/regimes.hpp"
#include "vattn/vattn.hpp"

namespace {

using namespace vattn;
using clock_type = std::chrono::steady_clock;

double seconds_since(clock_type::time_point start) {
  return std::chrono::duration<double>(clock_type::now() - start).count();
}

// For ratios: steadier than the wall clock where other programs share the cores.
double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

constexpr index_t head_size = 128;

/// A cache of element type T. Kept between benchmarks: making one takes longer than reading it.
template <class T>
struct kv_data {
  synthetic::cache source;
  std::vector<T> k, v;
  std::vector<float> norms, centre;
  std::vector<float> truth;  // exact output

  kv_data(const std::string& regime, index_t n) : source(synthetic::make_cache(regime, "mean", n, head_size, 1)) {
    const auto convert = [](const std::vector<float>& from, std::vector<T>& to) {
      to.resize(from.size());
      std::transform(from.begin(), from.end(), to.begin(), [](float x) { return static_cast<T>(x); });
    };
    convert(source.k, k);
    convert(source.v, v);
    const auto width = static_cast<std::size_t>(head_size);
    centre.assign(source.v.begin(), source.v.begin() + head_size);
    norms.resize(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < norms.size(); ++i)
      norms[i] = kernel::squared_distance(std::span<const float>(&source.v[i * width], width), centre.data());
    for (float& x : norms) x = std::sqrt(x);
    source.k = {};
    source.v = {};
    truth.resize(width);
    workspace memory;
    if (!exact_attention(query(), view(), options(), {.output = {truth.data(), {1, 1, 1, head_size}}}, memory))
      truth.clear();
  }

  [[nodiscard]] tensor_view<const float, 4> query() const { return {source.q.data(), {1, 1, 1, head_size}}; }
  [[nodiscard]] kv_view<T, T> view() const {
    const kv_shape shape{.n_batch = 1, .n_kv_heads = 1, .n_tokens = source.n, .dk = head_size, .dv = head_size};
    return contiguous_kv(k.data(), v.data(), shape)
        .with_norms({.values = norms.data(), .value_centres = centre.data()});
  }
  [[nodiscard]] attention_options options() const {
    attention_options o;
    o.scale = source.scale();
    return o;
  }
  [[nodiscard]] double error(const std::vector<float>& output) const {
    double miss = 0, norm = 0;
    for (std::size_t j = 0; j < truth.size(); ++j) {
      miss += (output[j] - truth[j]) * (output[j] - truth[j]);
      norm += truth[j] * truth[j];
    }
    return std::sqrt(miss / norm);
  }
};

template <class T>
const kv_data<T>& data(const std::string& regime, index_t n) {
  static std::pair<std::string, std::unique_ptr<kv_data<T>>> latest;  // one at a time: large ones are 128 MB
  const std::string name = regime + std::to_string(n);
  if (latest.first != name) latest = {name, std::make_unique<kv_data<T>>(regime, n)};
  return *latest.second;
}

std::vector<float> logits(index_t n) {
  std::mt19937_64 random(1);
  return synthetic::make_logits("gauss2", n, random);
}

// ---- Selection ----------------------------------------------------------------------------------

void top_k_selection(benchmark::State& state) {
  const auto scores = logits(state.range(0));
  std::vector<ordinal> order(scores.size());
  for (auto _ : state) benchmark::DoNotOptimize(top_k(scores, state.range(1), order).data());
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(top_k_selection)->ArgNames({"n", "k"})->ArgsProduct({{32768, 131072}, {128, 1024, 8192}});

void top_p_selection(benchmark::State& state) {
  const auto scores = logits(state.range(0));
  std::vector<ordinal> order(scores.size());
  std::size_t kept = 0;
  for (auto _ : state) kept = top_p(scores, 0.01 * static_cast<double>(state.range(1)), order).size();
  state.SetItemsProcessed(state.iterations() * state.range(0));
  state.counters["kept"] = static_cast<double>(kept);
}
BENCHMARK(top_p_selection)->ArgNames({"n", "percent"})->ArgsProduct({{32768, 131072}, {50, 90, 99}});

// ---- Sampling -----------------------------------------------------------------------------------

template <class Sampler>
void uniform_indices(benchmark::State& state) {
  const auto n = static_cast<ordinal>(state.range(0));
  std::vector<std::uint64_t> table(Sampler::table_size(n));
  std::uint32_t step = 0;
  for (auto _ : state) {
    Sampler sampler(n, random_stream({1, 0, ++step}, 0), table);
    ordinal sum = 0;
    for (index_t i = 0; i < state.range(1); ++i) sum += sampler.next();
    benchmark::DoNotOptimize(sum);
  }
  state.SetItemsProcessed(state.iterations() * state.range(1));
}
BENCHMARK(uniform_indices<sample::uniform_without_replacement>)
    ->ArgNames({"n", "m"})
    ->ArgsProduct({{32768, 131072}, {128, 1024, 8192}});
BENCHMARK(uniform_indices<sample::uniform_with_replacement>)
    ->ArgNames({"n", "m"})
    ->ArgsProduct({{32768, 131072}, {128, 1024, 8192}});

// ---- Budgets ------------------------------------------------------------------------------------

// Delta varies from call to call so that nothing can be hoisted out of the loop.
double vary(double delta, std::int64_t i) { return delta * (1 + 1e-6 * static_cast<double>(i % 16)); }

void f_quantile(benchmark::State& state) {
  const auto nu1 = static_cast<double>(state.range(0)), nu2 = static_cast<double>(state.range(1));
  std::int64_t i = 0;
  for (auto _ : state) benchmark::DoNotOptimize(stats::squared_error_quantile(vary(0.1, ++i), nu1, nu2));
}
BENCHMARK(f_quantile)->ArgNames({"nu1", "nu2"})->ArgsProduct({{1, 10, 100}, {5, 50, 1000, 100000}});

template <class Bound>
void sample_size(benchmark::State& state) {
  stats::sum_evidence e;
  e.population = 32000;
  e.variance = 1e-8;
  e.sampled = 256;
  e.radius = 1e-3;
  e.second_moment = 1e-8;
  e.scalar = state.range(0) == 0;
  if (!e.scalar) e.dimension = 60, e.dof = 150;
  std::int64_t i = 0;
  double rows = 0;
  for (auto _ : state) benchmark::DoNotOptimize(rows = budget::sample_size<Bound>(e, 0.05, vary(0.1, ++i)));
  state.counters["rows"] = rows;
}
BENCHMARK(sample_size<budget::clt>)->ArgName("vector")->Arg(0)->Arg(1);
BENCHMARK(sample_size<budget::hoeffding>)->ArgName("vector")->Arg(0)->Arg(1);
BENCHMARK(sample_size<budget::bernstein>)->ArgName("vector")->Arg(0)->Arg(1);

// ---- The scan of key codes ----------------------------------------------------------------------

/// Codes of random keys for a group of heads, whose thresholds take none: from a cache, or a million from memory.
void code_scan(benchmark::State& state, kernel::isa how) {
  static const sketch::block_codes codes = [] {
    sketch::block_codes all(head_size, 1);
    std::mt19937_64 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> key(head_size);
    for (int i = 0; i < 1 << 20; ++i) {
      for (float& x : key) x = normal(random);
      if (!all.append(key, 1)) break;
    }
    return all;
  }();
  const index_t heads = state.range(0), keys = state.range(1);
  if (codes.size() < keys) return state.SkipWithError("no memory");
  std::vector<float> queries(static_cast<std::size_t>(heads * head_size), 0.1f);
  sketch::query_tables tables;
  std::vector<std::uint8_t> entries(static_cast<std::size_t>(heads * codes.groups() * 64));
  std::vector<float> spare(sketch::query_tables::scratch_size(codes, heads));
  if (!tables.make(codes, queries.data(), heads, head_size, entries, spare)) return state.SkipWithError("tables");
  tables.query.plain.fill(32000);
  tables.query.floor.fill(32000);
  std::vector<kernel::scan_pick> picks(kernel::scan_keys);
  for (auto _ : state) {
    const index_t have =
        kernel::scan(how, tables.query, codes.view(), 0, keys / kernel::scan_keys, picks.data(), 0, kernel::scan_keys);
    if (have != 0) return state.SkipWithError("a key was taken");
  }
  state.counters["per_key"] = benchmark::Counter(static_cast<double>(state.iterations() * keys),
                                                 benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

// ---- Dense --------------------------------------------------------------------------------------

template <class T>
void dense(benchmark::State& state) {
  const auto& cache = data<T>("gauss2", state.range(0));
  std::vector<float> output(head_size);
  workspace memory;
  for (auto _ : state) {
    const status s = exact_attention(cache.query(), cache.view(), cache.options(),
                                     {.output = {output.data(), {1, 1, 1, head_size}}}, memory);
    if (!s) return state.SkipWithError(s.message());
  }
  state.SetBytesProcessed(state.iterations() * state.range(0) * 2 * head_size * static_cast<index_t>(sizeof(T)));
}
BENCHMARK(dense<float>)->ArgName("n")->Arg(32768)->Arg(131072);
BENCHMARK(dense<Eigen::half>)->ArgName("n")->Arg(32768)->Arg(131072);
BENCHMARK(dense<Eigen::bfloat16>)->ArgName("n")->Arg(32768)->Arg(131072);

// ---- The functor --------------------------------------------------------------------------------

// What a stage of the calls so far took. One thread: benchmarks run one after another.
struct stopwatch {
  double seconds = 0;
  std::int64_t calls = 0;
};
stopwatch scoring, judging;

template <class Selector>
struct timed_selector : Selector {
  template <class Row>
  score_result score(const Row& row, const population& tokens, const score_buffers& out) const noexcept {
    const auto start = clock_type::now();
    const score_result r = Selector::score(row, tokens, out);
    scoring.seconds += seconds_since(start);
    return r;
  }
};

template <class Target>
struct timed_target : Target {
  template <bound B>
  static verdict judge(const look& l) noexcept {
    const auto start = clock_type::now();
    const verdict v = Target::template judge<B>(l);
    judging.seconds += seconds_since(start);
    ++judging.calls;
    return v;
  }
};

template <class Policy>
struct timed : Policy {
  using selector = timed_selector<typename Policy::selector>;
  using target = timed_target<typename Policy::target>;
};

/// `scoring` is the share of the selector's pass over all keys, which a sketch or an index replaces.
template <class Policy, class T>
void functor(benchmark::State& state, const std::string& regime, config settings) {
  const auto& cache = data<T>(regime, state.range(0));
  settings.epsilon = 0.01 * static_cast<double>(state.range(1));
  settings.delta = 0.1;
  const vattention<timed<Policy>> attend(settings);
  std::vector<float> output(head_size);
  certificate c;
  workspace memory;
  draw_key key{.seed = 1};
  double rows = 0, error = 0, rounds = 0;
  scoring = judging = {};
  const auto start = clock_type::now();
  for (auto _ : state) {
    const status s =
        attend(cache.query(), cache.view(), cache.options(),
               {.output = {output.data(), {1, 1, 1, head_size}}, .certificates = {&c, {1, 1, 1}}}, memory, key);
    if (!s) return state.SkipWithError(s.message());
    ++key.step;
    rows += static_cast<double>(c.rows());
    rounds += static_cast<double>(c.rounds);
    error += cache.error(output);
  }
  const double total = seconds_since(start);
  const auto mean = [&](double x) { return benchmark::Counter(x, benchmark::Counter::kAvgIterations); };
  state.counters["rows"] = mean(rows);
  state.counters["density"] = mean(rows / static_cast<double>(c.n));
  state.counters["error"] = mean(error);
  state.counters["rounds"] = mean(rounds);
  state.counters["row_bytes"] = mean(rows * 2 * head_size * sizeof(T));
  state.counters["scoring"] = scoring.seconds / total;
  state.counters["judging"] = judging.seconds / total;
  state.counters["us_per_look"] = judging.calls ? 1e6 * judging.seconds / static_cast<double>(judging.calls) : 0;
}

// ---- A sampled row against an exact one ---------------------------------------------------------

/// The same number of rows at random places, once sampled (`residual_sample::grow`: draw, logit, moments)
/// and once exact (`accumulate_exact`), in turn. `in_cache`: all rows fit L2. `ratio` is the time of the one
/// over that of the other; `add_ratio` leaves the draw out and takes the rows one by one.
template <class T>
void sampled_row(benchmark::State& state) {
  const bool in_cache = state.range(0) == 1;
  const index_t n = in_cache ? 512 : 131072, batch = in_cache ? 256 : 2048;
  const auto& cache = data<T>("gauss2", n);
  const auto head = cache.view().head(0, 0);
  std::vector<float> query = cache.source.q;
  for (float& x : query) x *= cache.source.scale();
  const query_row<std::remove_cvref_t<decltype(head)>> row{.head = head, .scaled_query = query.data()};

  std::vector<index_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(1);
  std::shuffle(order.begin(), order.end(), random);
  index_t at = 0;
  const auto next_batch = [&] {
    const index_t first = at;
    at = at + 2 * batch > n ? 0 : at + batch;
    return &order[static_cast<std::size_t>(first)];
  };

  using sampler = sample::uniform_without_replacement;
  const auto width = static_cast<std::size_t>(head_size);
  std::vector<float> numerator(width), part_storage(width), centre(width);
  std::vector<float> storage(residual_moments::storage_size(head_size));
  softmax_state exact(numerator), part(part_storage);
  residual_moments moments(storage, head_size);
  std::vector<std::uint64_t> table(sampler::table_size(static_cast<ordinal>(n)));
  std::vector<drawn_row> drawn(static_cast<std::size_t>(batch));
  std::vector<ordinal> places(static_cast<std::size_t>(n));
  const std::vector<float> scores(static_cast<std::size_t>(n));
  const population tokens(0, n);
  const ranking unranked(scores, 0, n, places);

  double grow_time = 0, add_time = 0, exact_time = 0;
  std::uint32_t step = 0;
  for (auto _ : state) {
    moments.clear(centre, 4);
    double start = cpu_seconds();
    residual_sample sample(row, tokens, 0, 0, unranked,
                           sampler(static_cast<ordinal>(n), random_stream({1, 0, ++step}, 0), table), drawn, moments);
    benchmark::DoNotOptimize(sample.grow(batch));
    const double grow = cpu_seconds() - start;

    const index_t* rows = next_batch();
    start = cpu_seconds();
    benchmark::DoNotOptimize(accumulate_exact(
        row, batch, [&](index_t i) { return rows[i]; }, exact, part, false));
    exact_time += cpu_seconds() - start;

    rows = next_batch();
    start = cpu_seconds();
    for (index_t i = 0; i < batch; ++i) benchmark::DoNotOptimize(moments.add(row.logit(rows[i]), head.value(rows[i])));
    add_time += cpu_seconds() - start;

    grow_time += grow;
    state.SetIterationTime(grow);
  }
  const auto per_row = [&](double seconds) {
    return benchmark::Counter(1e9 * seconds / static_cast<double>(batch), benchmark::Counter::kAvgIterations);
  };
  state.counters["sampled_ns"] = per_row(grow_time);
  state.counters["exact_ns"] = per_row(exact_time);
  state.counters["ratio"] = grow_time / exact_time;
  state.counters["add_ratio"] = add_time / exact_time;
}
BENCHMARK(sampled_row<float>)->ArgName("in_cache")->Arg(1)->Arg(0)->UseManualTime();
BENCHMARK(sampled_row<Eigen::half>)->ArgName("in_cache")->Arg(1)->Arg(0)->UseManualTime();
BENCHMARK(sampled_row<Eigen::bfloat16>)->ArgName("in_cache")->Arg(1)->Arg(0)->UseManualTime();

struct bernstein_policy : ranked_policy {
  using bound = budget::bernstein;
};

template <class Policy, class T>
void add_functor(const std::string& name, const std::string& regime, const config& settings) {
  benchmark::RegisterBenchmark(
      ("functor/" + name + "/" + regime).c_str(),
      [regime, settings](benchmark::State& state) { functor<Policy, T>(state, regime, settings); })
      ->ArgNames({"n", "eps%"})
      ->ArgsProduct({{32768, 131072}, {5}})
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (const char* regime : {"flat", "gauss2", "laplace", "needle"}) {
    add_functor<ranked_policy, float>("output/f32", regime, {});
    add_functor<verified_denominator, float>("paper/f32", regime, presets::paper_default);
    add_functor<verified_numerator, float>("numerator/f32", regime, {});
    add_functor<verified_sdpa, float>("sdpa/f32", regime, {});
  }
  add_functor<ranked_policy, Eigen::half>("output/f16", "gauss2", {});
  add_functor<ranked_policy, Eigen::bfloat16>("output/bf16", "gauss2", {});
  add_functor<bernstein_policy, float>("output+bernstein/f32", "gauss2", {});
  for (const kernel::isa how : kernel::isa_levels) {
    if (how > kernel::widest_isa()) continue;
    benchmark::RegisterBenchmark((std::string("code_scan/") + to_string(how)).c_str(),
                                 [how](benchmark::State& state) { code_scan(state, how); })
        ->ArgNames({"heads", "keys"})
        ->ArgsProduct({{1, 2, 4, 8}, {4096, 1 << 20}})
        ->Unit(benchmark::kMicrosecond);
  }
  benchmark::AddCustomContext("vattn_build_type", VATTN_BUILD_TYPE);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
