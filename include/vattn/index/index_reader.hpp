// Values of rows that an index's scan has taken: which are worth reading, their sums, and how far they spread.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/index/index_keys.hpp"

namespace vattn::VATTN_ABI {

/// Sums over the sampled rows of a KV head, for the heads of a group.
template <kv_head Head>
class index_reader : public index_keys<Head> {
  using keys = index_keys<Head>;
  using keys::at, keys::candidate, keys::centre_, keys::certain_, keys::exponentials, keys::group_, keys::head_,
      keys::heads_, keys::how_, keys::kept_, keys::m_, keys::picks_, keys::reference_, keys::rows_, keys::sampled_,
      keys::tables_, keys::thin_, keys::unit_;
  using typename keys::rows_of, typename keys::V;

 public:
  /// `queries` [heads, dk], scaled; all arguments must outlive the reader.
  index_reader(head_group<Head>& group, const cell_tables& tables, const float* queries, float reach_unit,
               const float* value_centre, const index_reader_memory& memory, random_stream coins) noexcept
      : keys(group, tables, queries, reach_unit, value_centre, memory), coins_(coins) {}

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
        rows_.fetch_value(this->cell(index_t{m_.kept[at(i)]}));
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
  /// `outputs` [heads, dv]: ô as values are; `away` [heads, dv]: ô − c in the unit of lengths, of squared lengths
  /// `away2`. The values are read again, from a cache.
  void measure_spread(std::span<const float> outputs, std::span<const float> away,
                      const std::array<double, max_group>& away2, std::array<spread, max_group>& found) noexcept {
    const index_t dv = head_.dv();
    std::array<float, max_group> along{};   // c·u, as `dots`: u alone in the unit
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
                const float rough = r2[i] + u2, far = std::max(rough - 2 * unit_ * (dot[i] - cu), 4e-3f * rough);
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
      found[at(h)].third = static_cast<double>(((sum - static_cast<float>(third[at(h)]) * o) * unit_).norm());
    }
  }

 private:
  [[nodiscard]] std::uint64_t coins() noexcept { return (std::uint64_t{coins_.next()} << 32) | coins_.next(); }

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
      rows.fetch_value(this->cell(index_t{m_.kept[at(i)]}));
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

  random_stream coins_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
