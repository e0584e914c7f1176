// A call once its arguments are checked: walks its queries and heads, and writes its results.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <optional>
#include <span>
#include <utility>

#include "vattn/base/crew.hpp"
#include "vattn/base/executor.hpp"
#include "vattn/base/philox.hpp"
#include "vattn/base/workspace.hpp"
#include "vattn/call/arguments.hpp"
#include "vattn/certificate.hpp"
#include "vattn/estimate/residual.hpp"
#include "vattn/estimate/weighted.hpp"
#include "vattn/kv/query.hpp"
#include "vattn/kv/view.hpp"

namespace vattn::VATTN_ABI {

/// What one worker needs for one query of one head.
struct scratch {
  std::span<float> query;                     // [dk], scaled
  std::span<float> output;                    // [dv]
  std::span<float> state, part;               // [dv]
  std::span<float> audited, truth;            // [dv], an auditor's: sums of all rows, and their output
  std::span<float> centre, offset;            // [dv]
  std::span<float> value_centre;              // [dv]
  std::span<float> moments;                   // residual_moments::storage_size(dv)
  std::span<ordinal> visible;                 // [n], with a mask or positions
  std::span<ordinal> ends;                    // sinks and window, where cells have positions
  chosen_rows chosen;                         // where the call's rows are recorded, if they are
  std::span<float> scores;                    // [n]
  std::span<ordinal> order;                   // [n]
  std::span<drawn_row> drawn;                 // rows that may be sampled
  std::span<std::uint64_t> table;             // sampler's
  std::span<float> selector;                  // selector's
  bool lagging = false;                       // its index does not hold every visible token
  std::span<float> errors;                    // [n], of the scores
  std::span<float> matrix;                    // [2, dv, dv]
  std::span<float> weights, floors, numbers;  // [n], importance sampling's
  std::span<float> reaches;                   // [n]
  std::span<weighted_row> weighted;           // rows that may be sampled
  // Tokens that a first phase may keep: probability, permanent number, and what it knew of them.
  std::span<float> prior, kept_numbers, coarse_scores, coarse_errors;

  /// What sparse attention needs beyond exact attention, for n tokens.
  struct sparse_sizes {
    std::size_t drawn = 0, table = 0, weighted = 0, candidates = 0, selector = 0;
    bool sampled = false;
    bool measured = false;   // squares of values are summed, so that they need a unit
    bool observed = false;   // the call may have an auditor
    bool ranked = false;     // tokens are put in order
    bool errors = false;     // scores come with error scales
    std::size_t matrix = 0;  // dv², twice, where a second moment is kept whole
    index_t sinks = 0, window = 0;
    index_t shared = 1;           // heads of a group that are attended together, at most max_shared
    index_t queries = 1;          // with so many queries: shared·queries <= max_shared
    std::size_t group_bytes = 0;  // of memory for a group together
    bool cut = false;             // groups offer pieces of their work to workers that have none
  };

