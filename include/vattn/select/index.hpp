// Indices over keys: state that is built as a cache grows and scores it without reading it.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <span>

#include "vattn/kv/query.hpp"
#include "vattn/select/selector.hpp"

namespace vattn::VATTN_ABI {

/// State of one KV head of one layer. Supply
///   append(key row)               the next token's key; any grouping of appends gives the same state
///   truncate(n), clear()          forget the tokens from n on (a rejected draft, a new sequence)
///   size(), bytes()               tokens, memory
///   scratch_size()                floats of scratch for one query
///   score(scaled query, first, scores, errors, scratch) noexcept
///                                 one score a token from `first` on, higher = read first; `errors` (empty
///                                 unless `estimates`) receives error scales in logit units
///   estimates                     the scores estimate the logits before cap, mask and position bias
///   bound_over_error()            if estimates: no error exceeds this times its scale; inf if not known
///   upper_bounds                  optional, true if no logit (before cap, mask and bias) exceeds its score
///   recent()                      optional, recent_keys&: append_from then finds keys that were overwritten
/// and, to be saved with the cache, archive(), format() and valid() of vattn/base/archive.hpp.
template <class I>
concept key_index = requires(I& i, const I& c, std::span<const float> key, index_t n, std::span<float> out) {
  i.append(key);
  i.truncate(n);
  i.clear();
  { c.size() } -> std::convertible_to<index_t>;
  { c.bytes() } -> std::convertible_to<std::size_t>;
  { c.scratch_size() } -> std::convertible_to<std::size_t>;
  { c.score(key.data(), n, out, out, out) } noexcept;
  { I::estimates } -> std::convertible_to<bool>;
};

template <class I>
inline constexpr bool scores_bound_logits = [] {
  if constexpr (requires { I::upper_bounds; }) {
    return bool{I::upper_bounds};
  } else {
    return false;
  }
}();

/// Scores of a kind that bounds logits or contributions, but only as far as an estimate does: select::upper_scores.
template <class S>
inline constexpr bool scores_may_be_exceeded = [] {
  if constexpr (requires { S::may_be_exceeded; }) {
    return bool{S::may_be_exceeded};
  } else {
    return false;
  }
}();

/// Brings an index up to its head: call it after the engine has written keys. Returns the tokens appended.
///
/// What the head no longer holds is forgotten first: tokens past its end, and, by an index that keeps fingerprints of
/// its newest keys (recent_keys), tokens from the first one on whose key is another now. So drafts that were rejected
/// and overwritten are mended exactly, if no more than recent_keys::kept keys were appended since; where the oldest key
/// that is known is another too, as of a new sequence in the same cells, the index is made anew. Older keys that were
/// overwritten are not seen: truncate the index to the first of them.
template <key_index I, kv_head Head>
index_t append_from(I& index, const Head& head) {
  index_t kept = std::min<index_t>(index.size(), head.size());
  if constexpr (requires { index.recent(); }) kept = index.recent().unchanged(kept, head);
  if (kept < index.size()) index.truncate(kept);
  for (index_t token = kept; token < head.size(); ++token) index.append(head.key(token));
  return head.size() - kept;
}

namespace select {

/// A selector over indices, `heads[batch·n_kv_heads + head]`, one for each KV head of the cache that it is
/// used with. They must hold the tokens of their head and no others; `score` says not ok where one holds fewer than a
/// query sees, or more than there are.
template <key_index Index>
struct indexed {
  static constexpr bool estimates = Index::estimates;
  static constexpr bool upper_bounds = scores_bound_logits<Index>;

  std::span<const Index> heads;

  [[nodiscard]] std::size_t scratch_size() const noexcept {
    std::size_t most = 0;
    for (const Index& index : heads) most = std::max(most, index.scratch_size());
    return most;
  }

