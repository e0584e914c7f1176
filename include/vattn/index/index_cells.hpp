// Cells of an index that a group's queries see: which are sampled, which are certain; a look at scores; the scan.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <span>

#include "vattn/call/call.hpp"
#include "vattn/index/index_scratch.hpp"
#include "vattn/index/kv_index.hpp"
#include "vattn/settings.hpp"

namespace vattn::VATTN_ABI {

/// The cells of an index that the queries of a group see: which are sampled, and which are read for certain; what a
/// few scores say of the rest; and the scan.
template <kv_head Head>
class index_cells {
 public:
  /// `codes`: a kv_index's of the KV head.
  index_cells(head_group<Head>& group, const config& settings, const cell_codes& codes, const index_costs& costs,
              const index_scratch& memory) noexcept
      : group_(group),
        settings_(settings),
        costs_(costs),
        s_(memory),
        head_(group[0].row.head),
        tokens_(seen_together(group)),
        codes_(codes),
        heads_(group.size()),
        random_(group[0].stream) {
    tables_.query.scan.numbers = (std::uint64_t{random_.next()} << 32) | random_.next();
    for (index_t g = 0; g < heads_; ++g) {
      const population& own = group[g].tokens;
      if (own.size() == tokens_.size()) continue;  // all of them
      front_ = std::max(front_, own[0] - tokens_[0]);
      back_ = std::max(back_, tokens_[0] + tokens_.size() - own[0] - own.size());
    }
  }

 protected:
  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  // What is read for certain at the ends: with several queries, what not all of them see is among it.
  [[nodiscard]] index_t sinks() const noexcept { return std::min(settings_.sinks + front_, tokens_.size()); }
  [[nodiscard]] index_t window() const noexcept { return std::min(settings_.window + back_, tokens_.size() - sinks()); }
  // The tokens of one query, or, of several that see ranges, those that any of them sees.
  [[nodiscard]] static population seen_together(head_group<Head>& group) noexcept {
    const population& one = group[0].tokens;
    if (group[0].query == group[group.size() - 1].query) return one;
    index_t first = one[0], last = one[0] + one.size();
    for (index_t g = 1; g < group.size(); ++g) {
      const population& own = group[g].tokens;
      first = std::min(first, own[0]), last = std::max(last, own[0] + own.size());
    }
    return {first, last};
  }
  // Rows that are read for certain and that a head's query sees.
  [[nodiscard]] index_t certain_of(index_t g) const noexcept {
    return certain_ - (tokens_.size() - group_[g].tokens.size());
  }

  [[nodiscard]] bool may_pay() const noexcept { return index_may_pay(tokens_.size(), sinks() + window(), costs_); }
  [[nodiscard]] std::span<const ordinal> certain_cells() const noexcept { return s_.certain.first(at(certain_)); }

  // Which cells are sampled, and which are read for certain: sinks, window, and what has no code. False: too many.
  [[nodiscard]] bool find_cells() noexcept {
    const index_t n = tokens_.size(), first = sinks(), last = n - window();
    certain_ = 0;
    const auto certain = [&](index_t cell) {
      if (certain_ == static_cast<index_t>(s_.certain.size())) return false;
      s_.certain[at(certain_++)] = static_cast<ordinal>(cell);
      return true;
    };
    for (index_t j = 0; j < first; ++j) {
      if (!certain(tokens_[j])) return false;
    }
    for (index_t j = last; j < n; ++j) {
      if (!certain(tokens_[j])) return false;
    }
    if (tokens_.contiguous()) {
      const index_t from = tokens_[first], to = tokens_[last - 1] + 1;
      first_block_ = from / kernel::scan_keys, end_block_ = (to - 1) / kernel::scan_keys + 1;
      std::fill(s_.seen.begin() + first_block_, s_.seen.begin() + end_block_, ~std::uint64_t{0});
      s_.seen[at(first_block_)] &= ~std::uint64_t{0} << (from % kernel::scan_keys);
      s_.seen[at(end_block_ - 1)] &= ~std::uint64_t{0} >> (end_block_ * kernel::scan_keys - to);
    } else {
      first_block_ = 0, end_block_ = static_cast<index_t>(s_.seen.size());
      std::fill(s_.seen.begin(), s_.seen.end(), std::uint64_t{0});
      for (index_t j = first; j < last; ++j) {
        const index_t cell = tokens_[j];
        s_.seen[at(cell / kernel::scan_keys)] |= std::uint64_t{1} << (cell % kernel::scan_keys);
      }
    }
    cells_ = 0;
    const std::span<const std::uint64_t> coded = codes_.coded();
    for (index_t b = first_block_; b < end_block_; ++b) {
      const std::uint64_t known = at(b) < coded.size() ? coded[at(b)] : 0;
      for (std::uint64_t left = s_.seen[at(b)] & ~known; left != 0; left &= left - 1) {
        if (!certain(b * kernel::scan_keys + std::countr_zero(left))) return false;
      }
      s_.seen[at(b)] &= known;
      cells_ += std::popcount(s_.seen[at(b)]);
    }
    find_rise();
    return cells_ >= costs_.least;
  }

