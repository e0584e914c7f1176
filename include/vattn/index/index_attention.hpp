// Verified attention by an index beside the cache: a scan of its codes, a Poisson sample of rows wherever they lie.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "vattn/call/looks.hpp"
#include "vattn/exact_attention.hpp"
#include "vattn/index/index_plan.hpp"
#include "vattn/index/index_thresholds.hpp"

namespace vattn::VATTN_ABI {

/// One call's work for the heads of a group, a sampling design (call/looks.hpp):
///   begin  tables -> certain rows -> pilot -> plan, or what the last step remembers
///   draw   scan -> keys -> thin -> values
/// The sample is Poisson, its probabilities a function of codes alone: each estimate is unbiased over the draw,
/// wherever the rows lie and however logits are made of products. docs/index.md has the details.
template <class Policy, kv_head Head>
class index_sampler : protected index_thresholds<Policy, Head> {
  using base = index_thresholds<Policy, Head>;

 public:
  /// `remembered`: of the KV head's last step, or null.
  index_sampler(head_group<Head>& group, const config& settings, const cell_codes& codes, const float* value_centre,
                const index_costs& costs, index_memory* remembered, const index_scratch& memory) noexcept
      : base(group, settings, codes, value_centre, costs, memory), remembered_(remembered) {
    times_own_.fill(1);
  }

  /// Attends every head: verified, or exactly where that costs less or does not come to an end.
  void run() noexcept {
    look_until_verified(*this, group_, settings_.max_rounds);
    if (reader_) {
      for (index_t g = 0; g < heads_; ++g) group_[g].ok = group_[g].ok && (reader_->odd() >> g & 1) == 0;
      remember(all_done());
    }
    rest_exactly();
  }

  [[nodiscard]] bool begin() noexcept {
    if (resting() || !this->may_pay() || !this->find_cells() || !this->open()) return false;
    if (resume()) return true;
    this->guess_thresholds();
    if (!this->scan()) return false;
    enter(stage::pilot);
    if (!pilot()) return false;
    enter(stage::plan);
    return make_plan();
  }

  [[nodiscard]] draw_outcome draw() noexcept {
    wanted_.away = std::max(wanted_.away, this->away_wanted_);
    if (!this->scan_for_wanted()) return draw_outcome::too_much;
    enter(stage::picks);
    const bool enough = weigh_enough();
    if (this->certain_ + reader_->picks() > most_rows()) return draw_outcome::too_much;
    if (!enough) return reader_->odd() == 0 ? draw_outcome::nothing : draw_outcome::too_much;  // more than the scan has
    reader_->read_values(reader_->picks() > few_picks ? &goals_ : nullptr);
    enter(stage::judge);
    return estimate_all(now_) ? draw_outcome::sample : draw_outcome::too_much;
  }

  [[nodiscard]] soundness evidence(index_t g, stats::evidence& e) noexcept {
    group_[g].c.breaches = reader_->breaches(g);
    if (group_[g].c.breaches > stats::breaches_of_errors(reader_->keys_read())) return soundness::no_head;
    e = estimate_[at(g)] = now_[at(g)];
    return soundness::sound;
  }
  [[nodiscard]] stats::verdict judge(index_t, const stats::evidence& e) const noexcept {
    return stats::judge<B>(e, this->promise_);
  }
  [[nodiscard]] bool suffices(index_t g, const stats::evidence& e, const stats::verdict& v) const noexcept {
    return v.met && this->covers(g, e).enough;
  }
  [[nodiscard]] bool next(index_t g, const stats::evidence& e, const stats::verdict& v) noexcept {
    this->ask_for_more(g, this->covers(g, e), v);
    return true;
  }

  void record(index_t g, const stats::evidence& e, const stats::verdict& v) noexcept {
    head_task<Head>& task = group_[g];
    stats::certify(task.c, e, v,
                   {.rows_exact = this->certain_of(g),
                    .rows_sampled = reader_->picks(),
                    .budget = reader_->picks(),
                    .kind = B::kind,
                    .bound = B::name,
                    .assumptions = assumptions});
    record_rows(task);
    put_estimate(task, reader_->reference(g), e.denominator, s_.output.data() + g * head_.dv(), this->unit());
  }

