// A cache over several ranks: the whole's attention whichever way it is split, the same bits everywhere, and calls that
// fail everywhere or nowhere.
#include <cmath>
#include <random>
#include <stdexcept>

#include "support/catch.hpp"
#include "support/shards.hpp"
#include "vattn/dist/merge.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

struct way {
  const char* name;
  dist::split how;
  std::function<int(index_t)> rank_of;
};

// Of n tokens over `ranks`: what a test of shards must survive.
std::vector<way> ways(index_t n, int ranks) {
  return {{"blocks", dist::split::blocks, [=](index_t i) { return static_cast<int>(i * ranks / n); }},
          {"round robin", dist::split::round_robin, [=](index_t i) { return static_cast<int>(i % ranks); }},
          {"by position", dist::split::by_position, [=](index_t i) { return static_cast<int>(i * 7 % 13 % ranks); }},
          {"one has a single token", dist::split::blocks,
           [=](index_t i) { return i == n - 1 ? ranks - 1 : static_cast<int>(i * (ranks - 1) / n); }},
          {"all on the last", dist::split::blocks, [=](index_t) { return ranks - 1; }}};
}

config few_fixed(double epsilon = 0.1, double delta = 0.02) {
  config c;
  c.epsilon = epsilon, c.delta = delta;
  c.sinks = 4, c.window = 16;
  return c;
}

template <class T>
struct split_problem {
  split_problem(const problem<T>& whole, int ranks, const way& w, bool indexed)
      : p(whole), s(whole, ranks, w.rank_of), how(w.how) {
    for (int r = 0; indexed && r < ranks; ++r) indices.push_back(s.index(r));
  }
  // Every rank's results; their statuses.
  std::vector<status> attend(const config& c, std::vector<results>& to, const draw_key& key = {},
                             attention_options base = {}) {
    if (std::isnan(base.scale)) base = p.options;
    to.assign(static_cast<std::size_t>(s.ranks()), results(p.s));
    costs.assign(to.size(), {});
    return on_ranks(s.ranks(), [&](auto& comm) {
      const auto r = static_cast<std::size_t>(comm.rank());
      attention_options o = base;
      std::vector<float> mask;
      if (!p.mask.empty()) {
        for (index_t row = 0; row < p.s.batch * p.s.heads * p.s.queries; ++row) {
          for (const index_t i : s.tokens[r]) mask.push_back(p.mask[static_cast<std::size_t>(row * p.s.n + i)]);
        }
        mask.resize(mask.size() + 1);
        o.mask = mask_view(
            tensor_view<const float, 4>(mask.data(), {p.s.batch, p.s.heads, p.s.queries, s.shape[r].n_tokens}));
      }
      if (how == dist::split::by_position) o.positions = s.places(comm.rank());
      const dist::sharded_attention<> f(
          c, indices.empty() ? std::span<const kv_index>() : std::span<const kv_index>(indices[r]), how,
          remembered.empty() ? std::span<index_memory>() : std::span<index_memory>(remembered[r]));
      workspace memory;
      attention_result result = to[r].view();
      if (!decisions.empty()) result.decisions = decisions[r];
      return f(p.query(), s.view(comm.rank()), o, result, memory, comm, key, serial_executor{}, &costs[r]);
    });
  }
  const problem<T>& p;
  shards<T> s;
  dist::split how;
  std::vector<std::vector<kv_index>> indices;
  std::vector<std::vector<index_memory>> remembered;
  std::vector<decision_result> decisions;
  std::vector<dist::traffic> costs;
};

void require_ok(const std::vector<status>& all) {
  for (const status& s : all) {
    INFO(s.message());
    REQUIRE(s.ok());
  }
}
// All fail with one message, and nothing was written.
std::string failure(const std::vector<status>& all, const std::vector<results>& r) {
  for (const status& s : all) {
    REQUIRE_FALSE(s.ok());
    CHECK(std::string(s.message()) == all[0].message());
    CHECK(s.code() == all[0].code());
  }
  for (const results& one : r) {
    for (const float x : one.output) REQUIRE(x == -12345.0f);
  }
  return all[0].message();
}

