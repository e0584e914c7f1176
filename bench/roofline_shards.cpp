// A decode step over a cache that is split: sampled shards against dense shards merged by (o, log-sum-exp), in turn, in
// one run, over the processes of mpirun or threads of this one.
//   mpirun -n 2 roofline_shards --n 1048576 --regime gauss1,gauss3 --json shards.json
// `cpu_ms` is the slowest rank's processor time outside exchanges: what a machine shared with others says of the work.
//   roofline_shards --ranks 1 --threads 2 --n 1048576          (the whole in one process; mode `index`: not split at
//   all)
// `warm` and `index_warm` begin where their last step ended; each step asks for the same query.

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <functional>
#include <nlohmann/json.hpp>

#include "common/ranks.hpp"
#include "roofline_cache.hpp"
#include "support/atomic_file.hpp"
#include "vattn/base/thread_pool.hpp"
#include "vattn/dist/merge.hpp"
#include "vattn/dist/sharded_attention.hpp"

namespace {

using namespace vattn;
using element = Eigen::bfloat16;

struct settings {
  std::vector<index_t> n{131072};
  std::vector<std::string> regimes{"gauss1"};
  index_t heads = 32, kv_heads = 8, dim = 128, threads = 1;
  double epsilon = 0.05, delta = 0.1;
  int ranks = 0, repeats = 15, bits = 2;
  std::uint64_t seed = 1;
  std::string json;
};

struct row {
  std::string mode, regime;
  index_t n = 0, ranks = 0, threads = 0, failures = 0, draws = 0, exchanges = 0;
  double ms = 0, ms_min = 0, cpu_ms = 0, exchange_us = 0, speedup = 0, density = 0, error_p90 = 0;
  std::size_t bytes_sent = 0;
};

void require(const status& s) {
  if (!s) throw std::runtime_error(s.message());
}

double quantile(std::vector<double> v, double p) {
  if (v.empty()) return 0;
  std::sort(v.begin(), v.end());
  return v[std::min(v.size() - 1, static_cast<std::size_t>(p * static_cast<double>(v.size())))];
}

// Of the calling thread, or of all the process's threads: what others take of the machine is not in it.
double cpu_ms(bool thread) {
  std::timespec t{};
  clock_gettime(thread ? CLOCK_THREAD_CPUTIME_ID : CLOCK_PROCESS_CPUTIME_ID, &t);
  return 1e3 * static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_nsec);
}

// Adds up the time that a rank spends in exchanges, waiting for others included.
struct timed_communicator {
  dist::communicator_ref& of;
  bool thread = false;
  double us = 0, cpu = 0;
  [[nodiscard]] int rank() const noexcept { return of.rank(); }
  [[nodiscard]] int size() const noexcept { return of.size(); }
  [[nodiscard]] status all_gather(std::span<const std::byte> mine, std::span<std::byte> all) noexcept {
    const auto start = std::chrono::steady_clock::now();
    const double before = cpu_ms(thread);
    status s = of.all_gather(mine, all);
    cpu += cpu_ms(thread) - before;
    us += std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
    return s;
  }
};

