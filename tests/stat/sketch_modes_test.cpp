// The promise of importance sampling beyond one head and one phase: shared samples, two phases, hard bounds, and
// scores that an adversary has chosen.
#include <cmath>
#include <random>
#include <string>

#include "stat/binomial.hpp"
#include "stat/cells.hpp"
#include "stat/experiment.hpp"
#include "support/catch.hpp"

namespace {

using namespace vattn;
using namespace vattn::stat;

template <int Bits>
struct shared_policy : default_policy {
  using selector = select::indexed<sketch::key_codes<Bits>>;
  using sampler = sample::by_group_importance;
};

struct group_summary {
  std::vector<long> failures;  // of each head
  double density = 0;
  long exact = 0;
};

/// Draws of a group of query heads over one KV head, each head judged against its own exact answer.
template <class Policy>
group_summary run_group(const synthetic::cache& c, const typename Policy::selector& selector, const config& settings,
                        long draws, std::uint64_t seed) {
  group_summary s;
  s.failures.resize(static_cast<std::size_t>(c.heads));
  const auto d = static_cast<std::size_t>(c.dim);
  std::vector<std::vector<double>> want;
  std::vector<double> scale;
  const index_t dv = c.dim;
  for (std::int64_t h = 0; h < c.heads; ++h) {
    synthetic::cache one = c;
    one.heads = 1;
    one.q.assign(c.q.begin() + h * c.dim, c.q.begin() + (h + 1) * c.dim);
    const problem<float> p(one);
    want.push_back(p.output());
    scale.push_back(p.scale_of(settings.scale));
  }
  attention_options options;
  options.scale = c.scale();
  const auto cache = contiguous_kv(c.k.data(), c.v.data(), kv_shape{1, 1, c.n, c.dim, dv});
  std::vector<float> out(static_cast<std::size_t>(c.heads) * d);
  std::vector<certificate> certificates(static_cast<std::size_t>(c.heads));
  const vattention<Policy> attention(settings, selector);
  workspace memory;
  for (long i = 0; i < draws; ++i) {
    const status ok =
        attention(tensor_view<const float, 4>{c.q.data(), {1, 1, c.heads, c.dim}}, cache, options,
                  {.output = {out.data(), {1, 1, c.heads, dv}}, .certificates = {certificates.data(), {1, 1, c.heads}}},
                  memory, {.seed = seed + static_cast<std::uint64_t>(i)});
    if (!ok) throw std::runtime_error(ok.message());
    for (std::size_t h = 0; h < certificates.size(); ++h) {
      double e2 = 0;
      for (std::size_t j = 0; j < d; ++j) e2 += std::pow(static_cast<double>(out[h * d + j]) - want[h][j], 2);
      s.failures[h] += std::sqrt(e2) > settings.epsilon * scale[h];
      s.density += certificates[h].density() / static_cast<double>(draws * c.heads);
      s.exact += certificates[h].exact();
    }
  }
  return s;
}

template <int Bits>
void add_group(std::vector<tested>& cells, const char* regime, std::int64_t heads, synthetic::heads_are kind,
               const char* values = "mean") {
  const synthetic::cache c = synthetic::make_cache(regime, values, 4096, 64, 31, heads, kind);
  std::vector<sketch::key_codes<Bits>> index(1, sketch::key_codes<Bits>(64, 5));
  append_from(index[0], contiguous_kv(c.k.data(), c.v.data(), kv_shape{1, 1, c.n, 64, 64}).head(0, 0));
  constexpr long draws = 40;
  const group_summary s =
      run_group<shared_policy<Bits>>(c, {.heads = index}, promise(0.1, 0.1), draws, 1000000 * cells.size());
  for (std::size_t h = 0; h < s.failures.size(); ++h) {
    cells.push_back({std::string(regime) + "/bits=" + std::to_string(Bits) + "/heads=" + std::to_string(heads) +
                         "/head" + std::to_string(h),
                     s.failures[h], draws, 0.1});
  }
}

}  // namespace

TEST_CASE("a sample that is shared by 1, 3, 4 or 8 heads keeps the promise of each", "[stat][importance]") {
  std::vector<tested> cells;
  for (const char* regime : {"gauss1", "gauss3", "needle", "spikes", "staircase"}) {
    for (const std::int64_t heads : {1, 3, 4, 8}) {
      add_group<1>(cells, regime, heads, synthetic::heads_are::independent);
      add_group<4>(cells, regime, heads, synthetic::heads_are::independent);
    }
    add_group<2>(cells, regime, 4, synthetic::heads_are::alike);
    add_group<8>(cells, regime, 3, synthetic::heads_are::alike);
  }
  require_promise(cells);
}

