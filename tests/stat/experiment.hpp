// One cell of the statistical suite: a cache, a promise, many draws, and what came of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vattn/vattn.hpp>
#include <vector>

#include "support/regimes.hpp"

namespace vattn::stat {

/// exact_contributions for a query whose scores are computed once: draws of one query differ in their
/// randomness alone, and a thousand draws should not cost a thousand scans.
struct remembered_scores {
  const std::vector<float>* scores = nullptr;
  const std::vector<float>* centre = nullptr;
  float value_offset = 0;

  template <class Row>
  score_result score(const Row&, const population& tokens, const score_buffers& out) const noexcept {
    std::copy_n(scores->data(), tokens.size(), out.scores.data());
    std::copy_n(centre->data(), out.centre.size(), out.centre.data());
    return {.ok = true, .kind = score_kind::contribution, .value_offset = value_offset};
  }
  index_t heavy_count(const ranking& r, index_t n, const config& c) const noexcept {
    return select::top_k<select::exact_logits>{}.heavy_count(r, n, c);
  }
};

template <class Base>
struct remembering : Base {
  using selector = remembered_scores;
};

/// Scores of an index for a query, computed once, as `remembered_scores`.
struct remembered_estimates {
  static constexpr bool estimates = true;
  const std::vector<float>* scores = nullptr;
  const std::vector<float>* errors = nullptr;

  template <class Row>
  score_result score(const Row&, const population& tokens, const score_buffers& out) const noexcept {
    for (index_t j = 0; j < tokens.size(); ++j) {
      const auto to = static_cast<std::size_t>(j), from = static_cast<std::size_t>(tokens[j]);
      out.scores[to] = (*scores)[from];
      if (!out.errors.empty()) out.errors[to] = (*errors)[from];
    }
    return {};
  }
  index_t heavy_count(const ranking& r, index_t n, const config& c) const noexcept {
    return select::top_k<select::exact_logits>{}.heavy_count(r, n, c);
  }
};

struct importance_policy : default_policy {
  using selector = remembered_estimates;
  using sampler = sample::by_importance;
};

/// As select::two_phase.
struct remembered_phases : remembered_estimates {
  remembered_estimates coarse, fine;
};
struct two_phase_policy : default_policy {
  using selector = remembered_phases;
  using sampler = sample::in_two_phases;
};

/// As select::hard_bounds: scores plus `times` their errors.
struct remembered_bounds : remembered_estimates {
  static constexpr bool upper_bounds = true;
  float times = 0;

  template <class Row>
  score_result score(const Row&, const population& tokens, const score_buffers& out) const noexcept {
    for (index_t j = 0; j < tokens.size(); ++j) {
      const auto from = static_cast<std::size_t>(tokens[j]);
      out.scores[static_cast<std::size_t>(j)] = (*scores)[from] + times * (*errors)[from];
    }
    return {.kind = score_kind::logit};
  }
};
struct certified_test_policy : default_policy {
  using selector = remembered_bounds;
  using sampler = sample::by_importance;
  using bound = budget::bernstein;
};

/// A single-head problem in element type T with its exact answer in double precision.
template <kernel::element T>
class problem {
 public:
  problem(const std::string& regime, const std::string& values, index_t n, index_t dim, std::uint64_t seed)
      : problem(synthetic::make_cache(regime, values, n, dim, seed)) {}

