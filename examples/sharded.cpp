// Verified attention to a cache that is split over processes of MPI, or threads: errors, failures, bytes and time,
// against dense shards merged by their log-sum-exps.
//   mpirun -n 4 sharded --n 1048576 --regime gauss1
//   sharded --ranks 2 --q q.npy --k k.npy --v v.npy --causal --split blocks --json report.json
#include <chrono>
#include <cstdio>
#include <fstream>

#include "attend/input.hpp"
#include "attend/options.hpp"
#include "attend/report.hpp"
#include "common/ranks.hpp"
#include "common/reference.hpp"
#include "roofline_cache.hpp"
#include "vattn/base/thread_pool.hpp"
#include "vattn/dist/merge.hpp"
#include "vattn/dist/sharded_attention.hpp"

namespace vattn::examples {
namespace {

struct sharded_request : request {
  int ranks = 0;
  std::string split = "round-robin", regime = "gauss1", heads = "32/8";
  index_t n = 0, dim = 128;
  dist::split placed = dist::split::round_robin;
  std::vector<int> owners;  ///< of each token, where a file says
};

void require(const status& s) {
  if (!s) throw std::runtime_error(s.message());
}

int owner(const sharded_request& r, index_t token, index_t n, int ranks) {
  if (r.placed == dist::split::round_robin) return static_cast<int>(token % ranks);
  if (r.placed == dist::split::blocks) return static_cast<int>(token * ranks / n);
  return r.owners[static_cast<std::size_t>(token)];
}

// The rank of each token, in text.
std::vector<int> read_owners(const std::string& path) {
  std::ifstream file(path);
  if (!file)
    throw std::runtime_error("--split " + path + ": it is neither round-robin nor blocks, nor a file that can be read");
  std::vector<int> all;
  for (int r; file >> r;) all.push_back(r);
  if (!file.eof()) throw std::runtime_error("--split " + path + ": give one number a token, its rank");
  return all;
}

// A rank's shard of arrays that were read whole.
template <class T>
struct part_of_arrays {
  part_of_arrays(const sharded_request& r, const problem& p, int rank, int ranks) {
    const auto k_row = static_cast<std::size_t>(p.kv_heads * p.dk), v_row = static_cast<std::size_t>(p.kv_heads * p.dv);
    for (index_t i = 0; i < p.n; ++i) {
      if (owner(r, i, p.n, ranks) != rank) continue;
      const auto at = static_cast<std::size_t>(i);
      const auto k_at = p.k.as<T>().subspan(at * k_row, k_row), v_at = p.v.as<T>().subspan(at * v_row, v_row);
      k.insert(k.end(), k_at.begin(), k_at.end());
      v.insert(v.end(), v_at.begin(), v_at.end());
      positions.push_back(static_cast<std::int32_t>(i));
    }
    shape = {.n_batch = 1,
             .n_kv_heads = p.kv_heads,
             .n_tokens = static_cast<index_t>(positions.size()),
             .dk = p.dk,
             .dv = p.dv};
    k.resize(k.size() + 1), v.resize(v.size() + 1), positions.resize(positions.size() + 1);  // not null
    for (index_t t = 0; t < p.queries; ++t) queries.push_back(static_cast<std::int32_t>(p.n - p.queries + t));
  }
  [[nodiscard]] kv_view<T> view() const { return token_major_kv(k.data(), v.data(), shape); }
  [[nodiscard]] cell_positions places() const {
    return {{positions.data(), {1, shape.n_tokens}}, {queries.data(), {1, static_cast<index_t>(queries.size())}}};
  }
  std::vector<T> k, v;
  kv_shape shape;
  std::vector<std::int32_t> positions, queries;
};

// What the ranks measure together, and rank 0 reports.
class measured {
 public:
  measured(const sharded_request& r, const problem& p, int rank) : r_(r), p_(p) {
    if (rank == 0) report_ = std::make_unique<report>(r, p, "sharded");
  }

