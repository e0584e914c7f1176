// Verified attention from a shuffled store: heavy tokens by a scan of key codes, the rest by a contiguous slice.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <span>

#include "vattn/configuration.hpp"
#include "vattn/estimate/group.hpp"
#include "vattn/estimate/strata.hpp"
#include "vattn/exact_attention.hpp"
#include "vattn/kernel/scan.hpp"
#include "vattn/kv/store.hpp"
#include "vattn/runtime/call.hpp"
#include "vattn/sample/store_plan.hpp"

namespace vattn {

/// Scratch of a group of heads, taken from the call's workspace.
template <class Head>
struct store_scratch {
  std::span<std::uint8_t> tables;      // [heads][groups][64]
  std::span<float> table, rotated;     // one head's: [heads][groups·64], [width]
  std::span<float> queries, prepared;  // [heads, dk], and as block kernels want them
  std::span<float> picked, light;      // stratum::storage_size
  std::span<float> x, spare;           // [heads, block_rows]
  std::span<float> output, vectors;    // [heads, dv], [2, dv]
  std::span<kernel::scan_pick> picks;
  std::span<float> plan;                      // plan_rows::storage_size
  std::span<query_row<Head>> exact_rows;      // [heads]
  std::span<float> exact_part, exact_logits;  // as query_group wants them
  std::span<float> plan_terms;                // store_planner::storage_size

  /// More picks than this cost more than reading all rows.
  [[nodiscard]] static std::size_t most_picks(index_t n) noexcept { return static_cast<std::size_t>(n / 6 + 512); }

  [[nodiscard]] static store_scratch take(arena& a, index_t n, index_t heads, index_t dk, index_t dv) noexcept {
    const auto h = static_cast<std::size_t>(heads), width = static_cast<std::size_t>(dv);
    // As block_codes lays them out; at most P/6·64 entries and 3 bits a coordinate.
    const std::size_t coordinates = std::bit_ceil(static_cast<std::size_t>(std::max<index_t>(dk, 16)));
    const std::size_t groups = std::max<std::size_t>(coordinates / 6 + 1, 22);
    store_scratch s;
    s.tables = a.take<std::uint8_t>(h * groups * 64);
    s.table = a.take<float>(h * groups * 64);
    s.rotated = a.take<float>(coordinates);
    s.queries = a.take<float>(h * static_cast<std::size_t>(dk));
    s.prepared = a.take<float>(kernel::query_storage(heads, dk));
    s.picked = a.take<float>(stratum::storage_size(heads, dv));
    s.light = a.take<float>(stratum::storage_size(heads, dv));
    s.x = a.take<float>(h * kernel::block_rows);
    s.spare = a.take<float>(h * kernel::block_rows);
    s.output = a.take<float>(h * width);
    s.vectors = a.take<float>(2 * width);
    s.picks = a.take<kernel::scan_pick>(most_picks(n));
    s.plan = a.take<float>(plan_rows::storage_size(heads));
    s.exact_rows = a.take<query_row<Head>>(h);
    s.exact_part = a.take<float>(h * width);
    s.exact_logits = a.take<float>(query_group<Head>::logits_size(heads));
    s.plan_terms = a.take<float>(store_planner::storage_size(heads));
    return s;
  }
};

/// Bytes of `store_scratch` for a group.
template <class Head>
[[nodiscard]] std::size_t store_bytes(index_t n, index_t heads, index_t dk, index_t dv) noexcept {
  arena count;
  static_cast<void>(store_scratch<Head>::take(count, n, heads, dk, dv));
  return count.used() + workspace::alignment;
}

/// One call's work for the heads of a group:
///   prepare -> pilot -> plan -> scan -> read -> judge, the last three again with lower thresholds while a head is not
/// verified. Each token is sampled by whichever design gives it the larger probability: Poisson sampling with π from
/// its code (picked), or the slice of m of N rows (light, π < m/N). Both depend on the code alone, so every estimate is
/// unbiased over the draw and the store's order; docs/mathematics.md has the details.
template <bound B, class Head>
class store_sampler {
  using T = typename Head::key_element;

 public:
  store_sampler(head_group<Head>& group, const config& settings, const store_scratch<Head>& memory) noexcept
      : group_(group), settings_(settings), s_(memory), head_(group[0].row.head), codes_(head_.codes()) {
    heads_ = group.size();
    blocks_ = head_.past() / kernel::scan_keys;
    rows_ = blocks_ * kernel::scan_keys;
    random_stream random = group[0].stream;
    query_.numbers = (std::uint64_t{random.next()} << 32) | random.next();
    first_block_ = random.below(static_cast<std::uint32_t>(std::max<index_t>(1, blocks_)));
    coins_ = random.fork(1);
  }

