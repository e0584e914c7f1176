// Reads rows of a cache for the heads of a group: certain ones, and those that an index's scan has taken, keys first.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/estimate/strata.hpp"
#include "vattn/index/cell_tables.hpp"
#include "vattn/index/gather.hpp"
#include "vattn/runtime/call.hpp"
#include "vattn/runtime/workspace.hpp"
#include "vattn/sample/thinning.hpp"

namespace vattn::VATTN_ABI {

/// Memory of an `index_reader`, taken from the call's workspace.
struct index_reader_memory {
  std::span<std::byte> rows;                            // gathered_bytes
  std::span<float> prepared, centred;                   // queries and outputs as block kernels want them
  std::span<float> sampled, certain;                    // stratum::storage_size
  std::span<float> x, spare;                            // [heads, block_rows]
  std::span<float> third;                               // [heads, dv]
  std::span<ordinal> cells;                             // [capacity]: of candidates
  std::span<std::int16_t> reach, radius, noise, level;  // [capacity]
  std::span<std::int16_t> score;                        // [heads, capacity]
  std::span<float> logits;                              // [heads, capacity], of candidates whose keys were read
  std::span<std::uint8_t> seen;                         // [capacity]: its key was read
  std::span<ordinal> picks;                             // [capacity]: candidates that the thresholds take
  std::span<float> reach2;                              // [capacity], r² of picks
  std::span<float> thinning;                            // thinning::storage_size
  std::span<ordinal> kept;                              // [capacity]: picks whose values are read
  std::span<float> weights;                             // [capacity], 1/π of picks; 0: the value was not read
  std::span<float> by_level;                            // [levels] 1/π
  index_t capacity = 0;
  static constexpr index_t levels = 4096;  // steps below 0: no noise is larger than 17·ln 2 nats

  [[nodiscard]] static index_reader_memory take(arena& a, index_t heads, index_t dk, index_t dv,
                                                index_t capacity) noexcept {
    capacity = (capacity + kernel::scan_keys - 1) / kernel::scan_keys * kernel::scan_keys;
    const auto h = static_cast<std::size_t>(heads), n = static_cast<std::size_t>(capacity);
    index_reader_memory m;
    m.rows = a.take<std::byte>(gathered_bytes(dk, dv));
    m.prepared = a.take<float>(kernel::query_storage(heads, dk));
    m.centred = a.take<float>(kernel::query_storage(heads, dv));
    m.sampled = a.take<float>(stratum::storage_size(heads, dv));
    m.certain = a.take<float>(stratum::storage_size(heads, dv));
    m.x = a.take<float>(h * kernel::block_rows);
    m.spare = a.take<float>(h * kernel::block_rows);
    m.third = a.take<float>(h * static_cast<std::size_t>(dv));
    m.cells = a.take<ordinal>(n);
    m.reach = a.take<std::int16_t>(n);
    m.radius = a.take<std::int16_t>(n);
    m.noise = a.take<std::int16_t>(n);
    m.level = a.take<std::int16_t>(n);
    m.score = a.take<std::int16_t>(h * n);
    m.logits = a.take<float>(h * n);
    m.seen = a.take<std::uint8_t>(n);
    m.picks = a.take<ordinal>(n);
    m.reach2 = a.take<float>(n + static_cast<std::size_t>(kernel::block_rows));
    m.thinning = a.take<float>(thinning::storage_size(heads, capacity));
    m.kept = a.take<ordinal>(n);
    m.weights = a.take<float>(n);
    m.by_level = a.take<float>(static_cast<std::size_t>(levels));
    m.capacity = capacity;
    return m;
  }
};

/// Sums over rows of one KV head for the heads of a group, x = exp(l − reference); references rise as rows are read.
/// The sample is Poisson: candidates of a scan that the present thresholds take, each with its own probability.
template <kv_head Head>
class index_reader {
  using rows_of = row_gatherer<Head>;
  using K = typename rows_of::key_element;
  using V = typename rows_of::value_element;