  template <kv_head Head>
  score_result score(const query_row<Head>& row, const population& tokens, const score_buffers& out) const noexcept {
    const index_t n = tokens.size();
    if (row.kv_head >= static_cast<index_t>(heads.size())) return {.ok = false, .lagging = true};
    const Index& index = heads[static_cast<std::size_t>(row.kv_head)];
    // Longer: of a cache that was cut, whose rows may be others by now.
    if (index.size() > row.head.size()) return {.ok = false, .lagging = true};
    if (n == 0) return {};
    if constexpr (requires { index.dim(); }) {  // another layer's or model's
      if (index.dim() != row.head.dk()) return {.ok = false, .lagging = true};
    }
    // Runs of consecutive tokens: one, unless a mask has cut the population.
    for (index_t from = 0; from < n;) {
      index_t to = tokens.contiguous() ? n : from + 1;
      while (to < n && tokens[to] == tokens[to - 1] + 1) ++to;
      if (index.size() <= tokens[to - 1]) return {.ok = false, .lagging = true};
      const auto at = static_cast<std::size_t>(from), count = static_cast<std::size_t>(to - from);
      index.score(row.scaled_query, tokens[from], out.scores.subspan(at, count),
                  out.errors.empty() ? out.errors : out.errors.subspan(at, count), out.scratch);
      from = to;
    }
    if constexpr (estimates || scores_bound_logits<Index>) {
      for (index_t j = 0; j < n; ++j) {
        float& s = out.scores[static_cast<std::size_t>(j)];
        s = row.transform(s, tokens[j]);
      }
    }
    return {.ok = true, .kind = scores_bound_logits<Index> ? score_kind::logit : score_kind::ranking};
  }

  index_t heavy_count(const ranking& r, index_t n, const config& c) const noexcept {
    return top_k<exact_logits>{}.heavy_count(r, n, c);
  }
};

/// Two indices of the same keys: a coarse one that is scanned, and a fine one that is asked for the tokens
/// which the scan keeps. For sample::in_two_phases.
template <key_index Coarse, key_index Fine>
struct two_phase {
  static_assert(Coarse::estimates && Fine::estimates,
                "two_phase<Coarse, Fine>: both must estimate logits, as sketch::key_codes do");
  static constexpr bool estimates = true;

  indexed<Coarse> coarse;
  indexed<Fine> fine;

  [[nodiscard]] std::size_t scratch_size() const noexcept {
    return std::max(coarse.scratch_size(), fine.scratch_size());
  }
  template <kv_head Head>
  score_result score(const query_row<Head>& row, const population& tokens, const score_buffers& out) const noexcept {
    return fine.score(row, tokens, out);
  }
  index_t heavy_count(const ranking& r, index_t n, const config& c) const noexcept { return fine.heavy_count(r, n, c); }
};

/// What an index's scores and their errors allow the logits to be: scores plus `times` their error scales, after
/// cap, mask and bias, which map bounds to bounds. Ranks the tokens that may be heavy, and says how heavy the others
/// may be at most.
template <key_index Index>
struct upper_scores {
  static_assert(Index::estimates, "upper_scores<Index>: the index must state its errors, as sketch::key_codes do");
  static constexpr bool wants_errors = true;
  static constexpr bool may_be_exceeded = true;

  std::span<const Index> heads;
  /// As the importance floor's z: of honest scores 3 in 1000 are further off.
  float times = 2.75f;

  [[nodiscard]] std::size_t scratch_size() const noexcept { return indexed<Index>{heads}.scratch_size(); }
  template <kv_head Head>
  score_result score(const query_row<Head>& row, const population& tokens, const score_buffers& out) const noexcept {
    query_row<Head> bare = row;
    bare.softcap = 0, bare.alibi_slope = 0, bare.mask = {};
    const score_result r = indexed<Index>{heads}.score(bare, tokens, out);
    if (!r.ok) return r;
    bool finite = true;
    for (index_t j = 0; j < tokens.size(); ++j) {
      const auto at = static_cast<std::size_t>(j);
      out.scores[at] = row.transform(out.scores[at] + times * out.errors[at], tokens[j]);
      finite &= std::isfinite(out.scores[at]);
    }
    return {.ok = finite, .kind = score_kind::logit};
  }
  index_t heavy_count(const ranking& r, index_t n, const config& c) const noexcept {
    return top_k<exact_logits>{}.heavy_count(r, n, c);
  }
};

/// The same with the hard bound of the errors (`bound_over_error()` finite): no logit exceeds its score, for
/// guarantees that rest on no estimate.
template <key_index Index>
struct hard_bounds : upper_scores<Index> {
  static constexpr bool upper_bounds = true;
  static constexpr bool may_be_exceeded = false;

  hard_bounds() = default;
  hard_bounds(std::span<const Index> indices) noexcept
      : upper_scores<Index>{indices, indices.empty() ? 0 : indices.front().bound_over_error()} {}
};

}  // namespace select
}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
