// Reads rows of a cache for the heads of a group: certain ones, and those that an index's scan has taken, keys first.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/base/workspace.hpp"
#include "vattn/call/call.hpp"
#include "vattn/estimate/strata.hpp"
#include "vattn/index/cell_tables.hpp"
#include "vattn/index/gather.hpp"
#include "vattn/sample/thinning.hpp"

namespace vattn::VATTN_ABI {

/// What a worker needs for a piece of a group's work, at the front of its group's memory.
struct index_piece {
  static constexpr index_t blocks = 32;  // that are scanned
  static constexpr index_t rows = 128;   // whose keys or values are read
  static constexpr index_t most = 16;    // whose sums are kept at a time

  std::span<std::byte> gathered;  // gathered_bytes
  std::span<float> x, spare;      // [heads, block_rows]
  kernel::cell_candidates found;  // of `blocks` blocks

  [[nodiscard]] static index_piece take(arena& a, index_t heads, index_t dk, index_t dv) noexcept {
    constexpr index_t cells = blocks * kernel::scan_keys;
    const auto h = static_cast<std::size_t>(heads), n = static_cast<std::size_t>(cells);
    index_piece p;
    p.gathered = a.take<std::byte>(gathered_bytes(dk, dv));
    p.x = a.take<float>(h * static_cast<std::size_t>(kernel::block_rows));
    p.spare = a.take<float>(h * static_cast<std::size_t>(kernel::block_rows));
    ordinal* const cell = a.take<ordinal>(n).data();
    std::int16_t* const lanes = a.take<std::int16_t>((3 + h) * n).data();
    if (lanes) p.found = {cell, lanes, lanes + cells, lanes + 2 * cells, lanes + 3 * cells, cells, 0};
    return p;
  }
  [[nodiscard]] static std::size_t bytes(index_t heads, index_t dk, index_t dv) noexcept {
    arena count;
    static_cast<void>(take(count, heads, dk, dv));
    return count.used() + workspace::alignment;
  }
};

/// Memory of an `index_reader`, taken from the call's workspace.
struct index_reader_memory {
  // What pieces of keys say.
  struct keys_seen {
    std::array<float, max_group> top;
    std::array<index_t, max_group> outside;
    std::uint32_t odd;
  };
  // What pieces of values say of their spread; its third moment's sum of coefficients.
  struct spread_seen {
    std::array<double, max_group> variance, fourth, third;
  };

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
  std::span<keys_seen> keys;                            // [capacity / index_piece::rows + 1]
  std::span<stratum> parts;                             // [index_piece::most]
  std::span<spread_seen> spreads;                       // [index_piece::most]
  std::span<float> part_vectors;                        // [index_piece::most, heads, dv]
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
    constexpr auto parts = static_cast<std::size_t>(index_piece::most);
    m.keys = a.take<keys_seen>(n / static_cast<std::size_t>(index_piece::rows) + 1);
    m.parts = a.take<stratum>(parts);
    m.spreads = a.take<spread_seen>(parts);
    m.part_vectors = a.take<float>(parts * h * static_cast<std::size_t>(dv));
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
    return true;
  }

  using weighed = thinning::weighed;
  /// `away2` [heads]: ‖ô − c‖², R² = r² + that. Prepares `read_values`.
  void look_at_picks(const std::array<double, max_group>& away2, std::array<weighed, max_group>& found) noexcept {
    for (index_t h = 0; h < heads_; ++h) {
      float* to = thin_.weight(h);
      const float* logits = m_.logits.data() + h * m_.capacity;
      for (index_t i = 0; i < picks_; ++i) to[i] = logits[candidate(i)];
      found[at(h)] = thin_.weigh(h, reference_[at(h)], m_.reach2.data(), away2[at(h)]);
    }
  }

  /// The values of the picks: all of them, or with `goals` (as `thinning` has them, after `look_at_picks`) those that
  /// are worth it. The sums of the sample are then of these.
  void read_values(const std::array<double, kernel::scan_heads>* goals = nullptr) noexcept {
    choose_values(goals);
    sum_values();
  }

  /// Which values `read_values` reads, by `goals` as there.
  void choose_values(const std::array<double, kernel::scan_heads>* goals) noexcept {
    kept_ = thin_.keep(
        goals, tables_.query.scan.numbers, [&](index_t i) { return m_.cells[candidate(i)]; }, m_.kept, m_.weights);
  }

