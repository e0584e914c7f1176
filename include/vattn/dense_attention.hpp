// Exact attention from strided rows: each row read once for all queries of its KV head, the work cut in pieces.
#include "vattn/macros_push.hpp"
#pragma once

#include <atomic>
#include <memory>

#include "vattn/call/call.hpp"
#include "vattn/certificate.hpp"
#include "vattn/estimate/exact.hpp"
#include "vattn/estimate/group.hpp"

namespace vattn::VATTN_ABI {

/// How the work of a call is cut. It depends on the call's shape alone, never on the number of threads, and pieces
/// are merged in order: so any number of threads gives the same bits.
struct dense_plan {
  index_t tile = 1;      ///< queries whose rows are read together
  index_t tiles = 0;     ///< of a sequence
  index_t chunk = 1;     ///< tokens of a piece, a multiple of phase_rows
  index_t chunks = 1;    ///< of the longest sequence
  index_t together = 1;  ///< heads that see the same tokens and are read for at once
  index_t group = 1;     ///< query heads of a KV head
  index_t rows = 0;      ///< batch x queries x heads

  dense_plan(index_t batch, index_t queries, index_t heads, index_t kv_heads, index_t n, bool same_mask) noexcept {
    group = heads / kv_heads;
    rows = batch * queries * heads;
    together = same_mask ? std::clamp<index_t>(group, 1, max_together) : 1;
    tile = std::clamp<index_t>(max_tile / std::max<index_t>(1, group), 1, std::max<index_t>(1, queries));
    tiles = (queries + tile - 1) / tile;
    // Sequences are cut where heads and queries are too few to keep threads busy.
    const index_t pieces = batch * tiles * kv_heads;
    chunk = pieces < enough_pieces ? chunk_rows : std::max<index_t>(1, n);
    chunks = std::max<index_t>(1, (n + chunk - 1) / chunk);
  }

  static constexpr index_t max_together = 8, max_tile = 32, chunk_rows = phase_rows, enough_pieces = 64;
};

/// Memory of a call: what pieces leave of each query, and what a worker needs for the queries of a tile.
template <strided_head Head>
struct dense_scratch {
  std::span<softmax_state> states;          // [chunks, rows]
  std::span<float> numerators;              // [chunks, rows, dv]
  std::span<index_t> tokens;                // [chunks, rows]; -1: a logit was not finite
  std::span<query_row<Head>> queries;       // [tile, group]
  std::span<kernel::block_queries> blocks;  // [tile, group]
  std::span<float> scaled;                  // [tile, group, dk]
  std::span<float> prepared;                // [tile, group] x query_storage
  std::span<float> part;                    // [together, dv]
  std::span<float> logits;                  // [together, phase_rows]
  std::span<ordinal> visible;               // [phase_rows], with a mask

  void take_shared(arena& a, const dense_plan& p, index_t dv) noexcept {
    states = a.take<softmax_state>(static_cast<std::size_t>(p.rows * p.chunks));
    numerators = a.take<float>(static_cast<std::size_t>(p.rows * p.chunks * dv));
    tokens = a.take<index_t>(static_cast<std::size_t>(p.rows * p.chunks));
  }
  void take_own(arena& a, const dense_plan& p, index_t dk, index_t dv, bool masked) noexcept {
    const auto rows = static_cast<std::size_t>(p.tile * p.group);
    queries = a.take<query_row<Head>>(rows);
    blocks = a.take<kernel::block_queries>(rows);
    scaled = a.take<float>(rows * static_cast<std::size_t>(dk));
    prepared = a.take<float>(rows * kernel::query_storage(1, dk));
    part = a.take<float>(static_cast<std::size_t>(p.together * dv));
    logits = a.take<float>(query_group<Head>::logits_size(p.together));
    visible = a.take<ordinal>(static_cast<std::size_t>(masked ? phase_rows : 0));
  }
};

/// Exact attention of a call whose arguments were checked. Certificates say of what was asked what `asked` does.
template <class Q, kv_cache KV, class Head>
class dense_call {
 public:
  dense_call(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
             const attention_result& result, const certificate& asked = {}) noexcept
      : q_(q),
        cache_(cache),
        options_(options),
        result_(result),
        asked_(asked),
        plan_(q.extents[0], q.extents[1], q.extents[2], cache.n_kv_heads(), longest(cache),
              options.mask.same_for_heads()) {}

  template <executor E>
  [[nodiscard]] status run(workspace& memory, E& exec) noexcept {
    if (result_.output.size() == 0) return {};
    const index_t workers = workers_of(exec);
    const auto take = [&](arena& a, index_t worker) {
      dense_scratch<Head> s;
      s.take_shared(a, plan_, cache_.dv());
      for (index_t w = 0; w <= worker; ++w) s.take_own(a, plan_, cache_.dk(), cache_.dv(), bool(options_.mask));
      return s;
    };
    arena count;
    take(count, workers - 1);
    if (status s = memory.reserve(count.used() + workspace::alignment); !s) return s;
    const auto scratch_of = [&](index_t worker) {
      arena a(memory.memory());
      return take(a, worker);
    };
    const index_t pieces = q_.extents[0] * plan_.tiles * cache_.n_kv_heads() * plan_.chunks;
    status ran = run_tasks(exec, workers, pieces, [&](index_t task, index_t worker) {
      const index_t chunk = task % plan_.chunks, piece = task / plan_.chunks;
      const index_t kv = piece % cache_.n_kv_heads(), tile = piece / cache_.n_kv_heads();
      read(tile / plan_.tiles, tile % plan_.tiles * plan_.tile, kv, chunk, scratch_of(worker));
    });
    if (!ran) return ran;
    dense_scratch<Head> s = scratch_of(0);
    std::atomic<index_t> failed{-1};
    if (plan_.rows * plan_.chunks <= few_parts) {  // not worth waking anybody
      for (index_t place = 0; place < plan_.rows; ++place) finish(place, s, failed);
    } else {
      ran = run_tasks(exec, workers, plan_.rows, [&](index_t place, index_t worker) {
        dense_scratch<Head> own = scratch_of(worker);
        finish(place, own, failed);
      });
      if (!ran) return ran;
    }
    const index_t place = failed.load();
    return place < 0 ? status() : non_finite_error(place, q_.extents[1], q_.extents[2]);
  }

