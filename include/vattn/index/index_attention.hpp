// Verified attention by an index beside the cache: a scan of its codes, a Poisson sample of rows wherever they lie.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <span>
#include <utility>

#include "vattn/call/call.hpp"
#include "vattn/certify/certify.hpp"
#include "vattn/estimate/group.hpp"
#include "vattn/exact_attention.hpp"
#include "vattn/index/index_costs.hpp"
#include "vattn/index/index_plan.hpp"
#include "vattn/index/index_reader.hpp"
#include "vattn/index/kv_index.hpp"
#include "vattn/sample/importance.hpp"
#include "vattn/select/selector.hpp"
#include "vattn/settings.hpp"

namespace vattn::VATTN_ABI {

namespace sample {
/// From the codes of a kv_index (index/index_attention.hpp).
struct from_index {
  static constexpr bool is_index = true;
  /// As `from_store` has it.
  static void enter(store_stage) noexcept {}
};
}  // namespace sample

/// What the last step of a KV head's query heads found enough, for the next one to begin with: spares it the first look
/// and the plan. Whatever it holds (another sequence's, nothing that makes sense) costs rows or a look, never the
/// promise: every step is judged by its own sample and covers its own floors.
struct index_memory {
  index_t heads = 0;  ///< that it is of; 0: of none
  cell_thresholds thresholds{};
  std::array<stats::evidence, max_group> estimates{};
  std::array<double, max_group> log_sum{};  ///< of a few scores then
  std::int32_t failures = 0, rest = 0;      ///< times in a row that all rows were read instead; steps to do so unasked

  [[nodiscard]] bool usable(index_t of_heads) const noexcept {
    const cell_thresholds& t = thresholds;
    bool ok = heads == of_heads && t.base > 0 && t.base <= 1 && t.away > 0 && std::isfinite(t.away);
    for (index_t h = 0; ok && h < heads; ++h) {
      const stats::evidence& e = estimates[static_cast<std::size_t>(h)];
      ok = e.finite() && e.dimension >= 1 && e.away2 >= 0 && std::isfinite(e.away2) && e.output2 > 0 &&
           !std::isnan(t.plain[static_cast<std::size_t>(h)]) && !std::isnan(t.floor[static_cast<std::size_t>(h)]);
    }
    return ok;
  }
};

namespace select {
/// The indices of a call's sequences, [n_batch], and what is remembered between its steps, [n_batch, n_kv_heads] or
/// nothing. They must outlive the functor's calls. Memory is written by calls of one query and groups of up to 8 heads,
/// and left alone by others; one call at a time may use it.
template <bool needed>
struct indices_of_call {
  std::span<const kv_index> sequences{};
  std::span<index_memory> memory{};

  template <class Row>
  score_result score(const Row&, const population&, const score_buffers&) const noexcept {
    return {};
  }
  [[nodiscard]] index_t heavy_count(const ranking&, index_t, const config&) const noexcept { return 0; }
};
/// The call must have them.
using beside = indices_of_call<true>;
/// Whatever is at hand: them, or none, and then all rows are read.
using cheapest = indices_of_call<false>;
}  // namespace select

/// Scratch of a group of heads, taken from the call's workspace.
struct index_scratch {
  std::span<std::uint8_t> tables;  // cell_tables::table_bytes
  std::span<float> table;          // cell_tables::scratch_size
  std::span<float> queries;        // [heads, dk]
  std::span<float> output, away;   // [heads, dv]
  std::span<float> vectors;        // [2, dv]
  std::span<std::uint64_t> seen;   // [blocks]: cells that are sampled
  std::span<ordinal> certain;      // cells that are read for certain
  std::span<float> plan;           // plan_sample::storage_size
  std::span<float> looks;          // [heads + 1, look_cells], scores
  index_reader_memory reader;
  exact_scratch exact;

  static constexpr index_t look_cells = 16 * kernel::scan_keys;