double worst_error(const results& a, const results& b) {
  double worst = 0;
  const auto dv = static_cast<std::size_t>(a.extents[3]);
  for (std::size_t row = 0; row < a.log_sum_exp.size(); ++row) {
    const std::vector<double> want(b.row(row), b.row(row) + dv);
    worst = std::max(worst, reference::relative_error(a.row(row), want));
  }
  return worst;
}

}  // namespace

TEST_CASE("threads gather bytes in order of rank, call after call", "[dist]") {
  for (const int ranks : {1, 3, 8}) {
    const auto all = on_ranks(ranks, [&](auto& comm) {
      static_assert(dist::communicator<std::remove_cvref_t<decltype(comm)>>);
      for (std::uint32_t turn = 0; turn < 200; ++turn) {
        std::vector<std::uint32_t> mine(turn % 7 + 1, 1000 * turn + static_cast<std::uint32_t>(comm.rank()));
        std::vector<std::uint32_t> got(mine.size() * static_cast<std::size_t>(ranks));
        if (status s = comm.all_gather(std::as_bytes(std::span(mine)), std::as_writable_bytes(std::span(got))); !s)
          return s;
        for (std::size_t i = 0; i < got.size(); ++i) {
          if (got[i] != 1000 * turn + i / mine.size()) return status::error(errc::non_finite, "turn %u", turn);
        }
      }
      return status();
    });
    require_ok(all);
  }
}

TEST_CASE("a thread that does not come, or brings another number of bytes, fails the exchange of all", "[dist]") {
  dist::thread_group group(2, std::chrono::milliseconds(30));
  dist::thread_rank one(group, 0);
  std::byte mine{}, all[2]{};
  const status s = one.all_gather({&mine, 1}, all);
  CHECK(s.code() == errc::communication_failed);
  CHECK(std::string(s.message()).find("did not come") != std::string::npos);
  CHECK_FALSE(one.all_gather({&mine, 1}, all).ok());  // nor later

  const auto other = on_ranks(3, [&](auto& comm) {
    std::vector<std::byte> own(comm.rank() == 1 ? 9 : 8), room(3 * own.size());
    return comm.all_gather(own, room);
  });
  for (const status& each : other) CHECK(each.code() == errc::communication_failed);
}

TEST_CASE("dense shards are the whole, whatever a call carries and however it is split", "[dist]") {
  for (const int ranks : {1, 2, 3, 5}) {
    for (int carries = 0; carries < 7; ++carries) {
      problem<float> p(shape{.batch = 2,
                             .queries = carries == 1 || carries == 5 ? 3 : 1,
                             .heads = 4,
                             .kv_heads = 2,
                             .n = 97,
                             .dk = 16,
                             .dv = 24},
                       3u);
      if (carries == 1) p.options.causal = true;
      if (carries == 2) p.options.softcap = 3;
      if (carries == 3) p.set_sinks({0.5f, -1, 2, 0});
      if (carries == 4) p.set_alibi({0.1f, 0.02f, 0, 0.3f});
      if (carries == 5) p.options.causal = true, p.options.sliding_window = 31;
      if (carries == 6) {
        std::vector<float> mask(static_cast<std::size_t>(p.s.batch * p.s.heads * p.s.queries * p.s.n));
        for (std::size_t i = 0; i < mask.size(); ++i)
          mask[i] = i % 5 == 0 ? -infinity : static_cast<float>(i % 3) * 0.2f;
        p.set_mask(std::move(mask));
      }
      for (const way& w : ways(p.s.n, ranks)) {
        if (ranks == 1 && w.rank_of(0) != 0) continue;
        if (carries == 4 && w.how == dist::split::round_robin && ranks > 1) continue;  // refused: below
        CAPTURE(ranks, carries, w.name);
        if (ranks == 1 && std::string(w.name) == "one has a single token") continue;
        split_problem<float> split(p, ranks, w, false);
        std::vector<results> r;
        require_ok(split.attend({}, r));
        const disagreement off = compare(p, r[0]);
        CHECK(off.output < 2e-5);
        CHECK(off.denominator < 2e-5);
        for (const results& other : r) CHECK(same(r[0], other));
        for (const certificate& c : r[0].certificates) {
          CHECK(c.exact());
          CHECK(c.shards == ranks);
        }
        CHECK(split.costs[0].exchanges == 3);
      }
    }
  }
}

