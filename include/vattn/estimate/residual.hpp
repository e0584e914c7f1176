// The sampled part: rows drawn from what is not read exactly, and what they say of the whole.
#include "vattn/macros_push.hpp"
#pragma once

#include <cmath>
#include <span>

#include "vattn/estimate/moments.hpp"
#include "vattn/estimate/state.hpp"
#include "vattn/kv/query.hpp"
#include "vattn/sample/uniform.hpp"
#include "vattn/select/ranking.hpp"

namespace vattn::VATTN_ABI {

/// A sampled row: its place in the population, its logit, ‖v − c‖².
struct drawn_row {
  ordinal place;
  float logit;
  float spread;
};

/// A uniform sample of the residual: the population less its first `sinks`, last `window` and ranked
/// places. It grows (`grow`), and follows the ranking when that takes more of the residual (`shed`):
/// what is left of a uniform sample is a uniform sample of what is left. No row is ever thrown away.
/// Holds references; allocates nothing.
template <kv_head Head, uniform_sampler Sampler>
class residual_sample {
 public:
  residual_sample(const query_row<Head>& row, const population& tokens, index_t sinks, index_t window,
                  const ranking& order, Sampler sampler, std::span<drawn_row> storage,
                  residual_moments& moments) noexcept
      : row_(row),
        tokens_(tokens),
        order_(order),
        moments_(moments),
        sampler_(sampler),
        storage_(storage),
        first_(sinks),
        last_(tokens.size() - window) {}

  /// Terms in the residual.
  [[nodiscard]] index_t population_size() const noexcept { return last_ - first_ - order_.count(); }
  [[nodiscard]] std::span<const drawn_row> rows() const noexcept {
    return storage_.first(static_cast<std::size_t>(count_));
  }
  [[nodiscard]] index_t count() const noexcept { return count_; }

  /// Draws and reads rows until there are m (at most the residual and the storage). False if a logit
  /// is not finite.
  [[nodiscard]] bool grow(index_t m) noexcept {
    if (!Sampler::with_replacement) m = std::min(m, population_size());
    m = std::min(m, static_cast<index_t>(storage_.size()));
    bool finite = true;
    // A block of places first, then their rows: the misses of one row overlap those of the next.
    constexpr index_t block = 32;
    while (count_ < m) {
      const index_t end = std::min(m, count_ + block);
      index_t drawn = count_;
      while (drawn < end) {
        const ordinal place = sampler_.next();
        if (!in_residual(place)) continue;
        const index_t token = tokens_[place];
        prefetch(row_.head.key(token));
        prefetch(row_.head.value(token));
        storage_[static_cast<std::size_t>(drawn++)].place = place;
      }
      Eigen::Array<float, block, 1> x = Eigen::Array<float, block, 1>::Zero();
      const index_t width = end - count_;
      for (index_t i = 0; i < width; ++i) {
        drawn_row& r = storage_[static_cast<std::size_t>(count_ + i)];
        x[i] = r.logit = row_.logit(tokens_[r.place]);
      }
      finite &= x.head(width).allFinite();
      x.head(width) = (x.head(width) - moments_.prepare(x.head(width).maxCoeff())).exp();
      for (index_t i = 0; i < width; ++i) {
        drawn_row& r = storage_[static_cast<std::size_t>(count_ + i)];
        r.spread = moments_.add_weighted(x[i], row_.value(tokens_[r.place]));
      }
      count_ = end;
    }
    return finite;
  }

  /// Drops the rows that the ranking has meanwhile made exact, and rebuilds the moments from the rest:
  /// subtracting heavy terms from float sums would leave their rounding behind.
  void shed() noexcept {
    moments_.clear(moments_.centre(), moments_.reference_logit());
    index_t kept = 0;
    for (const drawn_row& r : rows()) {
      if (!in_residual(r.place)) continue;
      moments_.add(r.logit, row_.value(tokens_[r.place]));
      storage_[static_cast<std::size_t>(kept++)] = r;
    }
    count_ = kept;
  }

