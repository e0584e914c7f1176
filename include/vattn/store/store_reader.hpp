// Reads rows of a store for the heads of a group: fixed ones, a slice as it lies, and picked ones in two stages.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/base/philox.hpp"
#include "vattn/base/workspace.hpp"
#include "vattn/estimate/strata.hpp"
#include "vattn/kernel/block.hpp"
#include "vattn/kernel/scan.hpp"
#include "vattn/sample/thinning.hpp"
#include "vattn/sketch/query_tables.hpp"
#include "vattn/stats/judge.hpp"
#include "vattn/store/store_plan.hpp"

namespace vattn::VATTN_ABI {

/// Memory of a `store_reader`, taken from the call's workspace.
struct store_reader_memory {
  std::span<float> prepared;           // queries as block kernels want them
  std::span<float> picked, light;      // stratum::storage_size
  std::span<float> x, spare;           // [heads, block_rows]
  std::span<kernel::scan_pick> picks;  // [capacity]
  std::span<float> logits;             // [heads, capacity]
  std::span<float> thinning;           // thinning::storage_size
  std::span<ordinal> kept;             // [capacity]
  std::span<float> reach2;             // [capacity] r²
  std::span<float> by_level;           // [levels] 1/π
  std::span<float> weights;            // [capacity]
  index_t capacity = 0;
  static constexpr index_t levels = 4096;  // steps below 0: no noise is larger than 17·ln 2 nats

  [[nodiscard]] static store_reader_memory take(arena& a, index_t heads, index_t dk, index_t dv,
                                                index_t capacity) noexcept {
    const auto h = static_cast<std::size_t>(heads), rows = static_cast<std::size_t>(capacity);
    store_reader_memory m;
    m.prepared = a.take<float>(kernel::query_storage(heads, dk));
    m.picked = a.take<float>(stratum::storage_size(heads, dv));
    m.light = a.take<float>(stratum::storage_size(heads, dv));
    m.x = a.take<float>(h * kernel::block_rows);
    m.spare = a.take<float>(h * kernel::block_rows);
    m.picks = a.take<kernel::scan_pick>(rows);
    m.logits = a.take<float>(h * rows);
    m.thinning = a.take<float>(thinning::storage_size(heads, capacity));
    m.kept = a.take<ordinal>(rows);
    m.weights = a.take<float>(rows);
    m.reach2 = a.take<float>(rows + static_cast<std::size_t>(kernel::block_rows));
    m.by_level = a.take<float>(static_cast<std::size_t>(levels));
    m.capacity = capacity;
    return m;
  }
};

/// Sums over rows of one head of a store, in two strata. x = exp(l − reference); references rise as rows are read.
/// Values' distances are in `unit` (kernel/units.hpp).
template <class Head>
class store_reader {
  using T = typename Head::key_element;

 public:
  /// `queries` [heads, dk], scaled by `scale`; they must outlive the reader, as `memory` must.
  store_reader(const Head& head, const sketch::query_tables& tables, index_t heads, const float* queries, float scale,
               const store_reader_memory& memory, random_stream coins, float unit) noexcept
      : head_(head), tables_(tables), m_(memory), heads_(heads), how_(kernel::active_isa()), coins_(coins) {
    prepared_ = kernel::prepare_queries<T>(how_, queries, heads, head.dk(), scale, m_.prepared);
    picked_ = stratum(m_.picked, heads, head.dv(), unit);
    light_ = stratum(m_.light, heads, head.dv(), unit);
    reference_.fill(-std::numeric_limits<float>::infinity());
    const float reach_unit = head.codes().reach_unit() * unit;
    reach_unit2_ = reach_unit * reach_unit;
  }

  [[nodiscard]] const stratum& picked() const noexcept { return picked_; }
  [[nodiscard]] const stratum& light() const noexcept { return light_; }
  [[nodiscard]] float reference(index_t h) const noexcept { return reference_[at(h)]; }
  /// Rows whose score was further from the logit than it states, since `clear`.
  [[nodiscard]] index_t breaches(index_t h) const noexcept { return breaches_[at(h)]; }
  /// Heads whose logits were not finite, bits.
  [[nodiscard]] std::uint32_t odd() const noexcept { return odd_; }

  void clear() noexcept {
    picked_.clear();
    light_.clear();
    breaches_ = {};
  }
  /// Forgets the certain and the picked rows alone.
  void clear_picked() noexcept { picked_.clear(); }

  // All of these: false where a logit is not finite.