TEST_CASE("of shards without a token the output is 0 and the log-sum-exp the sink's", "[dist]") {
  problem<float> p(shape{.heads = 2, .kv_heads = 1, .n = 0, .dk = 8, .dv = 8});
  p.k.resize(1), p.v.resize(1);
  for (const bool sink : {false, true}) {
    if (sink) p.set_sinks({1.5f, 1.5f});
    split_problem<float> split(p, 3, ways(1, 3)[0], false);
    std::vector<results> r;
    require_ok(split.attend({}, r));
    for (const results& one : r) {
      for (const float x : one.output) CHECK(x == 0);
      for (const float x : one.log_sum_exp) CHECK(x == (sink ? 1.5f : -infinity));
    }
  }
}

TEST_CASE("(o, log-sum-exp) of dense shards merge into those of the whole", "[dist]") {
  const problem<float> p(shape{.batch = 2, .queries = 2, .heads = 4, .kv_heads = 2, .n = 300, .dk = 16, .dv = 16});
  const shards<float> s(p, 4, [](index_t i) { return i < 200 ? 0 : i == 200 ? 3 : 1; });
  std::vector<results> r(4, results(p.s));
  require_ok(on_ranks(4, [&](auto& comm) {
    const auto i = static_cast<std::size_t>(comm.rank());
    workspace memory;
    const status local = exact_attention(p.query(), s.view(comm.rank()), p.options, r[i].view(), memory);
    const attention_result to = r[i].view();
    return dist::merge_outputs(to.output, to.log_sum_exp, memory, comm, local);
  }));
  const disagreement off = compare(p, r[0]);
  CHECK(off.output < 2e-5);
  CHECK(off.denominator < 2e-5);
  for (const results& other : r) CHECK((other.output == r[0].output && other.log_sum_exp == r[0].log_sum_exp));
  // And what one has not, nobody has.
  const auto failed = on_ranks(4, [&](auto& comm) {
    workspace memory;
    const attention_result to = r[static_cast<std::size_t>(comm.rank())].view();
    return dist::merge_outputs(to.output, to.log_sum_exp, memory, comm,
                               comm.rank() == 2 ? status::error(errc::non_finite, "no") : status());
  });
  for (const status& one : failed) CHECK(std::string(one.message()) == "rank 2: no");
}

TEST_CASE("a sequence of 2^31 tokens in all shards is refused, not cut", "[dist]") {
  const auto agreed = [](index_t each) {
    return on_ranks(2, [&](auto& comm) {
      std::array<dist::sequence_shard, 1> own{{{.total = each}}};
      bool apart = false;
      return dist::agree(comm, dist::split::blocks, {}, dist::terms{}, own, apart);
    });
  };
  for (const status& s : agreed((index_t{1} << 30) - 1)) CHECK(s.ok());
  for (const status& s : agreed(index_t{1} << 30))
    CHECK(std::string(s.message()).find("end at 2^31") != std::string::npos);
}