  /// Attends every head: verified, or exactly where that costs less or does not come to an end.
  void run() noexcept {
    const read_costs costs(heads_);
    // A pilot that ends in exact attention is a twentieth of it at most, where the past is this long.
    if (blocks_ < 32 || 2.5 * costs.least(rows_) > costs.dense(head_.size())) return rest_exactly();
    if (!prepare() || !pilot()) return rest_exactly();
    choice_ = choose(costs);
    if (choice_.cost > costs.dense(head_.size())) return rest_exactly();
    const auto most = static_cast<index_t>(settings_.max_density * static_cast<double>(head_.size()));
    bool scan_again = true;
    index_t picks = 0, have = 0;  // rows of the slice that are in the sums
    for (index_t round = 1; round <= settings_.max_rounds; ++round) {
      if (scan_again) {
        set_thresholds();
        picks = kernel::scan(how_, query_, codes_.view(), 0, blocks_, s_.picks.data(), 0,
                             static_cast<index_t>(s_.picks.size()));
      }
      if (picks < 0 || fixed() + picks + choice_.slice > most) break;
      if (!(scan_again ? read(picks, choice_.slice, 1.0) : read_slice(have, choice_.slice))) break;
      have = choice_.slice;
      const verdict v = judge(round, picks);
      if (v == verdict::done) break;
      scan_again = v == verdict::scan;
    }
    rest_exactly();
  }

 private:
  static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  static constexpr index_t pilot_slice = 256;
  using entry_block = Eigen::Array<float, 64, 1>;

  [[nodiscard]] index_t fixed() const noexcept { return head_.size() - rows_; }

  // All rows, for the heads that are not done.
  void rest_exactly() noexcept {
    std::array<index_t, max_group> which{};
    std::array<softmax_state, max_group> states;
    index_t count = 0;
    const index_t dk = head_.dk();
    for (index_t g = 0; g < heads_; ++g) {
      head_task<Head>& task = group_[g];
      if (done_[at(g)] || !task.ok) continue;
      which[at(count)] = g;
      states[at(count)] = softmax_state(task.s.state);
      std::construct_at(&s_.exact_rows[at(count)], task.row);
      std::copy_n(task.row.scaled_query, dk, s_.queries.data() + count * dk);
      ++count;
    }
    if (count == 0) return;
    const kernel::isa how = kernel::active_isa();
    const query_group<Head> together{
        s_.exact_rows.data(), states.data(),
        kernel::prepare_queries<T>(how, s_.queries.data(), count, dk, group_[0].row.scale, s_.prepared),
        s_.exact_part.first(at(count * head_.dv())), s_.exact_logits};
    std::uint32_t odd = 0;
    for (index_t from = 0; from < head_.size(); from += phase_rows)
      odd |= together.add(population(from, std::min(head_.size(), from + phase_rows)));
    for (index_t i = 0; i < count; ++i) {
      head_task<Head>& task = group_[which[at(i)]];
      task.ok = (odd >> i & 1) == 0;
      task.state = states[at(i)];
      if (head_.size() > 0) add_sink(task.state, task.row.sink_logit);
      certify_exact(task.c);
    }
  }