  /// Rows [first, first + count), which are certain.
  [[nodiscard]] bool read_fixed(index_t first, index_t count) noexcept {
    block_weights b;
    for (index_t from = 0; from < count; from += kernel::block_rows) {
      const index_t n = std::min(kernel::block_rows, count - from);
      b.clear();
      std::fill_n(b.w, n, 1.0f);
      for (index_t i = 0; i < n; ++i)
        b.r2[i] = kernel::squared_distance_in(picked_.unit(), head_.value(first + from + i), head_.value_centre());
      if (!weigh({keys(), first + from, n})) return false;
      exponentials(n);
      picked_.add<T>(how_, m_.x.data(), b.w, nullptr, b.r2, {values(), first + from, n}, 0, m_.spare.data());
    }
    return true;
  }

  /// Blocks of 64 rows of the past [from, to), counted from `first` on and around its end: those of the light stratum.
  [[nodiscard]] bool read_slice(index_t first, index_t from, index_t to, plan_rows* notes = nullptr) noexcept {
    const index_t blocks = head_.past() / kernel::scan_keys;
    block_weights b;
    for (index_t k = from; k < to; ++k) {
      const index_t block = (first + k) % blocks;
      kernel::scan_all(how_, tables_.query, head_.codes().view(), block, slice_);
      for (index_t i = 0; i < kernel::block_rows; ++i) {
        b.w[i] = b.t[i] = slice_.level[i] < tables_.query.cut ? 1.0f : 0.0f;
        b.r2[i] = log_reach2(slice_.reach[i]);
      }
      squared_reaches(b.r2, kernel::block_rows);
      // block_rows; as a constant GCC 12 warns of overflow in loops over what is left of a block, which is nothing.
      const index_t row = head_.sinks() + block * kernel::scan_keys, count = std::min(kernel::block_rows, head_.past());
      if (!weigh({keys(), row, count})) return false;
      for (index_t h = 0; h < heads_; ++h) {
        for (index_t i = 0; i < kernel::block_rows; ++i) score_[at(i)] = tables_.score(slice_.score[h][i]);
        for (index_t i = 0; i < kernel::block_rows; ++i) radius_[at(i)] = kernel::bfloat16_to_float(slice_.radius[i]);
        check_scores(h, count);
      }
      if (notes) {
        for (index_t i = 0; i < count && !notes->full(); ++i) {
          if (b.w[i] == 0) continue;
          notes->push(static_cast<float>(blocks) / static_cast<float>(to), b.r2[i], tables_.log_reach(slice_.reach[i]),
                      kernel::bfloat16_to_float(slice_.radius[i]));
          for (index_t h = 0; h < heads_; ++h) {
            notes->last(notes->logits_of(h)) = m_.x[at(h * kernel::block_rows + i)];
            notes->last(notes->scores_of(h)) = tables_.score(slice_.score[h][i]);
          }
        }
      }
      exponentials(count);
      light_.add<T>(how_, m_.x.data(), b.w, b.t, b.r2, {values(), row, count}, coins(), m_.spare.data());
    }
    return true;
  }

  /// The keys of picks [from, to); those before have been weighed.
  [[nodiscard]] bool weigh_picks(index_t from, index_t to) noexcept {
    std::array<ordinal, kernel::block_rows> index{};
    const index_t sinks = head_.sinks();
    for (index_t first = from; first < to; first += kernel::block_rows) {
      const index_t count = std::min(kernel::block_rows, to - first);
      const kernel::scan_pick* p = m_.picks.data() + first;
      float* reach = m_.reach2.data() + first;
      for (index_t i = 0; i < count; ++i) {
        index[at(i)] = static_cast<ordinal>(p[i].row) + static_cast<ordinal>(sinks);
        reach[i] = log_reach2(p[i].reach);
      }
      squared_reaches(reach, count);
      fetch_keys(first + kernel::block_rows, to);
      if (!weigh(kernel::block_of_rows::gathered(keys(), index.data(), count))) return false;
      for (index_t i = 0; i < count; ++i) radius_[at(i)] = kernel::bfloat16_to_float(p[i].radius);
      for (index_t h = 0; h < heads_; ++h) {
        for (index_t i = 0; i < count; ++i) score_[at(i)] = tables_.score(p[i].score[at(h)]);
        check_scores(h, count);
        std::copy_n(m_.x.data() + h * kernel::block_rows, count, m_.logits.data() + h * m_.capacity + first);
      }
    }
    return true;
  }