  [[nodiscard]] static scratch take(arena& a, index_t n, index_t dk, index_t dv, bool masked,
                                    const sparse_sizes& sparse) noexcept {
    const auto tokens = static_cast<std::size_t>(n), width = static_cast<std::size_t>(dv);
    scratch s;
    s.query = a.take<float>(static_cast<std::size_t>(dk));
    s.output = a.take<float>(width);
    s.state = a.take<float>(width);
    s.part = a.take<float>(width);
    s.visible = a.take<ordinal>(masked ? tokens : 0);
    s.ends = a.take<ordinal>(masked ? static_cast<std::size_t>(std::min(n, sparse.sinks + sparse.window)) : 0);
    s.audited = a.take<float>(sparse.observed ? width : 0);
    s.truth = a.take<float>(sparse.observed ? width : 0);
    if (!sparse.sampled) return s;
    s.centre = a.take<float>(width);
    s.offset = a.take<float>(width);
    s.value_centre = a.take<float>(width);
    s.moments = a.take<float>(residual_moments::storage_size(dv));
    s.scores = a.take<float>(tokens);
    s.order = a.take<ordinal>(sparse.ranked || sparse.candidates > 0 ? tokens : 0);
    s.drawn = a.take<drawn_row>(sparse.drawn);
    s.table = a.take<std::uint64_t>(sparse.table);
    s.selector = a.take<float>(sparse.selector);
    s.errors = a.take<float>(sparse.errors ? tokens : 0);
    s.matrix = a.take<float>(sparse.matrix);
    if (sparse.weighted == 0) return s;
    s.weights = a.take<float>(tokens);
    s.floors = a.take<float>(tokens);
    s.numbers = a.take<float>(tokens);
    s.reaches = a.take<float>(tokens);
    s.weighted = a.take<weighted_row>(sparse.weighted);
    s.prior = a.take<float>(sparse.candidates);
    s.kept_numbers = a.take<float>(sparse.candidates);
    s.coarse_scores = a.take<float>(sparse.candidates);
    s.coarse_errors = a.take<float>(sparse.candidates);
    return s;
  }
};

/// `place` is (batch·n_queries + query)·n_heads + head.
[[nodiscard]] inline status non_finite_error(index_t place, index_t n_queries, index_t n_heads) noexcept {
  return status::error(
      errc::non_finite,
      "a NaN or infinity was read, or a product overflowed float, for batch %lld, query %lld, head %lld: check q, "
      "K, V, the mask and the sink logits of that head",
      static_cast<long long>(place / n_heads / n_queries), static_cast<long long>(place / n_heads % n_queries),
      static_cast<long long>(place % n_heads));
}

/// The lowest failing row of a call, so that its message does not depend on the threads. −1: none.
inline void keep_lowest(std::atomic<index_t>& failed, index_t place) noexcept {
  for (index_t seen = failed.load(); (seen < 0 || place < seen) && !failed.compare_exchange_weak(seen, place);) {
  }
}

/// Query t of T for head h: everything that its logits need. Scales the query into `scaled`, [dk].
template <class Q, kv_head Head>
[[nodiscard]] query_row<Head> make_row(const tensor_view<const Q, 4>& q, const Head& head,
                                       const attention_options& options, index_t b, index_t t, index_t h, index_t kv,
                                       std::span<float> scaled) noexcept {
  query_row<Head> row{.head = head, .scaled_query = scaled.data()};
  row.scale = options.scale;
  row.softcap = options.softcap;
  row.position = head.size() - q.extents[1] + t;
  row.kv_head = kv;
  row.mask = options.mask.at(b, h, t);
  row.positions = options.positions.at(b);
  if (row.positions && options.positions.queries) row.position = options.positions.queries(b, t);
  if (options.alibi_slopes) row.alibi_slope = options.alibi_slopes[h];
  if (options.sink_logits) row.sink_logit = options.sink_logits[h];
  using kernel::load;
  load(std::span<const Q>(&q(b, t, h, 0), scaled.size()), scaled.data());
  for (float& x : scaled) x *= options.scale;
  return row;
}

/// Heads of a group that share a sample. Larger groups are cut.
inline constexpr index_t max_shared = 8;

/// One query of one head: what it asks, what it may use, and what becomes of it.
template <kv_head Head>
struct head_task {
  query_row<Head> row;
  population tokens;
  random_stream stream;
  scratch s;
  softmax_state state{};
  certificate c{};
  index_t query = 0;  ///< t of the call's T
  bool ok = true;     ///< false: it met a number that is not finite, or an index that lags
  bool done = false;  ///< its sample is verified: state and certificate stand
  // What a first phase must cover, see sampling_frame.
  double log_floor = -std::numeric_limits<double>::infinity(), offset = 0;
};

/// Heads of one KV head, 1 to max_shared of them, query by query. Those of one query see the same tokens.
template <kv_head Head>
class head_group {
 public:
  void push(head_task<Head>&& task) noexcept { put(size_++, std::move(task)); }
  void put(index_t g, head_task<Head>&& task) noexcept { tasks_[static_cast<std::size_t>(g)].emplace(std::move(task)); }
  [[nodiscard]] index_t size() const noexcept { return size_; }
  [[nodiscard]] head_task<Head>& operator[](index_t g) noexcept { return *tasks_[static_cast<std::size_t>(g)]; }
  std::span<std::byte> memory{};  ///< sparse_sizes::group_bytes
  crew* helpers = nullptr;        ///< where sparse_sizes::cut
  index_t worker = 0;

