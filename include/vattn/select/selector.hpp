// The selector concept, and selectors that read every key: exact rankings ("oracle") and none at all.
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>
#include <concepts>
#include <span>

#include "vattn/kv/query.hpp"
#include "vattn/select/ranking.hpp"
#include "vattn/select/top_k.hpp"
#include "vattn/settings.hpp"

namespace vattn::VATTN_ABI {

/// What a score says of the token, in the order of what it allows.
enum class score_kind : std::uint8_t {
  ranking,       ///< an order only: nothing is known of the tokens below the k-th
  logit,         ///< the score is the logit, or more
  contribution,  ///< the score is log(x·sqrt(‖v − centre‖² + offset²)/unit), shifted as the logit is, or more
};

/// Scores of one query's population. `ok` is false if a logit or a value was not finite, or, with `lagging`,
/// if the selector's own state does not hold every visible token.
struct score_result {
  bool ok = true;
  bool lagging = false;
  score_kind kind = score_kind::ranking;
  // Of score_kind::contribution. No value is further from any point p than
  // sqrt(‖v − centre‖² + offset²)·sqrt(1 + ‖p − centre‖²/offset²)   (Cauchy-Schwarz).
  float value_offset = 0;
  float contribution_unit = 1;  ///< a length: that of the offset makes scores the same at any scale of the values
  index_t rows_read = 0;        ///< rows of the cache that scoring itself has read, beyond what the selector stands for
};

/// Where a selector writes.
struct score_buffers {
  std::span<float> scores;   ///< [n], one for each place of the population; a NaN: attend exactly
  std::span<float> errors;   ///< [n] or empty: error scale σ of the score as an estimate of the logit
  std::span<float> centre;   ///< [dv]: the values' centre, of score_kind::contribution
  std::span<float> scratch;  ///< [scratch_size()] of the selector, if it asks for any
};

/// Supply `score(row, tokens, buffers)` (higher = read first) and `heavy_count(ranking, n, config)`, which
/// says how many places to take exactly at first (it may rank them). Both const and noexcept: one selector
/// serves all threads. A selector whose scores estimate logits, with errors, says so by
/// `static constexpr bool estimates = true`; one that needs memory, by `scratch_size()` (floats).
template <class S, class Row>
concept selector_for = requires(const S& s, const Row& row, const population& tokens, const score_buffers& b,
                                ranking& r, index_t n, const config& c) {
  { s.score(row, tokens, b) } noexcept -> std::same_as<score_result>;
  { s.heavy_count(r, n, c) } noexcept -> std::convertible_to<index_t>;
};

/// Can places be ranked by these scores? A NaN says that the selector does not know, and the query is attended exactly.
[[nodiscard]] inline bool can_rank(const score_result& r, std::span<const float> scores) noexcept {
  if (r.kind == score_kind::contribution && !(r.value_offset > 0)) return false;
  bool known = true;
  for (const float s : scores) known &= !std::isnan(s);
  return known;
}

/// Can probabilities be made of them? That takes finite scores, and errors that are not negative.
[[nodiscard]] inline bool can_sample(std::span<const float> scores, std::span<const float> errors) noexcept {
  bool known = true;
  for (const float s : scores) known &= std::isfinite(s);
  for (const float e : errors) known &= e >= 0 && std::isfinite(e);
  return known;
}

template <class S>
[[nodiscard]] constexpr std::size_t selector_scratch(const S& s) noexcept {
  if constexpr (requires { s.scratch_size(); }) {
    return s.scratch_size();
  } else {
    return 0;
  }
}

namespace select {

/// Scores are the logits themselves: reads every visible key.
struct exact_logits {
  static constexpr bool estimates = true;  // with no error

