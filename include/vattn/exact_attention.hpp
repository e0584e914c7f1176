// Dense attention behind the same call as vattention: the reference, and the fallback.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <span>
#include <utility>

#include "vattn/call/call.hpp"
#include "vattn/dense_attention.hpp"
#include "vattn/estimate/exact.hpp"

namespace vattn::VATTN_ABI {

/// Reads every visible row once and certifies so. False if a logit is not finite. Of no rows the output is 0 and the
/// log-sum-exp the sink's logit, −inf without a sink: so shards of a cache merge, whichever of them are empty.
/// `with_power`: Σ x‖v‖² too.
template <kv_head Head>
[[nodiscard]] bool attend_exactly(const query_row<Head>& row, const population& tokens, scratch& s,
                                  softmax_state& state, certificate& c, bool with_power = false) noexcept {
  state.clear();
  softmax_state part(s.part);
  certify_exact(c);
  add_sink(state, row.sink_logit);
  return accumulate_exact(
      row, tokens.size(), [&](index_t j) { return tokens[j]; }, state, part, with_power);
}

/// Memory of `attend_group_exactly`.
struct exact_scratch {
  std::span<std::byte> rows;                 // [heads] x row_bytes: query_row of any head
  std::span<kernel::block_queries> queries;  // [heads], the first of each set of heads that see the same
  std::span<float> scaled, prepared;         // [heads, dk], and as block kernels want them
  std::span<float> numerators;               // [most_pieces, heads, dv]
  std::span<softmax_state> states;           // [most_pieces, heads]
  std::span<std::uint32_t> odd;              // [most_pieces]: heads that met a logit that is not finite, bits

  static constexpr std::size_t row_bytes = 512;
  static constexpr index_t most_pieces = 32;  // whose states are kept at a time