  // `truth` null: the dense shards' output is the truth.
  template <class KV>
  void run(const KV& shard, const attention_options& options, dist::communicator_ref& comm, const reference* truth) {
    const bool first = comm.rank() == 0;
    thread_pool pool(r_.threads);
    std::vector<kv_index> index;
    index.emplace_back(index_shape{.n_kv_heads = p_.kv_heads, .dk = p_.dk, .dv = p_.dv, .bits = std::min(r_.bits, 4)});
    require(index[0].build(shard));
    const std::array<index_t, 4> shape{1, p_.queries, p_.heads, p_.dv};
    const std::array<index_t, 3> rows{1, p_.queries, p_.heads};
    const auto width = static_cast<std::size_t>(p_.dv);
    std::vector<float> output(p_.rows() * width), dense(output.size()), lse(p_.rows()), dense_lse(p_.rows());
    std::vector<certificate> certificates(p_.rows());
    workspace memory, dense_memory;
    const auto timed = [&](auto&& f) {
      barrier(comm);
      const auto start = std::chrono::steady_clock::now();
      f();
      return largest(comm, std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
    };
    const dist::sharded_attention<> exactly(r_.settings, {}, r_.placed), attend(r_.settings, index, r_.placed);
    const bool plain = r_.placed != dist::split::by_position && !options.causal && options.sliding_window == 0;
    const auto run_dense = [&] {
      const attention_result to{{dense.data(), shape}, {dense_lse.data(), rows}};
      if (plain) {  // as an engine does: its own dense kernel on each shard, then a merge
        const status local = exact_attention(p_.query_view(), shard, options, to, dense_memory, pool);
        require(dist::merge_outputs(to.output, to.log_sum_exp, dense_memory, comm, local));
      } else {
        require(exactly(p_.query_view(), shard, options, to, dense_memory, comm, {}, pool));
      }
    };
    run_dense();
    const auto start = std::chrono::steady_clock::now();
    std::vector<double> ms, dense_ms;
    dist::traffic cost;
    for (std::int64_t trial = 0; trial < r_.trials; ++trial) {
      dense_ms.push_back(timed(run_dense));
      ms.push_back(timed([&] {
        require(attend(p_.query_view(), shard, options,
                       {{output.data(), shape}, {lse.data(), rows}, {certificates.data(), rows}}, memory, comm,
                       {.seed = r_.seed + static_cast<std::uint64_t>(trial)}, pool, &cost));
      }));
      for (std::size_t row = 0; first && row < p_.rows(); ++row) {
        const auto at = static_cast<index_t>(row);
        const std::span<const float> mine = std::span(output).subspan(row * width, width);
        report_->add(trial, at / p_.heads, at % p_.heads, certificates[row],
                     truth ? error_of(*truth, row, mine, certificates[row].log_denominator, r_.settings.scale)
                           : error_of(of(dense, dense_lse, row), 0, mine, certificates[row].log_denominator,
                                      error_scale::output));
      }
    }
    if (!first) return;
    const auto median = [](std::vector<double> v) {
      std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
      return v[v.size() / 2];
    };
    const double step = median(ms), whole = median(dense_ms);
    const nlohmann::ordered_json s =
        report_->finish(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(),
                        {{"ranks", comm.size()},
                         {"split", r_.split},
                         {"exchanges", cost.exchanges},
                         {"bytes_sent", cost.bytes_sent},
                         {"ms", step},
                         {"dense_ms", whole},
                         {"speedup_over_dense", whole / step}});
    report_->publish();
    const auto value = [&](const char* key) { return s[key].is_number() ? s[key].template get<double>() : 0.0; };
    std::printf("ranks        %d, %s; %.0f tokens, %.0f/%.0f heads\n", comm.size(), r_.split.c_str(), value("n"),
                value("heads"), value("kv_heads"));
    std::printf("density      %.4f   (%.1f rows; exact share %.3f)\n", value("density"), value("rows"),
                value("exact_share"));
    std::printf("error        mean %.3g, 90 %% %.3g   (%s)\n", value("error_mean"), value("error_p90"),
                s["error_is"].template get<std::string>().c_str());
    std::printf("failures     %.4f of the draws, worst head %.4f   (epsilon %g, delta %g)\n", value("failures"),
                value("worst_head_failures"), r_.settings.epsilon, r_.settings.delta);
    std::printf("exchanges    %lld, %zu bytes sent by each rank, the last step\n",
                static_cast<long long>(cost.exchanges), cost.bytes_sent);
    std::printf("time         %.3f ms a step, dense shards merged %.3f ms: %.2f x   (medians of %lld)\n", step, whole,
                whole / step, static_cast<long long>(r_.trials));
  }

 private:
  [[nodiscard]] reference of(const std::vector<float>& output, const std::vector<float>& lse, std::size_t row) const {
    const auto width = static_cast<std::size_t>(p_.dv);
    reference one;
    one.dv = p_.dv;
    one.output.assign(output.begin() + static_cast<std::ptrdiff_t>(row * width),
                      output.begin() + static_cast<std::ptrdiff_t>((row + 1) * width));
    double norm2 = 0;
    for (const double x : one.output) norm2 += x * x;
    one.norm = {std::sqrt(norm2)}, one.rms = {0}, one.log_sum_exp = {double{lse[row]}};
    return one;
  }
  const sharded_request& r_;
  const problem& p_;
  std::unique_ptr<report> report_;
};

template <class T>
void attend_arrays(const sharded_request& r, const problem& p, dist::communicator_ref comm) {
  measured m(r, p, comm.rank());
  const part_of_arrays<T> part(r, p, comm.rank(), comm.size());
  attention_options options = r.options;
  if (r.placed == dist::split::by_position) options.positions = part.places();
  reference truth;
  if (comm.rank() == 0) {
    thread_executor exec(r.threads);
    const kv_shape whole{.n_batch = 1, .n_kv_heads = p.kv_heads, .n_tokens = p.n, .dk = p.dk, .dv = p.dv};
    truth =
        exact_reference(p.query_view(), token_major_kv(p.k.as<T>().data(), p.v.as<T>().data(), whole), r.options, exec);
  }
  m.run(part.view(), options, comm, &truth);
}

// As many tokens on every rank, of the same distribution.
void attend_synthetic(const sharded_request& r, index_t heads, index_t kv_heads, dist::communicator_ref comm) {
  const index_t n = r.n / comm.size();
  const bench::roofline_cache<Eigen::bfloat16> cache({r.regime, n, heads, kv_heads, r.dim}, r.seed, comm.rank());
  problem p;
  p.queries = 1, p.heads = heads, p.kv_heads = kv_heads, p.n = n * comm.size(), p.dk = p.dv = r.dim;
  p.q.assign(cache.query().data, cache.query().data + heads * r.dim);
  attention_options options = r.options;
  options.scale = r.scale.value_or(cache.options().scale);
  measured(r, p, comm.rank()).run(cache.view(), options, comm, nullptr);
}

void run(sharded_request& r, int& argc, char**& argv) {
  if (status s = r.settings.validate(); !s) throw std::runtime_error(s.message());
  if (r.split == "blocks") {
    r.placed = dist::split::blocks;
  } else if (r.split != "round-robin") {
    r.placed = dist::split::by_position;
    r.owners = read_owners(r.split);
  }
  const bool files = !r.q_path.empty();
  long long heads = 0, kv_heads = 0;
  char rest = 0;
  if (!files) {
    if (std::sscanf(r.heads.c_str(), "%lld/%lld%c", &heads, &kv_heads, &rest) != 2 || heads < 1 || kv_heads < 1 ||
        heads % kv_heads != 0)
      throw std::runtime_error("--heads " + r.heads + ": give query heads/KV heads, such as 32/8");
    if (!r.owners.empty() || r.options.causal || r.options.sliding_window > 0 || r.settings.scale == error_scale::rms)
      throw std::runtime_error(
          "--split FILE, --causal, --sliding-window and --error-scale rms go with --q, --k and --v");
  }
  problem p;
  element_type type{};
  if (files) {
    p = load_problem(r, type);
    r.options.scale = r.scale.value_or(1 / std::sqrt(static_cast<float>(p.dk)));
    if (r.placed == dist::split::by_position && static_cast<index_t>(r.owners.size()) != p.n)
      throw std::runtime_error("--split " + r.split + " has " + std::to_string(r.owners.size()) + " ranks for " +
                               std::to_string(p.n) + " tokens: give one a token");
  }
  on_ranks(r.ranks, argc, argv, [&](dist::communicator_ref comm) {
    for (const int o : r.owners) {
      if (o < 0 || o >= comm.size())
        throw std::runtime_error("--split " + r.split + " names rank " + std::to_string(o) + " of " +
                                 std::to_string(comm.size()));
    }
    if (!files) return attend_synthetic(r, heads, kv_heads, comm);
    if (type == element_type::float32) return attend_arrays<float>(r, p, comm);
    if (type == element_type::float16) return attend_arrays<Eigen::half>(r, p, comm);
    attend_arrays<Eigen::bfloat16>(r, p, comm);
  });
}

}  // namespace
}  // namespace vattn::examples

int main(int argc, char** argv) {
  using namespace vattn;
  using namespace vattn::examples;
  sharded_request r;
  r.how = method::index;
  r.bits = 2;
  r.trials = 10;
  CLI::App app(
      "Verified attention to a cache that is split over the processes of mpirun, or over threads, against dense "
      "shards.",
      "sharded");
  for (const auto& [name, path] :
       {std::pair{"--q", &r.q_path}, std::pair{"--k", &r.k_path}, std::pair{"--v", &r.v_path}})
    app.add_option(
           name, *path,
           "as attend has them: [T, Hq, Dk], [n, Hkv, Dk], [n, Hkv, Dv]; every rank reads them and keeps its tokens")
        ->type_name("FILE")
        ->group("Arrays");
  app.get_option("--q")->needs("--k")->needs("--v");
  app.get_option("--k")->needs("--q");
  app.get_option("--v")->needs("--q");
  add_choice(app, "Arrays", "--kv-dtype", r.bfloat16, std::map<std::string, bool>{{"auto", false}, {"bf16", true}},
             "auto|bf16", "bf16: arrays of uint16 hold bfloat16");
  add_number(app, "Arrays", "--n", r.n, "tokens of a synthetic cache instead, all ranks together")
      ->check(CLI::Range(0, 1 << 30));
  app.add_option("--regime", r.regime, "of its logits")
      ->check(CLI::IsMember(synthetic::standard_regimes()))
      ->group("Arrays");
  app.add_option("--heads", r.heads, "its query heads/KV heads; default 32/8")->group("Arrays");
  add_number(app, "Arrays", "--dim", r.dim, "its head size; default 128")->check(CLI::Range(1, 1024));
  app.add_option("--json", r.json_path, "write a summary and every certificate")->type_name("FILE")->group("Arrays");
  app.add_option("--split", r.split, "which rank has a token: round-robin, blocks, or a file with one rank a token")
      ->type_name("WAY")
      ->group("Ranks");
  add_number(app, "Ranks", "--ranks", r.ranks, "threads of this process; default: the processes that mpirun started")
      ->check(CLI::Range(1, dist::most_ranks));
  add_number(app, "Attention", "--scale", r.scale, "logit = scale q.k; default 1/sqrt(Dk)");
  add_number(app, "Attention", "--softcap", r.options.softcap, "cap of the logits, cap tanh(logit/cap); 0 = none");
  app.add_flag("--causal", r.options.causal, "query t of T sees the tokens up to n - T + t")->group("Attention");
  add_number(app, "Attention", "--sliding-window", r.options.sliding_window,
             "see the X tokens up to the own position alone; 0 = all");
  add_number(app, "Method", "--epsilon", r.settings.epsilon, "error allowed, in (0, 1); default 0.05");
  add_number(app, "Method", "--delta", r.settings.delta, "share of draws that may exceed it, in (0, 1); default 0.1");
  add_number(app, "Method", "--sinks", r.settings.sinks, "first tokens, always exact; default 128");
  add_number(app, "Method", "--window", r.settings.window, "last tokens, always exact; default 128");
  add_number(app, "Method", "--bits", r.bits, "of the codes, 1 to 4; default 2")->check(CLI::Range(1, 4));
  add_choice(app, "Method", "--error-scale", r.settings.scale,
             std::map<std::string, error_scale>{{"output", error_scale::output}, {"rms", error_scale::rms}},
             "output|rms", "what epsilon is relative to");
  app.add_flag("--joint", r.settings.joint, "delta is for all queries and heads together, not for each")
      ->group("Method");
  add_number(app, "Run", "--seed", r.seed, "trial i draws from seed X + i; default 0")->check(not_negative());
  add_number(app, "Run", "--trials", r.trials, "independent draws; default 10")->check(CLI::Range(1, 1000000));
  add_number(app, "Run", "--threads", r.threads, "of each rank; default 1")->check(CLI::Range(1, 256));
  const auto fail = [](int code, const char* what) {
    std::fprintf(stderr, "sharded: %s\n", what);
    return code;
  };
  try {
    app.parse(argc, argv);
    if (r.q_path.empty() == (r.n == 0)) throw CLI::ValidationError("give --q, --k and --v, or --n");
  } catch (const CLI::ParseError& e) {
    return e.get_exit_code() == 0 ? app.exit(e) : fail(2, e.what());
  }
  try {
    run(r, argc, argv);
  } catch (const std::exception& e) {
    return fail(1, e.what());
  }
  return 0;
}
