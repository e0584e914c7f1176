// The heads of one KV head on one rank, between two exchanges: what it draws of its shard, and what it says of that.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <span>

#include "vattn/dist/shard_opening.hpp"
#include "vattn/dist/shard_sums.hpp"
#include "vattn/dist/shares.hpp"
#include "vattn/index/index_attention.hpp"

namespace vattn::VATTN_ABI::dist {

/// Memory of a group beyond an index's own, taken from the call's workspace.
struct shard_scratch {
  std::span<float> sums;            // shard_sums::storage_size
  std::span<float> total;           // sample_sums::storage
  std::span<float> centre;          // [dv], of all ranks
  std::span<float> offset, part;    // [dv]
  std::span<shard_effort> efforts;  // [ranks]

  [[nodiscard]] static shard_scratch take(arena& a, const look_format& f, int ranks) noexcept {
    const auto width = static_cast<std::size_t>(f.dv), each = static_cast<std::size_t>(ranks);
    shard_scratch s;
    s.sums = a.take<float>(shard_sums::storage_size(f.heads, f.dv, f.groups));
    s.total = a.take<float>(static_cast<std::size_t>(stats::sample_sums::storage(f.dv, f.groups)));
    s.centre = a.take<float>(width);
    s.offset = a.take<float>(width);
    s.part = a.take<float>(width);
    s.efforts = a.take<shard_effort>(each);
    return s;
  }
};

/// A sampler of index/index_attention.hpp whose sample is one part of several. A rank that cannot sample, or for which
/// it does not pay, reads all of its own rows instead: then they are certain rows, and the others go on.
template <class Policy, kv_head Head>
class shard_draws : protected index_sampler<Policy, Head> {
  using base = index_sampler<Policy, Head>;

 public:
  /// `settings` has the shard's own numbers of sinks and window; `remembered`: of the shard's last step, or null;
  /// `part`: how much of all shards' tokens it has.
  shard_draws(head_group<Head>& group, const config& settings, const cell_codes& codes, const float* value_centre,
              index_memory* remembered, bool indexed, const index_scratch& memory, const shard_scratch& own,
              const look_format& format, index_t rank, double part) noexcept
      : base(group, settings, codes, value_centre, {}, remembered, memory),
        own_(own),
        format_(format),
        sums_(own.sums, format.heads, format.dv, format.groups),
        rank_(rank),
        whole_(!indexed) {
    this->token_part_ = part;
  }

  /// Tables, certain rows, a look at scores; and what that says of the shard, or that all of its rows are to be read.
  void open(std::span<std::byte> to) noexcept {
    const bool samples = !whole_ && n_visible_ >= costs_.least && !this->resting() && this->may_pay() &&
                         this->find_cells() && base::open();
    whole_ = !samples;
    shard_opening o;
    o.tokens = static_cast<double>(n_visible_);
    o.mass.fill(-stats::infinity), o.sum.fill(-stats::infinity);
    if (whole_) {
      std::fill(own_.centre.begin(), own_.centre.end(), 0.0f);
      return o.write(heads_, own_.centre.data(), head_.dv(), to);
    }
    o.samples = true, o.remembers = remembered_ && remembered_->usable(heads_);
    o.cells = static_cast<double>(this->cells_), o.unit = double{this->reach_unit()};
    for (index_t h = 0; h < heads_; ++h) {
      const double offset = double{tables_.offset[at(h)]};
      o.mass[at(h)] = log_mass_[at(h)] + offset + std::log(o.unit);
      o.sum[at(h)] = log_sum_[at(h)] + offset;
    }
    o.write(heads_, this->centre_, head_.dv(), to);
  }

 protected:
  using B = typename Policy::bound;
  using base::at, base::away_wanted_, base::costs_, base::elsewhere_, base::elsewhere_reference_, base::estimate_,
      base::group_, base::head_, base::heads_, base::log_mass_, base::log_sum_, base::promise_, base::reader_,
      base::remembered_, base::scanned_, base::settings_, base::shape, base::share_, base::tables_, base::n_visible_,
      base::wanted_;

