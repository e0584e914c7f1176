// Attention, slow and obvious, in double precision. Shares no code with the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace vattn::reference {

struct problem {
  std::int64_t n_batch = 1, n_queries = 1, n_heads = 1, n_kv_heads = 1, n_tokens = 0, dk = 0, dv = 0;
  std::vector<double> q;  // [n_batch, n_queries, n_heads, dk]
  std::vector<double> k;  // [n_batch, n_kv_heads, n_tokens, dk]
  std::vector<double> v;  // [n_batch, n_kv_heads, n_tokens, dv]
  double scale = 1;
  double softcap = 0;  ///< 0 = none
  bool causal = false;
  std::int64_t sliding_window = 0;      ///< 0 = none
  std::vector<double> mask;             // [n_batch, n_heads, n_queries, n_tokens], or empty
  std::vector<double> alibi;            // [n_heads], or empty
  std::vector<double> sinks;            // [n_heads], or empty
  std::vector<std::int64_t> lengths{};  // [n_batch] tokens of each sequence, or empty: n_tokens
  std::vector<std::int64_t> cells{};    // [n_batch, n_tokens] positions, negative = absent; or empty: the token's own
  std::vector<std::int64_t> query_positions{};  // [n_batch, n_queries], with cells

  [[nodiscard]] std::int64_t length(std::int64_t b) const {
    return lengths.empty() ? n_tokens : lengths[static_cast<std::size_t>(b)];
  }
  /// Of a token, and of query t of T, which stands at the end of its sequence: n − T + t.
  [[nodiscard]] std::int64_t position(std::int64_t b, std::int64_t token) const {
    return cells.empty() ? token : cells[static_cast<std::size_t>(b * n_tokens + token)];
  }
  [[nodiscard]] std::int64_t query_position(std::int64_t b, std::int64_t t) const {
    return cells.empty() ? length(b) - n_queries + t : query_positions[static_cast<std::size_t>(b * n_queries + t)];
  }
};

struct row {
  std::vector<std::int64_t> tokens;  ///< that the query sees
  std::vector<double> logits;        ///< of those tokens
  double max_logit = -std::numeric_limits<double>::infinity();
  double denominator = 0;         ///< D = Σ exp(l − max_logit), the sink's term included
  std::vector<double> numerator;  ///< N = Σ exp(l − max_logit) v
  std::vector<double> output;     ///< N / D
  double log_sum_exp = -std::numeric_limits<double>::infinity();
};

/// Attention of rows with weights: D = Σ x, o = Σ x v/D, Σ x‖v‖² and ‖o‖².
struct weighted_output {
  double denominator = 0, power = 0, output2 = 0;
  std::vector<double> output;

  explicit weighted_output(std::size_t dv) : output(dv) {}
  /// `value(j)`: element j of the row's value.
  template <class Value>
  void add(double x, Value&& value) {
    denominator += x;
    for (std::size_t j = 0; j < output.size(); ++j) {
      const auto v = static_cast<double>(value(j));
      output[j] += x * v;
      power += x * v * v;
    }
  }
  /// After the last row.
  void finish() {
    for (double& o : output) {
      o /= denominator;
      output2 += o * o;
    }
  }
};

/// Does query t see this token?
[[nodiscard]] inline bool sees(const problem& p, std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t token) {
  const std::int64_t here = p.query_position(b, t), there = p.position(b, token);
  if (there < 0) return false;
  if (p.causal && there > here) return false;
  if (p.sliding_window > 0 && (there > here || there <= here - p.sliding_window)) return false;
  if (p.mask.empty()) return true;
  const auto at = static_cast<std::size_t>(((b * p.n_heads + h) * p.n_queries + t) * p.n_tokens + token);
  return p.mask[at] != -std::numeric_limits<double>::infinity();
}

[[nodiscard]] inline double logit(const problem& p, std::int64_t b, std::int64_t t, std::int64_t h,
                                  std::int64_t token) {
  const std::int64_t kv_head = h / (p.n_heads / p.n_kv_heads);
  const auto q = static_cast<std::size_t>(((b * p.n_queries + t) * p.n_heads + h) * p.dk);
  const auto k = static_cast<std::size_t>(((b * p.n_kv_heads + kv_head) * p.n_tokens + token) * p.dk);
  double s = 0;
  for (std::size_t j = 0; j < static_cast<std::size_t>(p.dk); ++j) s += p.q[q + j] * p.k[k + j];
  s *= p.scale;
  if (p.softcap > 0) s = p.softcap * std::tanh(s / p.softcap);
  if (!p.mask.empty())
    s += p.mask[static_cast<std::size_t>(((b * p.n_heads + h) * p.n_queries + t) * p.n_tokens + token)];
  if (!p.alibi.empty())
    s += p.alibi[static_cast<std::size_t>(h)] * static_cast<double>(p.position(b, token) - p.query_position(b, t));
  return s;
}

/// A query that sees no token has output 0 and, as its log-sum-exp, the sink's logit: −inf without a sink.
[[nodiscard]] inline row attend(const problem& p, std::int64_t b, std::int64_t t, std::int64_t h) {
  row r;
  r.numerator.assign(static_cast<std::size_t>(p.dv), 0.0);
  r.output = r.numerator;
  for (std::int64_t i = 0; i < p.length(b); ++i) {
    if (!sees(p, b, t, h, i)) continue;
    r.tokens.push_back(i);
    r.logits.push_back(logit(p, b, t, h, i));
    r.max_logit = std::max(r.max_logit, r.logits.back());
  }
  const double sink = p.sinks.empty() ? -std::numeric_limits<double>::infinity() : p.sinks[static_cast<std::size_t>(h)];
  r.max_logit = std::max(r.max_logit, sink);
  if (r.max_logit == -std::numeric_limits<double>::infinity()) return r;
  r.denominator = std::exp(sink - r.max_logit);
  const std::int64_t kv_head = h / (p.n_heads / p.n_kv_heads);
  for (std::size_t i = 0; i < r.tokens.size(); ++i) {
    const double x = std::exp(r.logits[i] - r.max_logit);
    const auto v = static_cast<std::size_t>(((b * p.n_kv_heads + kv_head) * p.n_tokens + r.tokens[i]) * p.dv);
    r.denominator += x;
    for (std::size_t j = 0; j < r.numerator.size(); ++j) r.numerator[j] += x * p.v[v + j];
  }
  for (std::size_t j = 0; j < r.output.size(); ++j) r.output[j] = r.numerator[j] / r.denominator;
  r.log_sum_exp = r.max_logit + std::log(r.denominator);
  return r;
}

/// ‖a − b‖ / ‖b‖; 0 where both are 0, inf where b alone is or where a is not finite.
template <class A>
[[nodiscard]] double relative_error(const A* a, const std::vector<double>& b) {
  double difference = 0, norm = 0;
  for (std::size_t j = 0; j < b.size(); ++j) {
    const double d = static_cast<double>(a[j]) - b[j];
    difference += d * d;
    norm += b[j] * b[j];
  }
  if (!std::isfinite(difference)) return std::numeric_limits<double>::infinity();
  if (norm == 0) return difference == 0 ? 0.0 : std::numeric_limits<double>::infinity();
  return std::sqrt(difference / norm);
}

}  // namespace vattn::reference