void measure(const settings& o, const std::string& regime, index_t n, dist::communicator_ref comm,
             std::vector<row>& table) {
  const bench::roofline_cache<element> cache({regime, n / comm.size(), o.heads, o.kv_heads, o.dim}, o.seed,
                                             comm.rank());
  const auto shard = cache.view();
  thread_pool pool(o.threads);
  std::vector<kv_index> index;
  index.emplace_back(index_shape{.n_kv_heads = o.kv_heads, .dk = o.dim, .dv = o.dim, .bits = o.bits});
  require(index[0].build(shard));
  config c;
  c.epsilon = o.epsilon, c.delta = o.delta;
  const std::array<index_t, 4> shape{1, 1, o.heads, o.dim};
  const std::array<index_t, 3> heads{1, 1, o.heads};
  std::vector<float> output(static_cast<std::size_t>(o.heads * o.dim)), dense(output.size()),
      lse(static_cast<std::size_t>(o.heads));
  std::vector<certificate> certificates(lse.size());
  const attention_result to{{output.data(), shape}, {lse.data(), heads}, {certificates.data(), heads}};
  const attention_options options = cache.options();
  const dist::sharded_attention<> attend(c, index, dist::split::round_robin);
  const vattention<index_policy> alone(c, {index});
  std::vector<index_memory> of_shard(static_cast<std::size_t>(o.kv_heads)), of_whole(of_shard.size());
  const dist::sharded_attention<> again(c, index, dist::split::round_robin, of_shard);
  const vattention<index_policy> alone_again(c, {index, of_whole});
  workspace memory;
  const bool thread = o.ranks > 1;  // then they share a process, and have a thread each
  timed_communicator exchange{comm, thread};
  dist::traffic cost, cost_again;
  const auto run_dense = [&](std::uint32_t) {
    const status local = exact_attention(cache.query(), shard, options, to, memory, pool);
    require(dist::merge_outputs(to.output, to.log_sum_exp, memory, exchange, local));
  };
  const auto run_shards = [&](std::uint32_t step) {
    require(attend(cache.query(), shard, options, to, memory, exchange, {.step = step}, pool, &cost));
  };
  const auto run_again = [&](std::uint32_t step) {
    require(again(cache.query(), shard, options, to, memory, exchange, {.step = step}, pool, &cost_again));
  };
  const auto run_alone = [&](std::uint32_t step) {
    require(alone(cache.query(), shard, options, to, memory, {.step = step}, pool));
  };
  const auto run_alone_again = [&](std::uint32_t step) {
    require(alone_again(cache.query(), shard, options, to, memory, {.step = step}, pool));
  };

  struct mode {
    const char* name;
    std::function<void(std::uint32_t)> run;
    const dist::traffic* sent = nullptr;
    std::vector<double> ms{}, cpu{}, us{}, errors{};
    double density = 0;
  };
  std::vector<mode> modes{{"dense", run_dense}, {"shards", run_shards, &cost}, {"warm", run_again, &cost_again}};
  if (comm.size() == 1) modes.push_back({"index", run_alone}), modes.push_back({"index_warm", run_alone_again});
  for (int repeat = -1; repeat < o.repeats; ++repeat) {  // the first warms up
    for (mode& m : modes) {
      examples::barrier(comm);
      exchange.us = exchange.cpu = 0;
      const double before = cpu_ms(thread);
      const auto start = std::chrono::steady_clock::now();
      m.run(static_cast<std::uint32_t>(repeat + 1));
      const double cpu_after = cpu_ms(thread);
      const double own = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
      const double slowest = examples::largest(comm, own);
      const double cpu = examples::largest(comm, cpu_after - before - exchange.cpu);
      if (&m == &modes[0]) dense = output;
      if (repeat < 0) continue;
      m.ms.push_back(slowest), m.cpu.push_back(cpu), m.us.push_back(exchange.us);
      for (std::size_t h = 0; h < lse.size(); ++h) {
        double miss = 0, norm = 0;
        for (std::size_t d = h * static_cast<std::size_t>(o.dim); d < (h + 1) * static_cast<std::size_t>(o.dim); ++d) {
          miss += std::pow(double{output[d]} - double{dense[d]}, 2), norm += std::pow(double{dense[d]}, 2);
        }
        m.errors.push_back(std::sqrt(miss / norm));
        m.density += certificates[h].density() / static_cast<double>(o.repeats) / static_cast<double>(lse.size());
      }
    }
  }
  if (comm.rank() != 0) return;
  for (mode& m : modes) {
    row r{.mode = m.name, .regime = regime, .n = n, .ranks = comm.size(), .threads = o.threads};
    const bool first = &m == &modes[0];
    r.ms = quantile(m.ms, 0.5), r.ms_min = quantile(m.ms, 0), r.exchange_us = quantile(m.us, 0.5);
    r.cpu_ms = quantile(m.cpu, 0.5);
    r.speedup = quantile(modes[0].ms, 0.5) / r.ms;
    r.density = first ? 1 : m.density, r.error_p90 = quantile(m.errors, 0.9);
    r.draws = static_cast<index_t>(m.errors.size());
    r.failures = std::count_if(m.errors.begin(), m.errors.end(), [&](double e) { return e > o.epsilon; });
    r.exchanges = m.sent ? m.sent->exchanges : first ? 2 : 0;
    r.bytes_sent = m.sent  ? m.sent->bytes_sent
                   : first ? static_cast<std::size_t>(o.heads * (o.dim + 1)) * sizeof(float)
                           : 0;
    table.push_back(r);
  }
}

