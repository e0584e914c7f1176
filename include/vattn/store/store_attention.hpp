// Verified attention from a shuffled store: heavy tokens by a scan of key codes, the rest by a contiguous slice.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "vattn/call/looks.hpp"
#include "vattn/exact_attention.hpp"
#include "vattn/store/store_pilot.hpp"

namespace vattn::VATTN_ABI {

/// One call's work for the heads of a group, a sampling design (call/looks.hpp):
///   begin  tables -> pilot -> plan
///   draw   scan -> slice -> keys -> thin -> values
/// Each token is sampled by whichever design gives it the larger probability: Poisson sampling with π from its code
/// (picked), or the slice of m of N rows (light, π < m/N). Of the picked ones the key is read, and the value if the
/// logit says that it is worth it. Both depend on the token alone, so every estimate is unbiased over the draw and the
/// store's order; docs/mathematics.md has the details.
template <class Policy, class Head>
class store_sampler : store_pilot<Policy, Head> {
  using base = store_pilot<Policy, Head>;
  using base::at, base::away_, base::blocks_, base::choice_, base::codes_, base::enter, base::estimate_,
      base::first_block_, base::group_, base::head_, base::heads_, base::plan_margin, base::promise_, base::reader_,
      base::rows_, base::s_, base::settings_, base::sure_reserve, base::tables_;
  using typename base::B, typename base::stage;
  enum class next_step : std::uint8_t { extend, scan, give_up };

 public:
  using base::base;

  /// Attends every head: verified, or exactly where that costs less or does not come to an end.
  void run() noexcept {
    look_until_verified(*this, group_, settings_.max_rounds);
    for (index_t g = 0; reader_ && g < heads_; ++g) group_[g].ok = group_[g].ok && (reader_->odd() >> g & 1) == 0;
    enter(stage::exact);
    attend_group_exactly(group_, s_.exact);
  }

  [[nodiscard]] bool begin() noexcept {
    squeeze_.fill(1);
    if (!this->open()) return false;
    enter(stage::pilot);
    if (!this->pilot()) return false;
    enter(stage::plan);
    choice_ = this->choose();
    return choice_.cost <= this->costs_.dense(head_.size());
  }

  [[nodiscard]] draw_outcome draw() noexcept {
    if (judged_) take_over();
    if (next_ == next_step::scan) {
      enter(stage::scan);
      candidates_ = this->scan(0, blocks_, reserve, s_.reader.capacity);
      if (candidates_ < 0) return draw_outcome::too_much;
      reader_->clear();
      slice_read_ = picks_ = 0;
      above_ = this->steps(held_back);
    }
    const auto most = static_cast<index_t>(settings_.max_density * static_cast<double>(head_.size()));
    if (this->fixed() + picks_ + choice_.slice > most) return draw_outcome::too_much;
    enter(stage::slice);
    reader_->clear_picked();
    if (!this->read_fixed() || !read_slice()) return draw_outcome::too_much;
    enter(stage::picks);
    next_ = weigh_enough();
    if (next_ == next_step::give_up) return draw_outcome::too_much;
    if (next_ == next_step::scan) return draw_outcome::nothing;
    reader_->read_picks(picks_ > few_picks ? &goals_ : nullptr);
    enter(stage::judge);
    judged_ = true;
    asked_ = {.lowest = above_, .floor = choice_.floor, .plain = choice_.plain, .away = away_};
    return draw_outcome::sample;
  }

  [[nodiscard]] soundness evidence(index_t g, stats::evidence& e) noexcept {
    group_[g].c.breaches = reader_->breaches(g);
    if (group_[g].c.breaches > stats::breaches_of_errors(sampled())) return soundness::not_this_head;
    e = this->estimate(g, choice_.slice);
    return e.finite() ? soundness::sound : soundness::not_this_head;
  }
  [[nodiscard]] stats::verdict judge(index_t, const stats::evidence& e) const noexcept {
    return stats::judge<B>(e, promise_);
  }
  [[nodiscard]] bool suffices(index_t g, const stats::evidence& e, const stats::verdict& v) const noexcept {
    return v.met && uncovered(g, e) <= 0;
  }