TEST_CASE("shards that cannot be merged are told on every rank, and nothing is written", "[dist]") {
  const auto merged = [](auto&& change) {
    std::array<std::vector<float>, 2> outputs, sums;
    const auto said = on_ranks(2, [&](auto& comm) {
      const auto i = static_cast<std::size_t>(comm.rank());
      outputs[i].assign(8, 1), sums[i].assign(2, 1);
      tensor_view<float, 4> output(outputs[i].data(), {1, 1, 2, 4});
      tensor_view<float, 3> lse(sums[i].data(), {1, 1, 2});
      if (i == 1) change(output, lse);
      workspace memory;
      return dist::merge_outputs(output, lse, memory, comm);
    });
    CHECK(outputs[0] == std::vector<float>(8, 1));
    CHECK(sums[0] == std::vector<float>(2, 1));
    return said;
  };
  for (const float odd : {not_a_number, infinity}) {
    for (const status& s : merged([&](auto&, auto& lse) { lse(0, 0, 1) = odd; })) CHECK(s.code() == errc::non_finite);
  }
  for (const status& s : merged([](auto&, auto& lse) { lse = {}; })) CHECK(s.code() == errc::invalid_argument);
  for (const status& s : merged([](auto& output, auto&) { output.strides[2] = 4; }))
    CHECK(s.code() == errc::invalid_argument);
  for (const status& s : merged([](auto& output, auto&) {
         output.data = reinterpret_cast<float*>(reinterpret_cast<std::byte*>(output.data) + 2);
       }))
    CHECK(s.code() == errc::invalid_argument);
}

TEST_CASE("sampled shards keep epsilon, read few rows, send little, and end with the same bits on every rank",
          "[dist]") {
  for (const int ranks : {1, 2, 3}) {
    const index_t n = 9000 * ranks;
    const problem<float> p(shape{.heads = 4, .kv_heads = 1, .n = n, .dk = 32, .dv = 32}, 5u, 2.0f);
    results exact(p.s);
    workspace memory;
    REQUIRE(exact_attention(p.query(), p.cache(), p.options, exact.view(), memory).ok());
    for (const way& w : ways(n, ranks)) {
      if (ranks == 1 && w.rank_of(n - 1) != 0) continue;
      if (ranks == 1 && std::string(w.name) == "one has a single token") continue;
      CAPTURE(ranks, w.name);
      split_problem<float> split(p, ranks, w, true);
      index_t sampled = 0, rows = 0, failures = 0, far = 0;
      for (std::uint32_t d = 0; d < 8; ++d) {
        std::vector<results> r;
        require_ok(split.attend(few_fixed(), r, {.seed = 9, .step = d}));
        for (const results& other : r) REQUIRE(same(r[0], other));
        for (std::size_t h = 0; h < 4; ++h) {
          const certificate& c = r[0].certificates[h];
          const std::vector<double> want(exact.row(h), exact.row(h) + p.s.dv);
          failures += reference::relative_error(r[0].row(h), want) > 0.1;
          CHECK(c.n == n);
          CHECK(c.shards == ranks);
          sampled += !c.exact(), rows += c.rows();
          far += std::abs(std::expm1(double{r[0].log_sum_exp[h]} - double{exact.log_sum_exp[h]})) > c.denominator_error;
        }
        const std::size_t looks = static_cast<std::size_t>(split.costs[0].exchanges - 2);
        CHECK(split.costs[0].bytes_sent < 424 + 2048 + looks * 24000);
      }
      CAPTURE(sampled, rows, failures);
      CHECK(sampled > 16);
      CHECK(failures <= 4);
      CHECK(far <= 4);
      CHECK(static_cast<double>(rows) < 0.45 * static_cast<double>(32 * n));
    }
  }
}

TEST_CASE("a look's message is at most 24 kB for the heads of a group of size 128, whatever their number", "[dist]") {
  for (index_t heads = 1; heads <= 8; ++heads) {
    CAPTURE(heads);
    const dist::look_format f(heads, 128);
    CHECK(f.bytes() <= 24000);
    CHECK(f.groups >= 6);
  }
}