 protected:  // for dist/, where a shard's sample is judged together with those of others
  using B = typename Policy::bound;
  using reader = index_reader<Head>;
  using base::at, base::binding, base::cells_, base::centre_, base::codes_, base::covered_by_scan,
      base::floor_threshold, base::goal2, base::scan, base::enter, base::group_, base::guessed_, base::head_,
      base::heads_, base::log_sum_, base::reader_, base::s_, base::scanned_, base::score_mean_, base::score_variance_,
      base::settings_, base::shape, base::share_, base::squeeze_, base::tables_, base::wanted_;
  using typename base::stage;
  static constexpr const char* assumptions =
      "asymptotic, as stated by the bound; and the codes' stated errors are true";

  [[nodiscard]] index_t most_rows() const noexcept {
    return static_cast<index_t>(settings_.max_density * static_cast<double>(this->n_visible_));
  }

  // Where sampling came to nothing it is left for a while: twice as long each time.
  [[nodiscard]] bool resting() noexcept {
    if (!remembered_ || remembered_->rest <= 0) return false;
    remembered_->rest = std::min<std::int32_t>(remembered_->rest, longest_rest) - 1;
    return true;
  }
  [[nodiscard]] bool all_done() const noexcept {
    bool all = true;
    for (index_t g = 0; g < heads_; ++g) all = all && group_[g].done;
    return all;
  }
  // `sampled`: every head's output rests on a sample.
  void remember(bool sampled) noexcept {
    if (!remembered_) return;
    index_memory& m = *remembered_;
    if (!sampled) {
      m.heads = 0;
      m.failures = std::clamp<std::int32_t>(m.failures, 0, 5) + 1;
      m.rest = std::min<std::int32_t>(longest_rest, 1 << m.failures);
      return;
    }
    m = {heads_, wanted_, estimate_, log_sum_, this->unit()};
    // What was read for nothing, or would not quite have been enough.
    for (index_t h = 0; h < heads_; ++h)
      m.thresholds.plain[at(h)] += std::clamp(-std::log(std::max(need_[at(h)], 1e-3)), -0.3, 0.3);
  }

  // Begins where the last step ended: with its thresholds where scores are as they were then, else with a plan for
  // outputs of the lengths that they had. False: with nothing at hand, or nothing that fits.
  [[nodiscard]] bool resume() noexcept {
    if (!remembered_ || !remembered_->usable(heads_) || remembered_->value_unit != this->unit()) return false;
    const index_memory& m = *remembered_;
    wanted_ = m.thresholds;
    estimate_ = m.estimates;
    wanted_.z = shape.z;
    wanted_.base = std::clamp(wanted_.base, shape.pilot_base / static_cast<double>(cells_), 1.0);
    wanted_.away = std::max(wanted_.away, 0.5);
    bool same = true;
    for (index_t h = 0; h < heads_; ++h) {
      const double shift = log_sum_[at(h)] - m.log_sum[at(h)];
      if (!(std::abs(shift) < 30)) return false;
      same = same && std::abs(shift) < 0.3;
      wanted_.plain[at(h)] += shift, wanted_.floor[at(h)] += shift;
    }
    scanned_ = wanted_;
    const double reserve = same ? 0.3 : 0.7;
    for (index_t h = 0; h < heads_; ++h) scanned_.plain[at(h)] -= reserve, scanned_.floor[at(h)] -= reserve;
    scanned_.away *= 1.2;
    guessed_ = true;
    if (!scan() || 8 * reader_->candidates().size > 3 * cells_) return false;
    guessed_ = false;
    if (same) return true;
    enter(stage::plan);
    take_plan_sample();
    for (index_t h = 0; h < heads_; ++h) {
      const double log_sum = plan_.log_sum(h, score_mean_[at(h)], score_variance_[at(h)], tables_);
      sampled_x_[at(h)] = std::exp(std::min(
          80.0, log_sum + static_cast<double>(tables_.offset[at(h)]) - static_cast<double>(reader_->reference(h))));
      estimate_[at(h)].denominator = whole(h, sampled_x_[at(h)] + reader_->certain().of(h).x);
      if (!estimate_[at(h)].finite()) return false;
    }
    return make_plan();
  }
  void take_plan_sample() noexcept {
    plan_ = plan_sample(kernel::active_isa(), s_.plan, heads_);
    const auto most = static_cast<index_t>(this->token_part_ * double{plan_sample::capacity});
    plan_.take(tables_, reader_->candidates(), reader_->levels(), 1, std::max<index_t>(256, most));
  }