TEST_CASE("a shared sample keeps the promise of heads that disagree on adversarial caches", "[stat][importance]") {
  std::vector<tested> cells;
  for (const char* regime : {"pareto", "rare_level", "comb", "gauss4"}) {
    for (const char* values : {"opposed", "rare_far", "low_rank"}) {
      add_group<8>(cells, regime, 4, synthetic::heads_are::independent, values);
      add_group<2>(cells, regime, 3, synthetic::heads_are::independent, values);
    }
  }
  require_promise(cells);
}

TEST_CASE("product codes keep the promise, of keys that they were trained on and of others", "[stat][importance]") {
  std::vector<tested> cells;
  for (const std::string& regime : all_regimes()) {
    const problem<float> p(regime, "mean", 4096, 64, 29);
    const problem<float> other("gauss1", "mean", 2048, 64, 83);
    for (const bool own : {true, false}) {
      sketch::product_codes codes(64, 21, {.seed = 3});
      codes.train(own ? p.head() : other.head());
      const indexed_problem index(p, std::move(codes));
      const summary s = run_cell<importance_policy>(p, index.selector(), promise(0.1, 0.1), 50, 1000000 * cells.size());
      cells.push_back({regime + (own ? "/own" : "/others'") + " codes", s.failures, s.draws, 0.1});
    }
  }
  require_promise(cells);
}

TEST_CASE("a shared sample costs agreeing heads little more than one head's", "[stat][importance]") {
  const auto density = [](std::int64_t heads, synthetic::heads_are kind) {
    const synthetic::cache c = synthetic::make_cache("gauss3", "mean", 8192, 64, 37, heads, kind);
    std::vector<sketch::key_codes<4>> index(1, sketch::key_codes<4>(64, 5));
    append_from(index[0], contiguous_kv(c.k.data(), c.v.data(), kv_shape{1, 1, c.n, 64, 64}).head(0, 0));
    config settings = promise(0.1, 0.1);
    settings.sinks = settings.window = 16;
    return run_group<shared_policy<4>>(c, {.heads = index}, settings, 10, 1).density;
  };
  const double one = density(1, synthetic::heads_are::alike), alike = density(4, synthetic::heads_are::alike),
               apart = density(4, synthetic::heads_are::independent);
  CHECK(alike < 1.6 * one);
  CHECK(apart > alike);
}

TEST_CASE("two phases keep the promise, and read no more rows than one", "[stat][importance]") {
  std::vector<tested> cells;
  double one = 0, two = 0;
  for (const std::string& regime : all_regimes()) {
    for (const char* values : {"mean", "one_huge"}) {
      const problem<float> p(regime, values, 8192, 64, 41);
      const indexed_problem coarse(p, sketch::key_codes<1>(64, 3));
      const indexed_problem fine(p, sketch::key_codes<4>(64, 3));
      remembered_phases phases;
      phases.coarse = coarse.selector(), phases.fine = fine.selector();
      const config settings = promise(0.05, 0.1, error_scale::rms);
      const summary s = run_cell<two_phase_policy>(p, phases, settings, 40, 1000000 * cells.size());
      cells.push_back({regime + "/" + values, s.failures, s.draws, 0.1});
      two += s.density;
      one += run_cell<importance_policy>(p, fine.selector(), settings, 10, 1).density;
    }
  }
  require_promise(cells);
  CHECK(two < 1.1 * one);
}

TEST_CASE("two phases keep the promise on adversarial caches", "[stat][importance]") {
  std::vector<tested> cells;
  for (const std::string& regime : synthetic::adversarial_regimes()) {
    for (const char* values : {"opposed", "rare_direction", "cauchy"}) {
      const problem<float> p(regime, values, 4096, 64, 73);
      const indexed_problem coarse(p, sketch::key_codes<1>(64, 3));
      const indexed_problem fine(p, sketch::key_codes<4>(64, 3));
      remembered_phases phases;
      phases.coarse = coarse.selector(), phases.fine = fine.selector();
      const summary s =
          run_cell<two_phase_policy>(p, phases, promise(0.05, 0.1, error_scale::rms), 40, 1000000 * cells.size());
      cells.push_back({regime + "/" + values, s.failures, s.draws, 0.1});
    }
  }
  require_promise(cells);
}