 private:
  static constexpr index_t few_parts = 2048;

  // Tokens of one chunk, for queries t0 and on of one KV head.
  void read(index_t b, index_t t0, index_t kv, index_t chunk, const dense_scratch<Head>& s) noexcept {
    const Head head = cache_.head(b, kv);
    const index_t n = head.size(), n_queries = q_.extents[1], n_heads = q_.extents[2], dk = head.dk(), dv = head.dv();
    const index_t queries = std::min(plan_.tile, n_queries - t0), group = plan_.group;
    const auto at = [](auto span, index_t first, index_t width) {
      return span.subspan(static_cast<std::size_t>(first * width), static_cast<std::size_t>(width));
    };
    const auto place_of = [&](index_t t, index_t h) {
      return chunk * plan_.rows + (b * n_queries + t0 + t) * n_heads + kv * group + h;
    };
    for (index_t i = 0; i < queries * group; ++i) {
      std::construct_at(&s.queries[static_cast<std::size_t>(i)],
                        make_row(q_, head, options_, b, t0 + i / group, kv * group + i % group,
                                 b * cache_.n_kv_heads() + kv, at(s.scaled, i, dk)));
      const index_t place = place_of(i / group, i % group);
      s.states[static_cast<std::size_t>(place)] = softmax_state(at(s.numerators, place, dv));
      s.tokens[static_cast<std::size_t>(place)] = 0;
    }
    const auto for_each_set = [&](auto&& f) {
      for (index_t t = 0; t < queries; ++t) {
        for (index_t h = 0; h < group; h += plan_.together) f(t, h, std::min(plan_.together, group - h));
      }
    };
    for_each_set([&](index_t t, index_t h, index_t heads) {
      const index_t i = t * group + h, storage = static_cast<index_t>(kernel::query_storage(1, dk));
      s.blocks[static_cast<std::size_t>(i)] = kernel::prepare_queries<typename Head::key_element>(
          kernel::active_isa(), s.scaled.data() + i * dk, heads, dk, options_.scale,
          s.prepared.subspan(static_cast<std::size_t>(i * storage)));
    });
    const index_t end = std::min(n, (chunk + 1) * plan_.chunk);
    for (index_t first = chunk * plan_.chunk; first < end; first += phase_rows) {
      const index_t last = std::min(end, first + phase_rows);
      for_each_set([&](index_t t, index_t h, index_t heads) {
        const auto i = static_cast<std::size_t>(t * group + h), place = static_cast<std::size_t>(place_of(t, h));
        const auto [begin, stop] = visible_range(n, n_queries, t0 + t, options_);
        const population tokens(std::max(first, begin), std::min(last, stop), s.queries[i].mask, s.visible);
        const query_group<Head> together{&s.queries[i], &s.states[place], s.blocks[i],
                                         s.part.first(static_cast<std::size_t>(heads * dv)), s.logits};
        const std::uint32_t odd = together.add(tokens);
        for (index_t g = 0; g < heads; ++g) {
          index_t& seen = s.tokens[place + static_cast<std::size_t>(g)];
          seen = seen < 0 || (odd >> g & 1) ? -1 : seen + tokens.size();
        }
      });
    }
  }

  // Merges the parts of one query, in order, and writes its results.
  void finish(index_t place, dense_scratch<Head>& s, std::atomic<index_t>& failed) noexcept {
    const index_t n_heads = q_.extents[2], h = place % n_heads, t = place / n_heads % q_.extents[1];
    const index_t b = place / n_heads / q_.extents[1], dv = cache_.dv();
    const float sink = options_.sink_logits ? options_.sink_logits[h] : -std::numeric_limits<float>::infinity();
    softmax_state& state = s.states[static_cast<std::size_t>(place)];
    index_t tokens = 0;
    bool ok = std::isfinite(sink) || sink == -std::numeric_limits<float>::infinity();
    for (index_t c = 0; c < plan_.chunks; ++c) {
      const auto i = static_cast<std::size_t>(c * plan_.rows + place);
      ok = ok && s.tokens[i] >= 0;
      tokens += s.tokens[i];
      if (c > 0 && ok) state.merge(s.states[i]);
    }
    if (ok) add_sink(state, sink);
    const std::span<float> output = s.part.first(static_cast<std::size_t>(dv));
    const float lse = state.finish(output);
    if (!ok || !std::isfinite(state.denominator()) || !kernel::const_float_map(output.data(), dv).allFinite())
      keep_lowest(failed, place);
    for (index_t j = 0; j < dv; ++j) result_.output(b, t, h, j) = output[static_cast<std::size_t>(j)];
    if (result_.log_sum_exp) result_.log_sum_exp(b, t, h) = lse;
    if (result_.certificates) {
      certificate c = asked_;
      c.n = tokens;
      certify_exact(c);
      c.log_denominator = lse;
      result_.certificates(b, t, h) = c;
    }
  }

  const tensor_view<const Q, 4>& q_;
  const KV& cache_;
  const attention_options& options_;
  const attention_result& result_;
  certificate asked_;
  dense_plan plan_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