  [[nodiscard]] stats::evidence estimate(index_t g) noexcept {
    const float sink = group_[g].row.sink_logit;
    const double extra = std::isfinite(sink) ? std::exp(static_cast<double>(sink - reader_->reference(g))) : 0;
    const auto dv = at(head_.dv());
    return estimate_strata(reader_->sampled(), reader_->certain(), g, this->certain_, this->certain_, extra,
                           {centre_, dv}, s_.output.subspan(at(g) * dv, dv), s_.vectors.data());
  }

  // Estimates of all heads from the values that were read last; false where one is not finite.
  [[nodiscard]] bool estimate_all(std::array<stats::evidence, max_group>& to) noexcept {
    const index_t dv = head_.dv();
    std::array<double, max_group> away2{};
    for (index_t g = 0; g < heads_; ++g) {
      to[at(g)] = estimate(g);
      if (!to[at(g)].finite()) return false;
      away2[at(g)] = to[at(g)].away2;
      kernel::float_map(s_.away.data() + g * dv, dv) =
          (kernel::const_float_map(s_.output.data() + g * dv, dv) - kernel::const_float_map(centre_, dv)) *
          this->unit();
    }
    std::array<typename reader::spread, max_group> found;
    reader_->measure_spread(s_.output, s_.away, away2, found);
    for (index_t g = 0; g < heads_; ++g) {
      stats::evidence& e = to[at(g)];
      const double d2 = e.denominator * e.denominator;
      e.variance = found[at(g)].variance / d2;
      e.skew = found[at(g)].variance > 0 ? found[at(g)].third / (found[at(g)].variance * e.denominator) : 0;
      e.rows = this->certain_of(g) + reader_->values_read(), e.certain = this->certain_of(g);
      e.dof = found[at(g)].fourth > 0 ? 2 * found[at(g)].variance * found[at(g)].variance / found[at(g)].fourth
                                      : std::numeric_limits<double>::infinity();
    }
    return true;
  }

  // A first look: the candidates of thresholds so much higher that a few rows for each head are left.
  [[nodiscard]] bool pilot() noexcept {
    const auto rows = static_cast<index_t>(shape.pilot * (1 + static_cast<double>(heads_)));
    take_plan_sample();
    const double nats = reader_->excess_for(rows) * static_cast<double>(tables_.step);
    wanted_ = scanned_;
    wanted_.base = scanned_.base * std::exp(-nats);
    for (index_t h = 0; h < heads_; ++h) wanted_.plain[at(h)] += nats, wanted_.floor[at(h)] += nats;
    tables_.set(wanted_);
    if (!reader_->pick(1)) return false;
    reader_->read_values();
    if (!estimate_all(estimate_)) return false;
    for (index_t h = 0; h < heads_; ++h) sampled_x_[at(h)] = reader_->sampled().of(h).x;
    return true;
  }

  [[nodiscard]] bool make_plan() noexcept {
    const auto unit = static_cast<double>(this->reach_unit());
    wanted_.away = 0.5;
    for (index_t g = 0; g < heads_; ++g)
      wanted_.away = std::max(wanted_.away, 1.1 * std::sqrt(estimate_[at(g)].away2) / unit);
    for (index_t g = 0; g < heads_; ++g) {
      const stats::evidence& e = estimate_[at(g)];
      const double margin = plan_margin / stats::planned_radius2<B>(e.dimension, settings_.delta);
      plan_.set_goal(g,
                     {.goal = margin * goal2(g, e) * e.denominator * e.denominator,
                      .denominator = sampled_x_[at(g)],
                      .away2 = e.away2,
                      .mean = score_mean_[at(g)],
                      .variance = score_variance_[at(g)],
                      .floor = floor_threshold(g, e) - 0.1},
                     tables_, unit, wanted_);
    }
    const double rows = plan_.choose(wanted_, static_cast<double>(cells_));
    guessed_ = false;
    return this->costs_.key * rows + this->costs_.once < static_cast<double>(this->n_visible_);
  }