  template <kv_head Head>
  score_result score(const query_row<Head>& row, const population& tokens, const score_buffers& out) const noexcept {
    bool finite = true;
    for (index_t j = 0; j < tokens.size(); ++j) {
      const float l = row.logit(tokens[j]);
      finite &= std::isfinite(l);
      out.scores[static_cast<std::size_t>(j)] = l;
    }
    std::fill(out.errors.begin(), out.errors.end(), 0.0f);
    return {.ok = finite, .kind = score_kind::logit};
  }
};

/// ‖v − centre‖ of a token in the row's value unit, as a function of the token; fills `centre` [dv]. From the cache's
/// norms where it keeps them; else the centre is the mean of the visible values, and every call reads a value. `row`
/// must outlive it.
template <kv_head Head>
[[nodiscard]] auto value_distances(const query_row<Head>& row, const population& tokens,
                                   std::span<float> centre) noexcept {
  const Head& head = row.head;
  const float* stored = nullptr;
  bool kept = false;
  if constexpr (kv_head_with_value_norms<Head>) {
    kept = head.has_value_norms();
    stored = head.value_centre();
  }
  for (std::size_t j = 0; j < centre.size(); ++j) centre[j] = kept && stored ? stored[j] * row.value_unit : 0.0f;
  if (!kept) {
    using kernel::axpy;
    const float share = 1 / static_cast<float>(std::max<index_t>(1, tokens.size()));
    for (index_t j = 0; j < tokens.size(); ++j) axpy(share, row.value(tokens[j]), centre.data());
  }
  return [&row, kept, c = centre.data()](index_t token) noexcept -> float {
    static_cast<void>(kept);  // of heads without norms
    if constexpr (kv_head_with_value_norms<Head>) {
      if (kept) return row.head.value_norm(token) * row.value_unit;
    }
    using kernel::squared_distance;
    return std::sqrt(squared_distance(row.value(token), c));
  };
}

/// What a token can move the output: scores log(x·sqrt(‖v − c‖² + offset²)/offset), c the cache's value centre (the
/// mean value where it keeps none), offset half the mean ‖v − c‖. A huge value under a small logit is then
/// read exactly too. `Logit` fills logits, or upper bounds of them. Where the cache keeps no value norms,
/// every value is read twice.
template <class Logit>
struct contributions : Logit {
  // Of logits, as importance sampling wants them: these are not.
  static constexpr bool estimates = false;
  static constexpr bool upper_bounds = false;

  template <kv_head Head>
  score_result score(const query_row<Head>& row, const population& tokens, const score_buffers& out) const noexcept {
    score_result r = Logit::score(row, tokens, out);
    if (!r.ok) return r;
    double sum = 0;
    const auto distance = value_distances(row, tokens, out.centre);
    for (index_t j = 0; j < tokens.size(); ++j) sum += distance(tokens[j]);
    if (!std::isfinite(sum)) return {.ok = false};
    if (!(sum > 0)) return r;  // all values are equal
    if (r.kind == score_kind::logit) r.kind = score_kind::contribution;
    r.value_offset = r.contribution_unit = static_cast<float>(sum / (2 * static_cast<double>(tokens.size())));
    // Blocks, so that the logarithms are vectors: one at a time they cost as much as the keys.
    constexpr index_t block = 256;
    Eigen::Array<float, block, 1> square;
    const float inverse2 = 1 / (r.value_offset * r.value_offset);
    for (index_t first = 0; first < tokens.size(); first += block) {
      const index_t width = std::min(block, tokens.size() - first);
      for (index_t j = 0; j < width; ++j) {
        const float d = distance(tokens[first + j]);
        square[j] = d * d * inverse2 + 1;
      }
      Eigen::Map<Eigen::ArrayXf>(out.scores.data() + first, width) += 0.5f * square.head(width).log();
    }
    return r;
  }
};

/// Scores are what scale·‖q‖‖k‖ allows the logits to be: poor for ranking, but a hard bound that reads no
/// key where the cache keeps key norms (else every key).
struct norm_bounds {
  template <kv_head Head>
  score_result score(const query_row<Head>& row, const population& tokens, const score_buffers& out) const noexcept {
    const auto dk = static_cast<Eigen::Index>(row.head.dk());
    const float q = kernel::norm(kernel::const_float_map(row.scaled_query, dk));
    bool finite = true;
    for (index_t j = 0; j < tokens.size(); ++j) {
      // 1e-6 dk covers the rounding of the norms and of the product that they bound.
      const float most =
          row.transform(q * key_norm(row.head, tokens[j]) * (1 + 1e-6f * static_cast<float>(dk)), tokens[j]);
      finite &= std::isfinite(most);
      out.scores[static_cast<std::size_t>(j)] = most;
    }
    return {.ok = finite, .kind = score_kind::logit};
  }

 private:
  template <kv_head Head>
  [[nodiscard]] static float key_norm(const Head& head, index_t token) noexcept {
    if constexpr (kv_head_with_key_norms<Head>) {
      if (head.has_key_norms()) return head.key_norm(token);
    }
    return kernel::norm_of(head.key(token));
  }
};

using exact_contributions = contributions<exact_logits>;

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
  score_result score(const Row&, const population&, const score_buffers&) const noexcept {
    return {};
  }
  index_t heavy_count(const ranking&, index_t, const config&) const noexcept { return 0; }
};

}  // namespace select
}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