 public:
  /// `queries` [heads, dk], scaled; all arguments must outlive the reader.
  index_reader(head_group<Head>& group, const cell_tables& tables, const float* queries, float reach_unit,
               const float* value_centre, const index_reader_memory& memory, random_stream coins) noexcept
      : group_(group),
        head_(group[0].row.head),
        tables_(tables),
        m_(memory),
        rows_(head_, memory.rows),
        heads_(group.size()),
        how_(kernel::active_isa()),
        coins_(coins),
        centre_(value_centre),
        log_unit2_(2 * std::log(reach_unit)) {
    prepared_ = kernel::prepare_queries<K>(how_, queries, heads_, head_.dk(), group[0].row.scale, m_.prepared);
    sampled_ = stratum(m_.sampled, heads_, head_.dv());
    certain_ = stratum(m_.certain, heads_, head_.dv());
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
    using kernel::squared_distance;
    block_weights b;
    const auto count = static_cast<index_t>(cells.size());
    for (index_t from = 0; from < count; from += kernel::block_rows) {
      const index_t n = std::min(kernel::block_rows, count - from);
      const ordinal* const here = cells.data() + from;
      b.clear();
      std::fill_n(b.w, n, 1.0f);
      for (index_t i = 0; i < n; ++i) b.r2[i] = squared_distance(head_.value(index_t{here[i]}), centre_);
      if (!weigh(here, n, nullptr)) return false;
      exponentials(n);
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
    return true;
  }

  /// What the picks' keys say of a head: Σ x/π₁, the variance Σ t (x R)² if all values are read, t = 1/π₁·(1/π₁ − 1),
  /// and the sum of the squares of its terms' shares: near 1 it rests on few picks.
  struct weighed {
    double x = 0, variance = 0, concentration = 0;
  };
  /// `away2` [heads]: ‖ô − c‖², R² = r² + that. Prepares `read_values`.
  void look_at_picks(const std::array<double, max_group>& away2, std::array<weighed, max_group>& found) noexcept {
    const Eigen::Map<const Eigen::ArrayXf> inverse(thin_.inverse(), picks_), r2(m_.reach2.data(), picks_);
    for (index_t h = 0; h < heads_; ++h) {
      float* to = thin_.weight(h);
      const float* logits = m_.logits.data() + h * m_.capacity;
      for (index_t i = 0; i < picks_; ++i) to[i] = logits[candidate(i)];
      kernel::exponentials(how_, to, picks_, reference_[at(h)]);
      Eigen::Map<Eigen::ArrayXf> w(to, picks_);
      const auto x = static_cast<double>((w * inverse).sum());
      w *= (r2 + static_cast<float>(away2[at(h)])).sqrt();
      const float all = thin_.all_kept(h, 1).sum;
      const float squares = all > 1e-30f ? thin_.all_kept(h, 1 / all).squares : 0;
      found[at(h)] = {x, static_cast<double>(all), static_cast<double>(squares)};
    }
  }

  /// The values of the picks: all of them, or with `goals` (as `thinning` has them, after `look_at_picks`) those that
  /// are worth it. The sums of the sample are then of these.
  void read_values(const std::array<double, kernel::scan_heads>* goals = nullptr) noexcept {
    index_t count = 0;
    if (goals) {
      static_cast<void>(thin_.solve(*goals));
      for (index_t i = 0; i < picks_; ++i) {
        const float total = thin_.inverse_probability(i);
        // The same number for the same row, whatever is kept beside it.
        const auto u =
            static_cast<float>(kernel::detail::scrambled(tables_.query.scan.numbers ^ m_.cells[candidate(i)]) >> 40) *
            0x1p-24f;
        const bool keep = u * total < thin_.inverse()[i];
        m_.kept[at(count)] = static_cast<ordinal>(i);
        count += keep ? 1 : 0;
        m_.weights[at(i)] = keep ? total : 0;
      }
    } else {
      for (; count < picks_; ++count) m_.kept[at(count)] = static_cast<ordinal>(count);
      std::copy_n(thin_.inverse(), picks_, m_.weights.data());
    }
    kept_ = count;
    sampled_.clear();
    std::array<ordinal, kernel::block_rows> cells{};
    block_weights b;
    const auto fetch = [&](index_t from) {
      for (index_t i = from; i < std::min(count, from + kernel::block_rows); ++i)
        rows_.fetch_value(cell(index_t{m_.kept[at(i)]}));
    };
    for (index_t from = 0; from < count; from += kernel::block_rows) {
      const index_t n = std::min(kernel::block_rows, count - from);
      b.clear();
      bool certain = true;
      fetch(from + kernel::block_rows);
      for (index_t i = 0; i < n; ++i) {
        const index_t p = index_t{m_.kept[at(from + i)]};
        const std::size_t c = candidate(p);
        cells[at(i)] = m_.cells[c];
        b.r2[i] = m_.reach2[at(p)];
        b.w[i] = m_.weights[at(p)];
        b.t[i] = b.w[i] * (b.w[i] - 1);
        certain = certain && b.w[i] <= 1;
        for (index_t h = 0; h < heads_; ++h) m_.x[at(h * kernel::block_rows + i)] = m_.logits[at(h * m_.capacity) + c];
      }
      exponentials(n);
      sampled_.template add<V>(how_, m_.x.data(), b.w, certain ? nullptr : b.t, b.r2, rows_.values(cells.data(), n),
                               coins(), m_.spare.data());
    }
  }

  /// Over the sampled values, t = (1 − π)/π²: Σ t x²‖v − ô‖², the sum of the squares of its terms, and the length of
  /// Σ (1/π − 1)·x·term·(v − ô), the covariance of the first with the error.
  struct spread {
    double variance = 0, fourth = 0, third = 0;
  };
  /// `outputs`, `away` [heads, dv]: ô, and ô − c of squared lengths `away2`. The values are read again, from a cache.
  void measure_spread(std::span<const float> outputs, std::span<const float> away,
                      const std::array<double, max_group>& away2, std::array<spread, max_group>& found) noexcept {
    const index_t dv = head_.dv();
    std::array<float, max_group> along{};   // c·u
    std::array<double, max_group> third{};  // of the coefficients
    for (index_t h = 0; h < heads_; ++h)
      along[at(h)] = kernel::const_float_map(away.data() + h * dv, dv).dot(kernel::const_float_map(centre_, dv));
    const kernel::block_queries u = kernel::prepare_queries<V>(how_, away.data(), heads_, dv, 1, m_.centred);
    found = {};
    std::fill_n(m_.third.begin(), heads_ * dv, 0.0f);
    std::array<ordinal, kernel::block_rows> cells{};
    alignas(64) float w[kernel::block_rows], r2[kernel::block_rows];
    index_t n = 0;
    const auto flush = [&] {
      const kernel::block_of_rows values = rows_.values(cells.data(), n);
      kernel::block_logits<V>(u, values, m_.spare.data());
      for (index_t h = 0; h < heads_; ++h) {
        float* x = m_.x.data() + h * kernel::block_rows;
        static_cast<void>(kernel::block_exponentials(how_, x, n, reference_[at(h)]));
        const float* dot = m_.spare.data() + h * kernel::block_rows;
        const auto u2 = static_cast<float>(away2[at(h)]), cu = along[at(h)];
        spread& s = found[at(h)];
        for (index_t i = 0; i < n; ++i) {
          // r is known to a thousandth: that is what distances are known to.
          const float rough = r2[i] + u2, far = std::max(rough - 2 * (dot[i] - cu), 4e-3f * rough);
          const float term = w[i] * (w[i] - 1) * x[i] * x[i] * far;
          s.variance += static_cast<double>(term), s.fourth += static_cast<double>(term) * static_cast<double>(term);
          x[i] *= term * (w[i] - 1);
          third[at(h)] += static_cast<double>(x[i]);
        }
        std::fill(x + n, x + kernel::block_rows, 0.0f);
      }
      kernel::block_add<V>(how_, m_.x.data(), heads_, values, dv, m_.third.data());
      n = 0;
    };
    for (index_t k = 0; k < kept_; ++k) {
      const index_t p = index_t{m_.kept[at(k)]};
      if (!(m_.weights[at(p)] > 1)) continue;
      const std::size_t c = candidate(p);
      cells[at(n)] = m_.cells[c];
      w[n] = m_.weights[at(p)], r2[n] = m_.reach2[at(p)];
      for (index_t h = 0; h < heads_; ++h) m_.x[at(h * kernel::block_rows + n)] = m_.logits[at(h * m_.capacity) + c];
      if (++n == kernel::block_rows) flush();
    }
    if (n > 0) flush();
    for (index_t h = 0; h < heads_; ++h) {
      const kernel::float_map sum(m_.third.data() + h * dv, dv);
      const kernel::const_float_map o(outputs.data() + h * dv, dv);
      found[at(h)].third = static_cast<double>((sum - static_cast<float>(third[at(h)]) * o).norm());
    }
  }

 private:
  struct block_weights {
    alignas(64) float w[kernel::block_rows], t[kernel::block_rows], r2[kernel::block_rows];
    void clear() noexcept {
      std::fill_n(w, kernel::block_rows, 0.0f);
      std::fill_n(t, kernel::block_rows, 0.0f);
      std::fill_n(r2, kernel::block_rows, 0.0f);
    }
  };

  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] std::size_t candidate(index_t pick) const noexcept { return std::size_t{m_.picks[at(pick)]}; }
  [[nodiscard]] std::uint64_t coins() noexcept { return (std::uint64_t{coins_.next()} << 32) | coins_.next(); }