TEST_CASE("a rank that reads all its rows and others that sample are one sample", "[dist]") {
  // Rank 1 has no index, rank 2 a few rows: their rows are certain ones.
  const index_t n = 12000;
  const problem<float> p(shape{.heads = 4, .kv_heads = 1, .n = n, .dk = 32, .dv = 32}, 6u, 2.0f);
  results exact(p.s);
  workspace memory;
  REQUIRE(exact_attention(p.query(), p.cache(), p.options, exact.view(), memory).ok());
  const way w{"", dist::split::blocks, [=](index_t i) { return i < 11000 ? 0 : i < 11900 ? 1 : 2; }};
  for (const error_scale scale : {error_scale::output, error_scale::rms}) {
    split_problem<float> split(p, 3, w, true);
    config c = few_fixed();
    c.scale = scale;
    int failures = 0, sampled = 0;
    for (std::uint32_t d = 0; d < 10; ++d) {
      std::vector<results> r;
      require_ok(split.attend(c, r, {.step = d}));
      // Relative to the RMS of the values, which is ‖o‖ over the coherence.
      const double by = scale == error_scale::rms ? r[0].certificates[0].coherence : 1;
      failures += by * worst_error(r[0], exact) > 0.11;
      for (const certificate& k : r[0].certificates) {
        sampled += !k.exact();
        CHECK(k.rows_exact >= 1000);
        CHECK(k.coherence > 0.5);
      }
      for (const results& other : r) CHECK(same(r[0], other));
    }
    CHECK(sampled > 20);
    CHECK(failures <= 3);
  }
}

TEST_CASE("shards that remember their last step spare a look, and never the promise, whatever they remember",
          "[dist]") {
  const index_t n = 18000;
  problem<float> p(shape{.heads = 4, .kv_heads = 1, .n = n, .dk = 32, .dv = 32}, 12u, 2.0f);
  const way w{"", dist::split::blocks, [](index_t i) { return i < 7000 ? 0 : 1; }};
  split_problem<float> split(p, 2, w, true);
  split.remembered.assign(2, std::vector<index_memory>(1));
  results exact(p.s);
  workspace memory;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  index_t failures = 0, draws = 0, sampled = 0, spared = 0, steps = 0;
  for (std::uint32_t step = 0; step < 40; ++step) {
    const bool same_query = step % 4 != 0, garbage = step >= 24 && step % 2 == 1;
    if (!same_query) {
      for (float& x : p.q) x = normal(random);
    }
    if (garbage) {
      index_memory& m = split.remembered[step / 2 % 2][0];
      switch (step / 2 % 6) {
        case 0:
          for (double& a : m.thresholds.plain) a += 20.0 * static_cast<double>(normal(random));
          break;
        case 1:
          for (auto& e : m.estimates) e.output2 *= 1e6, e.denominator *= 1e-6, e.reference = 1e5;
          break;
        case 2:
          m = {};
          break;
        case 3:
          for (double& x : m.log_sum) x = 1e300;
          break;
        case 4:
          for (double& x : m.share) x = -7;
          for (double& x : m.part) x = 1e-300;
          for (auto& e : m.estimates) e.reference = not_a_number;
          break;
        default:
          m.rest = 3;
          break;
      }
    }
    REQUIRE(exact_attention(p.query(), p.cache(), p.options, exact.view(), memory).ok());
    std::vector<results> r;
    require_ok(split.attend(few_fixed(), r, {.seed = 8, .step = step}));
    REQUIRE(same(r[0], r[1]));
    if (same_query && step < 24) ++steps, spared += split.costs[0].exchanges == 3;
    for (std::size_t h = 0; h < 4; ++h) {
      const std::vector<double> want(exact.row(h), exact.row(h) + p.s.dv);
      failures += reference::relative_error(r[0].row(h), want) > 0.1;
      ++draws, sampled += !r[0].certificates[h].exact();
    }
  }
  CAPTURE(failures, draws, sampled, spared, steps);
  CHECK(10 * failures <= draws);  // δ = 0.02
  CHECK(4 * sampled > 3 * draws);
  CHECK(2 * spared > steps);  // the first two exchanges and one look: no first look, nor another
}

