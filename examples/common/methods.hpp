// Attention from a fixed number of rows: the methods that vattention is compared with. None promises anything.
#pragma once

#include <algorithm>
#include <cmath>

#include "vattn/vattn.hpp"

namespace vattn::examples {

/// Which rows are read, whatever they turn out to hold.
///   sinks + window: {.sinks = 128, .window = 128}      top-k: {.heavy = 0.02}      sampling: {.sampled = 0.02}
struct row_budget {
  index_t sinks = 0, window = 0;  ///< first and last visible tokens
  double heavy = 0;               ///< share of the visible tokens, highest logits first
  double sampled = 0;             ///< share of what is left, drawn uniformly; with 0 what is left is ignored
};

/// Attention from the rows of `budget` alone. Shapes, errors and memory as `vattention`; the certificates
/// say what was read, `guarantee::none`, and `exact` where the budget comes to every row.
template <class Q, kv_cache KV, executor E = serial_executor, class Selector = select::exact_logits>
status fixed_budget(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
                    const attention_result& result, workspace& memory, const row_budget& budget,
                    const draw_key& key = {}, E&& exec = E{}, const Selector& selector = {}) noexcept {
  using sampler = sample::uniform_without_replacement;
  if (status s = check_call(q, cache, options, result); !s) return s;
  const index_t longest_n = longest(cache);
  const auto share = [](double part, index_t of) {
    return std::min(of, static_cast<index_t>(std::ceil(std::max(part, 0.0) * static_cast<double>(of))));
  };
  const scratch::sparse_sizes sizes{.drawn = static_cast<std::size_t>(share(budget.sampled, longest_n)),
                                    .table = sampler::table_size(static_cast<ordinal>(longest_n)),
                                    .selector = selector_scratch(selector),
                                    .sampled = true,
                                    .ranked = true};
  const auto attend = [&](const auto& row, const population& tokens, const random_stream& stream, scratch& s,
                          softmax_state& state, certificate& c) {
    const index_t n = tokens.size();
    const index_t sinks = std::min(budget.sinks, n), window = std::min(budget.window, n - sinks);
    ranking order(s.scores, sinks, n - window, s.order);
    const index_t heavy = std::min(order.size(), share(budget.heavy, n));
    const index_t sampled = share(budget.sampled, order.size() - heavy);
    if (sinks + window + heavy + sampled >= n) return attend_exactly(row, tokens, s, state, c);

    if (heavy > 0) {
      const score_result scored =
          selector.score(row, tokens, {s.scores.first(static_cast<std::size_t>(n)), {}, s.value_centre, s.selector});
      s.lagging = scored.lagging;
      if (!scored.ok) return false;
      order.extend(heavy);
    }
    c.rows_exact = sinks + window + heavy;
    c.rows_sampled = c.budget = sampled;
    softmax_state part(s.part);
    add_sink(state, row.sink_logit);
    const auto chosen = [&](index_t j) {
      if (j < sinks) return tokens[j];
      if (j < sinks + window) return tokens[n - window + (j - sinks)];
      return tokens[order.top()[static_cast<std::size_t>(j - sinks - window)]];
    };
    bool finite = accumulate_exact(row, c.rows_exact, chosen, state, part, sampled > 0);
    if (!finite || sampled == 0) return finite;

    state.finish(s.centre);
    residual_moments moments(s.moments, row.dv());
    moments.clear(s.centre, state.max_logit());
    residual_sample drawn(row, tokens, sinks, window, order, sampler(static_cast<ordinal>(n), stream, s.table), s.drawn,
                          moments);
    finite = drawn.grow(sampled);
    const estimate all = make_estimate(state, moments, drawn.population_size(), s.offset);
    add_residual(state, all, moments);
    return finite && all.finite;
  };
  return for_each_query(q, cache, options, result, memory, key, exec, sizes, attend);
}

/// MagicPIG's own estimator (arXiv 2410.16179): of the tokens between sinks and window those that share a bucket with
/// the query in two hash tables or more, weighted by one over their chance of doing so. `heads` as select::indexed.
/// Shapes, errors and memory as `vattention`; promises nothing.
template <class Q, kv_cache KV, executor E = serial_executor>
status magic_pig_attention(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
                           const attention_result& result, workspace& memory, std::span<const select::magic_pig> heads,
                           const row_budget& budget, const draw_key& key = {}, E&& exec = E{}) noexcept {
  if (status s = check_call(q, cache, options, result); !s) return s;
  const select::indexed<select::magic_pig> selector{heads};
  const scratch::sparse_sizes sizes{.selector = selector.scratch_size(), .sampled = true};
  const auto attend = [&](const auto& row, const population& tokens, const random_stream&, scratch& s,
                          softmax_state& state, certificate& c) {
    using kernel::axpy;
    const index_t n = tokens.size();
    const index_t sinks = std::min(budget.sinks, n), window = std::min(budget.window, n - sinks);
    const score_result scored =
        selector.score(row, tokens, {s.scores.first(static_cast<std::size_t>(n)), {}, {}, s.selector});
    s.lagging = scored.lagging;
    if (!scored.ok) return false;
    softmax_state part(s.part);
    add_sink(state, row.sink_logit);
    if (!accumulate_exact(
            row, sinks + window, [&](index_t j) { return tokens[j < sinks ? j : n - window + (j - sinks)]; }, state,
            part, false))
      return false;
    const select::magic_pig& index = heads[static_cast<std::size_t>(row.kv_head)];
    c.rows_exact = sinks + window;
    for (index_t j = sinks; j < n - window; ++j) {
      if (s.scores[static_cast<std::size_t>(j)] < 2) continue;
      const float logit = row.logit(tokens[j]);
      if (!std::isfinite(logit)) return false;
      using kernel::dot;
      const double u = index.probability(row.scaled_query, tokens[j], dot(row.scaled_query, row.head.key(tokens[j])));
      state.raise(logit);
      const double x = std::exp(static_cast<double>(logit - state.max_logit())) / std::max(u, 1e-12);
      state.add_denominator(x);
      axpy(static_cast<float>(x), row.head.value(tokens[j]), state.numerator().data());
      ++c.rows_sampled;
    }
    return true;
  };
  return for_each_query(q, cache, options, result, memory, key, exec, sizes, attend);
}

}  // namespace vattn::examples