  /// More values and a longer slice where that is enough, else lower thresholds.
  [[nodiscard]] bool next(index_t g, const stats::evidence& e, const stats::verdict& v) noexcept {
    const double missing = uncovered(g, e);
    if (!(missing <= 0)) {  // by candidates that are at hand, or by another scan
      const index_t lower = this->steps(missing + 0.15);
      if (lower > above_) asked_.next = next_step::scan;
      asked_.lowest = std::min(asked_.lowest, above_ - lower);
    }
    // Taken over where a scan follows; a floor that was never scanned covers nothing.
    asked_.floor[at(g)] = std::min(choice_.floor[at(g)], this->floor_threshold(g, e) - 0.2);
    asked_.away[at(g)] = std::max(away_[at(g)], static_cast<float>(1.1 * std::sqrt(e.away2)));
    estimate_[at(g)] = e;
    if (v.met) return true;
    const double goal_variance = 0.92 * 0.92 * v.needed_variance;
    squeeze_[at(g)] *= 0.95 / v.ratio;
    // More values and more of the candidates help as far as picks are what is uncertain.
    if (e.light < 0.5 * e.variance && (above_ > 0 || 10 * reader_->values_read() < 9 * picks_)) return true;
    const double left = goal_variance - (e.variance - e.light);
    const double factor = left > 0 ? 1.05 * e.light / left : 1e9;
    if (factor > 4) {
      asked_.next = next_step::scan;
      asked_.plain[at(g)] = this->weighed_from(g) - std::log(e.variance / goal_variance);
      asked_.more = std::max(asked_.more, e.variance / goal_variance);
    } else {
      asked_.longer = std::max(asked_.longer, factor);
    }
    return true;
  }

  void record(index_t g, const stats::evidence& e, const stats::verdict& v) noexcept {
    head_task<Head>& task = group_[g];
    stats::certify(task.c, e, v,
                   {.rows_exact = this->fixed(),
                    .rows_sampled = sampled(),
                    .budget = sampled(),
                    .kind = B::kind,
                    .bound = B::name,
                    .assumptions = "asymptotic, as stated by the bound; the codes' stated errors are true; draws are "
                                   "over the store's order"});
    record_rows(task);
    put_estimate(task, reader_->reference(g), e.denominator, s_.output.data() + g * head_.dv(), this->unit());
  }

 private:
  [[nodiscard]] index_t sampled() const noexcept { return picks_ + choice_.slice; }

  // What the heads of the last look have asked for.
  void take_over() noexcept {
    judged_ = false;
    next_ = asked_.next;
    above_ = std::max<index_t>(0, asked_.lowest);
    const bool scans = next_ == next_step::scan;
    lengthen_slice(std::max(asked_.longer, scans ? std::min(asked_.more, 2.0) : 1.0));
    if (!scans) return;
    choice_.share = static_cast<double>(choice_.slice) / static_cast<double>(rows_);
    choice_.floor = asked_.floor, choice_.plain = asked_.plain, away_ = asked_.away;
  }

  // What the sums lack of the slice.
  [[nodiscard]] bool read_slice() noexcept {
    const index_t from = std::exchange(slice_read_, choice_.slice / kernel::scan_keys);
    return reader_->read_slice(first_block_, from, slice_read_);
  }
  void lengthen_slice(double factor) noexcept {
    const auto wanted = static_cast<index_t>(factor * static_cast<double>(choice_.slice));
    choice_.slice = std::min(rows_, (wanted + kernel::scan_keys - 1) / kernel::scan_keys * kernel::scan_keys);
  }

  // Weighs the picks of the chosen thresholds, and of lower ones as long as their keys show that this is not enough. A
  // slice that leaves the picks so little that all their values would be read is made longer, where that is cheaper.
  [[nodiscard]] next_step weigh_enough() noexcept {
    std::array<double, max_group> away2{};
    for (index_t g = 0; g < heads_; ++g) away2[at(g)] = estimate_[at(g)].away2;
    const index_t spare = this->steps(for_floors);
    for (bool lengthened = false;;) {
      const double weight = static_cast<double>(rows_) / static_cast<double>(choice_.slice);
      kernel::scan_pick* const all = s_.reader.picks.data();
      const index_t before = picks_;
      picks_ = std::partition(all + before, all + candidates_,
                              [&](const kernel::scan_pick& p) { return p.margin >= above_; }) -
               all;
      if (!reader_->weigh_picks(before, picks_)) return next_step::give_up;
      reader_->set_probabilities(picks_, above_, 1.0f);
      std::array<typename store_reader<Head>::weighed, max_group> found;
      reader_->look_at_picks(picks_, away2, found);
      double worst = 0, longer = 1;
      bool again = false;
      goals_.fill(std::numeric_limits<double>::infinity());
      for (index_t g = 0; g < heads_; ++g) {
        if (group_[g].done) continue;
        const stats::evidence& e = estimate_[at(g)];
        const stratum_scalars& light = reader_->light().of(g);
        const double d = reader_->picked().of(g).x + found[at(g)].x + weight * light.x;
        const double slice = weight * (weight - 1) * (light.spread + light.square * e.away2);
        const double goal = squeeze_[at(g)] * thin_margin / stats::planned_radius2<B>(e.dimension, settings_.delta) *
                            stats::squared_goal(e, promise_) * d * d;
        goals_[at(g)] = std::max(goal - slice, 0.2 * goal);  // `next` lengthens a slice that is too short
        // With the quantile's part for few effective terms, as store_planner has it.
        const double sure = found[at(g)].variance * (1 + 4 * found[at(g)].concentration);
        const double need = sure / goals_[at(g)];
        if (need > 0.75) longer = std::max(longer, slice / (0.4 * goal));
        worst = std::max(worst, need);
        if (need > 1.1 && sure > 0.5 * goal) {  // else a longer slice is cheaper
          again = true;
          if (above_ == 0) choice_.plain[at(g)] = this->weighed_from(g) - std::log(need / worth_thinning);
        }
      }
      if (longer > 1 && !lengthened &&
          (longer - 1) * static_cast<double>(choice_.slice) < static_cast<double>(picks_) / 2) {
        lengthened = true;
        lengthen_slice(longer);
        if (!read_slice()) return next_step::give_up;
        continue;
      }
      if (worst <= worth_thinning || picks_ <= few_picks || (above_ <= spare && !again)) return next_step::extend;
      if (above_ == 0) return next_step::scan;
      const index_t lower = std::max<index_t>(1, this->steps(std::max(0.05, std::log(worst / worth_thinning))));
      above_ = std::max<index_t>(above_ > spare ? spare : 0, above_ - lower);
    }
  }

