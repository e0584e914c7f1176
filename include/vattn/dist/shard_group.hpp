// The heads of one KV head on all ranks: what each makes of what all have sent.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <span>

#include "vattn/certify/certify.hpp"
#include "vattn/dist/shard_draws.hpp"

namespace vattn::VATTN_ABI::dist {

/// Where a group stands: the same on every rank, since each decides by the same messages alone.
enum class stage : std::uint8_t { first_look, looking, exact, done };

/// One sample of all shards, judged on every rank. Poisson samples of the shards are together one of the whole, each
/// row with its own probability: the sums of all ranks merge into one evidence (docs/mathematics.md, "Shards").
///   open -> agree -> (work -> judge_all) until done, an exchange between the two of each pair
template <class Policy, kv_head Head>
class shard_sampler : shard_draws<Policy, Head> {
  using base = shard_draws<Policy, Head>;
  using B = typename base::B;
  using base::at, base::format_, base::group_, base::head_, base::heads_, base::openings_, base::own_, base::promise_,
      base::rank_, base::settings_, base::visible_, base::wanted_, base::whole_;

 public:
  /// As `shard_draws`; `sink_logits` [heads].
  shard_sampler(head_group<Head>& group, const config& settings, const cell_codes& codes, const float* value_centre,
                index_memory* remembered, bool indexed, const index_scratch& memory, const shard_scratch& own,
                const look_format& format, const std::array<float, max_group>& sink_logits, index_t rank,
                double part) noexcept
      : base(group, settings, codes, value_centre, remembered, indexed, memory, own, format, rank, part),
        sink_logits_(sink_logits) {}

  [[nodiscard]] stage at_stage() const noexcept { return stage_; }
  using base::exact_bytes;
  /// Of the group's next message.
  [[nodiscard]] std::size_t message_bytes() const noexcept {
    return stage_ == stage::done ? 0 : stage_ == stage::exact ? exact_bytes(heads_, head_.dv()) : format_.bytes();
  }

  using base::open;
  /// `all` stays where it is for as long as the group is used.
  void agree(const messages& all) noexcept {
    const auto [samples, remembered] = this->learn(all);
    again_ = samples && remembered;
    stage_ = !samples ? stage::exact : again_ ? stage::looking : stage::first_look;
  }

  /// The rank's own work of the next message, and the message.
  void work(std::span<std::byte> to) noexcept {
    if (stage_ == stage::exact) return this->write_exact(to);
    if (!whole_ && !(stage_ == stage::first_look ? this->first_look() : this->look(again_))) whole_ = true;
    this->write_sums(to);
  }

  /// What all ranks have sent: estimates, verdicts, and what the next look is to be.
  void judge_all(const messages& all) noexcept {
    if (stage_ == stage::exact) return merge_exact(all);
    first_ = stage_ == stage::first_look;
    stage_ = stage::looking;
    round_ += first_ ? 0 : 1;
    sent_ = all, counts_ = {};
    for (index_t r = 0; r < all.ranks; ++r) {
      const look_counts c = read_counts(all.of(r));
      counts_.certain += c.certain, counts_.picks += c.picks, counts_.breaches += c.breaches;
      counts_.samples |= c.samples, counts_.unsound |= c.unsound;
      own_.efforts[at(r)] = {.samples = c.samples != 0, .cells = shard_opening::read(openings_.of(r), heads_).cells};
    }
    variances_.fill(stats::infinity);
    const bool more = judge_look(*this, group_, round_);
    if (stage_ == stage::exact) return;
    if (more && (round_ >= settings_.max_rounds ||
                 static_cast<double>(counts_.certain + counts_.picks) > settings_.max_density * visible_)) {
      stage_ = stage::exact;
      return;
    }
    if (!whole_) {
      share_variance(own_.efforts, variances_, heads_, this->costs_.scan, this->costs_.key,
                     static_cast<std::size_t>(rank_), this->share_);
      wanted_.away = std::max(wanted_.away, this->away_wanted_);
    }
    // Scores of this rank that do not know their errors choose nothing any more.
    if (!whole_ && read_counts(all.of(rank_)).unsound != 0) whole_ = true;
    if (more) return;
    stage_ = stage::done;
    this->remember_step(!whole_, part_);
  }