  /// More candidates than this cost more than reading all rows.
  [[nodiscard]] static index_t most_candidates(index_t n) noexcept { return n / 3 + 1024; }
  [[nodiscard]] static index_t most_certain(index_t n, index_t fixed) noexcept { return fixed + n / 8 + 64; }

  /// `fixed`: sinks and window.
  [[nodiscard]] static index_scratch take(arena& a, index_t n, index_t heads, index_t dk, index_t dv,
                                          index_t fixed) noexcept {
    const auto h = static_cast<std::size_t>(heads), width = static_cast<std::size_t>(dv);
    const cell_layout most(dk, cell_codes::most_bits);
    index_scratch s;
    static_cast<void>(a.take<std::byte>(
        std::max(exact_scratch::piece_bytes(heads, dv), index_piece::bytes(heads, dk, dv))));  // of pieces, in front
    s.tables = a.take<std::uint8_t>(cell_tables::table_bytes(most, heads));
    s.table = a.take<float>(cell_tables::scratch_size(most, heads));
    s.queries = a.take<float>(h * static_cast<std::size_t>(dk));
    s.output = a.take<float>(h * width);
    s.away = a.take<float>(h * width);
    s.vectors = a.take<float>(2 * width);
    s.seen = a.take<std::uint64_t>(static_cast<std::size_t>(n / kernel::scan_keys + 1));
    s.certain = a.take<ordinal>(static_cast<std::size_t>(most_certain(n, fixed)));
    s.plan = a.take<float>(plan_sample::storage_size(heads));
    s.looks = a.take<float>((h + 1) * static_cast<std::size_t>(look_cells));
    s.reader = index_reader_memory::take(a, heads, dk, dv, most_candidates(n));
    s.exact = exact_scratch::take(a, heads, dk, dv);
    return s;
  }
};

/// Bytes of `index_scratch` for a group.
[[nodiscard]] inline std::size_t index_bytes(index_t n, index_t heads, index_t dk, index_t dv, index_t fixed) noexcept {
  arena count;
  static_cast<void>(index_scratch::take(count, n, heads, dk, dv, fixed));
  return count.used() + workspace::alignment;
}

/// Whether sampling n tokens, `fixed` of them certain, may cost less than reading them all.
[[nodiscard]] inline bool index_may_pay(index_t n, index_t fixed) noexcept {
  constexpr index_costs costs;
  constexpr index_shape_of_sample shape;
  const double rows = costs.key * (shape.pilot_base + shape.pilot) + static_cast<double>(fixed);
  return n - fixed >= costs.least && costs.scan * static_cast<double>(n) + rows + costs.once < static_cast<double>(n);
}

/// One call's work for the heads of a group:
///   tables -> scan -> pilot -> plan -> keys -> thin -> values -> judge, again with more rows while a head is not
/// verified. The sample is Poisson, its probabilities a function of codes alone: each estimate is unbiased over the
/// draw, wherever the rows lie and however logits are made of products. docs/index.md has the details.
template <class Policy, kv_head Head>
class index_sampler {
  using B = typename Policy::bound;
  using stage = sample::store_stage;
  static void enter(stage s) noexcept {
    if constexpr (requires { Policy::sampler::enter(s); }) Policy::sampler::enter(s);
  }

 public:
  /// `codes` and `value_centre` [dv]: a kv_index's of the KV head.
  index_sampler(head_group<Head>& group, const config& settings, const cell_codes& codes, const float* value_centre,
                index_memory* remembered, const index_scratch& memory) noexcept
      : group_(group),
        settings_(settings),
        promise_{settings.epsilon, settings.delta, settings.scale, shape.kappa},
        remembered_(remembered),
        s_(memory),
        head_(group[0].row.head),
        tokens_(seen_together(group)),
        codes_(codes),
        centre_(value_centre),
        heads_(group.size()),
        random_(group[0].stream) {
    tables_.query.scan.numbers = (std::uint64_t{random_.next()} << 32) | random_.next();
    share_.fill(1);
    for (index_t g = 0; g < heads_; ++g) {
      const population& own = group[g].tokens;
      if (own.size() == tokens_.size()) continue;  // all of them
      front_ = std::max(front_, own[0] - tokens_[0]);
      back_ = std::max(back_, tokens_[0] + tokens_.size() - own[0] - own.size());
    }
  }