  /// Blocks of the picks whose values are read: `visit(cells, n, w, x, values)`, w [n] 1/π, x [heads, block_rows]
  /// exp(l − reference), 0 from n on, which the visitor may overwrite.
  template <class Visit>
  void visit_values(Visit&& visit) noexcept {
    std::array<ordinal, kernel::block_rows> cells{};
    alignas(64) float w[kernel::block_rows];
    for (index_t from = 0; from < kept_; from += kernel::block_rows) {
      const index_t n = std::min(kernel::block_rows, kept_ - from);
      for (index_t i = from + n; i < std::min(kept_, from + n + kernel::block_rows); ++i)
        rows_.fetch_value(cell(index_t{m_.kept[at(i)]}));
      for (index_t i = 0; i < n; ++i) {
        const index_t p = index_t{m_.kept[at(from + i)]};
        const std::size_t c = candidate(p);
        cells[at(i)] = m_.cells[c];
        w[i] = m_.weights[at(p)];
        for (index_t h = 0; h < heads_; ++h) m_.x[at(h * kernel::block_rows + i)] = m_.logits[at(h * m_.capacity) + c];
      }
      exponentials(m_.x.data(), n);
      visit(cells.data(), n, static_cast<const float*>(w), m_.x.data(), rows_.values(cells.data(), n));
    }
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

  /// The sums of the values that were chosen.
  void sum_values() noexcept {
    const index_t count = kept_;
    sampled_.clear();
    // The first rows have the signs of which the spectrum is known; sums of the others are made apart, and merged.
    index_t done = 0;
    for (; done < count && sampled_.wants_signs(); done += kernel::block_rows)
      add_values(rows_, done, std::min(count, done + kernel::block_rows), coins(), m_.x.data(), m_.spare.data(),
                 sampled_);
    in_parts(
        done, count,
        [&](index_t part, index_t first, index_t last, const rows_of& rows, float* x, float* spare) {
          stratum& to = *std::construct_at(&m_.parts[at(part)], part_vectors(part), heads_, head_.dv());
          to.without_signs();
          for (index_t from = first; from < last; from += kernel::block_rows)
            add_values(rows, from, std::min(last, from + kernel::block_rows), 0, x, spare, to);
        },
        [&](index_t part) { sampled_.merge(m_.parts[at(part)]); });
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
    in_parts(
        0, kept_,
        [&](index_t part, index_t first, index_t last, const rows_of& rows, float* xs, float* dots) {
          typename index_reader_memory::spread_seen& seen = m_.spreads[at(part)];
          seen = {};
          const std::span<float> vectors = part_vectors(part);
          std::fill(vectors.begin(), vectors.end(), 0.0f);
          std::array<ordinal, kernel::block_rows> cells{};
          alignas(64) float w[kernel::block_rows], r2[kernel::block_rows];
          index_t n = 0;
          const auto flush = [&] {
            const kernel::block_of_rows values = rows.values(cells.data(), n);
            kernel::block_logits<V>(u, values, dots);
            for (index_t h = 0; h < heads_; ++h) {
              float* x = xs + h * kernel::block_rows;
              static_cast<void>(kernel::block_exponentials(how_, x, n, reference_[at(h)]));
              const float* dot = dots + h * kernel::block_rows;
              const auto u2 = static_cast<float>(away2[at(h)]), cu = along[at(h)];
              for (index_t i = 0; i < n; ++i) {
                // r is known to a thousandth: that is what distances are known to.
                const float rough = r2[i] + u2, far = std::max(rough - 2 * (dot[i] - cu), 4e-3f * rough);
                const float term = w[i] * (w[i] - 1) * x[i] * x[i] * far;
                seen.variance[at(h)] += static_cast<double>(term);
                seen.fourth[at(h)] += static_cast<double>(term) * static_cast<double>(term);
                x[i] *= term * (w[i] - 1);
                seen.third[at(h)] += static_cast<double>(x[i]);
              }
              std::fill(x + n, x + kernel::block_rows, 0.0f);
            }
            kernel::block_add<V>(how_, xs, heads_, values, dv, vectors.data());
            n = 0;
          };
          for (index_t k = first; k < last; ++k) {
            const index_t p = index_t{m_.kept[at(k)]};
            if (!(m_.weights[at(p)] > 1)) continue;
            const std::size_t c = candidate(p);
            cells[at(n)] = m_.cells[c];
            w[n] = m_.weights[at(p)], r2[n] = m_.reach2[at(p)];
            for (index_t h = 0; h < heads_; ++h) xs[h * kernel::block_rows + n] = m_.logits[at(h * m_.capacity) + c];
            if (++n == kernel::block_rows) flush();
          }
          if (n > 0) flush();
        },
        [&](index_t part) {
          const typename index_reader_memory::spread_seen& seen = m_.spreads[at(part)];
          for (index_t h = 0; h < heads_; ++h) {
            found[at(h)].variance += seen.variance[at(h)], found[at(h)].fourth += seen.fourth[at(h)];
            third[at(h)] += seen.third[at(h)];
          }
          const std::span<const float> vectors = part_vectors(part);
          for (index_t j = 0; j < heads_ * dv; ++j) m_.third[at(j)] += vectors[at(j)];
        });
    for (index_t h = 0; h < heads_; ++h) {
      const kernel::float_map sum(m_.third.data() + h * dv, dv);
      const kernel::const_float_map o(outputs.data() + h * dv, dv);
      found[at(h)].third = static_cast<double>((sum - static_cast<float>(third[at(h)]) * o).norm());
    }
  }

 private:
  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] std::size_t candidate(index_t pick) const noexcept { return std::size_t{m_.picks[at(pick)]}; }
  [[nodiscard]] std::uint64_t coins() noexcept { return (std::uint64_t{coins_.next()} << 32) | coins_.next(); }

