// The selector concept, and selectors that read every key: exact rankings ("oracle") and none at all.
#pragma once

#include <cmath>
#include <concepts>
#include <span>

#include "vattn/configuration.hpp"
#include "vattn/kv/query.hpp"
#include "vattn/select/ranking.hpp"
#include "vattn/select/top_k.hpp"

namespace vattn {

/// What a score says of the token, in the order of what it allows.
enum class score_kind : std::uint8_t {
  ranking,       ///< an order only: nothing is known of the tokens below the k-th
  logit,         ///< the score is the logit
  contribution,  ///< the score is log(x·(‖v‖ + offset)), shifted as the logit is
};

/// Scores of one query's population. `ok` is false if a logit was not finite.
struct score_result {
  bool ok = true;
  score_kind kind = score_kind::ranking;
  float value_offset = 0;  ///< of score_kind::contribution
};

/// Supply `score(row, tokens, scores)`, which fills scores[j] for each place j of the population (higher =
/// read first; a NaN ranks last), and `heavy_count(ranking, n, config)`, which says how many places
/// to take exactly at first (it may rank them). Both const and noexcept: one selector serves all threads.
template <class S, class Row>
concept selector_for = requires(const S& s, const Row& row, const population& tokens, std::span<float> scores,
                                ranking& r, index_t n, const config& c) {
  { s.score(row, tokens, scores) }
  noexcept->std::same_as<score_result>;
  { s.heavy_count(r, n, c) }
  noexcept->std::convertible_to<index_t>;
};

namespace select {

/// Scores are the logits themselves: reads every visible key.
struct exact_logits {
  template <kv_head Head>
  score_result score(const query_row<Head>& row, const population& tokens, std::span<float> scores) const noexcept {
    bool finite = true;
    for (index_t j = 0; j < tokens.size(); ++j) {
      const float l = row.logit(tokens[j]);
      finite &= std::isfinite(l);
      scores[static_cast<std::size_t>(j)] = l;
    }
    return {.ok = finite, .kind = score_kind::logit};
  }
};

/// Scores are log(x·(‖v‖ + offset)), offset the mean ‖v‖ of the visible tokens: what a token can add to
/// the output, so that a huge value under a small logit is read exactly too. Reads every visible key,
/// and every value where the cache keeps no norms.
struct exact_contributions {
  template <kv_head Head>
  score_result score(const query_row<Head>& row, const population& tokens, std::span<float> scores) const noexcept {
    // Norms first, in place of the scores; then logits on top of them.
    double sum = 0;
    for (index_t j = 0; j < tokens.size(); ++j) {
      const float norm = value_norm(row.head, tokens[j]);
      scores[static_cast<std::size_t>(j)] = norm;
      sum += norm;
    }
    if (!std::isfinite(sum)) return {.ok = false};
    if (!(sum > 0)) return exact_logits{}.score(row, tokens, scores);  // all values are zero
    const auto offset = static_cast<float>(sum / static_cast<double>(tokens.size()));
    bool finite = true;
    for (index_t j = 0; j < tokens.size(); ++j) {
      const float l = row.logit(tokens[j]);
      finite &= std::isfinite(l);
      float& s = scores[static_cast<std::size_t>(j)];
      s = l + std::log(s + offset);
    }
    return {.ok = finite, .kind = score_kind::contribution, .value_offset = offset};
  }

 private:
  template <kv_head Head>
  [[nodiscard]] static float value_norm(const Head& head, index_t token) noexcept {
    if constexpr (kv_head_with_value_norms<Head>) {
      if (head.has_value_norms()) return head.value_norm(token);
    }
    using kernel::squared_norm;
    return std::sqrt(squared_norm(head.value(token)));
  }
};

/// The config's share of the visible tokens, highest scores first. `Score` as `exact_logits`.
template <class Score = exact_contributions>
struct top_k : Score {
  index_t heavy_count(const ranking& r, index_t n, const config& c) const noexcept {
    const double share = c.heavy == config::automatic ? 0.02 : c.heavy;
    return std::min(r.size(), static_cast<index_t>(std::ceil(share * static_cast<double>(n))));
  }
};

/// As many of the highest scores as hold `mass` of the softmax of the rankable tokens, at most
/// `max_share` of the visible ones. Twilight, arXiv 2502.02770.
template <class Score = exact_logits>
struct top_p : Score {
  double mass = 0.9;
  double max_share = 0.5;

  index_t heavy_count(ranking& r, index_t n, const config&) const noexcept {
    return extend_to_mass(r, mass, static_cast<index_t>(std::ceil(max_share * static_cast<double>(n))));
  }
};

/// No heavy set: sinks and window alone are exact (StreamingLLM, arXiv 2309.17453, with a sampled rest).
struct none {
  template <class Row>
  score_result score(const Row&, const population&, std::span<float>) const noexcept {
    return {};
  }
  index_t heavy_count(const ranking&, index_t, const config&) const noexcept { return 0; }
};

}  // namespace select
}  // namespace vattn