 private:
  template <class R>
  static VATTN_ALWAYS_INLINE void prefetch(const R& r) noexcept {
    if constexpr (requires {
                    r.data();
                    r.size_bytes();
                  }) {
      kernel::prefetch_row(reinterpret_cast<const std::byte*>(r.data()), r.size_bytes());
    }
  }

  [[nodiscard]] bool in_residual(ordinal place) const noexcept {
    return place >= first_ && place < last_ && !order_.contains(place);
  }

  const query_row<Head>& row_;
  const population& tokens_;
  const ranking& order_;
  residual_moments& moments_;
  Sampler sampler_;
  std::span<drawn_row> storage_;
  index_t first_, last_;
  index_t count_ = 0;
};

/// The exact part plus N_r/m times the sampled part. All x relative to exp(reference).
struct estimate {
  double reference = 0;    ///< logit
  double denominator = 0;  ///< D̂
  double population = 0;   ///< N_r
  double sampled = 0;      ///< m
  residual_moments::sums s{};
  double u2 = 0;        ///< ‖u‖², u = ô − c
  double first_u = 0;   ///< N·u, N = Σ x r
  double second_u = 0;  ///< B·u, B = Σ x² r
  double first2 = 0;    ///< ‖N‖²
  double output2 = 0;   ///< ‖ô‖²
  double power = 0;     ///< Σ x‖v‖² / D̂, the mean square of the attended values
  double centre2 = 0;   ///< ‖c‖²
  double first_c = 0;   ///< N·c
  double second_c = 0;  ///< B·c
  bool finite = false;

  [[nodiscard]] double weight() const noexcept { return population / sampled; }
};

/// `exact` must hold power. Writes ô − c to `offset` [dv].
[[nodiscard]] inline estimate make_estimate(const softmax_state& exact, residual_moments& moments,
                                            index_t population_size, std::span<float> offset) noexcept {
  estimate e;
  e.s = moments.total();
  e.reference = moments.reference_logit();
  e.population = static_cast<double>(population_size);
  e.sampled = e.s.rows;
  const double w = e.weight();
  const double f = exact.empty() ? 0.0 : std::exp(exact.max_logit() - e.reference);
  e.denominator = f * exact.denominator() + w * e.s.S;

  const std::span<const float> c = moments.centre(), first = moments.first(), second = moments.second();
  const std::span<const float> o = exact.numerator();
  for (std::size_t j = 0; j < offset.size(); ++j) {
    const double output = (f * o[j] + w * (first[j] + e.s.S * c[j])) / e.denominator;
    const double u = output - c[j];
    offset[j] = static_cast<float>(u);
    e.output2 += output * output;
    e.u2 += u * u;
    e.centre2 += double{c[j]} * c[j];
    e.first2 += double{first[j]} * first[j];
    e.first_u += first[j] * u;
    e.second_u += second[j] * u;
    e.first_c += double{first[j]} * c[j];
    e.second_c += double{second[j]} * c[j];
  }
  e.power = (f * exact.power() + w * (e.s.P + 2 * e.first_c + e.s.S * e.centre2)) / e.denominator;
  e.finite = std::isfinite(e.denominator) && e.denominator > 0 && std::isfinite(e.output2) && std::isfinite(e.power);
  return e;
}

/// state += the estimated residual: its finished output is ô, its log-sum-exp log D̂.
inline void add_residual(softmax_state& state, const estimate& e, const residual_moments& moments) noexcept {
  state.raise(static_cast<float>(e.reference));
  const double w = e.weight() * std::exp(e.reference - state.max_logit());
  state.add_denominator(w * e.s.S);
  const std::span<const float> c = moments.centre(), first = moments.first();
  const std::span<float> o = state.numerator();
  for (std::size_t j = 0; j < o.size(); ++j) o[j] += static_cast<float>(w * (first[j] + e.s.S * c[j]));
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