  // What all ranks have opened with, which stays where it is: the common centre, and what the whole weighs. Returns
  // whether a rank samples, and whether all that do may begin where their last step ended.
  struct beginning {
    bool samples = false, remembered = true;
  };
  [[nodiscard]] beginning learn(const messages& all) noexcept {
    beginning to;
    openings_ = all;
    std::array<double, max_group> mass, sum;
    mass.fill(-stats::infinity), sum.fill(-stats::infinity);
    std::fill(own_.centre.begin(), own_.centre.end(), 0.0f);
    visible_ = 0, cells_of_all_ = 0;
    double samplers = 0;
    for (index_t r = 0; r < all.ranks; ++r) {
      const shard_opening o = shard_opening::read(all.of(r), heads_);
      visible_ += o.tokens;
      if (!o.samples) continue;
      cells_of_all_ += o.cells, ++samplers;
      to.remembered = to.remembered && o.remembers;
      for (index_t h = 0; h < heads_; ++h)
        mass[at(h)] = log_add(mass[at(h)], o.mass[at(h)]), sum[at(h)] = log_add(sum[at(h)], o.sum[at(h)]);
      const float* const theirs = shard_opening::centre_of(all.of(r), heads_);
      for (index_t j = 0; j < head_.dv(); ++j) own_.centre[at(j)] += static_cast<float>(o.cells) * theirs[j];
    }
    for (float& c : own_.centre) c = samplers > 0 ? c / static_cast<float>(cells_of_all_) : 0.0f;
    to.samples = samplers > 0;
    if (whole_) return to;
    const shard_opening mine = shard_opening::read(all.of(rank_), heads_);
    mass_share_ = 0;
    for (index_t h = 0; h < heads_; ++h) {
      mass_share_ = std::max(mass_share_, std::exp(mine.mass[at(h)] - mass[at(h)]));
      const double offset = double{tables_.offset[at(h)]};
      log_mass_[at(h)] = mass[at(h)] - offset - std::log(mine.unit);
      log_sum_[at(h)] = sum[at(h)] - offset;
      part_of_sum_[at(h)] = std::exp(mine.sum[at(h)] - sum[at(h)]);
      share_[at(h)] = 1 / samplers;
    }
    return to;
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

  // `again`: there was no first look, for all remember their last step.
  [[nodiscard]] bool look(bool again) noexcept {
    index_reader<Head>& read = *reader_;
    if (!planned_ && !(again ? begin_again() : this->make_plan())) return false;
    planned_ = true;
    for (int attempt = 0; attempt < 4; ++attempt) {
      if (!this->scan_for_wanted()) return false;
      const bool enough = this->weigh_enough();
      if (read.odd() != 0 || this->certain_ + read.picks() > this->most_rows()) return false;
      if (!enough) continue;  // more than the scan has
      read.choose_values(read.picks() > base::few_picks ? &this->goals_ : nullptr);
      return true;
    }
    return false;
  }

  // The next message: the sums of a sample, or of all rows.
  void write_sums(std::span<std::byte> to) noexcept {
    if (whole_) read_rest(true);
    sums_.clear();
    look_counts counts;
    if (whole_) {
      gather_all(counts);
    } else {
      gather_sample(counts);
    }
    sums_.write(format_, counts, to);
  }

  [[nodiscard]] static std::size_t exact_bytes(index_t heads, index_t dv) noexcept {
    return static_cast<std::size_t>(heads) * (2 * sizeof(double) + padded_floats(dv));
  }
  void write_exact(std::span<std::byte> to) noexcept {
    read_rest(false);
    const std::size_t each = exact_bytes(1, head_.dv());
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

  // What the next look, or step, needs to know of head h: the evidence of the whole, away from the shard's own centre.
  void keep(index_t h, const stats::evidence& e) noexcept {
    const auto n = static_cast<Eigen::Index>(head_.dv());
    estimate_[at(h)] = e;
    estimate_[at(h)].away2 = static_cast<double>(
        (kernel::const_float_map(group_[h].s.output.data(), n) - kernel::const_float_map(this->centre_, n))
            .squaredNorm());
  }
  // What the next look is to be, in the shard's own terms. `mine`: the shard's part of D, log.
  void prepare(index_t h, const stats::evidence& e, double mine) noexcept {
    index_reader<Head>& read = *reader_;
    read.raise_to(h, static_cast<float>(e.reference));
    const double reference = double{read.reference(h)};
    keep(h, e);
    stats::evidence& own = estimate_[at(h)];
    own.denominator = e.denominator * std::exp(e.reference - reference);
    own.reference = reference;
    const double part = std::exp(mine - reference);
    this->sampled_x_[at(h)] = std::max(0.0, part - read.certain().of(h).x);
    this->times_own_[at(h)] = 1;
    elsewhere_[at(h)] = std::max(0.0, own.denominator - part);
    elsewhere_reference_[at(h)] = reference;
  }

  // Once all heads are done. `sampled`: by a sample of this shard, too; `part`: of D, the shard's.
  void remember_step(bool sampled, const std::array<double, max_group>& part) noexcept {
    if (!remembered_ || !reader_) return;  // it did not come to sampling
    this->remember(sampled);
    remembered_->share = share_, remembered_->part = part;
  }

  void record_chosen(index_t h) noexcept {
    if (whole_) {
      group_[h].s.chosen.all(group_[h].tokens);
    } else {
      this->record_rows(group_[h]);
    }
  }

  shard_scratch own_;
  look_format format_;
  shard_sums sums_;
  messages openings_;
  index_t rank_ = 0;
  bool whole_ = false;
  double visible_ = 0, cells_of_all_ = 0, mass_share_ = 1;

 private:
  // The last step's thresholds; where they fit no more, those that scores alone suggest.
  [[nodiscard]] bool begin_again() noexcept {
    const index_memory& m = *remembered_;
    const auto given = [](double part, double otherwise) { return part > 0 && part <= 1 ? part : otherwise; };
    for (index_t h = 0; h < heads_; ++h) {
      share_[at(h)] = given(m.share[at(h)], share_[at(h)]);
      this->times_own_[at(h)] = 1 / given(m.part[at(h)], part_of_sum_[at(h)]);
    }
    if (this->resume()) return true;
    this->guess_thresholds();
    if (!this->scan()) return false;
    this->guessed_ = false;
    wanted_ = scanned_;
    return true;
  }

  void read_rest(bool with_power) noexcept {
    if (!read_all_) this->rest_exactly(with_power);
    read_all_ = true;
  }

  void gather_sample(look_counts& counts) noexcept {
    index_reader<Head>& read = *reader_;
    sums_.add_sample(kernel::active_isa(), head_, read, own_.centre.data(),
                     tables_.query.scan.numbers ^ 0x9e3779b97f4a7c15u, static_cast<int>(3 * rank_ % format_.groups));
    counts = {.away = wanted_.away * double{this->reach_unit()},
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

  bool planned_ = false, read_all_ = false;
  std::array<double, max_group> part_of_sum_{};  // of Σ e^s over all shards
};

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