  // Query tables in whole steps, one step for all heads. False: see head_task::ok.
  [[nodiscard]] bool prepare() noexcept {
    const index_t dk = head_.dk();
    for (index_t g = 0; g < heads_; ++g) std::copy_n(group_[g].row.scaled_query, dk, s_.queries.data() + g * dk);
    how_ = kernel::active_isa();
    prepared_ = kernel::prepare_queries<T>(how_, s_.queries.data(), heads_, dk, group_[0].row.scale, s_.prepared);
    picked_ = stratum(s_.picked, heads_, head_.dv());
    light_ = stratum(s_.light, heads_, head_.dv());

    const auto entries = static_cast<std::size_t>(codes_.groups()) * 64;
    float delta = 0;
    for (index_t g = 0; g < heads_; ++g) {
      const std::span<float> table = s_.table.subspan(at(g) * entries, entries);
      codes_.tabulate(s_.queries.data() + g * dk, s_.rotated, table);
      float norm2 = 0;
      for (const float x : s_.rotated) norm2 += x * x;
      if (!std::isfinite(norm2)) return false;
      norm_[at(g)] = std::sqrt(norm2);
      offset_[at(g)] = codes_.offset(s_.rotated);
      reference_[at(g)] = -std::numeric_limits<float>::infinity();
      float all = 0;
      for (std::size_t from = 0; from < entries; from += 64) {
        const Eigen::Map<const entry_block> t(table.data() + from);
        const float range = t.maxCoeff() - t.minCoeff();
        delta = std::max(delta, range / 63);
        all += range;
      }
      // Entries are rounded up by less than 1 each.
      delta = std::max(delta, all / static_cast<float>(kernel::scan_query::largest_sum - codes_.groups()));
    }
    const float unit = std::max(codes_.alpha_unit(), std::numeric_limits<float>::min());
    delta = std::max(delta, 16 * kernel::scan_query::smallest_step / unit);
    step_ = delta * unit / 16;
    for (index_t g = 0; g < heads_; ++g) {
      float bias = 0;
      for (std::size_t from = 0; from < entries; from += 64) {
        const Eigen::Map<const entry_block> t(s_.table.data() + at(g) * entries + from);
        const float low = t.minCoeff();
        bias += low;
        const Eigen::Array<int, 64, 1> whole = ((t - low) * (1 / delta) + 0.5f).cast<int>();
        std::uint8_t* to = s_.tables.data() + at(g) * entries + from;
        for (int e = 0; e < 64; ++e) to[e] = static_cast<std::uint8_t>(whole[e]);
      }
      query_.bias[at(g)] = static_cast<std::int16_t>(std::lround(16 * bias / delta));
    }
    query_.tables = s_.tables.data();
    query_.heads = static_cast<int>(heads_);
    query_.noise_factor = static_cast<std::int16_t>(std::max(1l, std::lround(32768 / (1024 * step_))));
    query_.reach_factor = static_cast<std::int16_t>(std::max(1l, std::lround(32768 / (512 * step_))));
    // Rounding of the tables: uniform errors of 16 steps a group.
    table_error_ = 16 * step_ * std::sqrt(static_cast<float>(codes_.groups()) / 12);
    slope_ = 1 / std::sqrt(static_cast<float>(codes_.width()));
    return true;
  }

  [[nodiscard]] float score(const kernel::scan_pick& p, index_t g) const noexcept {
    return static_cast<float>(p.score[at(g)]) * step_;  // of k − μ
  }
  // log(max(r, K)/unit), as the scan has it.
  [[nodiscard]] float log_reach(const kernel::scan_pick& p) const noexcept {
    return step_ * static_cast<float>(
                       std::max(kernel::detail::multiply_round(p.reach, query_.reach_factor), int{query_.least_reach}));
  }

