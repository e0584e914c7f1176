// The heads of one KV head on one rank: what it does between two exchanges, and what it makes of what all ranks sent.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <span>

#include "vattn/certify/certify.hpp"
#include "vattn/dist/shard_sums.hpp"
#include "vattn/dist/shares.hpp"
#include "vattn/index/index_attention.hpp"

namespace vattn::VATTN_ABI::dist {

/// Memory of a group beyond an index's own, taken from the call's workspace.
struct shard_scratch {
  std::span<float> sums;            // shard_sums::storage_size
  std::span<float> total, part;     // sample_sums::storage
  std::span<float> centre;          // [dv], of all ranks
  std::span<float> offset;          // [dv]
  std::span<shard_effort> efforts;  // [ranks]

  [[nodiscard]] static shard_scratch take(arena& a, const look_format& f, int ranks) noexcept {
    const auto width = static_cast<std::size_t>(f.dv), each = static_cast<std::size_t>(ranks);
    const auto vectors = static_cast<std::size_t>(stats::sample_sums::storage(f.dv, f.groups));
    shard_scratch s;
    s.sums = a.take<float>(shard_sums::storage_size(f.heads, f.dv, f.groups));
    s.total = a.take<float>(vectors);
    s.part = a.take<float>(vectors);
    s.centre = a.take<float>(width);
    s.offset = a.take<float>(width);
    s.efforts = a.take<shard_effort>(each);
    return s;
  }
};

/// Where a group stands: the same on every rank, since each decides by the same messages alone.
enum class stage : std::uint8_t { first_look, looking, exact, done };

/// The messages of all ranks of one group: rank r's begins at first + r·stride.
struct messages {
  const std::byte* first = nullptr;
  std::size_t stride = 0;
  index_t ranks = 1;
  [[nodiscard]] const std::byte* of(index_t r) const noexcept { return first + static_cast<std::size_t>(r) * stride; }
};

/// A sampler of index/index_attention.hpp whose sample is one part of several. Poisson samples of the shards are
/// together one of the whole, each row with its own probability: the sums of all ranks merge into one evidence, which
/// every rank judges (docs/mathematics.md, "Shards"). A rank that cannot sample, or for which it does not pay, reads
/// all of its own rows instead: then they are certain rows, and the others go on.
template <class Policy, kv_head Head>
class shard_sampler : index_sampler<Policy, Head> {
  using base = index_sampler<Policy, Head>;
  using B = typename Policy::bound;
  using base::at, base::away_wanted_, base::costs_, base::estimate_, base::group_, base::head_, base::heads_,
      base::log_mass_, base::log_sum_, base::promise_, base::reader_, base::scanned_, base::settings_, base::shape,
      base::tables_, base::n_visible_, base::wanted_;

 public:
  /// `settings` has the shard's own numbers of sinks and window. `sink_logits` [heads].
  shard_sampler(head_group<Head>& group, const config& settings, const cell_codes& codes, const float* value_centre,
                bool indexed, const index_scratch& memory, const shard_scratch& own, const look_format& format,
                const std::array<float, max_group>& sink_logits, index_t rank) noexcept
      : base(group, settings, codes, value_centre, {}, nullptr, memory),
        own_(own),
        format_(format),
        sums_(own.sums, format.heads, format.dv, format.groups),
        sink_logits_(sink_logits),
        rank_(rank),
        whole_(!indexed) {}

  [[nodiscard]] stage at_stage() const noexcept { return stage_; }

  /// What ranks tell each other before they sample: unit and values' centre of the shard's index, and what its scores
  /// say that its tokens weigh.
  [[nodiscard]] static std::size_t opening_bytes(index_t heads, index_t dv) noexcept {
    return (4 + 4 * static_cast<std::size_t>(heads)) * sizeof(double) +
           padded(static_cast<std::size_t>(dv) * sizeof(float));
  }
  [[nodiscard]] static std::size_t exact_bytes(index_t heads, index_t dv) noexcept {
    return static_cast<std::size_t>(heads) *
           (2 * sizeof(double) + padded(static_cast<std::size_t>(dv) * sizeof(float)));
  }
  /// Of the group's next message.
  [[nodiscard]] std::size_t message_bytes() const noexcept {
    return stage_ == stage::done ? 0 : stage_ == stage::exact ? exact_bytes(heads_, head_.dv()) : format_.bytes();
  }