  // log r², within what block_exponentials takes; whose r² is larger is read for certain, or hardly differs.
  [[nodiscard]] float log_reach2(std::int16_t reach) const noexcept {
    return std::clamp(static_cast<float>(reach) * (2.0f / 512) + log_unit2_, -80.0f, 80.0f);
  }

  void set_levels() noexcept { kernel::cell_levels(how_, tables_.query, candidates_, m_.level.data()); }

  // Keys of the first `count` of m_.kept, candidates here.
  [[nodiscard]] bool read_keys(index_t count) noexcept {
    std::array<ordinal, kernel::block_rows> cells{};
    const auto fetch = [&](index_t from) {
      for (index_t i = from; i < std::min(count, from + kernel::block_rows); ++i)
        rows_.fetch_key(index_t{m_.cells[m_.kept[at(i)]]});
    };
    for (index_t first = 0; first < count; first += kernel::block_rows) {
      const index_t n = std::min(kernel::block_rows, count - first);
      const ordinal* const which = m_.kept.data() + first;
      for (index_t i = 0; i < n; ++i) cells[at(i)] = m_.cells[which[i]];
      fetch(first + kernel::block_rows);
      if (!weigh(cells.data(), n, which)) return false;
      for (index_t h = 0; h < heads_; ++h) {
        float* to = m_.logits.data() + h * m_.capacity;
        for (index_t i = 0; i < n; ++i) to[which[i]] = m_.x[at(h * kernel::block_rows + i)];
      }
      for (index_t i = 0; i < n; ++i) m_.seen[which[i]] = 1;
    }
    keys_read_ += count;
    return true;
  }