void run(settings& o, int& argc, char**& argv) {
  std::vector<row> table;
  bool first = true;
  examples::on_ranks(o.ranks, argc, argv, [&](dist::communicator_ref comm) {
    if (comm.rank() != 0 && o.ranks == 0) first = false;  // a process of its own
    for (const std::string& regime : o.regimes) {
      for (const index_t n : o.n) measure(o, regime, n, comm, table);
    }
  });
  if (!first) return;
  std::printf("%-10s %-8s %9s %5s %2s %9s %9s %8s %11s %7s %8s %10s %9s %s\n", "mode", "regime", "n", "ranks", "t",
              "ms", "ms_min", "cpu_ms", "exchange_us", "speedup", "density", "bytes_sent", "error_p90", "failures");
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const row& r : table) {
    std::printf("%-10s %-8s %9lld %5lld %2lld %9.3f %9.3f %8.2f %11.1f %7.2f %8.4f %10zu %9.2e %lld/%lld\n",
                r.mode.c_str(), r.regime.c_str(), static_cast<long long>(r.n), static_cast<long long>(r.ranks),
                static_cast<long long>(r.threads), r.ms, r.ms_min, r.cpu_ms, r.exchange_us, r.speedup, r.density,
                r.bytes_sent, r.error_p90, static_cast<long long>(r.failures), static_cast<long long>(r.draws));
    rows.push_back({{"mode", r.mode},
                    {"regime", r.regime},
                    {"n", r.n},
                    {"ranks", r.ranks},
                    {"threads", r.threads},
                    {"ms", r.ms},
                    {"ms_min", r.ms_min},
                    {"cpu_ms", r.cpu_ms},
                    {"exchange_us", r.exchange_us},
                    {"exchanges", r.exchanges},
                    {"speedup_over_dense", r.speedup},
                    {"bytes_sent", r.bytes_sent},
                    {"density", r.density},
                    {"error_p90", r.error_p90},
                    {"failures", r.failures},
                    {"draws", r.draws},
                    {"epsilon", o.epsilon},
                    {"delta", o.delta}});
  }
  if (o.json.empty()) return;
  support::atomic_file json(o.json);
  json.stream() << nlohmann::ordered_json{{"isa", kernel::to_string(kernel::active_isa())},
                                          {"repeats", o.repeats},
                                          {"rows", rows}}
                       .dump(1)
                << '\n';
  json.commit();
}

}  // namespace

int main(int argc, char** argv) {
  settings o;
  std::string heads = "32/8";
  CLI::App app{
      "Sampled shards against dense shards that are merged, in turn, in one run. `failures` counts outputs further "
      "than epsilon from the dense one."};
  app.add_option("--n", o.n, "Tokens, all ranks together")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  app.add_option("--regime", o.regimes, "Regimes of the logits")
      ->delimiter(',')
      ->check(CLI::IsMember(synthetic::standard_regimes()))
      ->capture_default_str();
  app.add_option("--heads", heads, "Query heads/KV heads")->capture_default_str();
  app.add_option("--dim", o.dim, "Elements of a key and of a value")->check(CLI::Range(1, 1024))->capture_default_str();
  app.add_option("--ranks", o.ranks, "Threads that are ranks; default: the processes that mpirun started")
      ->check(CLI::Range(1, dist::most_ranks));
  app.add_option("--threads", o.threads, "Of each rank")->check(CLI::Range(1, 256))->capture_default_str();
  app.add_option("--bits", o.bits, "Of the index")->check(CLI::Range(1, 4))->capture_default_str();
  app.add_option("--epsilon", o.epsilon, "Error to promise")->check(CLI::Range(1e-6, 1.0))->capture_default_str();
  app.add_option("--delta", o.delta, "Share of outputs that may exceed it")
      ->check(CLI::Range(1e-9, 0.999))
      ->capture_default_str();
  app.add_option("--repeats", o.repeats, "Steps that are timed")->check(CLI::Range(1, 10000))->capture_default_str();
  app.add_option("--seed", o.seed, "Of the caches")->capture_default_str();
  app.add_option("--json", o.json, "File to write");
  CLI11_PARSE(app, argc, argv);
  try {
    long long q = 0, kv = 0;
    char rest = 0;
    if (std::sscanf(heads.c_str(), "%lld/%lld%c", &q, &kv, &rest) != 2 || q < 1 || kv < 1 || q % kv != 0)
      throw std::runtime_error("--heads " + heads + ": give query heads/KV heads, such as 32/8");
    o.heads = q, o.kv_heads = kv;
    run(o, argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "roofline_shards: %s\n", e.what());
    return 1;
  }
  return 0;
}
