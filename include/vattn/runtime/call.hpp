// The edge of the library: checks a call's arguments, walks its queries and heads, writes its results.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <span>

#include "vattn/certify/certificate.hpp"
#include "vattn/estimate/residual.hpp"
#include "vattn/estimate/weighted.hpp"
#include "vattn/kv/query.hpp"
#include "vattn/kv/view.hpp"
#include "vattn/runtime/executor.hpp"
#include "vattn/runtime/workspace.hpp"
#include "vattn/sample/philox.hpp"

namespace vattn {

/// Where results go. `output` is required, the others may be left empty.
struct attention_result {
  tensor_view<float, 4> output{};              ///< [n_batch, n_queries, n_q_heads, dv]
  tensor_view<float, 3> log_sum_exp{};         ///< [n_batch, n_queries, n_q_heads], natural log
  tensor_view<certificate, 3> certificates{};  ///< [n_batch, n_queries, n_q_heads]
};

/// What one worker needs for one query of one head.
struct scratch {
  std::span<float> query;                     // [dk], scaled
  std::span<float> output;                    // [dv]
  std::span<float> state, part;               // [dv]
  std::span<float> centre, offset;            // [dv]
  std::span<float> value_centre;              // [dv]
  std::span<float> moments;                   // residual_moments::storage_size(dv)
  std::span<ordinal> visible;                 // [n], with a mask
  std::span<float> scores;                    // [n]
  std::span<ordinal> order;                   // [n]
  std::span<drawn_row> drawn;                 // rows that may be sampled
  std::span<std::uint64_t> table;             // sampler's
  std::span<float> selector;                  // selector's
  bool lagging = false;                       // its index does not hold every visible token
  std::span<float> errors;                    // [n]; this and below: importance sampling's
  std::span<float> weights, floors, numbers;  // [n]
  std::span<weighted_row> weighted;           // rows that may be sampled