  // How much lower the thresholds of what was weighed ought to be for the floors, nats: 0 or less where they hold, and
  // infinity where keys are missing that were to be certain.
  [[nodiscard]] double uncovered(index_t g, const stats::evidence& e) const noexcept {
    const double floor = this->floor_threshold(g, e), away = std::sqrt(e.away2);
    const double weighed =
        choice_.floor[at(g)] - reserve + static_cast<double>(above_) * static_cast<double>(tables_.step);
    // Levels have max(r, away_): keys whose r is less are too low by as much as away_ is.
    const double want = floor + 0.35 - std::max(0.0, std::log(0.8 * away / static_cast<double>(away_[at(g)])));
    if (choice_.floor[at(g)] - sure_reserve > want) return std::numeric_limits<double>::infinity();
    return weighed - want;
  }

  // The rows behind an output with their weights, where the call asks for them.
  void record_rows(const head_task<Head>& task) noexcept {
    const chosen_rows& to = task.s.chosen;
    if (!to) return;
    to.clear();
    const index_t sinks = head_.sinks();
    to.add_ends(task.tokens, sinks, this->fixed() - sinks);
    for (index_t i = 0; i < picks_; ++i) {
      if (const float w = reader_->weights()[at(i)]; w > 0)
        to.add(sinks + static_cast<index_t>(s_.reader.picks[at(i)].row), static_cast<double>(w));
    }
    kernel::scanned_keys keys;
    for (index_t k = 0; k < choice_.slice / kernel::scan_keys; ++k) {
      const index_t block = (first_block_ + k) % blocks_;
      kernel::scan_all(kernel::active_isa(), tables_.query, codes_.view(), block, keys);
      for (index_t i = 0; i < kernel::scan_keys; ++i) {
        if (keys.level[i] < tables_.query.cut) {
          to.add(sinks + block * kernel::scan_keys + i,
                 static_cast<double>(rows_) / static_cast<double>(choice_.slice));
        }
      }
    }
  }

  // Of the variance that verifies: what is kept of the picks.
  static constexpr double thin_margin = 0.75;
  // Of the picks' goal: more variance than this with all of them, and it is worth weighing more.
  static constexpr double worth_thinning = 0.85;
  // Nats by which the scan's thresholds are lower than the plan's; those between are weighed if the rest is not enough,
  // the last of them only where otherwise another scan would follow: mostly for floors that the pilot took for higher.
  static constexpr double reserve = 0.9, held_back = 0.72, for_floors = 0.3;
  static constexpr index_t few_picks = 256;  // that are not worth thinning

  struct asked_for {
    next_step next = next_step::extend;
    double longer = 1, more = 1;  // slices, by these factors
    index_t lowest = 0;           // of `above_`
    std::array<double, kernel::scan_heads> floor{}, plain{};
    std::array<float, max_group> away{};
  };
  asked_for asked_;
  bool judged_ = false;  // since the last draw
  next_step next_ = next_step::scan;
  index_t candidates_ = 0, picks_ = 0, above_ = 0;  // weighed, by how many steps their thresholds are above the scan's
  index_t slice_read_ = 0;                          // blocks of the slice that are in the sums
  std::array<double, max_group> squeeze_{};
  std::array<double, kernel::scan_heads> goals_{};  // variances that the slice leaves to the picks
};

/// Every head of the group from its store.
template <class Policy, class Head>
void attend_from_store(head_group<Head>& group, const config& settings) noexcept {
  arena a(group.memory);
  const Head& head = group[0].row.head;
  const auto scratch = store_scratch::take(a, head.size(), group.size(), head.dk(), head.dv());
  const read_costs costs(kernel::active_isa(), group.size());
  store_sampler<Policy, Head>(group, settings, costs, scratch).run();
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