  // What judge_look asks of a sampling design; exchanges make its draws.
  [[nodiscard]] soundness evidence(index_t h, stats::evidence& e) noexcept {
    e = merge(h);
    if (!e.finite()) {
      stage_ = stage::exact;
      return soundness::no_head;
    }
    part_[at(h)] = std::exp(log_part_[at(h)] - e.reference) / e.denominator;
    variances_[at(h)] = base::plan_margin / stats::planned_radius2<B>(e.dimension, settings_.delta) *
                        stats::squared_goal(e, promise_) * e.denominator * e.denominator;
    return soundness::sound;
  }
  /// A first look is for the plan, unless there is nothing to plan: nothing is to rest on it, and quantiles take time.
  [[nodiscard]] stats::verdict judge(index_t h, const stats::evidence& e) const noexcept {
    return first_ && counts_.samples != 0 ? stats::verdict{} : base::judge(h, e);
  }
  [[nodiscard]] bool suffices(index_t h, const stats::evidence& e, const stats::verdict& v) noexcept {
    return counts_.samples == 0 || (v.met && counts_.unsound == 0 && is_covered(h, e));
  }
  [[nodiscard]] bool next(index_t h, const stats::evidence& e, const stats::verdict& v) noexcept {
    if (whole_) return true;
    this->prepare(h, e, log_part_[at(h)]);
    if (!first_) this->ask_for_more(h, this->covers(h, this->estimate_[at(h)]), v);
    return true;
  }
  void record(index_t h, const stats::evidence& e, const stats::verdict& v) noexcept {
    certificate& c = group_[h].c;
    c.rounds = round_, c.breaches = counts_.breaches;
    c.n = static_cast<index_t>(visible_);
    c.log_denominator = static_cast<double>(static_cast<float>(e.reference + std::log(e.denominator)));
    this->record_chosen(h);
    if (!whole_) this->keep(h, e);
    if (counts_.samples == 0) return certify_exact(c);
    stats::certify(c, e, v,
                   {.rows_exact = counts_.certain,
                    .rows_sampled = counts_.picks,
                    .budget = counts_.picks,
                    .kind = B::kind,
                    .bound = B::name,
                    .assumptions = base::assumptions});
  }

 private:
  // The evidence of all ranks; writes the output to the head's scratch.
  [[nodiscard]] stats::evidence merge(index_t h) noexcept {
    stats::sample_sums total{{}, own_.total.data(), head_.dv(), format_.groups};
    total.clear();
    for (index_t r = 0; r < sent_.ranks; ++r) {
      const head_scalars s = add_sums(format_, sent_.of(r), h, total);
      // Relative to the greatest reference, once that is known.
      const double reach = s.more().reach;
      own_.efforts[at(r)].spread[at(h)] = reach > 0 ? std::log(reach) + s.reference() : -stats::infinity;
      if (r == rank_) log_part_[at(h)] = s.x() > 0 ? std::log(s.x()) + s.reference() : -stats::infinity;
    }
    for (shard_effort& r : own_.efforts) r.spread[at(h)] = std::exp(r.spread[at(h)] - total.s.reference);
    return estimate_merged(total, own_.centre.data(), double{sink_logits_[at(h)]}, group_[h].s.output.data(),
                           own_.offset.data());
  }

  // Whether no rank leaves a token to chance that could cost more than its share of ε: as index_sampler::suffices has
  // it, from what each rank says of itself.
  [[nodiscard]] bool is_covered(index_t h, const stats::evidence& e) const noexcept {
    const double missed = std::log(stats::missable(e, promise_)) + e.reference;
    const double top = e.reference + std::log(e.denominator);
    const auto n = static_cast<Eigen::Index>(head_.dv());
    const kernel::const_float_map o(group_[h].s.output.data(), n);
    const double bend = this->rise(h, top) - this->rise_[at(h)];  // the cap's part, the same everywhere
    bool covered = true;
    for (index_t r = 0; r < sent_.ranks; ++r) {
      const double floor = read_scalars(format_, sent_.of(r), h).more().floor;
      if (!(floor > -stats::infinity)) continue;
      const double unit = shard_opening::unit_of(openings_.of(r));
      const kernel::const_float_map centre(shard_opening::centre_of(openings_.of(r), heads_), n);
      const auto away = static_cast<double>((o - centre).norm());
      covered = covered && floor <= missed - base::log_moved(unit, away) - bend + base::floor_slack &&
                base::away_share * away <= read_counts(sent_.of(r)).away;
    }
    return covered;
  }

  void merge_exact(const messages& all) noexcept {
    const std::size_t each = exact_bytes(1, head_.dv());
    for (index_t h = 0; h < heads_; ++h) {
      if (group_[h].done) continue;
      head_task<Head>& task = group_[h];
      softmax_state total(own_.offset);
      for (index_t r = 0; r < all.ranks; ++r) {
        wire_reader in(all.of(r) + at(h) * each);
        const auto top = static_cast<float>(in.get<double>());
        const double sum = in.get<double>();
        in.get(own_.part.data(), head_.dv());
        total.merge(softmax_state(top, sum, own_.part));
      }
      add_sink(total, sink_logits_[at(h)]);
      task.c.log_denominator = double{total.finish(task.s.output)};
      task.ok = task.ok && std::isfinite(total.denominator());
      task.c.n = static_cast<index_t>(visible_), task.c.rounds = round_;
      task.s.chosen.all(task.tokens);
      certify_exact(task.c);
      task.done = true;
    }
    stage_ = stage::done;
    this->remember_step(false, part_);
  }

  std::array<float, max_group> sink_logits_;
  stage stage_ = stage::first_look;
  bool again_ = false;
  index_t round_ = 0;
  // Of the look that is judged: what all have sent, and whether it is the first; the variances that heads may have;
  // this shard's part of D, log and relative.
  messages sent_;
  look_counts counts_;
  bool first_ = false;
  std::array<double, max_group> variances_{}, log_part_{}, part_{};
};

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