TEST_CASE("memory of shards is used by all ranks or none, by one query, and has a place for each KV head", "[dist]") {
  const index_t n = 16000;
  const problem<float> p(shape{.heads = 4, .kv_heads = 1, .n = n, .dk = 32, .dv = 32}, 5u, 2.0f);
  const way w{"", dist::split::round_robin, [](index_t i) { return static_cast<int>(i % 2); }};
  split_problem<float> split(p, 2, w, true);
  std::vector<results> cold, r;
  require_ok(split.attend(few_fixed(), cold, {.step = 1}));
  const index_t exchanges = split.costs[0].exchanges;
  split.remembered.assign(2, std::vector<index_memory>(1));
  require_ok(split.attend(few_fixed(), r, {.step = 1}));
  CHECK(same(r[0], cold[0]));  // nothing was remembered
  CHECK(split.costs[0].exchanges == exchanges);
  REQUIRE(split.remembered[0][0].heads == 4);
  CHECK(std::abs(split.remembered[0][0].share[0] + split.remembered[1][0].share[0] - 1) < 1e-9);
  CHECK(std::abs(split.remembered[0][0].part[0] + split.remembered[1][0].part[0] - 1) < 1e-9);
  split.remembered[1][0] = {};
  require_ok(split.attend(few_fixed(), r, {.step = 1}));
  CHECK(same(r[0], cold[0]));
  CHECK(same(r[1], cold[0]));
  split.remembered[1].resize(2);
  CHECK(failure(split.attend(few_fixed(), r), r).find("rank 1: memory of 2 KV heads for 1 sequences of 1") == 0);
}

TEST_CASE("decisions of shards are each rank's own rows, whose softmaxes merge into the output", "[dist]") {
  const index_t n = 14000, heads = 4, d = 32;
  for (const bool indexed : {true, false}) {
    problem<float> p(shape{.heads = heads, .kv_heads = 1, .n = n, .dk = d, .dv = d}, 6u, 2.0f);
    p.set_sinks({0.5f, -1, 2, 0});
    // The last rank has a few rows, which it reads all.
    const way w{"", dist::split::blocks, [](index_t i) { return i < 6000 ? 0 : i < 13500 ? 1 : 2; }};
    split_problem<float> split(p, 3, w, indexed);
    const auto room = static_cast<std::size_t>(heads * n);
    std::vector<std::vector<std::int32_t>> tokens(3, std::vector<std::int32_t>(room)),
        counts(3, std::vector<std::int32_t>(static_cast<std::size_t>(heads), -1));
    std::vector<std::vector<float>> weights(3, std::vector<float>(room));
    for (std::size_t r = 0; r < 3; ++r) {
      split.decisions.push_back({{tokens[r].data(), {1, 1, heads, n}},
                                 {weights[r].data(), {1, 1, heads, n}},
                                 {counts[r].data(), {1, 1, heads}}});
    }
    std::vector<results> r;
    require_ok(split.attend(few_fixed(), r, {.step = 4}));
    for (index_t h = 0; h < heads; ++h) {
      const auto at = static_cast<std::size_t>(h);
      double sum = std::exp(double{p.options.sink_logits[h]});
      index_t rows = 0;
      std::vector<double> o(static_cast<std::size_t>(d), 0.0);
      for (std::size_t rank = 0; rank < 3; ++rank) {
        const auto head = split.s.view(static_cast<int>(rank)).head(0, 0);
        rows += counts[rank][at];
        for (std::int32_t i = 0; i < counts[rank][at]; ++i) {
          const std::size_t place = at * static_cast<std::size_t>(n) + static_cast<std::size_t>(i);
          const index_t cell = tokens[rank][place];
          double logit = 0;
          for (index_t j = 0; j < d; ++j)
            logit +=
                double{p.q[static_cast<std::size_t>(h * d + j)]} * double{head.key(cell)[static_cast<std::size_t>(j)]};
          const double x = double{weights[rank][place]} * std::exp(logit * double{p.options.scale});
          sum += x;
          for (std::size_t j = 0; j < o.size(); ++j) o[j] += x * double{head.value(cell)[j]};
        }
      }
      for (double& x : o) x /= sum;
      CHECK(r[0].certificates[at].exact() == !indexed);
      CHECK((indexed ? 2 * rows < n : rows == n));
      CHECK(counts[2][at] == 500);
      CHECK(reference::relative_error(r[0].row(at), o) < 1e-4);
      CHECK(std::abs(std::log(sum) - double{r[0].log_sum_exp[at]}) < 1e-4);
    }
  }
}

