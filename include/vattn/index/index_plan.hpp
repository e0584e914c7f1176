// Which thresholds read the fewest rows for every head's goal: what the candidates of a scan predict.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/index/cell_tables.hpp"
#include "vattn/kernel/block.hpp"
#include "vattn/kernel/row_sums.hpp"
#include "vattn/sample/plan_search.hpp"

namespace vattn::VATTN_ABI {

/// A part of a scan's candidates with their scores, a structure of arrays over the caller's memory: they stand for all
/// cells, by their known probabilities, before a row is read.
class plan_sample {
 public:
  static constexpr index_t capacity = 768;
  [[nodiscard]] static constexpr std::size_t storage_size(index_t heads) noexcept {
    return static_cast<std::size_t>((3 + heads) * capacity + (4 * heads + 3) * capacity);
  }

  plan_sample() = default;
  plan_sample(kernel::isa how, std::span<float> storage, index_t heads) noexcept
      : how_(how), storage_(storage), heads_(heads) {}

  /// Every k-th of the candidates of a scan, up to `most` of them, whose levels are `levels`; its blocks were `share`
  /// of all.
  void take(const cell_tables& tables, const kernel::cell_candidates& from, std::span<const std::int16_t> levels,
            float share, index_t most = capacity) noexcept {
    const index_t k = std::max<index_t>(1, (from.size + most - 1) / most);
    size_ = 0;
    float* w = column(weight);
    for (index_t i = 0; i < from.size && size_ < most; i += k, ++size_) {
      w[size_] = std::min(0.0f, static_cast<float>(levels[static_cast<std::size_t>(i)]) * tables.step);
      column(log_reach)[size_] = tables.log_reach(from.reach[i]);
      column(radius)[size_] = static_cast<float>(from.radius[i]);
      for (index_t h = 0; h < heads_; ++h) column(scores + h)[size_] = tables.score(from.score[h * from.capacity + i]);
    }
    kernel::exponentials(how_, w, size_, 0);
    for (index_t i = 0; i < size_; ++i) w[i] = static_cast<float>(k) / (share * w[i]);
    for (index_t c = 0; c < scores + heads_; ++c) std::fill(column(c) + size_, column(c) + padded(), 0.0f);
  }

  [[nodiscard]] index_t size() const noexcept { return size_; }

  /// log Σ e^{l − ⟨q, μ⟩} over all cells of a head, as the scores have it.
  [[nodiscard]] double log_sum(index_t h, double mean, double variance, const cell_tables& tables) noexcept {
    map r = term(h, 1);
    if (size_ == 0) return -std::numeric_limits<double>::infinity();
    expect(h, mean, variance, tables, r);
    const float top = r.head(size_).maxCoeff();
    r = (r - top).max(-80.0f);
    kernel::exponentials(how_, r.data(), padded(), 0);
    return static_cast<double>(top) + std::log(static_cast<double>((map(column(weight), padded()) * r).sum()));
  }

  struct goal_of_head {
    double goal = 0;                ///< variance that verifies, relative to the reference
    double denominator = 0;         ///< of the sampled cells, relative to the reference
    double away2 = 0;               ///< ‖ô − c‖²
    double mean = 0, variance = 0;  ///< of all scores
    double floor = 0;
  };

  /// Takes the goal of a head; all heads before `choose`. `t` has z and the least distance that counts.
  void set_goal(index_t h, const goal_of_head& goal, const cell_tables& tables, double reach_unit,
                const cell_thresholds& t) noexcept {
    const auto real = [](double x) { return static_cast<float>(x); };
    const auto i = static_cast<std::size_t>(h);
    goal_[i] = goal.goal, floor_[i] = goal.floor;
    const map s(column(scores + h), padded()), reach(column(log_reach), padded()), rho(column(radius), padded());
    const map w(column(weight), padded());
    map q = term(h, 0), r = term(h, 1), g = term(h, 2), f = term(h, 3);
    if (size_ == 0) return;
    const float least = real(std::log(std::max(t.away, 1e-30))), error = tables.error(h, 1);
    g = s + reach.max(least);
    const float scale = g.head(size_).maxCoeff();
    scale_[i] = static_cast<double>(scale);
    f = (real(goal.floor) - g - real(t.z) * error * rho).min(80.0f).max(0.0f);
    g = (scale - g).min(80.0f);
    kernel::exponentials(how_, g.data(), padded(), 0);
    kernel::exponentials(how_, f.data(), padded(), 0);
    const double beta = expect(h, goal.mean, goal.variance, tables, q);
    const float top = q.head(size_).maxCoeff();
    r = (q - top).max(-80.0f);
    kernel::exponentials(how_, r.data(), padded(), 0);
    const float modelled = (w * r).sum();
    q = (2 * (q - top).max(-40.0f) + real(beta) * (error * rho).square()).min(80.0f);
    kernel::exponentials(how_, q.data(), padded(), 0);
    const float scale_x = modelled > 0 ? real(goal.denominator) / modelled : 0.0f;
    r = 2 * (reach + real(std::log(reach_unit)));
    r = r.max(-60.0f).min(60.0f);
    kernel::exponentials(how_, r.data(), padded(), 0);
    q *= (scale_x * scale_x) * (r + real(goal.away2)) * w;
    r = q.square() / w.max(1.0f);
    for (map* m : {&q, &r, &g, &f}) m->tail(padded() - size_).setZero();
    total_[i] = static_cast<double>(q.sum());
  }

