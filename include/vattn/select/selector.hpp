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
  logit,         ///< the score is the logit, or more
  contribution,  ///< the score is log(x·sqrt(‖v − centre‖² + offset²)), shifted as the logit is, or more
};

/// Scores of one query's population. `ok` is false if a logit or a value was not finite.
struct score_result {
  bool ok = true;
  score_kind kind = score_kind::ranking;
  // Of score_kind::contribution. No value is further from any point p than
  // sqrt(‖v − centre‖² + offset²)·sqrt(1 + ‖p − centre‖²/offset²)   (Cauchy-Schwarz).
  float value_offset = 0;
};

/// Supply `score(row, tokens, scores, centre)`, which fills scores[j] for each place j of the population
/// (higher = read first; a NaN ranks last) and, for contributions, centre [dv]; and `heavy_count(ranking, n, config)`,
/// which says how many places to take exactly at first (it may rank them). Both const and noexcept: one selector serves
/// all threads.
template <class S, class Row>
concept selector_for = requires(const S& s, const Row& row, const population& tokens, std::span<float> scores,
                                ranking& r, index_t n, const config& c) {
  { s.score(row, tokens, scores, scores) }
  noexcept->std::same_as<score_result>;
  { s.heavy_count(r, n, c) }
  noexcept->std::convertible_to<index_t>;
};

namespace select {

/// Scores are the logits themselves: reads every visible key.
struct exact_logits {
  template <kv_head Head>
  score_result score(const query_row<Head>& row, const population& tokens, std::span<float> scores,
                     std::span<float> /*centre*/) const noexcept {
    bool finite = true;
    for (index_t j = 0; j < tokens.size(); ++j) {
      const float l = row.logit(tokens[j]);
      finite &= std::isfinite(l);
      scores[static_cast<std::size_t>(j)] = l;
    }
    return {.ok = finite, .kind = score_kind::logit};
  }
};

/// Scores are log(x·sqrt(‖v − c‖² + offset²)), c the cache's value centre (the mean value where it keeps
/// none), offset half the mean ‖v − c‖: what a token can move the output, so that a huge value under a
/// small logit is read exactly too. Reads every visible key, and every value twice where the cache keeps
/// no value norms.
struct exact_contributions {
  template <kv_head Head>
  score_result score(const query_row<Head>& row, const population& tokens, std::span<float> scores,
                     std::span<float> centre) const noexcept {
    // Distances first, in place of the scores; then logits on top of them.
    const double sum = distances(row.head, tokens, scores, centre);
    if (!std::isfinite(sum)) return {.ok = false};
    if (!(sum > 0)) return exact_logits{}.score(row, tokens, scores, centre);  // all values are equal
    const auto offset = static_cast<float>(sum / (2 * static_cast<double>(tokens.size())));
    bool finite = true;
    for (index_t j = 0; j < tokens.size(); ++j) {
      const float l = row.logit(tokens[j]);
      finite &= std::isfinite(l);
      float& s = scores[static_cast<std::size_t>(j)];
      s = l + std::log(std::hypot(s, offset));
    }
    return {.ok = finite, .kind = score_kind::contribution, .value_offset = offset};
  }

 private:
  template <kv_head Head>
  [[nodiscard]] static double distances(const Head& head, const population& tokens, std::span<float> out,
                                        std::span<float> centre) noexcept {
    double sum = 0;
    if constexpr (kv_head_with_value_norms<Head>) {
      if (head.has_value_norms()) {
        const float* stored = head.value_centre();
        for (std::size_t j = 0; j < centre.size(); ++j) centre[j] = stored ? stored[j] : 0.0f;
        for (index_t j = 0; j < tokens.size(); ++j) {
          const float norm = head.value_norm(tokens[j]);
          out[static_cast<std::size_t>(j)] = norm;
          sum += norm;
        }
        return sum;
      }
    }
    using kernel::axpy, kernel::squared_distance;
    const float share = 1 / static_cast<float>(tokens.size());
    std::fill(centre.begin(), centre.end(), 0.0f);
    for (index_t j = 0; j < tokens.size(); ++j) axpy(share, head.value(tokens[j]), centre.data());
    for (index_t j = 0; j < tokens.size(); ++j) {
      const float norm = std::sqrt(squared_distance(head.value(tokens[j]), centre.data()));
      out[static_cast<std::size_t>(j)] = norm;
      sum += norm;
    }
    return sum;
  }
};

/// The config's share of the visible tokens, highest scores first; automatic: n/256 of them at first, at
/// least 64, at most 256. `Score` as `exact_logits`.
template <class Score = exact_contributions>
struct top_k : Score {
  index_t heavy_count(const ranking& r, index_t n, const config& c) const noexcept {
    if (c.heavy == config::automatic) return std::min(r.size(), std::clamp<index_t>(n / 256, 64, 256));
    return std::min(r.size(), static_cast<index_t>(std::ceil(c.heavy * static_cast<double>(n))));
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
  score_result score(const Row&, const population&, std::span<float>, std::span<float>) const noexcept {
    return {};
  }
  index_t heavy_count(const ranking&, index_t, const config&) const noexcept { return 0; }
};

}  // namespace select
}  // namespace vattn