  /// What sparse attention needs beyond exact attention, for n tokens.
  struct sparse_sizes {
    std::size_t drawn = 0, table = 0, weighted = 0, selector = 0;
    bool sampled = false;
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
    if (!sparse.sampled) return s;
    s.centre = a.take<float>(width);
    s.offset = a.take<float>(width);
    s.value_centre = a.take<float>(width);
    s.moments = a.take<float>(residual_moments::storage_size(dv));
    s.scores = a.take<float>(tokens);
    s.order = a.take<ordinal>(tokens);
    s.drawn = a.take<drawn_row>(sparse.drawn);
    s.table = a.take<std::uint64_t>(sparse.table);
    s.selector = a.take<float>(sparse.selector);
    if (sparse.weighted == 0) return s;
    s.errors = a.take<float>(tokens);
    s.weights = a.take<float>(tokens);
    s.floors = a.take<float>(tokens);
    s.numbers = a.take<float>(tokens);
    s.weighted = a.take<weighted_row>(sparse.weighted);
    return s;
  }
};

/// The longest sequence of a batch.
template <kv_cache KV>
[[nodiscard]] index_t longest(const KV& cache) noexcept {
  index_t n = 0;
  for (index_t b = 0; b < cache.n_batch(); ++b) n = std::max<index_t>(n, cache.head(b, 0).size());
  return n;
}

/// Everything about a call that can be known to be wrong before a row is read.
template <class Q, kv_cache KV>
[[nodiscard]] status check_call(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
                                const attention_result& result) noexcept {
  const auto ll = [](index_t v) { return static_cast<long long>(v); };
  if (status s = cache.validate(); !s) return s;
  const auto [batch, queries, heads, dk] = q.extents;
  if (batch != cache.n_batch()) {
    return status::error(errc::invalid_argument, "q has n_batch %lld, the cache %lld", ll(batch), ll(cache.n_batch()));
  }
  if (queries < 0 || heads < 0 || heads % cache.n_kv_heads() != 0) {
    return status::error(errc::invalid_argument,
                         "q has %lld heads, the cache %lld: the number of query heads must be a multiple of KV heads",
                         ll(heads), ll(cache.n_kv_heads()));
  }
  if (dk != cache.dk()) {
    return status::error(errc::invalid_argument, "q has head size %lld, the keys %lld%s", ll(dk), ll(cache.dk()),
                         dk == cache.dv() ? ": are K and V swapped?" : "");
  }
  if (q.size() > 0 && q.data == nullptr) return status::error(errc::invalid_argument, "q is null");
  if (q.size() > 0 && q.strides[3] != static_cast<index_t>(sizeof(Q))) {
    return status::error(errc::invalid_argument,
                         "the elements of a query must be adjacent: the last byte stride of q is %lld, not %zu",
                         ll(q.strides[3]), sizeof(Q));
  }
  if (std::isnan(options.scale)) {
    return status::error(errc::invalid_argument,
                         "options.scale is not set: 1/sqrt(dk) = %g for most models, 1 if the engine has scaled q",
                         1 / std::sqrt(static_cast<double>(dk)));
  }
  if (!std::isfinite(options.scale)) return status::error(errc::invalid_argument, "options.scale is not finite");
  if (!(options.softcap >= 0) || std::isinf(options.softcap)) {
    return status::error(errc::invalid_argument, "options.softcap is %g: give a positive cap, or 0 for none",
                         static_cast<double>(options.softcap));
  }
  if (options.sliding_window < 0) {
    return status::error(errc::invalid_argument,
                         "options.sliding_window is %lld: give a number of tokens, or 0 for all",
                         ll(options.sliding_window));
  }
  const index_t n = longest(cache);
  if (n >= population::max_size)
    return status::error(errc::invalid_argument, "%lld tokens: sequences end at 2^31", ll(n));
  if (options.mask) {
    const auto& m = options.mask.extents();
    if (m[0] < batch || m[1] < heads || m[2] < queries || m[3] < n) {
      return status::error(
          errc::invalid_argument,
          "the mask is [%lld, %lld, %lld, %lld], less than [%lld, %lld, %lld, %lld]: give the full extents, with "
          "byte stride 0 where an axis repeats",
          ll(m[0]), ll(m[1]), ll(m[2]), ll(m[3]), ll(batch), ll(heads), ll(queries), ll(n));
    }
  }
  const auto& o = result.output.extents;
  if (o != std::array<index_t, 4>{batch, queries, heads, cache.dv()}) {
    return status::error(errc::invalid_argument, "output is [%lld, %lld, %lld, %lld], not [%lld, %lld, %lld, %lld]%s",
                         ll(o[0]), ll(o[1]), ll(o[2]), ll(o[3]), ll(batch), ll(queries), ll(heads), ll(cache.dv()),
                         o[3] == cache.dk() && o[3] != cache.dv() ? ": are K and V swapped?" : "");
  }
  if (result.output.size() > 0 && result.output.data == nullptr)
    return status::error(errc::invalid_argument, "output is null");
  const std::array<index_t, 3> rows{batch, queries, heads};
  if ((result.log_sum_exp && result.log_sum_exp.extents != rows) ||
      (result.certificates && result.certificates.extents != rows)) {
    return status::error(errc::invalid_argument, "log_sum_exp and certificates must be [%lld, %lld, %lld], or empty",
                         ll(batch), ll(queries), ll(heads));
  }
  return {};
}

/// Bytes that `for_each_query` takes from the workspace: the dry run of the same code.
[[nodiscard]] inline std::size_t call_bytes(index_t n, index_t dk, index_t dv, bool masked,
                                            const scratch::sparse_sizes& sparse, index_t workers) noexcept {
  arena count;
  for (index_t w = 0; w < workers; ++w) static_cast<void>(scratch::take(count, n, dk, dv, masked, sparse));
  return count.used() + workspace::alignment;
}

/// Calls `attend(row, tokens, stream, scratch, state, certificate) -> bool` for every query and head and
/// writes what it leaves in `state`. It returns false where it met a number that is not finite.
template <class Q, kv_cache KV, executor E, class Attend>
[[nodiscard]] status for_each_query(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
                                    const attention_result& result, workspace& memory, const draw_key& key, E& exec,
                                    const scratch::sparse_sizes& sparse, Attend&& attend) noexcept {
  const index_t n_queries = q.extents[1], n_heads = q.extents[2], dk = q.extents[3];
  const index_t dv = cache.dv(), n_max = longest(cache), workers = exec.workers();
  const bool masked = static_cast<bool>(options.mask);
  const std::size_t bytes = call_bytes(n_max, dk, dv, masked, sparse, workers);
  if (status s = memory.reserve(bytes); !s) return s;

  const index_t tasks = q.extents[0] * n_queries * n_heads, group = n_heads / cache.n_kv_heads();
  std::atomic<index_t> failed{-1};
  std::atomic<bool> lagging{false};
  exec.for_each(tasks, [&](index_t task, index_t worker) {
    const index_t h = task % n_heads, t = task / n_heads % n_queries, b = task / n_heads / n_queries;
    arena a(memory.memory().subspan(call_bytes(n_max, dk, dv, masked, sparse, worker) - workspace::alignment));
    scratch s = scratch::take(a, n_max, dk, dv, masked, sparse);
    const auto head = cache.head(b, h / group);
    const index_t n = head.size();

    query_row<std::remove_cvref_t<decltype(head)>> row{.head = head, .scaled_query = s.query.data()};
    row.softcap = options.softcap;
    row.position = n - n_queries + t;
    row.kv_head = b * cache.n_kv_heads() + h / group;
    row.mask = options.mask.at(b, h, t);
    if (options.alibi_slopes) row.alibi_slope = options.alibi_slopes[h];
    if (options.sink_logits) row.sink_logit = options.sink_logits[h];
    using kernel::load;
    load(std::span<const Q>(&q(b, t, h, 0), static_cast<std::size_t>(dk)), s.query.data());
    for (float& x : s.query) x *= options.scale;

    const auto [first, last] = visible_range(n, n_queries, t, options);
    const population tokens(first, last, row.mask, s.visible);
    const random_stream stream({key.seed, key.layer, key.step + static_cast<std::uint32_t>(t)},
                               static_cast<std::uint32_t>(b * n_heads + h));
    certificate c;
    c.n = tokens.size();
    softmax_state state(s.state);
    const bool sink_ok = std::isfinite(row.sink_logit) || row.sink_logit == -std::numeric_limits<float>::infinity();
    bool finite = sink_ok && attend(row, tokens, stream, s, state, c);
    const float lse = state.finish(s.output);
    finite = finite && std::isfinite(state.denominator()) && kernel::const_float_map(s.output.data(), dv).allFinite();
    if (!finite) {
      if (s.lagging) lagging = true;
      // The lowest failing task, so that the message does not depend on the threads.
      for (index_t seen = failed.load(); (seen < 0 || task < seen) && !failed.compare_exchange_weak(seen, task);) {
      }
    }
    c.log_denominator = lse;
    for (index_t j = 0; j < dv; ++j) result.output(b, t, h, j) = s.output[static_cast<std::size_t>(j)];
    if (result.log_sum_exp) result.log_sum_exp(b, t, h) = lse;
    if (result.certificates) result.certificates(b, t, h) = c;
  });
  if (const index_t task = failed.load(); task >= 0) {
    if (lagging.load()) {
      return status::error(
          errc::invalid_argument,
          "the selector's index has no state for a KV head or lacks its latest tokens: give one index for "
          "each of batch x KV heads, and append the new keys before the call");
    }
    return status::error(
        errc::non_finite,
        "a NaN or infinity was read, or a product overflowed float, for batch %lld, query %lld, head %lld: check q, "
        "K, V, the mask and the sink logits of that head",
        static_cast<long long>(task / n_heads / n_queries), static_cast<long long>(task / n_heads % n_queries),
        static_cast<long long>(task % n_heads));
  }
  return {};
}

}  // namespace vattn