  /// f(piece, memory) for every piece of [0, n), on any thread, beginning in ascending order. `memory` is as large as
  /// the group's own, which it may be.
  template <class F>
  void for_each_piece(index_t n, F&& f) noexcept {
    if (helpers) return helpers->for_each(worker, memory, n, f);
    for (index_t piece = 0; piece < n; ++piece) f(piece, memory);
  }

 private:
  std::array<std::optional<head_task<Head>>, static_cast<std::size_t>(max_shared)> tasks_{};
  index_t size_ = 0;
};

/// The observer of calls that nobody observes.
struct unobserved {
  template <kv_head Head>
  void operator()(const head_task<Head>&) const noexcept {}
};

/// Bytes that `for_each_group` takes from the workspace: the dry run of the same code.
[[nodiscard]] inline std::size_t call_bytes(index_t n, index_t dk, index_t dv, bool masked,
                                            const scratch::sparse_sizes& sparse, index_t workers) noexcept {
  arena count;
  for (index_t w = 0; w < workers * sparse.shared * sparse.queries; ++w)
    static_cast<void>(scratch::take(count, n, dk, dv, masked, sparse));
  for (index_t w = 0; w < workers; ++w) static_cast<void>(count.take<std::byte>(sparse.group_bytes));
  return count.used() + workspace::alignment;
}

/// What query t of T sees of n tokens.
template <kv_head Head>
[[nodiscard]] population visible_tokens(const query_row<Head>& row, index_t n, index_t n_queries, index_t t,
                                        const attention_options& options, const scratch::sparse_sizes& sparse,
                                        const scratch& s) noexcept {
  if (!row.positions) {
    const auto [first, last] = visible_range(n, n_queries, t, options);
    return {first, last, row.mask, s.visible};
  }
  const position_range range = visible_positions(row.position, options);
  return visible_by_position(n, row.mask, row.positions, range, sparse.sinks, sparse.window, s.visible, s.ends);
}

/// Calls `attend(head_group&)` for every query and KV head, with up to `sparse.shared` query heads at a time,
/// and writes what it leaves in their states and certificates.
template <class Q, kv_cache KV, executor E, class Attend>
[[nodiscard]] status for_each_group(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
                                    const attention_result& result, workspace& memory, const draw_key& key, E& exec,
                                    const scratch::sparse_sizes& sparse, Attend&& attend) noexcept {
  if (result.output.size() == 0) return {};
  const index_t n_queries = q.extents[1], n_heads = q.extents[2], dk = q.extents[3];
  const index_t dv = cache.dv(), n_max = longest(cache), workers = workers_of(exec);
  const bool masked = options.mask || options.positions;
  if (status s = key.check(q.extents[0], n_heads); !s) return s;
  const std::size_t bytes = call_bytes(n_max, dk, dv, masked, sparse, workers);
  if (status s = memory.reserve(bytes); !s) return s;

  const index_t group = n_heads / cache.n_kv_heads();
  const index_t shared = std::min(options.mask.same_for_heads() ? sparse.shared : 1, std::max<index_t>(1, group));
  const index_t parts = group > 0 ? (group + shared - 1) / shared : 0;
  const index_t tile = std::max<index_t>(1, std::min(sparse.queries, n_queries)), tiles = (n_queries + tile - 1) / tile;
  const index_t tasks = q.extents[0] * tiles * cache.n_kv_heads() * parts;
  std::atomic<index_t> failed{-1};
  std::atomic<bool> lagging{false};
  // Behind the tasks, workers that find none left: parts of a call, which others do the rest of, have no such.
  constexpr bool whole = !partial_executor<E>;
  const index_t helping = whole && sparse.cut && workers > 1 ? workers - 1 : 0;
  crew helpers(tasks, helping + 1);
  const auto run = [&](index_t task, index_t worker) {
    if (task >= tasks) {
      arena a(memory.memory().subspan(call_bytes(n_max, dk, dv, masked, sparse, worker) - workspace::alignment));
      return helpers.help(a.take<std::byte>(sparse.group_bytes));
    }
    helpers.begin();
    const index_t part = task % parts, kv = task / parts % cache.n_kv_heads();
    const index_t t0 = task / parts / cache.n_kv_heads() % tiles * tile, b = task / parts / cache.n_kv_heads() / tiles;
    const index_t first_head = kv * group + part * shared, queries = std::min(tile, n_queries - t0);
    const index_t heads = std::min(shared, group - part * shared);
    arena a(memory.memory().subspan(call_bytes(n_max, dk, dv, masked, sparse, worker) - workspace::alignment));
    const auto head = cache.head(b, kv);
    using head_type = std::remove_cvref_t<decltype(head)>;
    const index_t n = head.size();
    head_group<head_type> together;
    together.memory = a.take<std::byte>(sparse.group_bytes);
    if (helping > 0) together.helpers = &helpers, together.worker = worker;
    for (index_t i = 0; i < queries * heads; ++i) {
      const index_t t = t0 + i / heads, h = first_head + i % heads;
      scratch s = scratch::take(a, n_max, dk, dv, masked, sparse);
      s.chosen = result.decisions.at(b, t, h);
      s.chosen.clear();
      const query_row<head_type> row = make_row(q, head, options, b, t, h, b * cache.n_kv_heads() + kv, s.query);
      const population tokens =
          i % heads == 0 ? visible_tokens(row, n, n_queries, t, options, sparse, s) : together[i - 1].tokens;
      const random_stream stream(key.at(b, t), key.first_head + static_cast<std::uint32_t>(h));
      head_task<head_type> one{.row = row, .tokens = tokens, .stream = stream, .s = s, .query = t};
      one.state = softmax_state(s.state);
      one.c.n = tokens.size();
      // Exact attention squares nothing.
      if (sparse.sampled || sparse.measured)
        one.row.value_unit = i == 0 ? value_unit(head, tokens, s.output) : together[0].row.value_unit;
      one.ok = std::isfinite(row.sink_logit) || row.sink_logit == -std::numeric_limits<float>::infinity();
      together.push(std::move(one));
    }
    attend(together);
    for (index_t g = 0; g < queries * heads; ++g) {
      head_task<head_type>& one = together[g];
      const index_t t = one.query, h = first_head + g % heads, place = (b * n_queries + t) * n_heads + h;
      const float lse = one.state.finish(one.s.output);
      for (float& x : one.s.output) x *= 1 / one.row.value_unit;
      const bool finite = one.ok && std::isfinite(one.state.denominator()) &&
                          kernel::const_float_map(one.s.output.data(), dv).allFinite();
      if (!finite) {
        if (one.s.lagging) lagging = true;
        keep_lowest(failed, place);
      }
      one.c.log_denominator = lse;
      for (index_t j = 0; j < dv; ++j) result.output(b, t, h, j) = one.s.output[static_cast<std::size_t>(j)];
      if (result.log_sum_exp) result.log_sum_exp(b, t, h) = lse;
      if (result.certificates) result.certificates(b, t, h) = one.c;
      if (one.c.exact()) one.s.chosen.all(one.tokens);
    }
    helpers.end();
  };
  if (status st = run_tasks(exec, workers, tasks + helping, run); !st) return st;
  if (const index_t place = failed.load(); place >= 0) {
    if (lagging.load()) {
      return status::error(
          errc::invalid_argument,
          "the selector's index has no state for a KV head, lacks its latest tokens or has more than there are: give "
          "one "
          "index of the cache's head size for each of batch x KV heads, append the new keys before the call, and "
          "truncate it with the cache");
    }
    return non_finite_error(place, n_queries, n_heads);
  }
  return {};
}

/// As `for_each_group`, one head at a time: `attend(row, tokens, stream, scratch, state, certificate) -> bool`,
/// false where it met a number that is not finite.
template <class Q, kv_cache KV, executor E, class Attend>
[[nodiscard]] status for_each_query(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
                                    const attention_result& result, workspace& memory, const draw_key& key, E& exec,
                                    const scratch::sparse_sizes& sparse, Attend&& attend) noexcept {
  return for_each_group(q, cache, options, result, memory, key, exec, sparse, [&attend](auto& heads) {
    for (index_t g = 0; g < heads.size(); ++g) {
      auto& one = heads[g];
      one.ok = one.ok && attend(one.row, one.tokens, one.stream, one.s, one.state, one.c);
    }
  });
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