TEST_CASE("two phases notice a coarse index that is stale", "[stat][importance]") {
  const problem<float> p("gauss2", "mean", 8192, 64, 43);
  indexed_problem coarse(p, sketch::key_codes<4>(64, 3));
  const indexed_problem fine(p, sketch::key_codes<8>(64, 3));
  std::mt19937_64 random(5);
  std::normal_distribution<float> normal;
  for (float& s : coarse.scores()) s += 2 * normal(random);
  remembered_phases phases;
  phases.coarse = coarse.selector(), phases.fine = fine.selector();
  // Told apart from an honest one, and done without: the fine scores alone keep the promise.
  long failures = 0;
  for_each_draw<two_phase_policy>(p, phases, promise(0.1, 0.1), 40, 1, [&](const draw& d, const auto&) {
    CHECK(d.certified.breaches > 2);
    failures += d.error > 0.1;
  });
  CHECK(failures <= 10);
}

TEST_CASE("certified: no failure, whatever the regime and the values", "[stat][certified]") {
  long draws = 0, sampled = 0;
  for (const std::string& regime : all_regimes()) {
    for (const std::string& values : synthetic::value_kinds()) {
      const problem<float> p(regime, values, 8192, 64, 47);
      const indexed_problem index(p, sketch::key_codes<8>(64, 3));
      for (const error_scale scale : {error_scale::output, error_scale::rms}) {
        const summary s = run_cell<certified_test_policy>(p, index.bounds(), promise(0.2, 0.2, scale), 6,
                                                          static_cast<std::uint64_t>(1000000 + draws));
        INFO(regime << " " << values << " " << to_string(scale));
        CHECK(s.failures == 0);
        CHECK(s.uncovered == 0);
        draws += s.draws;
        sampled += s.draws - s.exact;
      }
    }
  }
  CHECK(draws > 1000);
  CHECK(sampled > draws / 2);  // not by reading everything
}

TEST_CASE("certified: scores anywhere within their hard bound cost rows, never the promise", "[stat][certified]") {
  long sampled = 0;
  for (const char* regime : {"gauss1", "gauss3", "needle", "staircase", "student"}) {
    const problem<float> p(regime, "mean", 16384, 64, 53);
    indexed_problem index(p, sketch::key_codes<8>(64, 3));
    const float bound = index.index().bound_over_error();
    // The worst for a sampler: what is heavy looks light, what is light looks heavy, as far as the bound goes.
    std::vector<double> exact(index.scores().size());
    for (std::size_t i = 0; i < exact.size(); ++i) {
      double l = 0;
      const auto key = p.head().key(static_cast<index_t>(i));
      for (std::size_t j = 0; j < 64; ++j) l += static_cast<double>(p.scaled_query()[j]) * key[j];
      const double sign = l > 0 ? -1 : 1;
      index.scores()[i] = static_cast<float>(l + 0.999 * sign * static_cast<double>(bound * index.errors()[i]));
    }
    const summary s = run_cell<certified_test_policy>(p, index.bounds(), promise(0.1, 0.1), 40, 1);
    INFO(regime);
    CHECK(s.failures == 0);
    sampled += s.draws - s.exact;
  }
  CHECK(sampled > 0);
}

TEST_CASE("certified: a score above which a logit is found ends in exact attention", "[stat][certified]") {
  const problem<float> p("gauss1", "mean", 16384, 64, 59);
  indexed_problem index(p, sketch::key_codes<8>(64, 3));
  for (float& s : index.scores()) s -= 0.5f;
  const summary s = run_cell<certified_test_policy>(p, index.bounds(), promise(0.2, 0.1), 10, 1);
  CHECK(s.exact == 10);
}

TEST_CASE("certified: where a few tokens hold everything nothing is left to chance", "[stat][certified]") {
  synthetic::cache c = synthetic::make_cache("gauss1", "mean", 16384, 64, 61);
  const auto raise = [&](std::size_t i) {
    for (std::size_t j = 0; j < 64; ++j) c.k[i * 64 + j] += 25 * c.q[j] / std::sqrt(64.0f);
  };
  for (const std::size_t i : {5000u, 9000u, 12001u}) raise(i);
  const problem<float> p(c);
  const indexed_problem index(p, sketch::key_codes<8>(64, 3));
  for_each_draw<certified_test_policy>(p, index.bounds(), promise(0.05, 0.1), 20, 1, [](const draw& d, const auto&) {
    CHECK(d.certified.promise == guarantee::deterministic);
    CHECK(d.certified.rows_sampled == 0);
    CHECK(d.error <= d.certified.epsilon_achieved);
    CHECK(d.certified.density() < 0.05);
  });
}