  // Reads the keys that the wanted thresholds take, and of lower ones as long as they show that this is not enough.
  // False: a number was not finite, or the scan's thresholds are too high.
  [[nodiscard]] bool weigh_enough() noexcept {
    std::array<double, max_group> away2{};
    for (index_t g = 0; g < heads_; ++g) away2[at(g)] = estimate_[at(g)].away2;
    for (int attempt = 0;; ++attempt) {
      tables_.set(wanted_);
      if (!reader_->pick(1)) return false;
      std::array<typename reader::weighed, max_group> found;
      reader_->look_at_picks(away2, found);
      bool again = false;
      goals_.fill(std::numeric_limits<double>::infinity());
      for (index_t g = 0; g < heads_; ++g) {
        if (group_[g].done) continue;
        const stats::evidence& e = estimate_[at(g)];
        const double d = whole(g, reader_->certain().of(g).x + found[at(g)].x);
        const double goal = squeeze_[at(g)] * thin_margin / stats::planned_radius2<B>(e.dimension, settings_.delta) *
                            goal2(g, e) * d * d;
        goals_[at(g)] = goal;
        // With the quantile's part for few effective terms.
        const double need = found[at(g)].variance * (1 + 4 * found[at(g)].concentration) / goal;
        need_[at(g)] = need;
        if (need > worth_thinning && attempt < 4) {
          wanted_.plain[at(g)] = binding(g) - std::max(0.1, std::log(need / worth_thinning));
          again = true;
        }
      }
      if (!again) return true;
      if (!covered_by_scan()) return false;
    }
  }

  // D, of which this sample has `own`. Where others have the rest (dist/): what they have read, relative to the
  // reference that they knew; before that, by what they had of the last one.
  [[nodiscard]] double whole(index_t g, double own) const noexcept {
    const double read = elsewhere_[at(g)];
    return times_own_[at(g)] * own +
           (read > 0 ? read * std::exp(elsewhere_reference_[at(g)] - double{reader_->reference(g)}) : 0);
  }

  // The rows behind an output with their weights, where the call asks for them.
  void record_rows(const head_task<Head>& task) noexcept {
    const chosen_rows& to = task.s.chosen;
    if (!to) return;
    to.clear();
    for (const ordinal o : this->certain_cells()) {
      const index_t cell = index_t{o};
      if (this->seen_by().sees(task.query - group_[0].query, cell)) to.add(cell, 1);
    }
    for (index_t i = 0; i < reader_->picks(); ++i) {
      if (reader_->weight(i) > 0) to.add(reader_->cell(i), static_cast<double>(reader_->weight(i)));
    }
  }

  // All rows, for the heads that are not done.
  void rest_exactly(bool with_power = false) noexcept {
    enter(stage::exact);
    attend_group_exactly(group_, s_.exact, with_power);
  }

  // Of the variance that verifies: what the keys are planned for, and what is kept of them.
  static constexpr double plan_margin = 1.0, thin_margin = 0.92;
  // Of the picks' goal: more variance than this with all of them, and it is worth reading more keys.
  static constexpr double worth_thinning = 1.0;
  static constexpr index_t few_picks = 256;  // that are not worth thinning
  static constexpr std::int32_t longest_rest = 64;

  index_memory* remembered_;
  plan_sample plan_;
  std::array<double, max_group> need_{}, sampled_x_{}, times_own_{}, elsewhere_{}, elsewhere_reference_{};
  std::array<double, kernel::scan_heads> goals_{};
  std::array<stats::evidence, max_group> estimate_{}, now_{};  // the last that was judged; of the sample at hand
};

/// Every head of the group by its index.
template <class Policy, kv_head Head, class Indices>
void attend_by_index(head_group<Head>& group, const config& settings, const Indices& indices) noexcept {
  arena a(group.memory);
  const query_row<Head>& row = group[0].row;
  const index_t kv_heads = indices.sequences[0].shape().n_kv_heads;
  const kv_index& index = indices.sequences[static_cast<std::size_t>(row.kv_head / kv_heads)];
  const auto scratch = index_scratch::take(a, row.head.size(), group.size(), row.head.dk(), row.head.dv(),
                                           settings.sinks + settings.window);
  index_memory* const remembered =
      indices.memory.empty() ? nullptr : &indices.memory[static_cast<std::size_t>(row.kv_head)];
  const index_t kv = row.kv_head % kv_heads;
  attend_by_views(group, indices.costs, scratch.views, [&](head_group<Head>& heads, const cells_of_queries& seen_by) {
    index_scratch own = scratch;
    own.reader.seen_by = seen_by;
    index_sampler<Policy, Head>(heads, settings, index.codes(kv), index.value_centre(kv), indices.costs, remembered,
                                own)
        .run();
  });
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