  void open(std::span<std::byte> to) noexcept {
    // Tables, certain rows, a look at scores; else all rows are to be read.
    const bool samples = !whole_ && n_visible_ >= costs_.least && this->may_pay() && this->find_cells();
    whole_ = !samples || !base::open();
    wire_writer out(to);
    const double unit = whole_ ? 1 : double{this->codes_.units().reach};
    out.put(static_cast<double>(n_visible_));
    out.put(whole_ ? 0.0 : 1.0);
    out.put(unit);
    out.put(static_cast<double>(whole_ ? 0 : this->cells_));
    for (index_t h = 0; h < heads_; ++h) {
      const double offset = double{tables_.offset[at(h)]};
      out.put(whole_ ? -stats::infinity : log_mass_[at(h)] + offset + std::log(unit));
      out.put(whole_ ? -stats::infinity : log_sum_[at(h)] + offset);
      out.put(whole_ ? 0.0 : this->rounding(h));
      out.put(whole_ ? 0.0 : this->rise_[at(h)]);
    }
    if (whole_) std::fill_n(own_.centre.begin(), head_.dv(), 0.0f);
    out.put(whole_ ? own_.centre.data() : this->centre_, head_.dv());
  }

  /// `all` stays where it is for as long as the group is used.
  void agree(const messages& all) noexcept {
    openings_ = all;
    std::array<double, max_group> mass, sum;
    mass.fill(-stats::infinity), sum.fill(-stats::infinity);
    double weight = 0;
    std::fill(own_.centre.begin(), own_.centre.end(), 0.0f);
    visible_ = 0, cells_of_all_ = 0;
    bool samples = false;
    for (index_t r = 0; r < all.ranks; ++r) {
      const opening o = opening_of(r);
      visible_ += o.tokens, cells_of_all_ += o.cells;
      samples = samples || o.samples;
      if (!o.samples) continue;
      for (index_t h = 0; h < heads_; ++h)
        mass[at(h)] = log_add(mass[at(h)], o.mass[at(h)]), sum[at(h)] = log_add(sum[at(h)], o.sum[at(h)]);
      weight += o.cells;
      const float* const theirs = centre_of(r);
      for (index_t j = 0; j < head_.dv(); ++j) own_.centre[at(j)] += static_cast<float>(o.cells) * theirs[j];
    }
    for (float& c : own_.centre) c = weight > 0 ? c / static_cast<float>(weight) : 0.0f;
    if (!samples) stage_ = stage::exact;
    if (whole_) return;
    const opening mine = opening_of(rank_);
    mass_share_ = 0;
    for (index_t h = 0; h < heads_; ++h) {
      mass_share_ = std::max(mass_share_, std::exp(mine.mass[at(h)] - mass[at(h)]));
      const double offset = double{tables_.offset[at(h)]};
      log_mass_[at(h)] = mass[at(h)] - offset - std::log(mine.unit);
      log_sum_[at(h)] = sum[at(h)] - offset;
    }
  }

  /// The rank's own work of the next message, and the message.
  void work(std::span<std::byte> to) noexcept {
    if (stage_ == stage::exact) {
      if (!read_all_) this->rest_exactly();
      read_all_ = true;
      return write_exact(to);
    }
    if (!whole_ && !(stage_ == stage::first_look ? first_look() : look())) whole_ = true;
    if (whole_ && !read_all_) {
      this->rest_exactly(true);
      read_all_ = true;
    }
    sums_.clear();
    look_counts counts;
    if (whole_) {
      gather_all(counts);
    } else {
      gather_sample(counts);
    }
    sums_.write(format_, counts, to);
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
      own_.efforts[at(r)] = {.samples = c.samples != 0, .cells = opening_of(r).cells};
    }
    variances_.fill(stats::infinity);
    const bool more = judge_look(*this, group_, round_);
    if (stage_ == stage::exact) return;
    if (!more) {
      stage_ = stage::done;
    } else if (round_ >= settings_.max_rounds ||
               static_cast<double>(counts_.certain + counts_.picks) > settings_.max_density * visible_) {
      stage_ = stage::exact;
    } else if (!whole_) {
      share_variance(own_.efforts, variances_, heads_, costs_.scan, costs_.key, static_cast<std::size_t>(rank_),
                     this->share_);
      wanted_.away = std::max(wanted_.away, away_wanted_);
    }
    // Scores of this rank that do not know their errors choose nothing any more.
    if (!whole_ && read_counts(all.of(rank_)).unsound != 0) whole_ = true;
  }

