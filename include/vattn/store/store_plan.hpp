// How many rows to pick by their codes and how many to take as they lie: what a pilot predicts to be the fastest.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/kernel/block.hpp"
#include "vattn/kernel/row.hpp"
#include "vattn/kernel/row_sums.hpp"
#include "vattn/kernel/scan.hpp"
#include "vattn/sample/plan_search.hpp"

namespace vattn::VATTN_ABI {

/// How a token that its score hides is kept from hurting: with b the share of ε·T that it may move the output if its
/// score is z errors too low, π >= b/κ. One token alone may be very far off (`sure`), and then is read for certain if
/// it could cost more than κ; many that are off at once are off by less (`z`).
struct floor_sampling {
  double z = 1.0, sure = 2.75, kappa = 0.6;
};

/// Thresholds and sizes of a sample.
struct store_choice {
  std::array<double, kernel::scan_heads> plain{}, floor{};  ///< A and F: log π = s + log r − min(A, F − zσ)
  index_t slice = 0;                                        ///< m, rows read as they lie
  double share = 0;                                         ///< m/N: tokens of less probability are left to the slice
  double cost = 0;                                          ///< predicted, ns
};

/// Costs on one core, D = 128, bfloat16, with K, V and codes in memory rather than in a cache, all that is done to
/// verify included (docs/performance.md): nanoseconds with AVX-512 and BF16. What counts are their ratios. At other
/// levels the unit is 1/25 of a dense row of four heads there, and the scan alone costs another number of them: so a
/// sample's sizes do not depend on the level.
class read_costs {
 public:
  read_costs(kernel::isa how, index_t heads) noexcept : heads_(static_cast<double>(heads)), scan_(scan_costs(how)) {}
  [[nodiscard]] double dense(index_t n) const noexcept { return 25.0 * static_cast<double>(n); }
  [[nodiscard]] double scan(index_t n) const noexcept {
    return (scan_.key + scan_.head * heads_) * static_cast<double>(n);
  }
  [[nodiscard]] double pick() const noexcept { return 150 + 25 * heads_; }
  [[nodiscard]] double slice() const noexcept { return 40 + 15 * heads_; }
  [[nodiscard]] double once() const noexcept { return 50000; }  ///< tables, plan, judgement
  /// Whether sampling n rows may cost less than reading `all`. A scan, the pilot's and now and then one again cost what
  /// they cost; the rest is for the smallest sample, and must leave room.
  [[nodiscard]] bool may_pay(index_t n, index_t all) const noexcept {
    return 1.3 * scan(n) + 2.9 * (512 * slice() + 48 * heads_ * pick() + once()) <= dense(all);
  }

 private:
  struct scan_cost {
    double key, head;  // and a head
  };
  [[nodiscard]] static scan_cost scan_costs(kernel::isa how) noexcept {
    switch (how) {
      case kernel::isa::avx512_bf16:
        return {0.5, 0.25};
      case kernel::isa::avx512:
        return {0.7, 0.7};
      case kernel::isa::avx2:
      case kernel::isa::neon:  // not measured
        return {0.4, 0.4};
      case kernel::isa::portable:
        break;
    }
    return {2.3, 1.5};
  }

  double heads_;
  scan_cost scan_;
};

/// The pilot's rows, for the heads of a group; a structure of arrays over the caller's memory.
class plan_rows {
 public:
  static constexpr index_t capacity = 768;
  /// A row's numbers: 1/probability with which the pilot has it; r² and log(max(r, K)/unit); ρ.
  enum column : index_t { weight, reach2, log_reach, radius, logit };  // then [heads] logits, [heads] scores of k − μ

  [[nodiscard]] static constexpr std::size_t storage_size(index_t heads) noexcept {
    return static_cast<std::size_t>((4 + 2 * heads) * capacity);
  }
  plan_rows() = default;
  plan_rows(std::span<float> storage, index_t heads) noexcept : storage_(storage), heads_(heads) {}

  [[nodiscard]] index_t size() const noexcept { return size_; }
  [[nodiscard]] bool full() const noexcept { return size_ == capacity; }
  void clear() noexcept { size_ = 0; }
  void push(float inverse_probability, float r2, float log_r, float rho) noexcept {
    ++size_;
    last(weight) = inverse_probability, last(reach2) = r2, last(log_reach) = log_r, last(radius) = rho;
  }
  [[nodiscard]] float& last(index_t which) noexcept {
    return storage_[static_cast<std::size_t>(which * capacity + size_ - 1)];
  }
  [[nodiscard]] kernel::const_float_map operator[](index_t which) const noexcept {
    return {storage_.data() + which * capacity, static_cast<Eigen::Index>(size_)};
  }
  [[nodiscard]] index_t logits_of(index_t h) const noexcept { return logit + h; }
  [[nodiscard]] index_t scores_of(index_t h) const noexcept { return logit + heads_ + h; }