TEST_CASE("what differs between ranks is found before a row is read, and said on all of them", "[dist]") {
  const problem<float> p(shape{.heads = 2, .kv_heads = 1, .n = 64, .dk = 16, .dv = 16});
  const shards<float> s(p, 3, [](index_t i) { return static_cast<int>(i % 3); });
  const auto differing = [&](int what) {
    std::vector<results> r(3, results(p.s));
    const auto all = on_ranks(3, [&](auto& comm) {
      const bool odd = comm.rank() == 1;
      config c;
      draw_key key;
      attention_options o = p.options;
      std::vector<float> q = p.q;
      dist::split how = dist::split::round_robin;
      index_t heads = 2;
      if (odd && what == 0) c.epsilon = 0.06;
      if (odd && what == 1) heads = 1;
      if (odd && what == 2) o.softcap = 30;
      if (odd && what == 3) key.step = 1;
      if (odd && what == 4) q[3] += 1e-6f;
      if (odd && what == 5) how = dist::split::blocks;
      const tensor_view<const float, 4> query(q.data(), {1, 1, heads, 16});
      workspace memory;
      const auto i = static_cast<std::size_t>(comm.rank());
      return dist::sharded_attention<>(c, {}, how)(
          query, s.view(comm.rank()), o, {.output = {r[i].output.data(), {1, 1, heads, 16}}}, memory, comm, key);
    });
    return failure(all, r);
  };
  CHECK(differing(0) == "rank 1 has other settings than rank 0: give all ranks the same");
  CHECK(differing(1).find("rank 1 has other shapes") == 0);
  CHECK(differing(2).find("rank 1 has other options") == 0);
  CHECK(differing(3).find("rank 1 has another draw key") == 0);
  CHECK(differing(4).find("rank 1 has another query") == 0);
  CHECK(differing(5).find("rank 1 has other shapes or another split") == 0);
}