  // A first look: a slice, and the picks of an eighth of the past at thresholds that a few scores suggest.
  [[nodiscard]] bool pilot() noexcept {
    const index_t part = std::max<index_t>(32, blocks_ / 8);
    for (index_t g = 0; g < heads_; ++g)
      query_.plain[at(g)] = query_.floor[at(g)] = query_.slack[at(g)] = query_.sure[at(g)] = 0;
    query_.least_reach = -32767;
    query_.cut = 0;
    std::array<double, max_group> mass{};
    constexpr index_t looks = 8;
    for (index_t b = 0; b < looks; ++b) {
      kernel::scan_all(how_, query_, codes_.view(), (first_block_ + b * part / looks) % blocks_, slice_.data());
      for (index_t g = 0; g < heads_; ++g) {
        float* level = s_.x.data();
        for (index_t i = 0; i < kernel::scan_keys; ++i) {
          const auto x = static_cast<double>(score(slice_[at(i)], g));
          score_mean_[at(g)] += x / (looks * kernel::scan_keys);
          score_variance_[at(g)] += x * x / (looks * kernel::scan_keys);
        }
        float top = -std::numeric_limits<float>::infinity();
        for (index_t i = 0; i < kernel::scan_keys; ++i) {
          level[i] = score(slice_[at(i)], g) + log_reach(slice_[at(i)]);
          top = std::max(top, level[i]);
        }
        mass[at(g)] += static_cast<double>(kernel::block_exponentials(how_, level, kernel::scan_keys, top)) *
                       std::exp(static_cast<double>(top));
      }
    }
    for (index_t g = 0; g < heads_; ++g) score_variance_[at(g)] -= score_mean_[at(g)] * score_mean_[at(g)];
    // A second scan of a long past costs more than a better plan. Where scores spread by little but their error, the
    // slice says nearly all.
    double spread = 0;
    const float sigma = slope_ * codes_.largest_radius(first_block_);
    for (index_t g = 0; g < heads_; ++g)
      spread =
          std::max(spread, score_variance_[at(g)] - static_cast<double>(norm_[at(g)] * norm_[at(g)] * sigma * sigma));
    const double pilot_picks =
        spread < 2 ? 12 : std::clamp(48.0 * std::sqrt(static_cast<double>(rows_) / 65536), 40.0, 120.0);
    pilot_share_ = static_cast<double>(part) / static_cast<double>(blocks_);
    const double keys = static_cast<double>(part * kernel::scan_keys);
    for (index_t g = 0; g < heads_; ++g) {
      // Σ π = keys·E e^{s + log r − A} = pilot_picks
      choice_.plain[at(g)] = std::log(keys * mass[at(g)] / (looks * 64.0) / pilot_picks);
      choice_.floor[at(g)] = std::numeric_limits<double>::infinity();
    }
    choice_.slice = pilot_slice;
    choice_.share = static_cast<double>(pilot_slice) / static_cast<double>(rows_) / pilot_share_;
    index_t picks = -1;
    for (int attempt = 0;; ++attempt) {
      set_thresholds();
      picks = 0;
      const index_t end = first_block_ + part,
                    limit = attempt < 3 ? 8 * heads_ * static_cast<index_t>(pilot_picks) : 1 << 20;
      const auto room = std::min(static_cast<index_t>(s_.picks.size()), limit + kernel::scan_keys);
      picks = kernel::scan(how_, query_, codes_.view(), first_block_, std::min(end, blocks_), s_.picks.data(), 0, room);
      if (picks >= 0 && end > blocks_)
        picks = kernel::scan(how_, query_, codes_.view(), 0, end - blocks_, s_.picks.data(), picks, room);
      if (picks >= 0) break;
      if (attempt == 3) return false;
      for (double& a : choice_.plain) a += 1.5;  // the few scores missed what is heavy
    }
    plan_ = plan_rows(s_.plan, heads_);
    planning_ = true;
    const bool finite = read(picks, pilot_slice, pilot_share_);
    planning_ = false;
    if (!finite) return false;
    for (index_t g = 0; g < heads_; ++g) {
      estimate_[at(g)] = estimate(g, pilot_slice);
      if (!estimate_[at(g)].finite()) return false;
    }
    return true;
  }

  // Thresholds, cut and reach of the current choice.
  void set_thresholds() noexcept {
    float away = 0;
    for (index_t g = 0; g < heads_; ++g) away = std::max(away, away_[at(g)]);
    const float least = away > 0 ? std::log(away / codes_.reach_unit()) / step_ : -32767.0f;
    query_.least_reach = static_cast<std::int16_t>(std::clamp(least, -32767.0f, 32767.0f));
    for (index_t g = 0; g < heads_; ++g) {
      const auto steps = [&](double nats) {
        return static_cast<float>(std::min(1e6, nats / static_cast<double>(step_)));
      };
      query_.plain[at(g)] = steps(choice_.plain[at(g)]);
      query_.floor[at(g)] = steps(choice_.floor[at(g)] - shape.z * static_cast<double>(table_error_));
      query_.slack[at(g)] = static_cast<float>(shape.z) * norm_[at(g)] * slope_ / step_;
      query_.sure[at(g)] = static_cast<float>(shape.sure) * norm_[at(g)] * slope_ / step_;
    }
    query_.cut = static_cast<std::int16_t>(
        std::max(-32767.0, std::floor(std::log(std::min(1.0, choice_.share)) / static_cast<double>(step_))));
  }

  [[nodiscard]] strata_estimate estimate(index_t g, index_t m) noexcept {
    const float sink = group_[g].row.sink_logit;
    const double extra = std::isfinite(sink) ? std::exp(static_cast<double>(sink - reference_[at(g)])) : 0;
    const auto dv = at(head_.dv());
    return estimate_strata(picked_, light_, g, rows_, m, extra, {head_.value_centre(), dv},
                           s_.output.subspan(at(g) * dv, dv), s_.vectors.data());
  }

  [[nodiscard]] double goal2(const strata_estimate& e) const noexcept {
    const double scale2 =
        settings_.scale == error_scale::rms ? e.power : std::max(e.output2 - e.variance, e.output2 / 4);
    return settings_.epsilon * settings_.epsilon * scale2;
  }