TEST_CASE("importance sampling: near-duplicate keys share their codes' error and keep the promise",
          "[stat][importance]") {
  std::vector<tested> cells;
  for (const float apart : {0.0f, 0.01f, 0.1f}) {
    synthetic::cache c = synthetic::make_cache("gauss2", "mean", 4096, 64, 67);
    std::mt19937_64 random(3);
    std::normal_distribution<float> normal;
    for (std::size_t i = 64; i < 4096; ++i) {  // 64 clusters
      for (std::size_t j = 0; j < 64; ++j) c.k[i * 64 + j] = c.k[i % 64 * 64 + j] + apart * normal(random);
    }
    const problem<float> p(c);
    const indexed_problem one(p, sketch::key_codes<1>(64, 3));
    const indexed_problem four(p, sketch::key_codes<4>(64, 3));
    for (const auto& selector : {one.selector(), four.selector()}) {
      const summary s = run_cell<importance_policy>(p, selector, promise(0.1, 0.1), 60, 1000000 * cells.size());
      cells.push_back({"duplicates " + std::to_string(apart), s.failures, s.draws, 0.1});
    }
  }
  require_promise(cells);
}

namespace {

// A query for which a code hides a token: its score is `hidden` too low, its logit is `height`.
template <int Bits>
void align(synthetic::cache& c, std::size_t token, std::uint64_t seed, float height, float hidden) {
  const auto d = static_cast<std::size_t>(c.dim);
  sketch::key_codes<Bits> codes(c.dim, seed);
  append_from(codes, contiguous_kv(c.k.data(), c.v.data(), kv_shape{1, 1, c.n, c.dim, c.dim}).head(0, 0));
  std::vector<float> unit(d), residual(d), scratch(codes.scratch_size()), score(1);
  double r2 = 0, k2 = 0, rk = 0;
  for (std::size_t j = 0; j < d; ++j) {
    std::fill(unit.begin(), unit.end(), 0.0f);
    unit[j] = 1;
    codes.score(unit.data(), static_cast<index_t>(token), score, {}, scratch);
    residual[j] = c.k[token * d + j] - score[0];
    r2 += static_cast<double>(residual[j]) * residual[j];
    k2 += static_cast<double>(c.k[token * d + j]) * c.k[token * d + j];
    rk += static_cast<double>(residual[j]) * c.k[token * d + j];
  }
  // scaled q = a·k + b·r with q·k = height and q·r = hidden
  const double det = k2 * r2 - rk * rk;
  const double a = (height * r2 - hidden * rk) / det, b = (hidden * k2 - height * rk) / det;
  for (std::size_t j = 0; j < d; ++j) {
    c.q[j] = static_cast<float>(a * c.k[token * d + j] + b * residual[j]) / c.scale();
  }
}

template <int Bits>
void add_aligned(std::vector<tested>& cells, std::uint64_t attacked_seed, float hidden) {
  for (const std::size_t token : {1000u, 2500u}) {
    synthetic::cache c = synthetic::make_cache("gauss1", "mean", 8192, 128, 71);
    // Thirty-two copies of the token: together they weigh as much as all others.
    for (std::size_t copy = 1; copy < 32; ++copy)
      std::copy_n(c.k.data() + token * 128, 128, c.k.data() + (token + 37 * copy) * 128);
    align<Bits>(c, token, attacked_seed, 6, hidden);
    const problem<float> p(c);
    const indexed_problem index(p, sketch::key_codes<Bits>(128, 3));
    const summary s = run_cell<importance_policy>(p, index.selector(), promise(0.1, 0.1), 100, 1000000 * cells.size());
    cells.push_back({"aligned, bits=" + std::to_string(Bits), s.failures, s.draws, 0.1});
  }
}

}  // namespace

// Rotations are random: whoever asks does not know them. From 4 bits on that does not matter, since a query
// of ordinary length cannot hide a token.
TEST_CASE("importance sampling: queries along the residuals of codes keep the promise", "[stat][importance]") {
  std::vector<tested> cells;
  add_aligned<1>(cells, 4, 5);
  add_aligned<2>(cells, 4, 3);
  add_aligned<4>(cells, 3, 1);
  add_aligned<8>(cells, 3, 0.1f);
  require_promise(cells);
}