 private:
  std::span<float> storage_;
  index_t heads_ = 0, size_ = 0;
};

/// Chooses by the pilot's rows. With q_i the expected x_i²R_i²/π_i the variance for new probabilities π' = max(e^{s +
/// log r − A}, floor) is Σ q·(1/max(π', N/m) − 1): each token with the design that gives it the larger probability.
class store_planner {
 public:
  struct goal_of_head {
    double goal = 0;                ///< variance that verifies, relative to the reference
    float reference = 0;            ///< logit
    double away2 = 0;               ///< ‖ô − c‖²
    double mean = 0, variance = 0;  ///< of all scores of k − μ
    double floor = 0;               ///< F
    double error = 0;               ///< ‖q‖/sqrt(P): σ a unit of ρ
    double z = 0, sure = 0;         ///< of floor_sampling
  };

  [[nodiscard]] static constexpr std::size_t storage_size(index_t heads) noexcept {
    return static_cast<std::size_t>((5 * heads + 2) * plan_rows::capacity);
  }

  /// `terms` [storage_size(heads)].
  store_planner(kernel::isa how, const plan_rows& rows, std::span<float> terms, index_t heads, index_t n) noexcept
      : how_(how), rows_(rows), terms_(terms), heads_(heads), n_(n) {}

  /// Takes the goal of a head; all heads before `choose`.
  void head(index_t h, const goal_of_head& goal) noexcept {
    goals_[at(h)] = goal;
    prepare(h);
  }

  [[nodiscard]] store_choice choose(const read_costs& costs, index_t fixed) const noexcept {
    // The cost has more than one valley: a long slice by itself, or picks and a shorter one.
    std::array<double, kernel::scan_heads> high{};
    high.fill(14);  // log a, where nearly everything is certain
    const double alone = slice_alone();
    store_choice best = option(std::min(alone, static_cast<double>(n_)), costs, fixed, high), next;
    high.fill(14);
    double m = 128;
    for (; m < alone && costs.slice() * m < best.cost; m *= 2) {  // a falls as the slice grows
      next = option(m, costs, fixed, high);
      if (next.cost < best.cost) best = next;
    }
    for (const double factor : {0.70711, 1.41421}) {
      if (static_cast<double>(best.slice) >= 0.9 * alone) break;
      high.fill(14);
      next = option(factor * static_cast<double>(best.slice), costs, fixed, high);
      if (next.cost < best.cost) best = next;
    }
    return best;
  }

 private:
  using map = Eigen::Map<Eigen::ArrayXf>;
  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] index_t padded() const noexcept { return (rows_.size() + 15) / 16 * 16; }
  [[nodiscard]] float* term(index_t h, index_t which) const noexcept {
    return terms_.data() + (5 * h + which) * plan_rows::capacity;
  }
  [[nodiscard]] float* group_term(index_t which) const noexcept { return term(heads_, which); }
  [[nodiscard]] map column(index_t h, index_t which) const noexcept {
    return {term(h, which), static_cast<Eigen::Index>(rows_.size())};
  }

  // With a slice of about m rows, at least 128. `high` is an upper bound of each log a, and becomes it.
  [[nodiscard]] store_choice option(double m, const read_costs& costs, index_t fixed,
                                    std::array<double, kernel::scan_heads>& high) const noexcept {
    store_choice o;
    const auto blocks = static_cast<index_t>(std::max(2.0, std::ceil(m / kernel::scan_keys)));
    o.slice = std::min(blocks * kernel::scan_keys, n_);
    o.share = static_cast<double>(o.slice) / static_cast<double>(n_);
    std::array<double, kernel::scan_heads> a{};
    for (index_t h = 0; h < heads_; ++h) a[at(h)] = threshold(h, o.share, high[at(h)]);
    const double shift = share_picks(a, o.share);
    for (index_t h = 0; h < heads_; ++h) {
      o.plain[at(h)] =
          a[at(h)] > 0 ? scale_[at(h)] - std::log(a[at(h)]) + shift : std::numeric_limits<double>::infinity();
      o.floor[at(h)] = goals_[at(h)].floor;
    }
    const double picks = static_cast<double>(sums(0, true, std::exp(-shift), o.share, true).picks);
    o.cost = costs.scan(n_ + n_ / 8) + costs.slice() * static_cast<double>(o.slice + fixed) + costs.pick() * picks +
             costs.once();
    return o;
  }

  // Every head reads the others' picks too: how far all thresholds may rise, nats, with each head's goal still met.
  // Leaves the group's inverse probabilities in the terms that `sums` takes for all heads.
  [[nodiscard]] double share_picks(const std::array<double, kernel::scan_heads>& a, double share) const noexcept {
    Eigen::Map<Eigen::ArrayXf> g(group_term(0), padded()), f(group_term(1), padded());
    g.setConstant(std::numeric_limits<float>::max());
    f.setConstant(std::numeric_limits<float>::max());
    for (index_t h = 0; h < heads_; ++h) {
      if (a[at(h)] > 0) g = g.min(map(term(h, 2), padded()) * static_cast<float>(1 / a[at(h)]));
      f = f.min(map(term(h, 3), padded()));
    }
    return common_rise(heads_, 3, [&](index_t h, double factor) { return enough(h, true, factor, share); });
  }

