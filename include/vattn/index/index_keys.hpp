// Keys of rows that an index's scan has taken: their logits, their probabilities, and whether scores were honest; rows
// that are read for certain.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/call/call.hpp"
#include "vattn/index/cell_tables.hpp"
#include "vattn/index/index_scratch.hpp"
#include "vattn/kernel/units.hpp"

namespace vattn::VATTN_ABI {

/// Rows of one KV head for the heads of a group: those that are read for certain, and the keys of what a scan has
/// taken. x = exp(l − reference); references rise as rows are read. The sample is Poisson: candidates of a scan that
/// the present thresholds take, each with its own probability.
template <kv_head Head>
class index_keys {
 protected:
  using rows_of = row_gatherer<Head>;
  using K = typename rows_of::key_element;
  using V = typename rows_of::value_element;

 public:
  /// `queries` [heads, dk], scaled; `reach_unit` in the queries' value unit. All arguments must outlive it.
  index_keys(head_group<Head>& group, const cell_tables& tables, const float* queries, float reach_unit,
             const float* value_centre, const index_reader_memory& memory) noexcept
      : group_(group),
        head_(group[0].row.head),
        tables_(tables),
        m_(memory),
        rows_(head_, memory.rows),
        heads_(group.size()),
        how_(kernel::active_isa()),
        centre_(value_centre),
        unit_(group[0].row.value_unit),
        reach_unit2_(reach_unit * reach_unit) {
    prepared_ = kernel::prepare_queries<K>(how_, queries, heads_, head_.dk(), group[0].row.scale, m_.prepared);
    sampled_ = stratum(m_.sampled, heads_, head_.dv(), unit_);
    certain_ = stratum(m_.certain, heads_, head_.dv(), unit_);
    reference_.fill(-std::numeric_limits<float>::infinity());
    candidates_ = {
        m_.cells.data(), m_.reach.data(), m_.radius.data(), m_.noise.data(), m_.score.data(), m_.capacity, 0};
    for (index_t h = 0; h < heads_; ++h) transforms_ = transforms_ || group[h].row.transforms();
  }

  [[nodiscard]] kernel::cell_candidates& candidates() noexcept { return candidates_; }
  [[nodiscard]] const stratum& sampled() const noexcept { return sampled_; }
  [[nodiscard]] const stratum& certain() const noexcept { return certain_; }
  [[nodiscard]] float reference(index_t h) const noexcept { return reference_[at(h)]; }
  /// Rows whose score was further from the logit than it states, since `forget`.
  [[nodiscard]] index_t breaches(index_t h) const noexcept { return breaches_[at(h)]; }
  /// Heads whose logits were not finite, bits.
  [[nodiscard]] std::uint32_t odd() const noexcept { return odd_; }
  [[nodiscard]] index_t picks() const noexcept { return picks_; }
  [[nodiscard]] index_t values_read() const noexcept { return kept_; }
  [[nodiscard]] index_t keys_read() const noexcept { return keys_read_; }
  /// Cell of a pick, and 1/π: 0 where its value was not read.
  [[nodiscard]] index_t cell(index_t pick) const noexcept { return index_t{m_.cells[candidate(pick)]}; }
  [[nodiscard]] float weight(index_t pick) const noexcept { return m_.weights[at(pick)]; }

  /// New candidates: none of their keys was read.
  void forget() noexcept {
    std::fill_n(m_.seen.begin(), candidates_.size, std::uint8_t{0});
    picks_ = kept_ = 0;
    breaches_ = {};
  }

  /// Rows that are read for certain. False where a logit is not finite.
  [[nodiscard]] bool read_certain(std::span<const ordinal> cells) noexcept {
    block_weights b;
    const auto count = static_cast<index_t>(cells.size());
    for (index_t from = 0; from < count; from += kernel::block_rows) {
      const index_t n = std::min(kernel::block_rows, count - from);
      const ordinal* const here = cells.data() + from;
      b.clear();
      std::fill_n(b.w, n, 1.0f);
      for (index_t i = 0; i < n; ++i)
        b.r2[i] = kernel::squared_distance_in(unit_, head_.value(index_t{here[i]}), centre_);
      if (!weigh_certain(here, n)) return false;
      exponentials(m_.x.data(), n);
      for (index_t h = 0; h < heads_; ++h) hide(h, here, n, 0);
      certain_.template add<V>(how_, m_.x.data(), b.w, nullptr, b.r2, rows_.values(here, n), 0, m_.spare.data());
    }
    return true;
  }

