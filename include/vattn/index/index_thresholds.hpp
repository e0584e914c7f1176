// Thresholds of a group's sample by an index: guessed, scanned for, wanted, and what an estimate asks of them.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "vattn/index/index_call.hpp"
#include "vattn/index/index_cells.hpp"
#include "vattn/index/index_reader.hpp"
#include "vattn/stats/judge.hpp"

namespace vattn::VATTN_ABI {

/// Which thresholds a group's sample is to have, and those that were scanned for: a scan at low thresholds serves any
/// higher ones.
template <class Policy, kv_head Head>
class index_thresholds : protected index_cells<Head> {
  using cells = index_cells<Head>;

 public:
  /// `codes` and `value_centre` [dv]: a kv_index's of the KV head.
  index_thresholds(head_group<Head>& group, const config& settings, const cell_codes& codes, const float* value_centre,
                   const index_costs& costs, const index_scratch& memory) noexcept
      : cells(group, settings, codes, costs, memory),
        promise_{settings.epsilon, settings.delta, settings.scale, shape.kappa},
        centre_(value_centre) {
    share_.fill(1), squeeze_.fill(1);
  }

 protected:
  using cells::at, cells::cells_, cells::codes_, cells::group_, cells::head_, cells::heads_, cells::log_mass_,
      cells::log_sum_, cells::s_, cells::settings_, cells::tables_;
  using stage = sample::store_stage;
  static void enter(stage s) noexcept {
    if constexpr (requires { Policy::sampler::enter(s); }) Policy::sampler::enter(s);
  }

  // Tables, rows that are read for certain, and a look at scores. False: all rows are to be read, as where the codes'
  // unit of distances is nothing like the values that are there.
  [[nodiscard]] bool open() noexcept {
    if (!(this->reach_unit() > 0x1p-40f && this->reach_unit() < 0x1p40f)) return false;
    enter(stage::tables);
    if (!this->make_tables()) return false;
    reader_.emplace(group_, tables_, s_.queries.data(), this->reach_unit(), centre_, s_.reader, this->random_.fork(1));
    enter(stage::slice);
    if (!reader_->read_certain(this->certain_cells())) return false;
    enter(stage::pilot);
    return this->look_at_scores();
  }

  // Thresholds of the first scan: those of a sample that is enough for an output as far from 0 as the values' centre.
  void guess_thresholds() noexcept {
    const auto unit = static_cast<double>(this->reach_unit());
    const kernel::const_float_map centre(centre_, static_cast<Eigen::Index>(head_.dv()));
    const auto centre2 = static_cast<double>((centre * this->unit()).squaredNorm());
    const double length = std::sqrt(centre2 + 0.05 * unit * unit) / unit;
    const double rows = 3.3 / (settings_.epsilon * settings_.epsilon * length * length);
    for (index_t h = 0; h < heads_; ++h) {
      scanned_.plain[at(h)] = log_mass_[at(h)] - std::log(std::max(rows, 2 * shape.pilot));
      // Well below: a few scores say little of D, candidates more cost a tenth of another scan.
      scanned_.floor[at(h)] = std::log(shape.kappa * settings_.epsilon * length / 1.2) + log_sum_[at(h)] - 1.9;
    }
    scanned_.base = std::min(1.0, 2 * shape.pilot_base / static_cast<double>(cells_));
    scanned_.z = shape.z;
    scanned_.away = 1.5;
    guessed_ = true;
  }

  [[nodiscard]] bool scan() noexcept {
    enter(stage::scan);
    for (int attempt = 0; attempt < 3; ++attempt) {
      tables_.set(scanned_);
      reader_->candidates().size = 0;
      if (this->scan_blocks(reader_->candidates())) {
        reader_->forget();
        return true;
      }
      if (!guessed_) return false;  // what is asked for is too much
      for (index_t h = 0; h < heads_; ++h) scanned_.plain[at(h)] += 1.5, scanned_.floor[at(h)] += 1.5;
    }
    return false;
  }

  // Scans again where the wanted thresholds are lower than the last scan's. False: that is too much.
  [[nodiscard]] bool scan_for_wanted() noexcept {
    if (covered_by_scan()) return true;
    for (index_t h = 0; h < heads_; ++h)
      scanned_.plain[at(h)] = std::min(scanned_.plain[at(h)], wanted_.plain[at(h)] - 0.3),
      scanned_.floor[at(h)] = std::min(scanned_.floor[at(h)], wanted_.floor[at(h)] - 0.3);
    scanned_.base = std::max(scanned_.base, wanted_.base);
    scanned_.away = std::max(scanned_.away, wanted_.away);
    return scan();
  }