  // What judge_look asks of a sampling design; exchanges make its draws.
  [[nodiscard]] soundness evidence(index_t h, stats::evidence& e) noexcept {
    e = merge(sent_, h);
    if (e.finite()) return soundness::sound;
    stage_ = stage::exact;
    return soundness::no_head;
  }
  using base::judge;
  /// A first look is for the plan, unless there is nothing to plan.
  [[nodiscard]] bool suffices(index_t h, const stats::evidence& e, const stats::verdict& v) noexcept {
    return counts_.samples == 0 || (v.met && !first_ && counts_.unsound == 0 && is_covered(sent_, h, e));
  }
  [[nodiscard]] bool next(index_t h, const stats::evidence& e, const stats::verdict& v) noexcept {
    variances_[at(h)] = base::plan_margin / stats::planned_radius2<B>(e.dimension, settings_.delta) *
                        stats::squared_goal(e, promise_) * e.denominator * e.denominator;
    if (!whole_) prepare(h, e, v);
    return true;
  }
  void record(index_t h, const stats::evidence& e, const stats::verdict& v) noexcept {
    certificate& c = group_[h].c;
    c.rounds = round_, c.breaches = counts_.breaches;
    c.n = static_cast<index_t>(visible_);
    c.log_denominator = static_cast<double>(static_cast<float>(e.reference + std::log(e.denominator)));
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
  struct opening {
    double tokens = 0, unit = 1, cells = 0;
    bool samples = false;
    std::array<double, max_group> mass, sum, rounding, rise;
  };
  [[nodiscard]] static constexpr std::size_t padded(std::size_t bytes) noexcept { return (bytes + 7) / 8 * 8; }
  [[nodiscard]] opening opening_of(index_t r) const noexcept {
    wire_reader in(openings_.of(r));
    opening o;
    o.tokens = in.get<double>();
    o.samples = in.get<double>() != 0;
    o.unit = in.get<double>();
    o.cells = in.get<double>();
    for (index_t h = 0; h < heads_; ++h) {
      o.mass[at(h)] = in.get<double>(), o.sum[at(h)] = in.get<double>();
      o.rounding[at(h)] = in.get<double>(), o.rise[at(h)] = in.get<double>();
    }
    return o;
  }
  [[nodiscard]] const float* centre_of(index_t r) const noexcept {
    return reinterpret_cast<const float*>(openings_.of(r) + (4 + 4 * at(heads_)) * sizeof(double));
  }
  [[nodiscard]] static double log_add(double a, double b) noexcept {
    const double top = std::max(a, b);
    return top > -stats::infinity ? top + std::log(std::exp(a - top) + std::exp(b - top)) : top;
  }

  // As many rows as a sample of the whole begins with, shared by what the shards weigh.
  [[nodiscard]] bool first_look() noexcept {
    index_reader<Head>& read = *reader_;
    this->guess_thresholds();
    scanned_.base = std::min(1.0, 2 * shape.pilot_base / cells_of_all_);
    if (!this->scan()) return false;
    this->take_plan_sample();
    const double rows = shape.pilot * (1 + static_cast<double>(heads_)) * mass_share_;
    const double nats = read.excess_for(std::max<index_t>(16, static_cast<index_t>(rows))) * double{tables_.step};
    wanted_ = scanned_;
    wanted_.base = scanned_.base * std::exp(-nats);
    for (index_t h = 0; h < heads_; ++h) wanted_.plain[at(h)] += nats, wanted_.floor[at(h)] += nats;
    tables_.set(wanted_);
    if (!read.pick(1)) return false;
    read.choose_values(nullptr);
    return true;
  }

  [[nodiscard]] bool look() noexcept {
    index_reader<Head>& read = *reader_;
    if (!planned_ && !this->make_plan()) return false;
    planned_ = true;
    const auto most = static_cast<index_t>(settings_.max_density * static_cast<double>(n_visible_));
    for (int attempt = 0; attempt < 4; ++attempt) {
      if (!this->scan_for_wanted()) return false;
      const bool enough = this->weigh_enough();
      if (read.odd() != 0 || this->certain_ + read.picks() > most) return false;
      if (!enough) continue;  // more than the scan has
      read.choose_values(read.picks() > base::few_picks ? &this->goals_ : nullptr);
      return true;
    }
    return false;
  }

  void gather_sample(look_counts& counts) noexcept {
    index_reader<Head>& read = *reader_;
    sums_.add_sample(kernel::active_isa(), head_, read, own_.centre.data(),
                     tables_.query.scan.numbers ^ 0x9e3779b97f4a7c15u, static_cast<int>(3 * rank_ % format_.groups));
    counts = {.away = wanted_.away * double{this->codes_.units().reach},
              .certain = this->certain_,
              .picks = read.picks(),
              .samples = 1};
    for (index_t h = 0; h < heads_; ++h) {
      const stratum_scalars& c = read.certain().of(h);
      sums_.add_certain(h, double{read.reference(h)}, c.x, read.certain().numerator(h), c.power, this->centre_,
                        own_.centre.data(), this->certain_);
      sums_.more(h).floor =
          wanted_.floor[at(h)] + double{tables_.offset[at(h)]} + this->rounding(h) + this->rise_[at(h)];
      counts.breaches = std::max(counts.breaches, read.breaches(h));
    }
    counts.unsound = counts.breaches > stats::breaches_of_errors(read.keys_read()) ? 1 : 0;
  }
  void gather_all(look_counts& counts) noexcept {
    counts.certain = n_visible_;
    for (index_t h = 0; h < heads_; ++h) {
      const softmax_state& s = group_[h].state;
      if (group_[h].done || s.empty()) continue;
      sums_.add_certain(h, double{s.max_logit()}, s.denominator(), s.numerator().data(), s.power(), nullptr,
                        own_.centre.data(), n_visible_);
    }
  }

  // The evidence of all ranks; writes the output to the head's scratch.
  [[nodiscard]] stats::evidence merge(const messages& all, index_t h) noexcept {
    stats::sample_sums total{{}, own_.total.data(), head_.dv(), format_.groups};
    stats::sample_sums part{{}, own_.part.data(), head_.dv(), format_.groups};
    total.clear();
    for (index_t r = 0; r < all.ranks; ++r) {
      const look_scalars more = read_sums(format_, all.of(r), h, part);
      // Relative to the greatest reference, once that is known.
      own_.efforts[at(r)].spread[at(h)] = more.reach > 0 ? std::log(more.reach) + part.s.reference : -stats::infinity;
      if (r == rank_) mine_x_[at(h)] = part.s.x, mine_reference_[at(h)] = part.s.reference;
      total.merge(part);
    }
    for (shard_effort& r : own_.efforts) r.spread[at(h)] = std::exp(r.spread[at(h)] - total.s.reference);
    return stats::estimate(total, nullptr, {}, own_.centre.data(), double{sink_logits_[at(h)]},
                           group_[h].s.output.data(), own_.offset.data());
  }

  // Whether no rank leaves a token to chance that could cost more than its share of ε: as index_sampler::suffices has
  // it, from what each rank says of itself.
  [[nodiscard]] bool is_covered(const messages& all, index_t h, const stats::evidence& e) noexcept {
    const double missed = std::log(stats::missable(e, promise_)) + e.reference;
    const double top = e.reference + std::log(e.denominator);
    const auto n = static_cast<Eigen::Index>(head_.dv());
    const kernel::const_float_map o(group_[h].s.output.data(), n);
    bool covered = true;
    for (index_t r = 0; r < all.ranks; ++r) {
      const double floor = read_scalars(format_, all.of(r), h).floor();
      if (!(floor > -stats::infinity)) continue;
      const double unit = opening_of(r).unit;
      const double away = std::max(1e-12, static_cast<double>((o - kernel::const_float_map(centre_of(r), n)).norm()));
      const double bend = this->rise(h, top) - this->rise_[at(h)];  // the cap's part, the same everywhere
      covered = covered &&
                floor <= missed - std::log(unit + std::min(away, unit * unit / away)) - bend + base::floor_slack &&
                base::away_share * away <= read_counts(all.of(r)).away;
    }
    return covered;
  }

  // What the next look needs to know of head h, in this rank's own terms.
  void prepare(index_t h, const stats::evidence& e, const stats::verdict& v) noexcept {
    index_reader<Head>& read = *reader_;
    const index_t dv = head_.dv();
    read.raise_to(h, static_cast<float>(e.reference));
    const double reference = double{read.reference(h)};
    stats::evidence& own = estimate_[at(h)] = e;
    own.denominator = e.denominator * std::exp(e.reference - reference);
    own.reference = reference;
    own.away2 = static_cast<double>(
        (kernel::const_float_map(group_[h].s.output.data(), dv) - kernel::const_float_map(this->centre_, dv))
            .squaredNorm());
    const double mine = mine_x_[at(h)] * std::exp(mine_reference_[at(h)] - reference);
    this->sampled_x_[at(h)] = std::max(0.0, mine - read.certain().of(h).x);
    this->elsewhere_[at(h)] = std::max(0.0, own.denominator - mine);
    this->elsewhere_reference_[at(h)] = reference;
    if (first_) return;
    this->ask_for_more(h, this->covers(h, own), v);
  }

  void write_exact(std::span<std::byte> to) noexcept {
    const std::size_t each = to.size() / at(heads_);
    for (index_t h = 0; h < heads_; ++h) {
      wire_writer out(to.subspan(at(h) * each));
      const softmax_state& s = group_[h].state;
      const bool empty = group_[h].done || s.empty();
      out.put(empty ? -stats::infinity : double{s.max_logit()});
      out.put(empty ? 0.0 : s.denominator());
      if (empty) std::fill(own_.offset.begin(), own_.offset.end(), 0.0f);
      out.put(empty ? own_.offset.data() : s.numerator().data(), head_.dv());
    }
  }
  void merge_exact(const messages& all) noexcept {
    const std::size_t each = exact_bytes(1, head_.dv());
    const std::span<float> numerator = own_.offset, part = own_.part.first(at(head_.dv()));
    for (index_t h = 0; h < heads_; ++h) {
      if (group_[h].done) continue;
      head_task<Head>& task = group_[h];
      softmax_state total(numerator);
      for (index_t r = 0; r < all.ranks; ++r) {
        wire_reader in(all.of(r) + at(h) * each);
        const auto top = static_cast<float>(in.get<double>());
        const double sum = in.get<double>();
        in.get(part.data(), head_.dv());
        total.merge(softmax_state(top, sum, part));
      }
      add_sink(total, sink_logits_[at(h)]);
      task.c.log_denominator = double{total.finish(task.s.output)};
      task.ok = task.ok && std::isfinite(total.denominator());
      task.c.n = static_cast<index_t>(visible_), task.c.rounds = round_;
      certify_exact(task.c);
      task.done = true;
    }
    stage_ = stage::done;
  }

  shard_scratch own_;
  look_format format_;
  shard_sums sums_;
  std::array<float, max_group> sink_logits_;
  messages openings_;
  index_t rank_ = 0, round_ = 0;
  bool whole_ = false, read_all_ = false, planned_ = false;
  stage stage_ = stage::first_look;
  double visible_ = 0, cells_of_all_ = 0, mass_share_ = 1;
  // Of the look that is judged: what all have sent, and whether it is the first; the variances that heads may have.
  messages sent_;
  look_counts counts_;
  bool first_ = false;
  std::array<double, max_group> variances_{};
  std::array<double, max_group> mine_x_{}, mine_reference_{};
};

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