  // log(κ ε T D) as a threshold of scores of k − μ plus log(r/unit): a token that is missed although it may move the
  // output by f must cost at most κ·ε·T, and moves it by x‖v − ô‖ <= x(r + ‖ô − c‖), at a typical r.
  [[nodiscard]] double floor_threshold(index_t g, const strata_estimate& e) const noexcept {
    const double unit = static_cast<double>(codes_.reach_unit()), away = std::max(1e-12, std::sqrt(e.away2));
    return std::log(shape.kappa * std::sqrt(goal2(e)) * e.denominator) + static_cast<double>(reference_[at(g)]) -
           static_cast<double>(offset_[at(g)]) -
           std::log(static_cast<double>(codes_.reach_unit()) + std::min(away, unit * unit / away));
  }

  [[nodiscard]] store_choice choose(const read_costs& costs) noexcept {
    store_planner planner(how_, plan_, s_.plan_terms, heads_, rows_);
    for (index_t g = 0; g < heads_; ++g) {
      const strata_estimate& e = estimate_[at(g)];
      const double margin = 0.93 * 0.93 / known_variance_radius2(e.dimension);
      away_[at(g)] = std::max(codes_.reach_unit() / 2, static_cast<float>(1.1 * std::sqrt(e.away2)));
      planner.head(g, {.goal = margin * goal2(e) * e.denominator * e.denominator,
                       .reference = reference_[at(g)],
                       .away2 = e.away2,
                       .mean = score_mean_[at(g)],
                       .variance = score_variance_[at(g)],
                       .floor = floor_threshold(g, e) - 0.15,
                       .error = static_cast<double>(norm_[at(g)] * slope_),
                       .z = shape.z,
                       .sure = shape.sure});
    }
    return planner.choose(costs, fixed());
  }

  [[nodiscard]] double squared_radius(double variance, double dimension, double dof) const noexcept {
    sum_evidence y;
    y.with_replacement = true;
    y.population = 1;
    y.variance = variance;
    y.dimension = dimension;
    y.dof = dof;
    y.sampled = 1e6;
    const double r = B::radius(y, 1, settings_.delta);
    return r * r;
  }

  // squared_radius(1, dimension, ∞), by Wilson and Hilferty's cube root: for plans, which need no more.
  [[nodiscard]] double known_variance_radius2(double dimension) const noexcept {
    if (dimension < 3) return squared_radius(1, dimension, 1e4);
    const double spread = 2 / (9 * dimension);
    const double root = 1 - spread + budget::normal_quantile(1 - settings_.delta) * std::sqrt(spread);
    return root * root * root;
  }

  // Sums over the fixed rows, `picks` of s_.picks (probability share·π) and the slice. False: not finite.
  [[nodiscard]] bool read(index_t picks, index_t slice, double share) noexcept {
    picked_.clear();
    light_.clear();
    read_breaches_ = {};
    const index_t sinks = head_.sinks(), after = sinks + rows_;
    bool finite = read_fixed(0, sinks) && read_fixed(after, head_.size() - after);
    std::array<ordinal, kernel::block_rows> index{};
    block_weights b;
    for (index_t from = 0; finite && from < picks; from += kernel::block_rows) {
      const index_t count = std::min(kernel::block_rows, picks - from);
      const kernel::scan_pick* p = s_.picks.data() + from;
      b.clear();
      for (index_t i = 0; i < count; ++i) {
        index[at(i)] = static_cast<ordinal>(p[i].row) + static_cast<ordinal>(sinks);
        b.w[i] = p[i].level;
        b.log_reach[i] = static_cast<float>(p[i].reach) / 512;
      }
      const bool certain = weights(b, count, static_cast<float>(share));
      finite =
          read_block(kernel::block_of_rows::gathered(keys(), index.data(), count),
                     kernel::block_of_rows::gathered(values(), index.data(), count), b, certain, picked_, p, false);
    }
    return finite && read_slice(0, slice);
  }

  // Rows [from, to) of the slice: those of the light stratum.
  [[nodiscard]] bool read_slice(index_t from, index_t to) noexcept {
    block_weights b;
    for (index_t k = from / kernel::scan_keys; k < to / kernel::scan_keys; ++k) {
      const index_t block = (first_block_ + k) % blocks_;
      kernel::scan_all(how_, query_, codes_.view(), block, slice_.data());
      b.clear();
      for (index_t i = 0; i < kernel::scan_keys; ++i) {
        b.w[i] = b.t[i] = slice_[at(i)].level < query_.cut ? 1.0f : 0.0f;
        b.log_reach[i] = static_cast<float>(slice_[at(i)].reach) / 512;
      }
      const index_t row = head_.sinks() + block * kernel::scan_keys;
      // block_rows; as a constant GCC 12 warns of overflow in loops over what is left of a block, which is nothing.
      const index_t count = std::min(kernel::block_rows, rows_);
      if (!read_block({keys(), row, count}, {values(), row, count}, b, false, light_, slice_.data(), true)) {
        return false;
      }
    }
    return true;
  }

