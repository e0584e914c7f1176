// Cells of an index that a group's queries see: which are sampled, which are certain; a look at scores; the scan.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
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
        codes_(codes),
        heads_(group.size()),
        random_(group[0].stream) {
    tables_.query.scan.numbers = (std::uint64_t{random_.next()} << 32) | random_.next();
    n_visible_ = seen_by() ? seen_by().seen_by_any() : group[0].tokens.size();
    for (index_t g = 0; g < heads_; ++g) apart_ = std::max(apart_, n_visible_ - group[g].tokens.size());
  }

 protected:
  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  // Which cells each of several queries sees; none where all heads have the same query.
  [[nodiscard]] const cells_of_queries& seen_by() const noexcept { return s_.reader.seen_by; }
  // Rows that are read for certain and that a head's query sees: what not all queries see is certain.
  [[nodiscard]] index_t certain_of(index_t g) const noexcept {
    return certain_ - (n_visible_ - group_[g].tokens.size());
  }

  // Lengths of values are in the queries' value unit, and so is the codes' unit of them.
  [[nodiscard]] float unit() const noexcept { return group_[0].row.value_unit; }
  [[nodiscard]] float reach_unit() const noexcept { return codes_.units().reach * unit(); }

  [[nodiscard]] bool may_pay() const noexcept {
    return index_may_pay(n_visible_, std::min(n_visible_, settings_.sinks + settings_.window + apart_), costs_);
  }
  [[nodiscard]] std::span<const ordinal> certain_cells() const noexcept { return s_.certain.first(at(certain_)); }

  // Which cells are sampled, and which are read for certain: sinks, window, what not all queries see, and what has no
  // code. False: too many.
  [[nodiscard]] bool find_cells() noexcept {
    certain_ = cells_ = 0;
    if (!(seen_by() ? find_shared() : find_own())) return false;
    const std::span<const std::uint64_t> coded = codes_.coded();
    for (index_t b = first_block_; b < end_block_; ++b) {
      const std::uint64_t known = at(b) < coded.size() ? coded[at(b)] : 0;
      for (std::uint64_t left = s_.seen[at(b)] & ~known; left != 0; left &= left - 1) {
        if (!add_certain(b * kernel::scan_keys + std::countr_zero(left))) return false;
      }
      s_.seen[at(b)] &= known;
      cells_ += std::popcount(s_.seen[at(b)]);
    }
    find_rise();
    return cells_ >= costs_.least;
  }

  [[nodiscard]] bool add_certain(index_t cell) noexcept {
    if (certain_ == static_cast<index_t>(s_.certain.size())) return false;
    s_.certain[at(certain_++)] = static_cast<ordinal>(cell);
    return true;
  }
  // What the one query sees between sinks and window, and these. False: too many.
  [[nodiscard]] bool find_own() noexcept {
    const population& tokens = group_[0].tokens;
    const index_t n = tokens.size(), first = std::min(settings_.sinks, n), last = std::max(first, n - settings_.window);
    for (index_t j = 0; j < first; ++j) {
      if (!add_certain(tokens[j])) return false;
    }
    for (index_t j = last; j < n; ++j) {
      if (!add_certain(tokens[j])) return false;
    }
    const auto [from, to] = mark_cells(tokens, first, last, s_.seen);
    first_block_ = from, end_block_ = to;
    return true;
  }
  // Of several queries: what all of them see but for their sinks and windows; these, and what only some see. False: too
  // many.
  [[nodiscard]] bool find_shared() noexcept {
    const cells_of_queries& by = seen_by();
    for (index_t b = 0; b < by.blocks; ++b) s_.seen[at(b)] = by.all(b);
    for (index_t g = 0; g < heads_; ++g) {
      if (g > 0 && group_[g].query == group_[g - 1].query) continue;
      const population& own = group_[g].tokens;
      const auto leave = [&](index_t cell) {
        s_.seen[at(cell / kernel::scan_keys)] &= ~(std::uint64_t{1} << (cell % kernel::scan_keys));
      };
      for (index_t j = 0; j < std::min(settings_.sinks, own.size()); ++j) leave(own[j]);
      for (index_t j = std::max<index_t>(0, own.size() - settings_.window); j < own.size(); ++j) leave(own[j]);
    }
    first_block_ = by.blocks, end_block_ = 0;
    for (index_t b = 0; b < by.blocks; ++b) {
      if (s_.seen[at(b)] != 0) first_block_ = std::min(first_block_, b), end_block_ = b + 1;
      for (std::uint64_t left = by.any(b) & ~s_.seen[at(b)]; left != 0; left &= left - 1) {
        if (!add_certain(b * kernel::scan_keys + std::countr_zero(left))) return false;
      }
    }
    return true;
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
    constexpr index_t most = index_scratch::look_cells / kernel::scan_keys;
    const index_t looks = std::max<index_t>(4, std::lround(token_part_ * double{most}));
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
  // Of mask and position bias: the most that they add to any visible logit, 0 at least. What is no number may be
  // anything: then all rows are read, and it is told.
  void find_rise() noexcept {
    for (index_t g = 0; g < heads_; ++g) {
      query_row<Head> bare = group_[g].row;
      // Heads that are attended together have one mask.
      if (g > 0 && group_[g].query == group_[g - 1].query && bare.alibi_slope == group_[g - 1].row.alibi_slope) {
        rise_[at(g)] = rise_[at(g - 1)];
        continue;
      }
      const population& own = group_[g].tokens;
      bare.softcap = 0;
      rise_[at(g)] = 0;
      if (!bare.transforms()) continue;
      for (index_t j = 0; j < own.size(); ++j) {
        const auto by = static_cast<double>(bare.transform(0, own[j]));
        if (!(by <= rise_[at(g)])) rise_[at(g)] = std::isnan(by) ? std::numeric_limits<double>::infinity() : by;
      }
    }
  }

  head_group<Head>& group_;
  const config& settings_;
  const index_costs costs_;
  index_scratch s_;
  const Head head_;
  index_t n_visible_ = 0, apart_ = 0;  // tokens that any query sees; of them, the most that one does not
  const cell_codes& codes_;
  cell_tables tables_;
  index_t heads_, certain_ = 0, cells_ = 0, first_block_ = 0, end_block_ = 0;
  random_stream random_;
  double token_part_ = 1;  // of the tokens that one sample is of, where others have the rest (dist/): looks are shared
  // Of scores: mean and variance, log Σ e^s·r and log Σ e^s over all cells.
  std::array<double, max_group> score_mean_{}, score_variance_{}, log_mass_{}, log_sum_{};
  std::array<double, max_group> rise_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