  /// The picks that were weighed have probability share·π(level − above), in whole steps.
  void set_probabilities(index_t picks, index_t above, float share) noexcept {
    thin_ = thinning(how_, m_.thinning, heads_, picks);
    const float scale = 1 / share;
    index_t least = 0;
    for (index_t i = 0; i < picks; ++i) least = std::min<index_t>(least, m_.picks[at(i)].level);
    tabulate_probabilities(above - least + 1);
    for (index_t i = 0; i < picks; ++i) {
      const index_t below = std::clamp<index_t>(above - m_.picks[at(i)].level, 0, m_.levels - 1);
      thin_.inverse()[i] = scale * m_.by_level[at(below)];
    }
  }

  /// Remembers the picks for the plan.
  void note_picks(index_t picks, plan_rows& notes) const noexcept {
    for (index_t i = 0; i < picks && !notes.full(); ++i) {
      const kernel::scan_pick& p = m_.picks[at(i)];
      notes.push(thin_.inverse()[i], m_.reach2[at(i)], tables_.log_reach(p.reach), kernel::bfloat16_to_float(p.radius));
      for (index_t h = 0; h < heads_; ++h) {
        notes.last(notes.logits_of(h)) = m_.logits[at(h * m_.capacity + i)];
        notes.last(notes.scores_of(h)) = tables_.score(p.score[at(h)]);
      }
    }
  }

  using weighed = thinning::weighed;
  /// `away2` [heads]: ‖ô − c‖², R² = r² + that. Prepares `read_picks`.
  void look_at_picks(index_t picks, const std::array<double, max_group>& away2,
                     std::array<weighed, max_group>& found) noexcept {
    for (index_t h = 0; h < heads_; ++h) {
      std::copy_n(m_.logits.data() + h * m_.capacity, picks, thin_.weight(h));
      found[at(h)] = thin_.weigh(h, reference_[at(h)], m_.reach2.data(), away2[at(h)]);
    }
  }

  /// The values of the picks that were weighed: all of them, or with `goals` (as `thinning` has them, after
  /// `look_at_picks`) those that are worth it.
  void read_picks(const std::array<double, kernel::scan_heads>* goals = nullptr) noexcept {
    const index_t sinks = head_.sinks();
    const std::span<ordinal> kept = m_.kept;
    const index_t count = read_ = thin_.keep(
        goals, tables_.query.numbers, [&](index_t i) { return m_.picks[at(i)].row; }, kept, m_.weights);
    std::array<ordinal, kernel::block_rows> index{};
    block_weights b;
    for (index_t from = 0; from < count; from += kernel::block_rows) {
      const index_t n = std::min(kernel::block_rows, count - from);
      b.clear();
      bool certain = true;
      fetch_values(kept, from + kernel::block_rows, count);
      for (index_t i = 0; i < n; ++i) {
        const auto k = at(index_t{kept[at(from + i)]});
        const kernel::scan_pick& p = m_.picks[k];
        index[at(i)] = static_cast<ordinal>(p.row) + static_cast<ordinal>(sinks);
        b.r2[i] = m_.reach2[k];
        b.w[i] = m_.weights[k];
        b.t[i] = b.w[i] * (b.w[i] - 1);
        certain = certain && b.w[i] <= 1;
        for (index_t h = 0; h < heads_; ++h) m_.x[at(h * kernel::block_rows + i)] = m_.logits[at(h * m_.capacity) + k];
      }
      exponentials(n);
      picked_.add<T>(how_, m_.x.data(), b.w, certain ? nullptr : b.t, b.r2,
                     kernel::block_of_rows::gathered(values(), index.data(), n), coins(), m_.spare.data());
    }
  }

  /// 1/π of the picks, 0 where the value was not read.
  [[nodiscard]] std::span<const float> weights() const noexcept { return m_.weights; }
  /// Of the picks, those whose values were read.
  [[nodiscard]] index_t values_read() const noexcept { return read_; }

 private:
  // 1/π of levels down to −count.
  void tabulate_probabilities(index_t count) noexcept {
    for (; tabulated_ < std::min(count, m_.levels); tabulated_ += kernel::block_rows) {
      float* p = m_.by_level.data() + tabulated_;
      kernel::inclusion(how_, tables_.query.noise_factor, -static_cast<int>(tabulated_), kernel::block_rows, p);
      for (index_t i = 0; i < kernel::block_rows; ++i) p[i] = 1 / p[i];
    }
  }

  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] kernel::strided_rows keys() const noexcept { return head_.key_rows(); }
  [[nodiscard]] kernel::strided_rows values() const noexcept { return head_.value_rows(); }
  [[nodiscard]] std::uint64_t coins() noexcept { return (std::uint64_t{coins_.next()} << 32) | coins_.next(); }