  /// Of the worker that does a piece: at the front of its group's memory.
  [[nodiscard]] static std::size_t piece_bytes(index_t heads, index_t dv) noexcept {
    arena count;
    static_cast<void>(count.take<float>(static_cast<std::size_t>(heads * phase_rows)));
    static_cast<void>(count.take<float>(static_cast<std::size_t>(heads * dv)));
    return count.used() + workspace::alignment;
  }
  [[nodiscard]] static exact_scratch take(arena& a, index_t heads, index_t dk, index_t dv) noexcept {
    const auto h = static_cast<std::size_t>(heads), pieces = static_cast<std::size_t>(most_pieces);
    exact_scratch s;
    s.rows = a.take<std::byte>(h * row_bytes);
    s.queries = a.take<kernel::block_queries>(h);
    s.scaled = a.take<float>(h * static_cast<std::size_t>(dk));
    s.prepared = a.take<float>(h * kernel::query_storage(1, dk));
    s.numerators = a.take<float>(pieces * h * static_cast<std::size_t>(dv));
    s.states = a.take<softmax_state>(pieces * h);
    s.odd = a.take<std::uint32_t>(pieces);
    return s;
  }
};

/// Exact attention of the heads of a group that are not done, cut in pieces as `exact_attention` cuts a sequence and
/// with the same bits. Memory for pieces lies at the front of the group's.
template <kv_head Head>
void attend_group_exactly(head_group<Head>& group, const exact_scratch& s, bool with_power = false) noexcept {
  const auto wanted = [&](index_t g) { return !group[g].done && group[g].ok; };
  if constexpr (!strided_head<Head>) {
    group.for_each_piece(group.size(), [&](index_t g, std::span<std::byte>) {
      head_task<Head>& task = group[g];
      if (wanted(g)) task.ok = attend_exactly(task.row, task.tokens, task.s, task.state, task.c, with_power);
    });
  } else {
    using K = typename Head::key_element;
    static_assert(sizeof(query_row<Head>) <= exact_scratch::row_bytes);
    const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
    auto* const rows = reinterpret_cast<query_row<Head>*>(s.rows.data());
    const Head& head = group[0].row.head;
    const index_t dk = head.dk(), dv = head.dv(), storage = static_cast<index_t>(kernel::query_storage(1, dk));
    std::array<index_t, static_cast<std::size_t>(max_shared)> task_of{};
    std::array<std::pair<index_t, index_t>, static_cast<std::size_t>(max_shared)> sets;  // first, count
    index_t count = 0, n_sets = 0;
    for (index_t g = 0; g < group.size(); ++g) {
      if (!wanted(g)) continue;
      head_task<Head>& task = group[g];
      if (count == 0 || group[task_of[at(count - 1)]].query != task.query) sets[at(n_sets++)] = {count, 0};
      ++sets[at(n_sets - 1)].second;
      task_of[at(count)] = g;
      std::construct_at(rows + count, task.row);
      std::copy_n(task.row.scaled_query, dk, s.scaled.data() + count * dk);
      task.state.clear();
      ++count;
    }
    if (count == 0) return;
    for (index_t i = 0; i < n_sets; ++i) {
      const auto [first, heads] = sets[at(i)];
      s.queries[at(first)] = kernel::prepare_queries<K>(kernel::active_isa(), s.scaled.data() + first * dk, heads, dk,
                                                        group[0].row.scale, s.prepared.subspan(at(first * storage)));
    }
    // Places of tokens [first, last) of the cache; where cells have positions their order is another, and places are
    // cut.
    const bool by_place = static_cast<bool>(group[0].row.positions);
    const auto part_of = [&](const population& tokens, index_t first, index_t last) -> population {
      if (const ordinal* const list = tokens.list()) {
        const ordinal *from = list + std::min(first, tokens.size()), *to = list + std::min(last, tokens.size());
        if (!by_place) {
          from = std::lower_bound(list, list + tokens.size(), static_cast<ordinal>(first));
          to = std::lower_bound(from, list + tokens.size(), static_cast<ordinal>(last));
        }
        return population(std::span<const ordinal>(from, to));
      }
      if (tokens.size() == 0) return {};
      if (by_place) first += tokens[0], last += tokens[0];
      const index_t begin = std::max(first, tokens[0]), end = std::min(last, tokens[0] + tokens.size());
      return {begin, std::max(begin, end)};
    };
    std::uint32_t odd = 0;
    const index_t pieces = (head.size() + phase_rows - 1) / phase_rows;
    for (index_t done = 0; done < pieces; done += exact_scratch::most_pieces) {
      const index_t now = std::min(exact_scratch::most_pieces, pieces - done);
      group.for_each_piece(now, [&](index_t piece, std::span<std::byte> memory) {
        arena a(memory);
        const auto logits = a.take<float>(at(count * phase_rows)), part = a.take<float>(at(count * dv));
        softmax_state* const states = s.states.data() + piece * count;
        std::uint32_t odd_here = 0;
        for (index_t i = 0; i < n_sets; ++i) {
          const auto [first, heads] = sets[at(i)];
          for (index_t j = first; j < first + heads; ++j)
            std::construct_at(states + j, s.numerators.subspan(at((piece * count + j) * dv), at(dv)));
          const query_group<Head> together{rows + first, states + first, s.queries[at(first)],
                                           part.first(at(heads * dv)), logits};
          const index_t from = (done + piece) * phase_rows;
          odd_here |= together.add(part_of(group[task_of[at(first)]].tokens, from, from + phase_rows), with_power)
                      << first;
        }
        s.odd[at(piece)] = odd_here;
      });
      for (index_t piece = 0; piece < now; ++piece) {
        odd |= s.odd[at(piece)];
        for (index_t i = 0; i < count; ++i) group[task_of[at(i)]].state.merge(s.states[at(piece * count + i)]);
      }
    }
    for (index_t i = 0; i < count; ++i) {
      head_task<Head>& task = group[task_of[at(i)]];
      task.ok = (odd >> i & 1) == 0;
      if (task.ok) add_sink(task.state, task.row.sink_logit);
      certify_exact(task.c);
    }
  }
}

/// Bytes of a group's memory for all rows of all of its heads, and these.
[[nodiscard]] inline std::size_t exact_group_bytes(index_t heads, index_t dk, index_t dv) noexcept {
  arena count;
  static_cast<void>(count.take<std::byte>(exact_scratch::piece_bytes(heads, dv)));
  static_cast<void>(exact_scratch::take(count, heads, dk, dv));
  return count.used() + workspace::alignment;
}
template <kv_head Head>
void attend_group_exactly(head_group<Head>& group) noexcept {
  arena a(group.memory);
  const Head& head = group[0].row.head;
  static_cast<void>(a.take<std::byte>(exact_scratch::piece_bytes(group.size(), head.dv())));
  attend_group_exactly(group, exact_scratch::take(a, group.size(), head.dk(), head.dv()));
}

/// Exact attention of every query and head. Shapes, errors and memory as `vattention`.
template <class Q, kv_cache KV, executor E = serial_executor>
status exact_attention(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
                       const attention_result& result, workspace& memory, E&& exec = E{}) noexcept {
  const kernel::floating_point_scope standard;
  if (status s = check_call(q, cache, options, result); !s) return s;
  using head = std::remove_cvref_t<decltype(cache.head(0, 0))>;
  // A part of the tasks is of no use there: the second half of them needs the results of the first.
  if constexpr (strided_head<head> && !partial_executor<std::remove_cvref_t<E>>) {
    // Positions order the tokens, and decisions list them: neither is the block kernels' business.
    if (!options.positions && !result.decisions.tokens)
      return dense_call<Q, KV, head>(q, cache, options, result).run(memory, exec);
  }
  return for_each_query(q, cache, options, result, memory, {}, exec, {},
                        [](const auto& row, const population& tokens, const random_stream&, scratch& s,
                           softmax_state& state, certificate& c) { return attend_exactly(row, tokens, s, state, c); });
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