TEST_CASE("a rank whose call fails makes it fail everywhere, with its message and without an output", "[dist]") {
  const index_t n = 9000;
  problem<float> p(shape{.heads = 4, .kv_heads = 2, .n = n, .dk = 16, .dv = 16}, 2u, 2.0f);
  const way w{"", dist::split::round_robin, [](index_t i) { return static_cast<int>(i % 3); }};
  split_problem<float> split(p, 3, w, true);
  std::vector<results> r;
  const auto key_at = [&](int rank, index_t kv, index_t token) -> float& {
    return split.s.k[static_cast<std::size_t>(rank)][static_cast<std::size_t>((kv * 3000 + token) * 16)];
  };

  SECTION("what is not finite in its keys") {
    key_at(2, 1, 1500) = not_a_number;
    split.indices[2] = split.s.index(2);
    CHECK(failure(split.attend(few_fixed(), r), r).find("rank 2: a NaN or infinity was read") == 0);
  }
  SECTION("or in its values, which shows in the sums of all") {
    split.s.v[1][1500 * 16 + 3] = not_a_number;
    split.indices[1] = split.s.index(1);
    CHECK(failure(split.attend(few_fixed(), r), r).find("a NaN or infinity was read") != std::string::npos);
  }
  SECTION("its settings") {
    config c;
    c.epsilon = 2;
    CHECK(failure(split.attend(c, r), r).find("rank 0: epsilon is 2") == 0);
  }
  SECTION("its cells are not dealt as is said") {
    split.s.shape[0].n_tokens -= 1;
    CHECK(failure(split.attend(few_fixed(), r), r).find("rank 0 has 2999 of 8999 tokens") == 0);
  }
  SECTION("its index is of another cache") {
    std::vector<kv_index> other;
    other.emplace_back(index_shape{.n_kv_heads = 1, .dk = 16, .dv = 16});
    split.indices[1] = std::move(other);
    CHECK(failure(split.attend(few_fixed(), r), r).find("rank 1: an index is of 1 KV heads") == 0);
  }
  SECTION("its workspace is too small") {
    r.assign(3, results(p.s));
    const auto all = on_ranks(3, [&](auto& comm) {
      std::vector<std::byte> few(1000);
      workspace fixed{std::span<std::byte>(few)}, own;
      const auto i = static_cast<std::size_t>(comm.rank());
      return dist::sharded_attention<>(few_fixed(), split.indices[i], w.how)(
          p.query(), split.s.view(comm.rank()), p.options, r[i].view(), comm.rank() == 1 ? fixed : own, comm);
    });
    CHECK(failure(all, r).find("rank 1: the workspace has 1000 bytes") == 0);
  }
  SECTION("its executor throws, in whichever exchange") {
    struct throws_later {
      int left;
      [[nodiscard]] index_t workers() const { return 1; }
      void for_each(index_t count, const std::function<void(index_t, index_t)>& f) {
        if (left-- == 0) throw std::runtime_error("no more");
        for (index_t i = 0; i < count; ++i) f(i, 0);
      }
    };
    const auto with_calls = [&](int calls) {
      r.assign(3, results(p.s));
      return on_ranks(3, [&](auto& comm) {
        workspace memory;
        const auto i = static_cast<std::size_t>(comm.rank());
        return dist::sharded_attention<>(few_fixed(), split.indices[i], w.how)(
            p.query(), split.s.view(comm.rank()), p.options, r[i].view(), memory, comm, {},
            throws_later{comm.rank() == 1 ? calls : 1000});
      });
    };
    // Judging is done nevertheless; what it was to read is not.
    for (const int calls : {0, 2, 4}) {
      const auto all = with_calls(calls);
      CHECK(failure(all, r).find("rank 1: the executor threw") == 0);
    }
    for (const int calls : {1, 3}) {
      const auto all = with_calls(calls);
      require_ok(all);
      CHECK(same(r[0], r[1]));
    }
  }
}

TEST_CASE("what shards do not do is said", "[dist]") {
  problem<float> p(shape{.heads = 2, .kv_heads = 1, .n = 64, .dk = 16, .dv = 16});
  p.set_alibi({0.1f, 0.2f});
  split_problem<float> split(p, 2, ways(64, 2)[1], false);
  std::vector<results> r;
  CHECK(failure(split.attend({}, r), r) ==
        "rank 0: ALiBi and split::round_robin: give split::by_position and options.positions");
  split.how = dist::split::blocks;
  attention_options o = p.options;
  o.alibi_slopes = nullptr, o.positions = split.s.places(0);
  CHECK(failure(split.attend({}, r, {}, o), r).find("options.positions with another split") != std::string::npos);
}

TEST_CASE("threads of a rank change no bit", "[dist]") {
  const problem<Eigen::bfloat16> p(shape{.batch = 2, .heads = 8, .kv_heads = 4, .n = 8000, .dk = 32, .dv = 32}, 4u,
                                   2.0f);
  const shards<Eigen::bfloat16> s(p, 2, [](index_t i) { return static_cast<int>(i % 2); });
  const std::vector<kv_index> index[2] = {s.index(0), s.index(1)};
  std::vector<results> r(4, results(p.s));
  for (const std::size_t threads : {1u, 3u}) {
    require_ok(on_ranks(2, [&](auto& comm) {
      workspace memory;
      thread_executor pool(static_cast<index_t>(threads) + comm.rank());
      return dist::sharded_attention<>(few_fixed(), index[comm.rank()], dist::split::round_robin)(
          p.query(), s.view(comm.rank()), p.options,
          r[static_cast<std::size_t>(comm.rank()) + (threads == 1 ? 0 : 2)].view(), memory, comm, {.step = 5}, pool);
    }));
  }
  for (const results& other : r) CHECK(same(r[0], other));
}