  struct block_weights {
    alignas(64) float w[kernel::block_rows], t[kernel::block_rows], log_reach[kernel::block_rows],
        r2[kernel::block_rows];
    void clear() noexcept {
      std::fill_n(w, kernel::block_rows, 0.0f);
      std::fill_n(t, kernel::block_rows, 0.0f);
      std::fill_n(log_reach, kernel::block_rows, -80.0f);
    }
  };

  // Levels in b.w to 1/π and (1 − π)/π², π = share·inclusion(level). True: all are certain.
  [[nodiscard]] bool weights(block_weights& b, index_t count, float share) const noexcept {
    using block = Eigen::Array<float, kernel::block_rows, 1>;
    Eigen::Map<block> w(b.w), t(b.t);
    const block pi = share * kernel::inclusion(block(w), query_.noise_factor);
    w = 1 / pi;
    t = (1 - pi) / pi.square();
    w.tail(kernel::block_rows - count).setZero();
    t.tail(kernel::block_rows - count).setZero();
    return pi.head(count).minCoeff() >= 1;
  }

  [[nodiscard]] kernel::strided_rows keys() const noexcept { return head_.key_rows(); }
  [[nodiscard]] kernel::strided_rows values() const noexcept { return head_.value_rows(); }

  [[nodiscard]] bool read_fixed(index_t first, index_t count) noexcept {
    using kernel::squared_distance;
    block_weights b;
    for (index_t from = 0; from < count; from += kernel::block_rows) {
      const index_t n = std::min(kernel::block_rows, count - from);
      b.clear();
      std::fill_n(b.w, n, 1.0f);
      std::fill_n(b.r2, kernel::block_rows, 0.0f);
      for (index_t i = 0; i < n; ++i) b.r2[i] = squared_distance(head_.value(first + from + i), head_.value_centre());
      if (!weigh({keys(), first + from, n}, nullptr)) return false;
      exponentials(n);
      picked_.add<T>(how_, s_.x.data(), b.w, nullptr, b.r2, {values(), first + from, n}, 0, s_.spare.data());
    }
    return true;
  }

  [[nodiscard]] bool read_block(const kernel::block_of_rows& k, const kernel::block_of_rows& v, block_weights& b,
                                bool certain, stratum& to, const kernel::scan_pick* scores, bool slice) noexcept {
    if (!slice) {
      for (index_t i = 0; i < v.count; ++i) {
        const std::byte* row = v.first + index_t{v.index[i]} * v.stride;
        for (index_t byte = 0; byte < v.stride; byte += 64) __builtin_prefetch(row + byte);
      }
    }
    Eigen::Map<Eigen::Array<float, kernel::block_rows, 1>> r2(b.r2);
    r2 = (2 * Eigen::Map<const Eigen::Array<float, kernel::block_rows, 1>>(b.log_reach)).exp() *
         (codes_.reach_unit() * codes_.reach_unit());
    if (!weigh(k, scores)) return false;
    if (planning_) note(scores, k.count, b, slice);
    exponentials(k.count);
    const std::uint64_t coins = (std::uint64_t{coins_.next()} << 32) | coins_.next();
    to.add<T>(how_, s_.x.data(), b.w, certain ? nullptr : b.t, b.r2, v, coins, s_.spare.data());
    return true;
  }

  // Logits of a block, checked against what their scores state.
  [[nodiscard]] bool weigh(const kernel::block_of_rows& k, const kernel::scan_pick* scores) noexcept {
    kernel::block_logits<T>(prepared_, k, s_.x.data());
    const index_t n = k.count;
    for (index_t g = 0; g < heads_; ++g) {
      float* l = s_.x.data() + g * kernel::block_rows;
      float top;
      if (!kernel::block_maximum(how_, l, n, top)) {
        group_[g].ok = false;
        return false;
      }
      if (scores) {
        const float wide = 4 * norm_[at(g)] * slope_, base = offset_[at(g)];
        index_t outside = 0;
        for (index_t i = 0; i < n; ++i) {
          const float off = std::abs(l[i] - base - score(scores[i], g));
          outside += off > wide * kernel::bfloat16_to_float(scores[i].radius) + 4 * table_error_ +
                               1e-2f * (1 + std::abs(l[i]));
        }
        read_breaches_[at(g)] += outside;
      }
      if (top > reference_[at(g)]) {  // with room, so that it seldom happens
        const float higher = top + 2;
        if (std::isfinite(reference_[at(g)])) {
          const double factor = std::exp(static_cast<double>(reference_[at(g)] - higher));
          picked_.rescale(g, factor);
          light_.rescale(g, factor);
        }
        reference_[at(g)] = higher;
      }
    }
    return true;
  }