  /// The levels of all candidates under the tables' thresholds.
  [[nodiscard]] std::span<const std::int16_t> levels() noexcept {
    set_levels();
    return m_.level.first(at(candidates_.size));
  }
  /// By how much all thresholds have to be higher for about `picks` candidates to be taken, steps.
  [[nodiscard]] int excess_for(index_t picks) noexcept {
    const index_t n = candidates_.size;
    if (n <= picks) return 0;
    set_levels();
    for (index_t i = 0; i < n; ++i) m_.level[at(i)] = kernel::detail::saturate(m_.level[at(i)] + m_.noise[at(i)]);
    const auto nth = m_.level.begin() + (n - picks);
    std::nth_element(m_.level.begin(), nth, m_.level.begin() + n);
    return std::max<int>(0, *nth);
  }

  /// The sample that the tables' thresholds take of the candidates: its probabilities, and the keys that were not read
  /// yet. `share`: with which the candidates' blocks were scanned. False where a logit is not finite.
  [[nodiscard]] bool pick(float share) noexcept {
    const index_t n = candidates_.size;
    set_levels();
    picks_ = 0;
    index_t least = 0, fresh = 0;
    for (index_t i = 0; i < n; ++i) {
      if (m_.level[at(i)] + m_.noise[at(i)] < 0) continue;
      m_.picks[at(picks_++)] = static_cast<ordinal>(i);
      least = std::min<index_t>(least, m_.level[at(i)]);
      if (m_.seen[at(i)] == 0) m_.kept[at(fresh++)] = static_cast<ordinal>(i);
    }
    if (!read_keys(fresh)) return false;
    tabulate_probabilities(1 - least);
    thin_ = thinning(how_, m_.thinning, heads_, picks_);
    const float scale = 1 / share;
    for (index_t i = 0; i < picks_; ++i) {
      const index_t below = std::clamp<index_t>(-index_t{m_.level[candidate(i)]}, 0, m_.levels - 1);
      thin_.inverse()[i] = scale * m_.by_level[at(below)];
      m_.reach2[at(i)] = log_reach2(m_.reach[candidate(i)]);
    }
    kernel::exponentials(how_, m_.reach2.data(), picks_, 0);
    for (index_t i = 0; i < picks_; ++i) m_.reach2[at(i)] *= reach_unit2_;
    return true;
  }

  /// Brings a head's reference up to `logit`; never down.
  void raise_to(index_t h, float logit) noexcept {
    if (!(logit > reference_[at(h)])) return;
    if (std::isfinite(reference_[at(h)])) {
      const double factor = std::exp(static_cast<double>(reference_[at(h)] - logit));
      sampled_.rescale(h, factor);
      certain_.rescale(h, factor);
    }
    reference_[at(h)] = logit;
  }

 protected:
  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] std::size_t candidate(index_t pick) const noexcept { return std::size_t{m_.picks[at(pick)]}; }

  // x = exp(l − reference), 0 behind the block's rows.
  void exponentials(float* x, index_t n) const noexcept {
    for (index_t h = 0; h < heads_; ++h) {
      float* l = x + h * kernel::block_rows;
      static_cast<void>(kernel::block_exponentials(how_, l, n, reference_[at(h)]));
      std::fill(l + n, l + kernel::block_rows, 0.0f);
    }
  }

 private:
  // log (r/reach_unit)², so that its square is a float, and at any scale of the values the same; whose r² is larger is
  // read for certain, or hardly differs.
  [[nodiscard]] static float log_reach2(std::int16_t reach) noexcept {
    return std::clamp(static_cast<float>(reach) * (2.0f / 512), -80.0f, 60.0f);
  }

  void set_levels() noexcept { kernel::cell_levels(how_, tables_.query, candidates_, m_.level.data()); }