  /// Thresholds with the fewest rows that meet every head's goal, into `t`; returns their expected number. `cells`:
  /// that are sampled.
  [[nodiscard]] double choose(cell_thresholds& t, double cells) noexcept {
    double best = std::numeric_limits<double>::infinity();
    std::array<double, kernel::scan_heads> chosen{};
    double base = 0, shift = 0;
    std::array<double, kernel::scan_heads> high{};
    high.fill(14);  // log a, where nearly everything is certain
    for (double share = 64 / cells; share < 0.5; share *= 4) {
      std::array<double, kernel::scan_heads> a{};
      for (index_t h = 0; h < heads_; ++h) a[static_cast<std::size_t>(h)] = least(h, share, high);
      const double up = raise_together(a, share);
      const double rows = expected_rows(up, share, cells);
      if (rows < best) best = rows, chosen = a, base = share, shift = up;
      if (cells * share > best) break;
    }
    for (index_t h = 0; h < heads_; ++h) {
      const auto i = static_cast<std::size_t>(h);
      t.plain[i] = chosen[i] > 0 ? scale_[i] - std::log(chosen[i]) + shift : std::numeric_limits<double>::infinity();
      t.floor[i] = floor_[i];
    }
    t.base = base;
    return best;
  }

 private:
  using map = Eigen::Map<Eigen::ArrayXf>;

  // log E x by what the score says of it, l | s ~ N(mean + β(s − mean), βσ²), β = 1 − σ²/var(s), which it returns: one
  // row that is far from its score, and stands for hundreds, would sway the sum.
  double expect(index_t h, double mean, double variance, const cell_tables& tables, map& to) noexcept {
    const auto real = [](double x) { return static_cast<float>(x); };
    const map s(column(scores + h), padded()), rho(column(radius), padded()), w(column(weight), padded());
    const float error = tables.error(h, 1);
    const double typical = static_cast<double>(error * error * (rho.square() * w).sum() / w.sum());
    const double beta = variance > 0 ? std::clamp(1 - typical / variance, 0.2, 1.0) : 1.0;
    to = real(mean) + real(beta) * (s - real(mean)) + real(beta / 2) * (error * rho).square();
    return beta;
  }
  enum columns : index_t { weight, log_reach, radius, scores };

  [[nodiscard]] index_t padded() const noexcept { return (size_ + 15) / 16 * 16; }
  [[nodiscard]] float* column(index_t c) const noexcept { return storage_.data() + c * capacity; }
  [[nodiscard]] map term(index_t h, index_t which) const noexcept {
    return {column(scores + heads_ + 4 * h + which), padded()};
  }
  [[nodiscard]] map together(index_t which) const noexcept { return term(heads_, which); }

  [[nodiscard]] kernel::plan_totals sums(index_t h, bool group, double a, double share, bool picks) const noexcept {
    const kernel::plan_terms t{term(h, 0).data(),
                               term(h, 1).data(),
                               group ? together(0).data() : term(h, 2).data(),
                               group ? together(1).data() : term(h, 3).data(),
                               column(weight),
                               padded()};
    return kernel::plan_sums(how_, t, static_cast<float>(1 / std::max(a, 1e-30)), static_cast<float>(1 / share), picks);
  }

  [[nodiscard]] bool enough(index_t h, bool group, double a, double share) const noexcept {
    const auto i = static_cast<std::size_t>(h);
    return within_goal(sums(h, group, a, share, false), total_[i], goal_[i]);
  }

  // The least a that is enough: 0 where the base is by itself.
  [[nodiscard]] double least(index_t h, double share, std::array<double, kernel::scan_heads>& highs) const noexcept {
    return least_enough(highs[static_cast<std::size_t>(h)], 5, [&](double a) { return enough(h, false, a, share); });
  }

  // Every head reads the others' rows too: how far all thresholds may rise, nats, with each head's goal still met.
  [[nodiscard]] double raise_together(const std::array<double, kernel::scan_heads>& a, double share) const noexcept {
    map g = together(0), f = together(1);
    g.setConstant(std::numeric_limits<float>::max());
    f.setConstant(std::numeric_limits<float>::max());
    for (index_t h = 0; h < heads_; ++h) {
      const double own = a[static_cast<std::size_t>(h)];
      if (own > 0) g = g.min(term(h, 2) * static_cast<float>(1 / own));
      f = f.min(term(h, 3));
    }
    return common_rise(heads_, 3, [&](index_t h, double factor) { return enough(h, true, factor, share); });
  }

  [[nodiscard]] double expected_rows(double shift, double share, double cells) const noexcept {
    return static_cast<double>(sums(0, true, std::exp(-shift), share, true).picks) + share * cells;
  }

  kernel::isa how_ = kernel::isa::portable;
  std::span<float> storage_;  // columns, then terms of heads, then of the group
  index_t heads_ = 0, size_ = 0;
  std::array<double, kernel::scan_heads> scale_{}, total_{}, goal_{}, floor_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