  /// Attends every head: verified, or exactly where that costs less or does not come to an end.
  void run() noexcept {
    if (!resting() && may_pay() && find_cells()) {
      enter(stage::tables);
      for (index_t g = 0; g < heads_; ++g)
        std::copy_n(group_[g].row.scaled_query, head_.dk(), s_.queries.data() + g * head_.dk());
      if (tables_.make(codes_, s_.queries.data(), heads_, s_.tables, s_.table)) {
        index_reader<Head> read(group_, tables_, s_.queries.data(), codes_.units().reach, centre_, s_.reader,
                                random_.fork(1));
        sample_until_verified(read);
        for (index_t g = 0; g < heads_; ++g) group_[g].ok = group_[g].ok && (read.odd() >> g & 1) == 0;
        remember();
      }
    }
    rest_exactly();
  }

 protected:  // for dist/, where a shard's sample is judged together with those of others
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

  [[nodiscard]] bool may_pay() const noexcept { return index_may_pay(tokens_.size(), sinks() + window()); }

  // Where sampling came to nothing it is left for a while: twice as long each time.
  [[nodiscard]] bool resting() noexcept {
    if (!remembered_ || remembered_->rest <= 0) return false;
    remembered_->rest = std::min<std::int32_t>(remembered_->rest, longest_rest) - 1;
    return true;
  }
  void remember() noexcept {
    if (!remembered_) return;
    index_memory& m = *remembered_;
    if (!std::all_of(done_.begin(), done_.begin() + heads_, [](bool done) { return done; })) {
      m.heads = 0;
      m.failures = std::clamp<std::int32_t>(m.failures, 0, 5) + 1;
      m.rest = std::min<std::int32_t>(longest_rest, 1 << m.failures);
      return;
    }
    m = {heads_, wanted_, estimate_, log_sum_};
    // What was read for nothing, or would not quite have been enough.
    for (index_t h = 0; h < heads_; ++h)
      m.thresholds.plain[at(h)] += std::clamp(-std::log(std::max(need_[at(h)], 1e-3)), -0.3, 0.3);
  }

  // Begins where the last step ended: with its thresholds where scores are as they were then, else with a plan for
  // outputs of the lengths that they had. False: with nothing at hand, or nothing that fits.
  [[nodiscard]] bool resume(index_reader<Head>& read) noexcept {
    if (!remembered_ || !remembered_->usable(heads_)) return false;
    const index_memory& m = *remembered_;
    wanted_ = m.thresholds;
    estimate_ = m.estimates;
    wanted_.z = shape.z;
    wanted_.base = std::clamp(wanted_.base, shape.pilot_base / static_cast<double>(cells_), 1.0);
    wanted_.away = std::max(wanted_.away, 0.5);
    bool same = true;
    for (index_t h = 0; h < heads_; ++h) {
      const double shift = log_sum_[at(h)] - m.log_sum[at(h)];
      if (!(std::abs(shift) < 30)) return false;
      same = same && std::abs(shift) < 0.3;
      wanted_.plain[at(h)] += shift, wanted_.floor[at(h)] += shift;
    }
    scanned_ = wanted_;
    const double reserve = same ? 0.3 : 0.7;
    for (index_t h = 0; h < heads_; ++h) scanned_.plain[at(h)] -= reserve, scanned_.floor[at(h)] -= reserve;
    scanned_.away *= 1.2;
    guessed_ = true;
    if (!scan(read) || 8 * read.candidates().size > 3 * cells_) return false;
    guessed_ = false;
    if (same) return true;
    enter(stage::plan);
    take_plan_sample(read);
    for (index_t h = 0; h < heads_; ++h) {
      const double log_sum = plan_.log_sum(h, score_mean_[at(h)], score_variance_[at(h)], tables_);
      sampled_x_[at(h)] = std::exp(std::min(
          80.0, log_sum + static_cast<double>(tables_.offset[at(h)]) - static_cast<double>(read.reference(h))));
      estimate_[at(h)].denominator = sampled_x_[at(h)] + read.certain().of(h).x;
      if (!estimate_[at(h)].finite()) return false;
    }
    return make_plan(read);
  }
  void take_plan_sample(index_reader<Head>& read) noexcept {
    plan_ = plan_sample(kernel::active_isa(), s_.plan, heads_);
    plan_.take(tables_, read.candidates(), read.levels(), 1);
  }

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