  // Tables of the queries. False: a query is not finite.
  [[nodiscard]] bool make_tables() noexcept {
    for (index_t g = 0; g < heads_; ++g)
      std::copy_n(group_[g].row.scaled_query, head_.dk(), s_.queries.data() + g * head_.dk());
    return tables_.make(codes_, s_.queries.data(), heads_, s_.tables, s_.table);
  }

  // Scores of a few blocks: their mean and variance, and how many cells a threshold would take.
  [[nodiscard]] bool look_at_scores() noexcept {
    const index_t blocks = end_block_ - first_block_;
    constexpr index_t looks = index_scratch::look_cells / kernel::scan_keys;
    const auto start = static_cast<index_t>(random_.below(static_cast<std::uint32_t>(blocks)));
    float* const reach = s_.looks.data() + heads_ * index_scratch::look_cells;
    index_t count = 0;
    kernel::scanned_cells b;
    tables_.set({});
    for (index_t i = 0; i < std::min(looks, blocks); ++i) {
      const index_t block = first_block_ + (start + i * blocks / looks) % blocks;
      if (s_.seen[at(block)] == 0) continue;
      kernel::score_cells(kernel::active_isa(), tables_.query, codes_.view(), block, b);
      const std::int16_t* lanes =
          kernel::detail::block_lanes(codes_.view(), codes_.view().first + at(block) * codes_.view().stride);
      for (std::uint64_t left = s_.seen[at(block)]; left != 0; left &= left - 1, ++count) {
        const int bit = std::countr_zero(left), lane = (bit & 1) * 32 + bit / 2;
        reach[count] = tables_.log_reach(lanes[kernel::scan_keys + lane]);
        for (index_t h = 0; h < heads_; ++h)
          s_.looks[at(h * index_scratch::look_cells + count)] = tables_.score(b.score[h][lane]);
      }
    }
    if (count < kernel::scan_keys) return false;
    const double each = 1 / static_cast<double>(count), all = std::log(static_cast<double>(cells_) * each);
    const Eigen::Map<const Eigen::ArrayXf> far(reach, count);
    for (index_t h = 0; h < heads_; ++h) {
      Eigen::Map<Eigen::ArrayXf> s(s_.looks.data() + h * index_scratch::look_cells, count);
      const float mean = s.mean(), top = s.maxCoeff();
      score_mean_[at(h)] = static_cast<double>(mean);
      score_variance_[at(h)] = static_cast<double>((s - mean).square().mean());
      const auto log_of_sum = [&](float shift) {
        kernel::exponentials(kernel::active_isa(), s.data(), count, 0);
        return static_cast<double>(shift) + std::log(static_cast<double>(s.sum())) + all;
      };
      s = (s - top + far).min(80.0f);
      log_mass_[at(h)] = log_of_sum(top);
      s *= (-far).exp();
      log_sum_[at(h)] = static_cast<double>(top) + std::log(static_cast<double>(s.sum())) + all;
    }
    return true;
  }