  // Keys of the first `count` of m_.kept, candidates here.
  [[nodiscard]] bool read_keys(index_t count) noexcept {
    const index_t pieces = (count + index_piece::rows - 1) / index_piece::rows;
    group_.for_each_piece(pieces, [&](index_t piece, std::span<std::byte> memory) {
      arena a(memory);
      const index_piece own = index_piece::take(a, heads_, head_.dk(), head_.dv());
      const rows_of rows(head_, own.gathered);
      const index_t end = std::min(count, (piece + 1) * index_piece::rows);
      typename index_reader_memory::keys_seen& seen = m_.keys[at(piece)];
      seen.top.fill(-std::numeric_limits<float>::infinity());
      seen.outside = {};
      seen.odd = 0;
      std::array<ordinal, kernel::block_rows> cells{};
      for (index_t first = piece * index_piece::rows; first < end; first += kernel::block_rows) {
        const index_t n = std::min(kernel::block_rows, end - first);
        const ordinal* const which = m_.kept.data() + first;
        for (index_t i = 0; i < n; ++i) cells[at(i)] = m_.cells[which[i]];
        for (index_t i = first + n; i < std::min(count, first + n + kernel::block_rows); ++i)
          rows.fetch_key(index_t{m_.cells[m_.kept[at(i)]]});
        float* const x = own.x.data();
        kernel::block_logits<K>(prepared_, rows.keys(cells.data(), n), x);
        for (index_t h = 0; h < heads_; ++h) {
          float* const l = x + h * kernel::block_rows;
          seen.outside[at(h)] += outside_of_scores(h, l, n, which);
          transform(h, cells.data(), l, n);
          float top = 0;
          if (!kernel::block_maximum(how_, l, n, top)) seen.odd |= 1u << h;
          seen.top[at(h)] = std::max(seen.top[at(h)], top);
          float* const to = m_.logits.data() + h * m_.capacity;
          for (index_t i = 0; i < n; ++i) to[which[i]] = l[i];
        }
        for (index_t i = 0; i < n; ++i) m_.seen[which[i]] = 1;
      }
    });
    for (index_t piece = 0; piece < pieces; ++piece) {
      const typename index_reader_memory::keys_seen& seen = m_.keys[at(piece)];
      odd_ |= seen.odd;
      for (index_t h = 0; odd_ == 0 && h < heads_; ++h) {
        breaches_[at(h)] += seen.outside[at(h)];
        raise(h, seen.top[at(h)]);
      }
    }
    keys_read_ += count;
    return odd_ == 0;
  }

  // 1/π of levels down to −count.
  void tabulate_probabilities(index_t count) noexcept {
    for (; tabulated_ < std::min(count, m_.levels); tabulated_ += kernel::block_rows) {
      float* p = m_.by_level.data() + tabulated_;
      kernel::inclusion(how_, tables_.query.scan.noise_factor, -static_cast<int>(tabulated_), kernel::block_rows, p);
      for (index_t i = 0; i < kernel::block_rows; ++i) p[i] = 1 / p[i];
    }
  }

  // Logits of rows that are read for certain, into m_.x.
  [[nodiscard]] bool weigh_certain(const ordinal* cells, index_t n) noexcept {
    kernel::block_logits<K>(prepared_, rows_.keys(cells, n), m_.x.data());
    for (index_t h = 0; h < heads_; ++h) {
      float* l = m_.x.data() + h * kernel::block_rows;
      transform(h, cells, l, n);
      hide(h, cells, n, hidden_logit);
      float top;
      if (!kernel::block_maximum(how_, l, n, top)) {
        odd_ |= 1u << h;
        return false;
      }
      raise(h, top);
    }
    return true;
  }
  // Rows that other queries of the group see, and this one does not. They are all certain.
  void hide(index_t h, const ordinal* cells, index_t n, float what) noexcept {
    if (!m_.seen_by) return;
    float* l = m_.x.data() + h * kernel::block_rows;
    for (index_t i = 0; i < n; ++i) {
      if (!m_.seen_by.sees(group_[h].query - group_[0].query, index_t{cells[i]})) l[i] = what;
    }
  }
  void transform(index_t h, const ordinal* cells, float* l, index_t n) const noexcept {
    if (!transforms_) return;
    for (index_t i = 0; i < n; ++i) l[i] = group_[h].row.transform(l[i], index_t{cells[i]});
  }
  // A head's reference, with room, so that it seldom rises.
  void raise(index_t h, float top) noexcept {
    if (top > reference_[at(h)]) raise_to(h, top + 2);
  }

  // The logits that are further from their scores than these state.
  [[nodiscard]] index_t outside_of_scores(index_t h, const float* l, index_t n, const ordinal* which) const noexcept {
    const float base = tables_.offset[at(h)], rounding = 4 * tables_.table_error;
    const std::int16_t* score = m_.score.data() + h * m_.capacity;
    index_t outside = 0;
    for (index_t i = 0; i < n; ++i) {
      const std::size_t c{which[i]};
      const float off = std::abs(l[i] - base - tables_.score(score[c]));
      outside += off > 4 * tables_.error(h, m_.radius[c]) + rounding + 1e-2f * (1 + std::abs(l[i])) ? 1 : 0;
    }
    return outside;
  }

  static constexpr float hidden_logit = -1e30f;

 protected:
  head_group<Head>& group_;
  const Head& head_;
  const cell_tables& tables_;
  index_reader_memory m_;
  rows_of rows_;
  index_t heads_;
  kernel::isa how_;
  const float* centre_;
  float unit_;  // of values' lengths
  float reach_unit2_;
  bool transforms_ = false;
  kernel::block_queries prepared_{};
  kernel::cell_candidates candidates_;
  stratum sampled_, certain_;
  thinning thin_;
  index_t picks_ = 0, kept_ = 0, keys_read_ = 0, tabulated_ = 0;
  std::uint32_t odd_ = 0;
  std::array<float, max_group> reference_{};
  std::array<index_t, max_group> breaches_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
