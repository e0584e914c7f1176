// Poisson sampling with probabilities that follow a cheap score and its stated error.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "vattn/base/philox.hpp"

namespace vattn::VATTN_ABI::sample {

/// Shape of the inclusion probabilities; the defaults are those that the docs' figures were made with.
struct importance_shape {
  double pilot = 96;       ///< expected rows of the first look, besides the exact ones
  double tempered = 0.5;   ///< share of the weights that follow e^{βs}, not e^{s}
  double defensive = 0.1;  ///< weight, on top, that does not follow the score at all
  double z = 2.5;          ///< standard errors by which the floor allows a score to be too low
  double kappa = 0.5;      ///< share of ε that one missed token at its floor may cost
};

/// The sampler slot's importance form: vattention then asks the selector for estimates with errors instead of
/// a ranking. Derive and redefine `shape` to change the probabilities.
struct by_importance {
  static constexpr importance_shape shape{};
};

/// As `by_importance`, in two phases (two_phase_attention.hpp): the selector is select::two_phase<Coarse, Fine>.
struct in_two_phases : by_importance {
  static constexpr bool two_phases = true;
  static constexpr double widening = 16;  ///< candidates for each row of the pilot, at first
};

/// As `by_importance`, with one sample for the query heads of a KV head: token i is kept with the largest of
/// the heads' probabilities, so each row that is read serves them all and each head's estimate stays unbiased.
/// Fewer rows where heads agree; where they do not, their union.
struct by_group_importance : by_importance {
  static constexpr bool shared = true;
};

/// What a call on a store spends its time on.
enum class store_stage : std::uint8_t { tables, pilot, plan, scan, picks, slice, judge, exact };
inline constexpr std::size_t store_stages = 8;

/// Picks by the codes of a shuffled_store, and a slice of it (store_attention.hpp).
struct from_store {
  static constexpr bool is_store = true;
  /// Told by the calling thread when a stage begins; the last one ends with the call. For benchmarks: derive and
  /// redefine.
  static void enter(store_stage) noexcept {}
};

/// Permanent numbers u_i, a pure function of the stream, [first, last) of `numbers`.
inline void draw_numbers(std::span<float> numbers, index_t first, index_t last, random_stream stream) noexcept {
  for (index_t i = first; i < last; ++i) {
    // Centre of one of 2^24 cells: never 0, so a token of probability 0 stays out and π = 1 is always in.
    numbers[static_cast<std::size_t>(i)] = (static_cast<float>(stream.next() >> 8) + 0.5f) * 0x1p-24f;
  }
}

/// Inclusion probabilities of one head: token i is in the sample iff u_i < π_i, with permanent numbers u_i, so
/// that samples for growing π are nested. π_i = 1 inside the exact set, else min(prior_i, max(c·w_i, λ·f_i)):
///   w_i  weights that sum to 1 + defensive: ½ norm(e^s vn) + ½ norm(e^{βs} vn) + 0.1 norm(vn)
///   f_i  e^{s + zσ}(r_i + K), what the token may move the output if its score is z errors too low: r_i its value's
///        distance from the centre, K the output's. λ makes it a floor, without which a heavy token that the score
///        hides and the sample misses leaves no trace. At least κ·ln(1/δ)·e^{s + σ²/2}(r_i + K): of many tokens ln(1/δ)
///        expected rows are missed together as often as δ, and then cost κ·ε each if they weigh their floor, not so
///        much if they weigh what honest scores let them weigh in the mean
/// `prior` (1 where it is empty): the tokens are themselves a sample, taken by the same numbers u_i < prior_i;
/// then π_i is the probability over both phases, exactly, and norm() estimates sums over all tokens.
/// Holds spans over the caller's memory, [n] each.
class importance {
 public:
  importance() = default;
  importance(std::span<float> weight, std::span<float> floor, std::span<float> reach,
             std::span<const float> prior = {}) noexcept
      : weight_(weight), floor_(floor), reach_(reach), prior_(prior) {}

  /// `delta` is that of the promise. `scores` and `errors` are the estimated logits and their error scales σ,
  /// `distance` the r_i as a function of the place; the weights take vn = r + a tenth of their mean. Places before
  /// `first` and from `last` on are exact.
  template <class Distance>
  void prepare(std::span<const float> scores, std::span<const float> errors, Distance&& distance, index_t first,
               index_t last, double beta, const importance_shape& shape, double delta) noexcept {
    first_ = first;
    last_ = last;
    top_ = -std::numeric_limits<float>::infinity();
    for (index_t i = first; i < last; ++i) top_ = std::max(top_, scores[at(i)]);
    double plain = 0, tempered = 0, flat = 0;
    const auto b = static_cast<float>(beta), z = static_cast<float>(shape.z);
    double mean = 0;
    for (index_t i = first; i < last; ++i) {
      reach_[at(i)] = distance(i);
      mean += static_cast<double>(reach_[at(i)]) / static_cast<double>(last - first);
    }
    offset_ = 0.1 * mean;
    const auto value = [&](index_t i) { return reach_[at(i)] + static_cast<float>(0.1 * mean); };
    for (index_t i = first; i < last; ++i) {
      const float vn = value(i), s = scores[at(i)] - top_;
      const float e = std::exp(s) * vn, t = std::exp(b * s) * vn;
      weight_[at(i)] = e;
      floor_[at(i)] = t;  // until the sums are known
      const float stands_for = prior_.empty() ? 1.0f : 1 / prior_[at(i)];
      plain += stands_for * e;
      tempered += stands_for * t;
      flat += stands_for * vn;
    }
    const auto share = [](double part, double sum) { return sum > 0 ? static_cast<float>(part / sum) : 0.0f; };
    const float a = share(1 - shape.tempered, plain), t = share(shape.tempered, tempered),
                d = share(shape.defensive, flat);
    const auto together = static_cast<float>(std::log(shape.kappa * std::log(1 / delta)));
    for (index_t i = first; i < last; ++i) {
      weight_[at(i)] = a * weight_[at(i)] + t * floor_[at(i)] + d * value(i);
      const float sigma = errors[at(i)];
      floor_[at(i)] = std::exp(scores[at(i)] - top_ + std::max(z * sigma, sigma * sigma / 2 + together));
    }
  }

  /// K, the output's distance from the values' centre as far as it is known; at first a tenth of the mean r.
  [[nodiscard]] double offset() const noexcept { return offset_; }

  /// The scores' reference: floors and weights are relative to exp of it.
  [[nodiscard]] float top() const noexcept { return top_; }

  /// `offset` is K; increasing in c, λ and K.
  [[nodiscard]] double probability(index_t i, double c, double lambda, double offset) const noexcept {
    if (i < first_ || i >= last_) return 1;
    const double most = prior_.empty() ? 1.0 : static_cast<double>(prior_[at(i)]);
    const double floor = lambda * static_cast<double>(floor_[at(i)]) * (static_cast<double>(reach_[at(i)]) + offset);
    return std::min(most, std::max(c * static_cast<double>(weight_[at(i)]), floor));
  }

 private:
  [[nodiscard]] static std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }

  std::span<float> weight_, floor_, reach_;
  std::span<const float> prior_;
  double offset_ = 0;
  index_t first_ = 0, last_ = 0;
  float top_ = 0;
};

}  // namespace vattn::VATTN_ABI::sample

#include "vattn/macros_pop.hpp"
