// Exact attention in double precision, and the errors of an output against it.
#pragma once

#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "vattn/vattn.hpp"

namespace vattn::examples {

/// Rows are (batch, query, head), row-major.
struct reference {
  index_t dv = 0;
  std::vector<double> output;       // [rows, dv]
  std::vector<double> log_sum_exp;  // [rows], natural log, −inf where nothing is visible
  std::vector<double> norm;         // [rows], ‖o‖
  std::vector<double> rms;          // [rows], sqrt(Σ x‖v‖²/D), the root mean square of the attended values

  [[nodiscard]] std::span<const double> row(std::size_t r) const {
    return std::span(output).subspan(r * static_cast<std::size_t>(dv), static_cast<std::size_t>(dv));
  }
};

/// Relative errors of one row, each of the quantity that a target may promise.
struct row_error {
  double output = 0;       ///< ‖ô − o‖ / T, T = ‖o‖ or the RMS of the attended values
  double numerator = 0;    ///< ‖N̂ − N‖ / ‖N‖, N = o·D
  double denominator = 0;  ///< |D̂ − D| / D

  [[nodiscard]] double of(target_kind target) const {
    if (target == target_kind::denominator) return denominator;
    return target == target_kind::numerator ? numerator : output;
  }
};

/// Straightforward two-pass softmax. For arguments that `check_call` accepts and that are finite.
template <class Q, kv_cache KV, executor E = serial_executor>
[[nodiscard]] reference exact_reference(const tensor_view<const Q, 4>& q, const KV& cache,
                                        const attention_options& options, E&& exec = E{}) {
  const auto [n_batch, n_queries, n_heads, dk] = q.extents;
  const auto width = static_cast<std::size_t>(cache.dv()), key_width = static_cast<std::size_t>(dk);
  const auto rows = static_cast<std::size_t>(n_batch * n_queries * n_heads);
  const index_t group = n_heads / cache.n_kv_heads();
  reference r;
  r.dv = cache.dv();
  r.output.resize(rows * width);
  r.log_sum_exp.assign(rows, -std::numeric_limits<double>::infinity());
  r.norm.resize(rows);
  r.rms.resize(rows);

  struct buffers {
    std::vector<float> row;
    Eigen::VectorXd query, key, value;
    std::vector<double> logits;
  };
  std::vector<buffers> of_worker(static_cast<std::size_t>(exec.workers()));  // allocated here: tasks must not throw
  for (buffers& b : of_worker) {
    b.row.resize(std::max(width, key_width));
    b.query.resize(static_cast<Eigen::Index>(key_width));
    b.key.resize(static_cast<Eigen::Index>(key_width));
    b.value.resize(static_cast<Eigen::Index>(width));
    b.logits.resize(static_cast<std::size_t>(longest(cache)));
  }
  const auto widen = [](const auto& from, std::vector<float>& row, Eigen::VectorXd& to) {
    using kernel::load;
    load(from, row.data());
    for (Eigen::Index j = 0; j < to.size(); ++j) to[j] = row[static_cast<std::size_t>(j)];
  };
  exec.for_each(static_cast<index_t>(rows), [&](index_t task, index_t worker) {
    const index_t h = task % q.extents[2], t = task / q.extents[2] % q.extents[1],
                  b = task / q.extents[2] / q.extents[1];
    buffers& s = of_worker[static_cast<std::size_t>(worker)];
    const auto head = cache.head(b, h / group);
    const mask_view::line mask = options.mask.at(b, h, t);
    const auto [first, last] = visible_range(head.size(), q.extents[1], t, options);
    const index_t position = head.size() - q.extents[1] + t;
    widen(std::span<const Q>(&q(b, t, h, 0), key_width), s.row, s.query);

    double largest = options.sink_logits ? double{options.sink_logits[h]} : -std::numeric_limits<double>::infinity();
    for (index_t i = first; i < last; ++i) {
      widen(head.key(i), s.row, s.key);
      double l = double{options.scale} * s.query.dot(s.key);
      if (options.softcap > 0) l = options.softcap * std::tanh(l / options.softcap);
      if (mask) l += mask(i);
      if (options.alibi_slopes) l += double{options.alibi_slopes[h]} * static_cast<double>(i - position);
      s.logits[static_cast<std::size_t>(i)] = l;
      largest = std::max(largest, l);
    }
    if (!(largest > -std::numeric_limits<double>::infinity())) return;  // nothing is visible: 0, −inf
    const auto row = static_cast<std::size_t>(task);
    Eigen::Map<Eigen::VectorXd> o(r.output.data() + row * width, static_cast<Eigen::Index>(width));
    double d = options.sink_logits ? std::exp(options.sink_logits[h] - largest) : 0, power = 0;
    for (index_t i = first; i < last; ++i) {
      const double x = std::exp(s.logits[static_cast<std::size_t>(i)] - largest);
      if (x == 0) continue;
      widen(head.value(i), s.row, s.value);
      d += x;
      o += x * s.value;
      power += x * s.value.squaredNorm();
    }
    o /= d;
    r.log_sum_exp[row] = largest + std::log(d);
    r.norm[row] = o.norm();
    r.rms[row] = std::sqrt(power / d);
  });
  return r;
}

/// Errors of `output` [dv] and its log-sum-exp against row r. An error of 0 relative to 0 is 0.
[[nodiscard]] inline row_error error_of(const reference& exact, std::size_t r, std::span<const float> output,
                                        double log_sum_exp, error_scale scale) {
  const auto relative = [](double error, double to) {
    if (error == 0) return 0.0;
    return to > 0 ? error / to : std::numeric_limits<double>::infinity();
  };
  const std::span<const double> o = exact.row(r);
  const bool none = std::isinf(exact.log_sum_exp[r]) && std::isinf(log_sum_exp);
  const double ratio = none ? 1 : std::exp(log_sum_exp - exact.log_sum_exp[r]);  // D̂/D
  double output2 = 0, numerator2 = 0;
  for (std::size_t j = 0; j < o.size(); ++j) {
    output2 += (output[j] - o[j]) * (output[j] - o[j]);
    numerator2 += (output[j] * ratio - o[j]) * (output[j] * ratio - o[j]);
  }
  return {.output = relative(std::sqrt(output2), scale == error_scale::rms ? exact.rms[r] : exact.norm[r]),
          .numerator = relative(std::sqrt(numerator2), exact.norm[r]),
          .denominator = std::abs(ratio - 1)};
}

}  // namespace vattn::examples