  [[nodiscard]] bool covered_by_scan() const noexcept {
    bool ok = wanted_.base <= scanned_.base && wanted_.away <= scanned_.away;
    for (index_t h = 0; h < heads_; ++h) {
      ok = ok && wanted_.plain[at(h)] >= scanned_.plain[at(h)] && wanted_.floor[at(h)] >= scanned_.floor[at(h)];
    }
    return ok;
  }

  // This sample's share of what the error's square may be.
  [[nodiscard]] double goal2(index_t g, const stats::evidence& e) const noexcept {
    return share_[at(g)] * stats::squared_goal(e, promise_);
  }

  // log(κ ε T D) as a threshold of scores of k − μ plus log(r/unit): a token that is missed although it may move the
  // output by f must cost at most κ·ε·T, and moves it by x‖v − ô‖ <= x(r + ‖ô − c‖), at a typical r.
  [[nodiscard]] double floor_threshold(index_t g, const stats::evidence& e) const noexcept {
    return std::log(stats::missable(e, promise_)) + static_cast<double>(reader_->reference(g)) -
           static_cast<double>(tables_.offset[at(g)]) -
           log_moved(static_cast<double>(this->reach_unit()), std::sqrt(e.away2)) - rounding(g) -
           this->rise(g, static_cast<double>(reader_->reference(g)) + std::log(e.denominator));
  }
  // log(r + ‖ô − c‖) at a typical r, for an output that is `away` from the centre, of distances about `unit`.
  [[nodiscard]] static double log_moved(double unit, double away) noexcept {
    away = std::max(1e-12 * unit, away);
    return std::log(unit + std::min(away, unit * unit / away));
  }
  // What the tables' rounding adds to z errors of a typical cell's score: it is independent of them.
  [[nodiscard]] double rounding(index_t g) const noexcept {
    const double sigma = static_cast<double>(tables_.error(g, 32767)) * typical_radius_;
    return shape.z * (std::hypot(sigma, static_cast<double>(tables_.table_error)) - sigma);
  }

  // The threshold of a typical cell's score: that of its goal, or of its floor where that is lower.
  [[nodiscard]] double binding(index_t g) const noexcept {
    const double sigma = static_cast<double>(tables_.error(g, 32767)) * typical_radius_;
    return std::min(wanted_.plain[at(g)], wanted_.floor[at(g)] - shape.z * sigma);
  }

  // What an estimate asks of the thresholds, and whether they had it: floors by so many nats too high do, and distances
  // of the output by so much of what they allow for.
  static constexpr double floor_slack = 0.22, away_share = 0.8;
  struct coverage {
    double floor, away;
    bool enough;
  };
  [[nodiscard]] coverage covers(index_t g, const stats::evidence& e) const noexcept {
    const double floor = floor_threshold(g, e);
    const double away = away_share * std::sqrt(e.away2) / static_cast<double>(this->reach_unit());
    return {floor, away, wanted_.floor[at(g)] <= floor + floor_slack && away <= wanted_.away};
  }
  // Thresholds of the next look, for a head that is not verified.
  void ask_for_more(index_t g, const coverage& c, const stats::verdict& v) noexcept {
    away_wanted_ = std::max(away_wanted_, 1.1 * c.away / away_share);
    if (!c.enough) wanted_.floor[at(g)] = std::min(wanted_.floor[at(g)], c.floor - 0.1);
    if (v.met) return;
    squeeze_[at(g)] *= 0.95 / v.ratio;
    if (10 * reader_->values_read() >= 9 * reader_->picks())
      wanted_.plain[at(g)] = binding(g) - std::max(0.1, std::log(v.ratio));
  }

  static constexpr index_shape_of_sample shape{};
  static constexpr double typical_radius_ = 0.3;  // of a cell, in the unit of radii

  const stats::promise promise_;
  const float* const centre_;
  std::optional<index_reader<Head>> reader_;  // once there are tables
  cell_thresholds scanned_, wanted_;
  double away_wanted_ = 0;  // least distance that the heads ask of the next look
  bool guessed_ = false;    // the scan's thresholds, by a look at scores
  // Of each head: by how much goals are less than asked for, since looks did not come to them; this sample's share of
  // the error, where it is one of several (dist/).
  std::array<double, max_group> squeeze_{}, share_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