  // 1/π of levels down to −count.
  void tabulate_probabilities(index_t count) noexcept {
    for (; tabulated_ < std::min(count, m_.levels); tabulated_ += kernel::block_rows) {
      float* p = m_.by_level.data() + tabulated_;
      kernel::inclusion(how_, tables_.query.scan.noise_factor, -static_cast<int>(tabulated_), kernel::block_rows, p);
      for (index_t i = 0; i < kernel::block_rows; ++i) p[i] = 1 / p[i];
    }
  }

  // Logits of cells into x; `which` are the candidates that they are, whose scores are checked.
  [[nodiscard]] bool weigh(const ordinal* cells, index_t n, const ordinal* which) noexcept {
    kernel::block_logits<K>(prepared_, rows_.keys(cells, n), m_.x.data());
    for (index_t h = 0; h < heads_; ++h) {
      float* l = m_.x.data() + h * kernel::block_rows;
      if (which) check_scores(h, l, n, which);
      if (transforms_) {
        for (index_t i = 0; i < n; ++i) l[i] = group_[h].row.transform(l[i], index_t{cells[i]});
      }
      float top;
      if (!kernel::block_maximum(how_, l, n, top)) {
        odd_ |= 1u << h;
        return false;
      }
      if (top > reference_[at(h)]) {  // with room, so that it seldom happens
        const float higher = top + 2;
        if (std::isfinite(reference_[at(h)])) {
          const double factor = std::exp(static_cast<double>(reference_[at(h)] - higher));
          sampled_.rescale(h, factor);
          certain_.rescale(h, factor);
        }
        reference_[at(h)] = higher;
      }
    }
    return true;
  }

  // Counts the logits that are further from their scores than these state.
  void check_scores(index_t h, const float* l, index_t n, const ordinal* which) noexcept {
    const float base = tables_.offset[at(h)], rounding = 4 * tables_.table_error;
    const std::int16_t* score = m_.score.data() + h * m_.capacity;
    index_t outside = 0;
    for (index_t i = 0; i < n; ++i) {
      const std::size_t c{which[i]};
      const float off = std::abs(l[i] - base - tables_.score(score[c]));
      outside += off > 4 * tables_.error(h, m_.radius[c]) + rounding + 1e-2f * (1 + std::abs(l[i])) ? 1 : 0;
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

  head_group<Head>& group_;
  const Head& head_;
  const cell_tables& tables_;
  index_reader_memory m_;
  rows_of rows_;
  index_t heads_;
  kernel::isa how_;
  random_stream coins_;
  const float* centre_;
  float log_unit2_;
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