  // All blocks, cut in pieces whose cells are taken over in order. False where there are too many.
  [[nodiscard]] bool scan_blocks(kernel::cell_candidates& out) noexcept {
    const auto scan = [&](index_t first, index_t last, kernel::cell_candidates& to) {
      return kernel::scan_cells(kernel::active_isa(), tables_.query, codes_.view(), first, last, s_.seen.data(), to);
    };
    if (!group_.helpers) return scan(first_block_, end_block_, out);
    std::atomic<index_t> taken_over{0};
    bool full = false;  // as `scan` has it, and guarded by what is taken over
    const index_t pieces = (end_block_ - first_block_ + index_piece::blocks - 1) / index_piece::blocks;
    group_.for_each_piece(pieces, [&](index_t piece, std::span<std::byte> memory) {
      arena a(memory);
      kernel::cell_candidates own = index_piece::take(a, heads_, head_.dk(), head_.dv()).found;
      const index_t first = first_block_ + piece * index_piece::blocks;
      static_cast<void>(scan(first, std::min(end_block_, first + index_piece::blocks), own));
      crew::wait([&] { return taken_over.load(std::memory_order_acquire) == piece; });
      if (!full && own.size > 0) {
        const ordinal last = own.cell[own.size - 1] / kernel::scan_keys;
        index_t before = own.size;
        while (before > 0 && own.cell[before - 1] / kernel::scan_keys == last) --before;
        full = out.size + before + kernel::scan_keys > out.capacity;
        if (!full) {
          std::copy_n(own.cell, own.size, out.cell + out.size);
          std::copy_n(own.reach, own.size, out.reach + out.size);
          std::copy_n(own.radius, own.size, out.radius + out.size);
          std::copy_n(own.noise, own.size, out.noise + out.size);
          for (index_t h = 0; h < heads_; ++h)
            std::copy_n(own.score + h * own.capacity, own.size, out.score + h * out.capacity + out.size);
          out.size += own.size;
        }
      }
      taken_over.store(piece + 1, std::memory_order_release);
    });
    return !full;
  }

  // By how much a logit may be more than scores know of: by mask and position bias, and by the cap's pull towards 0 of
  // what is negative. `top` is about the logarithm of D: what is e^12 below it, a sample of any kind covers.
  [[nodiscard]] double rise(index_t g, double top) const noexcept {
    const auto cap = static_cast<double>(group_[g].row.softcap);
    if (!(cap > 0)) return rise_[at(g)];
    const double lowest = std::clamp((top - 12) / cap, -0.99, 0.0);
    return rise_[at(g)] + cap * (lowest - std::atanh(lowest));
  }
  // Of mask and position bias: the most that they add to any visible logit, 0 at least.
  void find_rise() noexcept {
    for (index_t g = 0; g < heads_; ++g) {
      query_row<Head> bare = group_[g].row;
      bare.softcap = 0;
      rise_[at(g)] = 0;
      if (!bare.transforms()) continue;
      for (index_t j = 0; j < tokens_.size(); ++j)
        rise_[at(g)] = std::max(rise_[at(g)], static_cast<double>(bare.transform(0, tokens_[j])));
    }
  }

  head_group<Head>& group_;
  const config& settings_;
  const index_costs costs_;
  index_scratch s_;
  const Head head_;
  const population tokens_;
  index_t front_ = 0, back_ = 0;  // tokens at its ends that not all queries see
  const cell_codes& codes_;
  cell_tables tables_;
  index_t heads_, certain_ = 0, cells_ = 0, first_block_ = 0, end_block_ = 0;
  random_stream random_;
  // Of scores: mean and variance, log Σ e^s·r and log Σ e^s over all cells.
  std::array<double, max_group> score_mean_{}, score_variance_{}, log_mass_{}, log_sum_{};
  std::array<double, max_group> rise_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