  // log (r/reach_unit)², so that its square is a float; whose r² is larger is read for certain, or hardly differs.
  [[nodiscard]] static float log_reach2(std::int16_t reach) noexcept {
    return std::min(static_cast<float>(reach) * (2.0f / 512), 60.0f);
  }
  // r² of log_reach2: at any scale of the values the same numbers times the square of a power of two.
  void squared_reaches(float* r2, index_t n) const noexcept {
    static_cast<void>(kernel::block_exponentials(how_, r2, n, 0));
    for (index_t i = 0; i < n; ++i) r2[i] *= reach_unit2_;
  }

  VATTN_ALWAYS_INLINE void fetch(const kernel::strided_rows& rows, const kernel::scan_pick& p) const noexcept {
    kernel::prefetch_row(rows.first + (head_.sinks() + index_t{p.row}) * rows.stride,
                         static_cast<std::size_t>(rows.stride));
  }
  VATTN_ALWAYS_INLINE void fetch_keys(index_t from, index_t end) const noexcept {
    for (index_t i = from; i < std::min(end, from + kernel::block_rows); ++i) fetch(keys(), m_.picks[at(i)]);
  }
  VATTN_ALWAYS_INLINE void fetch_values(std::span<const ordinal> kept, index_t from, index_t end) const noexcept {
    for (index_t i = from; i < std::min(end, from + kernel::block_rows); ++i)
      fetch(values(), m_.picks[at(index_t{kept[at(i)]})]);
  }

  // Logits of a block.
  [[nodiscard]] bool weigh(const kernel::block_of_rows& k) noexcept {
    kernel::block_logits<T>(prepared_, k, m_.x.data());
    for (index_t h = 0; h < heads_; ++h) {
      float top;
      if (!kernel::block_maximum(how_, m_.x.data() + h * kernel::block_rows, k.count, top)) {
        odd_ |= 1u << h;
        return false;
      }
      if (top > reference_[at(h)]) {  // with room, so that it seldom happens
        const float higher = top + 2;
        if (std::isfinite(reference_[at(h)])) {
          const double factor = std::exp(static_cast<double>(reference_[at(h)] - higher));
          picked_.rescale(h, factor);
          light_.rescale(h, factor);
        }
        reference_[at(h)] = higher;
      }
    }
    return true;
  }

  // Counts the logits of a block that are further from their scores than these state: `score_`, `radius_`. As
  // stats::breaches has it, in vectors.
  void check_scores(index_t h, index_t n) noexcept {
    const float* l = m_.x.data() + h * kernel::block_rows;
    const float wide = 4 * tables_.error(h), base = tables_.offset[at(h)], rounding = 4 * tables_.table_error;
    constexpr auto relative = static_cast<float>(stats::score_rounding);
    int outside = 0;
    for (int i = 0; i < static_cast<int>(n); ++i) {
      const float off = std::abs(l[i] - base - score_[at(i)]);
      outside += off > wide * radius_[at(i)] + rounding + relative * (1 + std::abs(l[i])) ? 1 : 0;
    }
    breaches_[at(h)] += outside;
  }

  // x = exp(l − reference), 0 behind the block's rows.
  void exponentials(index_t n) noexcept {
    for (index_t h = 0; h < heads_; ++h) {
      float* l = m_.x.data() + h * kernel::block_rows;
      static_cast<void>(kernel::block_exponentials(how_, l, n, reference_[at(h)]));
      std::fill(l + n, l + kernel::block_rows, 0.0f);
    }
  }

  const Head& head_;
  const sketch::query_tables& tables_;
  store_reader_memory m_;
  index_t heads_;
  kernel::isa how_;
  random_stream coins_;
  kernel::block_queries prepared_{};
  stratum picked_, light_;
  thinning thin_;  // of the picks whose probabilities are set
  index_t read_ = 0, tabulated_ = 0;
  float reach_unit2_ = 0;
  std::uint32_t odd_ = 0;
  std::array<float, max_group> reference_{};
  std::array<index_t, max_group> breaches_{};
  kernel::scanned_keys slice_;
  std::array<float, kernel::block_rows> score_{}, radius_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
