// What the sweep compares: ways to answer one query from a cache, each behind the same call.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "common/methods.hpp"
#include "support/regimes.hpp"
#include "vattn/vattn.hpp"

namespace vattn::bench {

/// Settings of one cell. A method reads `epsilon` and `delta` if it verifies, `density` if it does not.
struct cell {
  double epsilon = 0, delta = 0, density = 0;
  error_scale scale = error_scale::output;

  [[nodiscard]] config settings(config base = {}) const {
    base.epsilon = epsilon;
    base.delta = delta;
    base.scale = scale;
    return base;
  }
};

/// One query against one cache, with room for its answer and the true one.
class problem {
 public:
  problem(std::string_view regime, std::string_view values, index_t n, index_t dim, std::uint64_t seed)
      : problem(synthetic::make_cache(regime, values, n, dim, seed)) {}

  explicit problem(synthetic::cache c)
      : cache_(std::move(c)), norms_(static_cast<std::size_t>(cache_.n)), centre_(width()), output_(width()) {
    keep_norms();
    solve();
    index_.emplace_back(index_shape{.n_kv_heads = 1, .dk = cache_.dim, .dv = cache_.dim});
    if (const status built = index_[0].build(view()); !built) throw std::runtime_error(built.message());
  }

  [[nodiscard]] tensor_view<const float, 4> query() const { return {cache_.q.data(), {1, 1, 1, cache_.dim}}; }
  /// With the norms that a cache which serves a ranking would keep.
  [[nodiscard]] kv_view<float, float> view() const {
    const kv_shape shape{.n_batch = 1, .n_kv_heads = 1, .n_tokens = cache_.n, .dk = cache_.dim, .dv = cache_.dim};
    return contiguous_kv(cache_.k.data(), cache_.v.data(), shape)
        .with_norms({.values = norms_.data(), .value_centres = centre_.data()});
  }
  [[nodiscard]] attention_options options() const {
    attention_options o;
    o.scale = cache_.scale();
    return o;
  }
  [[nodiscard]] attention_result result() {
    const index_t dim = cache_.dim;
    return {.output = {output_.data(), {1, 1, 1, dim}}, .certificates = {&proof_, {1, 1, 1}}};
  }
  [[nodiscard]] workspace& memory() { return memory_; }
  [[nodiscard]] std::span<const kv_index> index() const { return index_; }

  [[nodiscard]] index_t n() const { return cache_.n; }
  [[nodiscard]] index_t dim() const { return cache_.dim; }
  [[nodiscard]] const std::vector<double>& logits() const { return logits_; }

  /// Of the latest call.
  [[nodiscard]] const certificate& proof() const { return proof_; }
  /// Of the latest call: ‖ô − o‖ / T against double precision.
  [[nodiscard]] double error(error_scale scale) const {
    double square = 0;
    for (std::size_t j = 0; j < width(); ++j) {
      const double miss = output_[j] - truth_[j];
      square += miss * miss;
    }
    return std::sqrt(square / (scale == error_scale::rms ? power_ : norm2_));
  }

 private:
  [[nodiscard]] std::size_t width() const { return static_cast<std::size_t>(cache_.dim); }

  // ‖v − centre‖, the centre that of the first few hundred values, as an engine could keep it.
  void keep_norms() {
    const std::size_t first = std::min<std::size_t>(norms_.size(), 256);
    for (std::size_t i = 0; i < first; ++i) {
      for (std::size_t j = 0; j < width(); ++j) centre_[j] += cache_.v[i * width() + j] / static_cast<float>(first);
    }
    for (std::size_t i = 0; i < norms_.size(); ++i) {
      double square = 0;
      for (std::size_t j = 0; j < width(); ++j) {
        const double away = cache_.v[i * width() + j] - centre_[j];
        square += away * away;
      }
      norms_[i] = static_cast<float>(std::sqrt(square));
    }
  }

  // o, ‖o‖² and the mean square of the attended values, in double.
  void solve() {
    const std::size_t n = norms_.size();
    std::vector<double>& logits = logits_;
    logits.assign(n, 0);
    double highest = -std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < width(); ++j) logits[i] += double{cache_.q[j]} * cache_.k[i * width() + j];
      logits[i] /= std::sqrt(static_cast<double>(width()));
      highest = std::max(highest, logits[i]);
    }
    truth_.assign(width(), 0);
    double denominator = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const double x = std::exp(logits[i] - highest);
      denominator += x;
      for (std::size_t j = 0; j < width(); ++j) {
        const double v = cache_.v[i * width() + j];
        truth_[j] += x * v;
        power_ += x * v * v;
      }
    }
    power_ /= denominator;
    for (double& o : truth_) {
      o /= denominator;
      norm2_ += o * o;
    }
  }

  synthetic::cache cache_;
  std::vector<float> norms_;    // [n]
  std::vector<float> centre_;   // [dim]
  std::vector<double> logits_;  // [n]
  std::vector<double> truth_;   // [dim]
  double norm2_ = 0, power_ = 0;
  std::vector<float> output_;  // [dim]
  certificate proof_;
  workspace memory_;
  std::vector<kv_index> index_;
};

/// Rows of a fixed number, no promise.
inline status attend_rows(problem& p, const examples::row_budget& budget, const draw_key& key) {
  return examples::fixed_budget(p.query(), p.view(), p.options(), p.result(), p.memory(), budget, key);
}

template <class Policy>
status attend_verified(problem& p, const config& settings, const draw_key& key) {
  return vattention<Policy>(settings)(p.query(), p.view(), p.options(), p.result(), p.memory(), key);
}

/// What sets a method's cost, hence what is swept.
enum class knob { none, density, epsilon };

struct contender {
  const char* name;
  knob sweeps;
  bool random;  ///< worth more than one trial
  status (*attend)(problem&, const cell&, const draw_key&);
};

inline constexpr contender contenders[] = {
    {"dense", knob::none, false,
     [](problem& p, const cell&, const draw_key&) {
       return exact_attention(p.query(), p.view(), p.options(), p.result(), p.memory());
     }},
    {"sinks+window", knob::none, false,
     [](problem& p, const cell&, const draw_key& key) { return attend_rows(p, {.sinks = 128, .window = 128}, key); }},
    {"top-k", knob::density, false,
     [](problem& p, const cell& at, const draw_key& key) { return attend_rows(p, {.heavy = at.density}, key); }},
    {"sample", knob::density, true,
     [](problem& p, const cell& at, const draw_key& key) { return attend_rows(p, {.sampled = at.density}, key); }},
    {"paper", knob::epsilon, true,
     [](problem& p, const cell& at, const draw_key& key) {
       return attend_verified<verified_denominator>(p, at.settings(presets::paper_default), key);
     }},
    {"sdpa", knob::epsilon, true,
     [](problem& p, const cell& at, const draw_key& key) {
       return attend_verified<verified_sdpa>(p, at.settings(), key);
     }},
    {"ranked", knob::epsilon, true,
     [](problem& p, const cell& at, const draw_key& key) {
       return attend_verified<ranked_policy>(p, at.settings(), key);
     }},
    {"vattention", knob::epsilon, true,
     [](problem& p, const cell& at, const draw_key& key) {
       return vattention<index_policy>(at.settings(), {p.index()})(p.query(), p.view(), p.options(), p.result(),
                                                                   p.memory(), key);
     }},
};

}  // namespace vattn::bench