  // Thresholds of the first scan: those of a sample that is enough for an output as far from 0 as the values' centre.
  void guess_thresholds() noexcept {
    const auto unit = static_cast<double>(codes_.units().reach);
    const auto centre2 =
        static_cast<double>(kernel::const_float_map(centre_, static_cast<Eigen::Index>(head_.dv())).squaredNorm());
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

  [[nodiscard]] bool scan(index_reader<Head>& read) noexcept {
    enter(stage::scan);
    for (int attempt = 0; attempt < 3; ++attempt) {
      tables_.set(scanned_);
      read.candidates().size = 0;
      if (scan_blocks(read.candidates())) {
        read.forget();
        return true;
      }
      if (!guessed_) return false;  // what is asked for is too much
      for (index_t h = 0; h < heads_; ++h) scanned_.plain[at(h)] += 1.5, scanned_.floor[at(h)] += 1.5;
    }
    return false;
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

  void sample_until_verified(index_reader<Head>& read) noexcept {
    enter(stage::slice);
    if (!read.read_certain({s_.certain.data(), at(certain_)})) return;
    enter(stage::pilot);
    if (!look_at_scores()) return;
    if (!resume(read)) {
      guess_thresholds();
      if (!scan(read)) return;
      enter(stage::pilot);
      if (!pilot(read)) return;
      enter(stage::plan);
      if (!make_plan(read)) return;
    }
    const auto most = static_cast<index_t>(settings_.max_density * static_cast<double>(tokens_.size()));
    squeeze_.fill(1);
    for (index_t round = 1; round <= settings_.max_rounds; ++round) {
      if (!scan_for_wanted(read)) return;
      enter(stage::picks);
      if (!weigh_enough(read)) {
        if (read.odd() != 0 || certain_ + read.picks() > most) return;
        continue;  // more than the scan has
      }
      if (certain_ + read.picks() > most) return;
      read.read_values(read.picks() > few_picks ? &goals_ : nullptr);
      enter(stage::judge);
      if (judge(read, round)) return;
    }
  }

  // Scans again where the wanted thresholds are lower than the last scan's. False: that is too much.
  [[nodiscard]] bool scan_for_wanted(index_reader<Head>& read) noexcept {
    if (covered_by_scan()) return true;
    for (index_t h = 0; h < heads_; ++h)
      scanned_.plain[at(h)] = std::min(scanned_.plain[at(h)], wanted_.plain[at(h)] - 0.3),
      scanned_.floor[at(h)] = std::min(scanned_.floor[at(h)], wanted_.floor[at(h)] - 0.3);
    scanned_.base = std::max(scanned_.base, wanted_.base);
    scanned_.away = std::max(scanned_.away, wanted_.away);
    return scan(read);
  }

  [[nodiscard]] bool covered_by_scan() const noexcept {
    bool ok = wanted_.base <= scanned_.base && wanted_.away <= scanned_.away;
    for (index_t h = 0; h < heads_; ++h) {
      ok = ok && wanted_.plain[at(h)] >= scanned_.plain[at(h)] && wanted_.floor[at(h)] >= scanned_.floor[at(h)];
    }
    return ok;
  }

  [[nodiscard]] stats::evidence estimate(const index_reader<Head>& read, index_t g) noexcept {
    const float sink = group_[g].row.sink_logit;
    const double extra = std::isfinite(sink) ? std::exp(static_cast<double>(sink - read.reference(g))) : 0;
    const auto dv = at(head_.dv());
    return estimate_strata(read.sampled(), read.certain(), g, certain_, certain_, extra, {centre_, dv},
                           s_.output.subspan(at(g) * dv, dv), s_.vectors.data());
  }

  // Estimates of all heads from the values that were read last; false where one is not finite.
  [[nodiscard]] bool estimate_all(index_reader<Head>& read, std::array<stats::evidence, max_group>& to) noexcept {
    const index_t dv = head_.dv();
    std::array<double, max_group> away2{};
    for (index_t g = 0; g < heads_; ++g) {
      to[at(g)] = estimate(read, g);
      if (!to[at(g)].finite()) return false;
      away2[at(g)] = to[at(g)].away2;
      kernel::float_map(s_.away.data() + g * dv, dv) =
          kernel::const_float_map(s_.output.data() + g * dv, dv) - kernel::const_float_map(centre_, dv);
    }
    std::array<typename index_reader<Head>::spread, max_group> found;
    read.measure_spread(s_.output, s_.away, away2, found);
    for (index_t g = 0; g < heads_; ++g) {
      stats::evidence& e = to[at(g)];
      const double d2 = e.denominator * e.denominator;
      e.variance = found[at(g)].variance / d2;
      e.skew = found[at(g)].variance > 0 ? found[at(g)].third / (found[at(g)].variance * e.denominator) : 0;
      e.rows = certain_of(g) + read.values_read(), e.certain = certain_of(g);
      e.dof = found[at(g)].fourth > 0 ? 2 * found[at(g)].variance * found[at(g)].variance / found[at(g)].fourth
                                      : std::numeric_limits<double>::infinity();
    }
    return true;
  }

  // A first look: the candidates of thresholds so much higher that a few rows for each head are left.
  [[nodiscard]] bool pilot(index_reader<Head>& read) noexcept {
    const auto rows = static_cast<index_t>(shape.pilot * (1 + static_cast<double>(heads_)));
    take_plan_sample(read);
    const double nats = read.excess_for(rows) * static_cast<double>(tables_.step);
    wanted_ = scanned_;
    wanted_.base = scanned_.base * std::exp(-nats);
    for (index_t h = 0; h < heads_; ++h) wanted_.plain[at(h)] += nats, wanted_.floor[at(h)] += nats;
    tables_.set(wanted_);
    if (!read.pick(1)) return false;
    read.read_values();
    if (!estimate_all(read, estimate_)) return false;
    for (index_t h = 0; h < heads_; ++h) sampled_x_[at(h)] = read.sampled().of(h).x;
    return true;
  }

  [[nodiscard]] bool make_plan(const index_reader<Head>& read) noexcept {
    const auto unit = static_cast<double>(codes_.units().reach);
    wanted_.away = 0.5;
    for (index_t g = 0; g < heads_; ++g)
      wanted_.away = std::max(wanted_.away, 1.1 * std::sqrt(estimate_[at(g)].away2) / unit);
    for (index_t g = 0; g < heads_; ++g) {
      const stats::evidence& e = estimate_[at(g)];
      const double margin = plan_margin / known_variance_radius2(e.dimension);
      plan_.set_goal(g,
                     {.goal = margin * goal2(g, e) * e.denominator * e.denominator,
                      .denominator = sampled_x_[at(g)],
                      .away2 = e.away2,
                      .mean = score_mean_[at(g)],
                      .variance = score_variance_[at(g)],
                      .floor = floor_threshold(read, g, e) - 0.1},
                     tables_, unit, wanted_);
    }
    const double rows = plan_.choose(wanted_, static_cast<double>(cells_));
    guessed_ = false;
    return costs_.key * rows + costs_.once < static_cast<double>(tokens_.size());
  }

  // This sample's share of what the error's square may be.
  [[nodiscard]] double goal2(index_t g, const stats::evidence& e) const noexcept {
    return share_[at(g)] * stats::squared_goal(e, promise_);
  }

  // log(κ ε T D) as a threshold of scores of k − μ plus log(r/unit): a token that is missed although it may move the
  // output by f must cost at most κ·ε·T, and moves it by x‖v − ô‖ <= x(r + ‖ô − c‖), at a typical r.
  [[nodiscard]] double floor_threshold(const index_reader<Head>& read, index_t g,
                                       const stats::evidence& e) const noexcept {
    const double unit = static_cast<double>(codes_.units().reach), away = std::max(1e-12, std::sqrt(e.away2));
    return std::log(stats::missable(e, promise_)) + static_cast<double>(read.reference(g)) -
           static_cast<double>(tables_.offset[at(g)]) - std::log(unit + std::min(away, unit * unit / away)) -
           rounding(g) - rise(g, static_cast<double>(read.reference(g)) + std::log(e.denominator));
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

  // What the tables' rounding adds to z errors of a typical cell's score: it is independent of them.
  [[nodiscard]] double rounding(index_t g) const noexcept {
    const double sigma = static_cast<double>(tables_.error(g, 32767)) * typical_radius_;
    return shape.z * (std::hypot(sigma, static_cast<double>(tables_.table_error)) - sigma);
  }

  // Reads the keys that the wanted thresholds take, and of lower ones as long as they show that this is not enough.
  // False: a number was not finite, or the scan's thresholds are too high.
  [[nodiscard]] bool weigh_enough(index_reader<Head>& read) noexcept {
    std::array<double, max_group> away2{};
    for (index_t g = 0; g < heads_; ++g) away2[at(g)] = estimate_[at(g)].away2;
    for (int attempt = 0;; ++attempt) {
      tables_.set(wanted_);
      if (!read.pick(1)) return false;
      std::array<typename index_reader<Head>::weighed, max_group> found;
      read.look_at_picks(away2, found);
      bool again = false;
      goals_.fill(std::numeric_limits<double>::infinity());
      for (index_t g = 0; g < heads_; ++g) {
        if (done_[at(g)]) continue;
        const stats::evidence& e = estimate_[at(g)];
        const double d = read.certain().of(g).x + found[at(g)].x + elsewhere(read, g);
        const double goal = squeeze_[at(g)] * thin_margin / known_variance_radius2(e.dimension) * goal2(g, e) * d * d;
        goals_[at(g)] = goal;
        // With the quantile's part for few effective terms.
        const double need = found[at(g)].variance * (1 + 4 * found[at(g)].concentration) / goal;
        need_[at(g)] = need;
        if (need > worth_thinning && attempt < 4) {
          wanted_.plain[at(g)] = binding(g) - std::max(0.1, std::log(need / worth_thinning));
          again = true;
        }
      }
      if (!again) return true;
      if (!covered_by_scan()) return false;
    }
  }

  // Of D, what others have read (dist/): relative to the reference that they knew.
  [[nodiscard]] double elsewhere(const index_reader<Head>& read, index_t g) const noexcept {
    return elsewhere_[at(g)] > 0 ? elsewhere_[at(g)] * std::exp(elsewhere_reference_[at(g)] - double{read.reference(g)})
                                 : 0;
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
  [[nodiscard]] coverage covers(const index_reader<Head>& read, index_t g, const stats::evidence& e) const noexcept {
    const double floor = floor_threshold(read, g, e);
    const double away = away_share * std::sqrt(e.away2) / static_cast<double>(codes_.units().reach);
    return {floor, away, wanted_.floor[at(g)] <= floor + floor_slack && away <= wanted_.away};
  }
  // Thresholds of the next look, for a head that is not verified; `away` rises to what the heads want.
  void ask_for_more(const index_reader<Head>& read, index_t g, const coverage& c, const stats::verdict& v,
                    double& away) noexcept {
    away = std::max(away, 1.1 * c.away / away_share);
    if (!c.enough) wanted_.floor[at(g)] = std::min(wanted_.floor[at(g)], c.floor - 0.1);
    if (v.met) return;
    squeeze_[at(g)] *= 0.95 / v.ratio;
    if (10 * read.values_read() >= 9 * read.picks())
      wanted_.plain[at(g)] = binding(g) - std::max(0.1, std::log(v.ratio));
  }

  // Writes what is verified, and sets the next thresholds for the rest. True: all are done, or will not be.
  [[nodiscard]] bool judge(index_reader<Head>& read, index_t round) noexcept {
    bool all = true;
    std::array<stats::evidence, max_group> now;
    if (!estimate_all(read, now)) return true;
    double away_wanted = wanted_.away;
    for (index_t g = 0; g < heads_; ++g) {
      head_task<Head>& task = group_[g];
      if (done_[at(g)]) continue;
      certificate& c = task.c;
      c.rounds = round;
      c.breaches = read.breaches(g);
      if (c.breaches > stats::breaches_of_errors(read.keys_read())) return true;
      const stats::evidence& e = estimate_[at(g)] = now[at(g)];
      const stats::verdict v = stats::judge<B>(e, promise_);
      const coverage has = covers(read, g, e);
      if (v.met && has.enough) {
        write(read, g, e, v);
        continue;
      }
      all = false;
      ask_for_more(read, g, has, v, away_wanted);
    }
    wanted_.away = away_wanted;
    return all;
  }

  void write(const index_reader<Head>& read, index_t g, const stats::evidence& e, const stats::verdict& v) noexcept {
    head_task<Head>& task = group_[g];
    done_[at(g)] = true;
    stats::certify(task.c, e, v,
                   {.rows_exact = certain_of(g),
                    .rows_sampled = read.picks(),
                    .budget = read.picks(),
                    .kind = B::kind,
                    .bound = B::name,
                    .assumptions = "asymptotic, as stated by the bound; and the codes' stated errors are true"});
    if (const chosen_rows& to = task.s.chosen) {
      to.clear();
      for (index_t i = 0; i < certain_; ++i) {
        const index_t cell = index_t{s_.certain[at(i)]};
        const bool seen =
            certain_of(g) == certain_ || (cell >= task.tokens[0] && cell < task.tokens[0] + task.tokens.size());
        if (seen) to.add(cell, 1);
      }
      for (index_t i = 0; i < read.picks(); ++i) {
        if (read.weight(i) > 0) to.add(read.cell(i), static_cast<double>(read.weight(i)));
      }
    }
    task.state.clear();
    task.state.raise(read.reference(g));
    task.state.add_denominator(e.denominator);
    const std::span<float> to = task.state.numerator();
    for (std::size_t j = 0; j < to.size(); ++j)
      to[j] = s_.output[at(g) * to.size() + j] * static_cast<float>(e.denominator);
  }

  // squared_radius(1, dimension, ∞), by Wilson and Hilferty's cube root: for plans, which need no more.
  [[nodiscard]] double known_variance_radius2(double dimension) const noexcept {
    if (dimension < 3) return stats::squared_radius<B>(1, 0, {dimension, stats::infinity, 1e6}, settings_.delta);
    const double spread = 2 / (9 * dimension);
    const double root = 1 - spread + stats::normal_quantile(1 - settings_.delta) * std::sqrt(spread);
    return root * root * root;
  }

  // All rows, for the heads that are not done.
  void rest_exactly(bool with_power = false) noexcept {
    enter(stage::exact);
    std::uint32_t left = 0;
    for (index_t g = 0; g < heads_; ++g) left |= done_[at(g)] ? 0u : 1u << g;
    attend_group_exactly(group_, left, s_.exact, with_power);
  }

  static constexpr index_shape_of_sample shape{};
  static constexpr index_costs costs_{};
  // Of the variance that verifies: what the keys are planned for, and what is kept of them.
  static constexpr double plan_margin = 1.0, thin_margin = 0.92;
  // Of the picks' goal: more variance than this with all of them, and it is worth reading more keys.
  static constexpr double worth_thinning = 1.0;
  static constexpr index_t few_picks = 256;  // that are not worth thinning
  static constexpr std::int32_t longest_rest = 64;

  head_group<Head>& group_;
  const config& settings_;
  stats::promise promise_;
  index_memory* remembered_;
  index_scratch s_;
  const Head head_;
  const population tokens_;
  index_t front_ = 0, back_ = 0;  // tokens at its ends that not all queries see
  const cell_codes& codes_;
  const float* centre_;
  cell_tables tables_;
  index_t heads_, certain_ = 0, cells_ = 0, first_block_ = 0, end_block_ = 0;
  random_stream random_;
  plan_sample plan_;
  cell_thresholds scanned_, wanted_;
  bool guessed_ = false;  // the scan's thresholds, by a look at scores
  double typical_radius_ = 0.3;
  std::array<double, max_group> score_mean_{}, score_variance_{}, log_mass_{}, log_sum_{};
  std::array<double, max_group> squeeze_{}, need_{}, sampled_x_{}, rise_{};
  std::array<double, max_group> share_{}, elsewhere_{}, elsewhere_reference_{};
  std::array<double, kernel::scan_heads> goals_{};
  std::array<bool, max_group> done_{};
  std::array<stats::evidence, max_group> estimate_{};
};

/// Every head of the group by its index.
template <class Policy, kv_head Head>
void attend_by_index(head_group<Head>& group, const config& settings, std::span<const kv_index> indices,
                     std::span<index_memory> memory) noexcept {
  arena a(group.memory);
  const query_row<Head>& row = group[0].row;
  const index_t kv_heads = indices[0].shape().n_kv_heads;
  const kv_index& index = indices[static_cast<std::size_t>(row.kv_head / kv_heads)];
  const auto scratch = index_scratch::take(a, row.head.size(), group.size(), row.head.dk(), row.head.dv(),
                                           settings.sinks + settings.window);
  index_memory* const remembered = memory.empty() ? nullptr : &memory[static_cast<std::size_t>(row.kv_head)];
  const index_t kv = row.kv_head % kv_heads;
  index_sampler<Policy, Head>(group, settings, index.codes(kv), index.value_centre(kv), remembered, scratch).run();
}

/// What can be wrong with the indices of a call.
template <kv_cache KV, class Indices>
[[nodiscard]] status check_index_call(const KV& cache, const Indices& indices) noexcept {
  const auto ll = [](index_t v) { return static_cast<long long>(v); };
  if (static_cast<index_t>(indices.sequences.size()) != cache.n_batch()) {
    return status::error(errc::invalid_argument, "%zu indices for %lld sequences: give one for each",
                         indices.sequences.size(), ll(cache.n_batch()));
  }
  if (!indices.memory.empty() && static_cast<index_t>(indices.memory.size()) != cache.n_batch() * cache.n_kv_heads()) {
    return status::error(errc::invalid_argument,
                         "memory of %zu KV heads for %lld sequences of %lld: give one for each, or none",
                         indices.memory.size(), ll(cache.n_batch()), ll(cache.n_kv_heads()));
  }
  for (const kv_index& i : indices.sequences) {
    if (status s = i.validate(); !s) return s;
    const index_shape& p = i.shape();
    if (p.n_kv_heads != cache.n_kv_heads() || p.dk != cache.dk() || p.dv != cache.dv()) {
      return status::error(errc::invalid_argument,
                           "an index is of %lld KV heads of sizes %lld and %lld, the cache of %lld of %lld and %lld: "
                           "build it from this cache",
                           ll(p.n_kv_heads), ll(p.dk), ll(p.dv), ll(cache.n_kv_heads()), ll(cache.dk()),
                           ll(cache.dv()));
    }
  }
  return {};
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