  explicit problem(const synthetic::cache& c)
      : n_(c.n),
        dk_(c.dim),
        dv_(c.n > 0 ? static_cast<index_t>(c.v.size()) / c.n : c.dim),
        scale_(c.scale()),
        q_(c.q),
        k_(c.k.begin(), c.k.end()),
        v_(c.v.begin(), c.v.end()) {
    const auto n = static_cast<std::size_t>(n_), dk = static_cast<std::size_t>(dk_), dv = static_cast<std::size_t>(dv_);
    for (const float q : q_) scaled_q_.push_back(q * scale_);
    logits_.resize(n);
    double highest = -1e300;
    for (std::size_t i = 0; i < n; ++i) {
      double s = 0;
      for (std::size_t j = 0; j < dk; ++j) s += static_cast<double>(q_[j]) * static_cast<float>(k_[i * dk + j]);
      logits_[i] = s * static_cast<double>(scale_);
      highest = std::max(highest, logits_[i]);
    }
    output_.assign(dv, 0);
    centre_.assign(dv, 0);
    double denominator = 0, power = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const double x = std::exp(logits_[i] - highest);
      denominator += x;
      for (std::size_t j = 0; j < dv; ++j) {
        const double v = static_cast<double>(static_cast<float>(v_[i * dv + j]));
        output_[j] += x * v;
        power += x * v * v;
        centre_[j] += static_cast<float>(v / static_cast<double>(n));
      }
    }
    for (double& o : output_) o /= denominator;
    log_denominator_ = highest + std::log(denominator);
    double norm2 = 0;
    for (const double o : output_) norm2 += o * o;
    norm_ = std::sqrt(norm2);
    rms_ = std::sqrt(power / denominator);
    distances_.resize(n);
    double mean = 0;
    for (std::size_t i = 0; i < n; ++i) {
      double s = 0;
      for (std::size_t j = 0; j < dv; ++j)
        s += std::pow(static_cast<double>(static_cast<float>(v_[i * dv + j])) - centre_[j], 2);
      distances_[i] = static_cast<float>(std::sqrt(s));
      mean += std::sqrt(s) / static_cast<double>(n);
    }
    offset_ = static_cast<float>(mean / 2);
    scores_.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
      scores_[i] = static_cast<float>(logits_[i]) + std::log(std::hypot(distances_[i], offset_));
    }
  }
  problem(const problem&) = delete;
  problem& operator=(const problem&) = delete;

  [[nodiscard]] index_t n() const { return n_; }
  [[nodiscard]] index_t dk() const { return dk_; }
  [[nodiscard]] index_t dv() const { return dv_; }
  [[nodiscard]] auto cache() const {
    return contiguous_kv(k_.data(), v_.data(), kv_shape{1, 1, n_, dk_, dv_})
        .with_norms({.values = distances_.data(), .value_centres = centre_.data()});
  }
  [[nodiscard]] tensor_view<const float, 4> query() const { return {q_.data(), {1, 1, 1, dk_}}; }
  [[nodiscard]] attention_options options() const {
    attention_options o;
    o.scale = scale_;
    return o;
  }
  [[nodiscard]] remembered_scores selector() const { return {&scores_, &centre_, offset_}; }
  [[nodiscard]] const float* scaled_query() const { return scaled_q_.data(); }
  [[nodiscard]] auto head() const { return cache().head(0, 0); }
  [[nodiscard]] const std::vector<double>& output() const { return output_; }
  [[nodiscard]] double log_denominator() const { return log_denominator_; }
  [[nodiscard]] double scale_of(error_scale s) const { return s == error_scale::rms ? rms_ : norm_; }
  [[nodiscard]] double norm() const { return norm_; }
  [[nodiscard]] double coherence() const { return norm_ / rms_; }

 private:
  index_t n_, dk_, dv_;
  float scale_;
  std::vector<float> q_, scaled_q_;
  std::vector<T> k_, v_;
  std::vector<double> logits_, output_;
  std::vector<float> centre_, distances_, scores_;
  double log_denominator_ = 0, norm_ = 0, rms_ = 0;
  float offset_ = 0;
};

/// One draw: the certificate, and the true error of what it is about (relative, as ε is).
struct draw {
  certificate certified;
  double error = 0;
  double denominator_error = 0;  ///< (D̂ − D)/D, signed
};