  // log r², within what block_exponentials takes; whose r² is larger is read for certain, or hardly differs.
  [[nodiscard]] float log_reach2(std::int16_t reach) const noexcept {
    return std::clamp(static_cast<float>(reach) * (2.0f / 512) + log_unit2_, -80.0f, 80.0f);
  }

  void set_levels() noexcept { kernel::cell_levels(how_, tables_.query, candidates_, m_.level.data()); }

  [[nodiscard]] std::span<float> part_vectors(index_t part) const noexcept {
    const auto size = at(heads_ * head_.dv());
    return m_.part_vectors.subspan(at(part) * size, size);
  }

  // Cuts [first, last) of m_.kept in parts: f(part, from, to, gatherer, x, spare) on any thread, part below
  // index_piece::most, then take(part) in order.
  template <class F, class Take>
  void in_parts(index_t first, index_t last, F&& f, Take&& take) noexcept {
    for (; first < last; first += index_piece::most * index_piece::rows) {
      const index_t parts = std::min(index_piece::most, (last - first + index_piece::rows - 1) / index_piece::rows);
      group_.for_each_piece(parts, [&](index_t part, std::span<std::byte> memory) {
        arena a(memory);
        const index_piece own = index_piece::take(a, heads_, head_.dk(), head_.dv());
        const index_t from = first + part * index_piece::rows;
        f(part, from, std::min(last, from + index_piece::rows), rows_of(head_, own.gathered), own.x.data(),
          own.spare.data());
      });
      for (index_t part = 0; part < parts; ++part) take(part);
    }
  }

  // Adds the values of m_.kept[first, last), at most block_rows.
  void add_values(const rows_of& rows, index_t first, index_t last, std::uint64_t signs, float* x, float* spare,
                  stratum& to) noexcept {
    std::array<ordinal, kernel::block_rows> cells{};
    block_weights b;
    const index_t n = last - first;
    bool certain = true;
    b.clear();
    for (index_t i = last; i < std::min(kept_, last + kernel::block_rows); ++i)
      rows.fetch_value(cell(index_t{m_.kept[at(i)]}));
    for (index_t i = 0; i < n; ++i) {
      const index_t p = index_t{m_.kept[at(first + i)]};
      const std::size_t c = candidate(p);
      cells[at(i)] = m_.cells[c];
      b.r2[i] = m_.reach2[at(p)];
      b.w[i] = m_.weights[at(p)];
      b.t[i] = b.w[i] * (b.w[i] - 1);
      certain = certain && b.w[i] <= 1;
      for (index_t h = 0; h < heads_; ++h) x[h * kernel::block_rows + i] = m_.logits[at(h * m_.capacity) + c];
    }
    exponentials(x, n);
    to.template add<V>(how_, x, b.w, certain ? nullptr : b.t, b.r2, rows.values(cells.data(), n), signs, spare);
  }

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
    if (group_[0].query == group_[heads_ - 1].query) return;  // all see the same
    const population& seen = group_[h].tokens;
    float* l = m_.x.data() + h * kernel::block_rows;
    for (index_t i = 0; i < n; ++i) {
      const index_t token = index_t{cells[i]};
      if (token < seen[0] || token >= seen[0] + seen.size()) l[i] = what;
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

  // x = exp(l − reference), 0 behind the block's rows.
  void exponentials(float* x, index_t n) const noexcept {
    for (index_t h = 0; h < heads_; ++h) {
      float* l = x + h * kernel::block_rows;
      static_cast<void>(kernel::block_exponentials(how_, l, n, reference_[at(h)]));
      std::fill(l + n, l + kernel::block_rows, 0.0f);
    }
  }

  static constexpr float hidden_logit = -1e30f;

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