  // x = exp(l − reference), 0 behind the block's rows.
  void exponentials(index_t n) noexcept {
    for (index_t g = 0; g < heads_; ++g) {
      float* l = s_.x.data() + g * kernel::block_rows;
      static_cast<void>(kernel::block_exponentials(how_, l, n, reference_[at(g)]));
      std::fill(l + n, l + kernel::block_rows, 0.0f);
    }
  }

  // Remembers sampled rows for the plan.
  void note(const kernel::scan_pick* scores, index_t n, const block_weights& b, bool slice) noexcept {
    for (index_t i = 0; i < n && !plan_.full(); ++i) {
      if (slice && b.w[i] == 0) continue;  // of the other stratum
      plan_.push();
      plan_.last(plan_rows::weight) = slice ? static_cast<float>(rows_) / static_cast<float>(choice_.slice) : b.w[i];
      plan_.last(plan_rows::reach2) = b.r2[i];
      plan_.last(plan_rows::radius) = kernel::bfloat16_to_float(scores[i].radius);
      plan_.last(plan_rows::log_reach) = log_reach(scores[i]);
      for (index_t g = 0; g < heads_; ++g) {
        plan_.last(plan_.logits_of(g)) = s_.x[at(g * kernel::block_rows + i)];
        plan_.last(plan_.scores_of(g)) = score(scores[i], g);
      }
    }
  }

  enum class verdict : std::uint8_t { done, extend, scan };

  // Writes what is verified, and sets the next choice for the rest: a longer slice where that is enough, else lower
  // thresholds.
  [[nodiscard]] verdict judge(index_t round, index_t picks) noexcept {
    verdict next = verdict::done;
    double longer = 1, more = 1;
    auto wanted_floor = choice_.floor, wanted_plain = choice_.plain;
    auto wanted_away = away_;
    for (index_t g = 0; g < heads_; ++g) {
      head_task<Head>& task = group_[g];
      if (done_[at(g)]) continue;
      certificate& c = task.c;
      c.rounds = round;
      c.breaches = read_breaches_[at(g)];
      const index_t sampled = picks + choice_.slice;
      // Of honest scores one in 16000 is off by 4σ. More than that: they do not know their own error.
      if (c.breaches > 2 + sampled / 100) continue;
      const strata_estimate e = estimate(g, choice_.slice);
      if (!e.finite()) continue;
      const double error2 = squared_radius(e.variance, e.dimension, e.dof), goal = goal2(e);
      const double floor = floor_threshold(g, e), away = std::sqrt(e.away2);
      const bool verified = error2 <= goal;
      const bool covered = choice_.floor[at(g)] <= floor + 0.35 && 0.8 * away <= std::max<double>(away_[at(g)], 0);
      if (verified && covered) {
        done_[at(g)] = true;
        const double scale2 = goal / (settings_.epsilon * settings_.epsilon);
        c.rows_exact = fixed();
        c.rows_sampled = sampled;
        c.budget = sampled;
        // What the floors leave to chance shows in no variance where none of it was drawn.
        const double hidden = shape.kappa * settings_.epsilon;
        c.epsilon_achieved = std::max(std::sqrt(error2 / scale2), hidden);
        c.denominator_error = std::hypot(std::sqrt(squared_radius(e.denominator_variance, 1, e.dof)), hidden);
        c.coherence = e.power > 0 ? std::sqrt(e.output2 / e.power) : 0;
        c.promise = B::kind, c.bound = B::name;
        c.assumptions =
            "asymptotic, as stated by the bound; the codes' stated errors are true; draws are over the store's order";
        record(task, picks);
        task.state.clear();
        task.state.raise(reference_[at(g)]);
        task.state.add_denominator(e.denominator);
        const std::span<float> to = task.state.numerator();
        for (std::size_t j = 0; j < to.size(); ++j)
          to[j] = s_.output[at(g) * to.size() + j] * static_cast<float>(e.denominator);
        continue;
      }
      next = std::max(next, verdict::extend);
      if (!covered) next = verdict::scan;
      // Taken over where a scan follows; a floor that was never scanned covers nothing.
      wanted_floor[at(g)] = std::min(choice_.floor[at(g)], floor - 0.2);
      wanted_away[at(g)] = std::max(away_[at(g)], static_cast<float>(1.1 * away));
      if (verified) continue;
      const double goal_variance = 0.92 * 0.92 * goal / (error2 / e.variance);
      const double left = goal_variance - (e.variance - e.light_variance);
      const double factor = left > 0 ? 1.05 * e.light_variance / left : 1e9;
      if (factor > 4) {
        next = verdict::scan;
        wanted_plain[at(g)] -= std::log(e.variance / goal_variance);
        more = std::max(more, e.variance / goal_variance);
      } else {
        longer = std::max(longer, factor);
      }
    }
    const double grow = std::max(longer, next == verdict::scan ? std::min(more, 2.0) : 1.0);
    const auto wanted = static_cast<index_t>(grow * static_cast<double>(choice_.slice));
    choice_.slice = std::min(rows_, (wanted + kernel::scan_keys - 1) / kernel::scan_keys * kernel::scan_keys);
    if (next == verdict::scan) {
      choice_.share = static_cast<double>(choice_.slice) / static_cast<double>(rows_);
      choice_.floor = wanted_floor, choice_.plain = wanted_plain, away_ = wanted_away;
    }
    return next;
  }