/// Draws `count` times with seeds first_seed, first_seed + 1, … `visit(draw, output)` sees each.
template <class Policy, kernel::element T, class Visit>
void for_each_draw(const problem<T>& p, const typename Policy::selector& selector, const config& settings, long count,
                   std::uint64_t first_seed, Visit&& visit) {
  const vattention<Policy> attention(settings, selector);
  const auto dv = static_cast<std::size_t>(p.dv());
  std::vector<float> out(dv);
  draw d;
  workspace memory;
  for (long i = 0; i < count; ++i) {
    const status s = attention(p.query(), p.cache(), p.options(),
                               {.output = {out.data(), {1, 1, 1, p.dv()}}, .certificates = {&d.certified, {1, 1, 1}}},
                               memory, {.seed = first_seed + static_cast<std::uint64_t>(i)});
    if (!s) throw std::runtime_error(s.message());
    const double ratio = std::exp(d.certified.log_denominator - p.log_denominator());  // D̂/D
    d.denominator_error = ratio - 1;
    double output2 = 0, numerator2 = 0;
    for (std::size_t j = 0; j < dv; ++j) {
      output2 += std::pow(out[j] - p.output()[j], 2);
      numerator2 += std::pow(out[j] * ratio - p.output()[j], 2);
    }
    switch (d.certified.target) {
      case target_kind::denominator:
        d.error = std::abs(d.denominator_error);
        break;
      case target_kind::numerator:
        d.error = std::sqrt(numerator2) / p.norm();
        break;
      default:
        d.error = std::sqrt(output2) / p.scale_of(settings.scale);
    }
    visit(static_cast<const draw&>(d), static_cast<const std::vector<float>&>(out));
  }
}

/// What a cell's draws amount to.
struct summary {
  long draws = 0, failures = 0, exact = 0;
  long uncovered = 0;  ///< sampled draws whose error exceeds their own epsilon_achieved
  double density = 0, rounds = 0, achieved_mean = 0;
  std::vector<double> errors;  ///< of the sampled draws, sorted

  [[nodiscard]] double quantile(double p) const {
    if (errors.empty()) return 0;
    const auto last = static_cast<double>(errors.size() - 1);
    return errors[static_cast<std::size_t>(std::ceil(p * last))];
  }
  [[nodiscard]] double failure_share() const {
    return draws ? static_cast<double>(failures) / static_cast<double>(draws) : 0;
  }
};

template <class Policy, kernel::element T>
summary run_cell(const problem<T>& p, const typename Policy::selector& selector, const config& settings, long count,
                 std::uint64_t first_seed) {
  summary s;
  // Float outputs are compared with double references: below this an error is rounding, not sampling.
  constexpr double rounding = 2e-6;
  for_each_draw<Policy>(p, selector, settings, count, first_seed, [&](const draw& d, const auto&) {
    ++s.draws;
    s.failures += d.error > settings.epsilon;
    s.density += d.certified.density();
    s.rounds += static_cast<double>(d.certified.rounds);
    if (d.certified.exact()) {
      ++s.exact;
    } else {
      s.uncovered += d.error > d.certified.epsilon_achieved + rounding;
      s.achieved_mean += d.certified.epsilon_achieved;
      s.errors.push_back(d.error);
    }
  });
  std::sort(s.errors.begin(), s.errors.end());
  s.density /= static_cast<double>(std::max(1L, s.draws));
  s.rounds /= static_cast<double>(std::max(1L, s.draws));
  s.achieved_mean /= static_cast<double>(std::max<std::size_t>(1, s.errors.size()));
  return s;
}

template <class Policy, kernel::element T>
summary run_cell(const problem<T>& p, const config& settings, long count, std::uint64_t first_seed) {
  return run_cell<Policy>(p, p.selector(), settings, count, first_seed);
}

/// An index over the keys of a problem and what it says of the query.
template <key_index Index>
class indexed_problem {
 public:
  template <kernel::element T>
  indexed_problem(const problem<T>& p, Index index) : index_(std::move(index)) {
    append_from(index_, p.head());
    std::vector<float> scratch(index_.scratch_size());
    scores_.resize(static_cast<std::size_t>(p.n()));
    errors_.resize(Index::estimates ? scores_.size() : 0);
    index_.score(p.scaled_query(), 0, scores_, errors_, scratch);
  }
  indexed_problem(const indexed_problem&) = delete;
  indexed_problem& operator=(const indexed_problem&) = delete;

  [[nodiscard]] const Index& index() const { return index_; }
  [[nodiscard]] remembered_estimates selector() const { return {&scores_, &errors_}; }
  [[nodiscard]] remembered_bounds bounds() const {
    remembered_bounds b;
    b.scores = &scores_, b.errors = &errors_, b.times = index_.bound_over_error();
    return b;
  }
  [[nodiscard]] std::vector<float>& scores() { return scores_; }
  [[nodiscard]] std::vector<float>& errors() { return errors_; }

 private:
  Index index_;
  std::vector<float> scores_, errors_;
};

}  // namespace vattn::stat