  // q_i; e^{scale − s − log r}, so that 1/π = that over a; and 1/floor.
  void prepare(index_t h) noexcept {
    const goal_of_head& goal = goals_[at(h)];
    const auto score = rows_[rows_.scores_of(h)].array();
    const auto reach = rows_[plan_rows::log_reach].array();
    const auto real = [](double x) { return static_cast<float>(x); };
    const float scale = (score + reach).maxCoeff();
    scale_[at(h)] = static_cast<double>(scale);
    map q = column(h, 0), r = column(h, 1), g = column(h, 2), f = column(h, 3), weight = column(h, 4);
    g = (scale - score - reach).min(80.0f);
    exponentials(g);
    const auto sigma = real(goal.error) * rows_[plan_rows::radius].array();
    f = (real(goal.floor) - score - reach - real(goal.z) * sigma).min(80.0f).max(0.0f);
    exponentials(f);
    // What its score may hide for certain is read for certain.
    f = ((score + reach + real(goal.sure) * sigma) >= real(goal.floor)).select(map::Ones(f.size()), f);
    // x² by what the score says of it, l | s ~ N(mean + β(s − mean), βσ²), β = 1 − σ²/var(s): one row of the pilot that
    // is far from its score, and stands for hundreds, would sway the sum. The sum of x itself is the pilot's.
    const auto w = rows_[plan_rows::weight].array();
    const double typical = goal.error * goal.error * rows_[plan_rows::radius].cast<double>().squaredNorm() /
                           static_cast<double>(rows_.size());
    const double beta = goal.variance > 0 ? std::clamp(1 - typical / goal.variance, 0.2, 1.0) : 1.0;
    q = real(goal.mean) + real(beta) * (score - real(goal.mean)) + real(beta / 2) * sigma.square();
    const float top = q.maxCoeff();
    const auto sum_of_exponentials = [&] {  // of r, weighted
      exponentials(r);
      return (w * r).sum();
    };
    r = q - top;
    const float modelled = sum_of_exponentials();
    r = (rows_[rows_.logits_of(h)].array() - goal.reference).max(-80.0f);
    const float seen = sum_of_exponentials();
    const float scale_x = modelled > 0 ? seen / modelled : 0.0f;
    q = (2 * (q - top).max(-40.0f) + real(beta) * sigma.square()).min(80.0f);
    exponentials(q);
    q *= (scale_x * scale_x) * (rows_[plan_rows::reach2].array() + real(goal.away2)) * w;
    r = q.square() / w;
    weight = w;
    total_[at(h)] = static_cast<double>(q.sum());
    for (index_t which = 0; which < 5; ++which)
      std::fill(term(h, which) + rows_.size(), term(h, which) + padded(), 0.0f);
  }

  // Of a column, whose padding is overwritten.
  void exponentials(map& x) const noexcept { kernel::exponentials(how_, x.data(), rows_.size(), 0); }

  [[nodiscard]] kernel::plan_totals sums(index_t h, bool group, double a, double share, bool picks) const noexcept {
    const kernel::plan_terms t{
        term(h, 0), term(h, 1), group ? group_term(0) : term(h, 2), group ? group_term(1) : term(h, 3),
        term(h, 4), padded()};
    return kernel::plan_sums(how_, t, static_cast<float>(1 / std::max(a, 1e-30)), static_cast<float>(1 / share), picks);
  }

  [[nodiscard]] bool enough(index_t h, bool group, double a, double share) const noexcept {
    return within_goal(sums(h, group, a, share, false), total_[at(h)], goals_[at(h)].goal);
  }

  // The slice that is enough for all heads by itself.
  [[nodiscard]] double slice_alone() const noexcept {
    double low = 6, high = std::log2(static_cast<double>(n_));  // log₂ of rows
    for (int i = 0; i < 8; ++i) {
      const double middle = (low + high) / 2, share = std::exp2(middle) / static_cast<double>(n_);
      bool all = true;
      for (index_t h = 0; h < heads_ && all; ++h) all = enough(h, false, 0, share);
      (all ? high : low) = middle;
    }
    return std::exp2(high);
  }

  // The least a that is enough: 0 where the slice is by itself.
  [[nodiscard]] double threshold(index_t h, double share, double& high) const noexcept {
    return least_enough(high, 4, [&](double a) { return enough(h, false, a, share); });
  }

  kernel::isa how_;
  const plan_rows& rows_;
  std::span<float> terms_;
  index_t heads_, n_;
  std::array<double, kernel::scan_heads> scale_{}, total_{};
  std::array<goal_of_head, kernel::scan_heads> goals_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