  // The rows behind an output with their weights, where the call asks for them.
  void record(head_task<Head>& task, index_t picks) noexcept {
    const chosen_rows& to = task.s.chosen;
    to.clear();
    if (!to) return;
    const index_t sinks = head_.sinks();
    to.add_ends(task.tokens, sinks, fixed() - sinks);
    block_weights b;
    for (index_t i = 0; i < picks; ++i) {
      b.clear();
      b.w[0] = s_.picks[at(i)].level;
      static_cast<void>(weights(b, 1, 1.0f));
      to.add(sinks + static_cast<index_t>(s_.picks[at(i)].row), static_cast<double>(b.w[0]));
    }
    for (index_t k = 0; k < choice_.slice / kernel::scan_keys; ++k) {
      kernel::scan_all(how_, query_, codes_.view(), (first_block_ + k) % blocks_, slice_.data());
      for (const kernel::scan_pick& p : slice_) {
        if (p.level < query_.cut)
          to.add(sinks + static_cast<index_t>(p.row), static_cast<double>(rows_) / static_cast<double>(choice_.slice));
      }
    }
  }

  static constexpr floor_sampling shape{};

  head_group<Head>& group_;
  const config& settings_;
  store_scratch<Head> s_;
  Head head_;
  const sketch::block_codes& codes_;
  kernel::isa how_ = kernel::isa::portable;
  kernel::block_queries prepared_{};
  kernel::scan_query query_{};
  index_t heads_ = 0, blocks_ = 0, rows_ = 0, first_block_ = 0;
  plan_rows plan_;
  random_stream coins_{};
  double pilot_share_ = 1;
  std::array<double, max_group> score_mean_{}, score_variance_{};  // over all keys, from a few blocks
  float step_ = 1, table_error_ = 0, slope_ = 0;
  std::array<float, max_group> norm_{}, offset_{}, reference_{}, away_{};
  std::array<bool, max_group> done_{};
  std::array<index_t, max_group> read_breaches_{};
  std::array<strata_estimate, max_group> estimate_{};
  std::array<kernel::scan_pick, kernel::scan_keys> slice_{};
  store_choice choice_{};
  stratum picked_, light_;
  bool planning_ = false;
};

/// A store's rows are in no order, and its codes know products alone.
template <class Q, class Store>
[[nodiscard]] status check_store_call(const tensor_view<const Q, 4>& q, const Store&,
                                      const attention_options& options) noexcept {
  static_assert(
      requires(const Store& s) { s.head(0, 0).codes(); },
      "a policy that samples from a store needs a vattn::shuffled_store as its cache: assign() the view to one");
  const bool ordered = (options.causal && q.extents[1] > 1) || options.sliding_window > 0 || options.mask ||
                       options.positions || options.alibi_slopes != nullptr;
  if (ordered || options.softcap > 0) {
    return status::error(errc::invalid_argument,
                         "a store is attended whole and without %s: use a view and an "
                         "importance policy for this call",
                         ordered ? "masks, windows, positions, ALiBi or several causal queries" : "soft cap");
  }
  return {};
}

/// Every head of the group from its store.
template <bound B, class Head>
void attend_from_store(head_group<Head>& group, const config& settings) noexcept {
  arena a(group.memory);
  const Head& head = group[0].row.head;
  const auto scratch = store_scratch<Head>::take(a, head.size(), group.size(), head.dk(), head.dv());
  store_sampler<B, Head>(group, settings, scratch).run();
}

}  // namespace vattn
