// Memory of a call on a shuffled store, whether one is worth sampling, a first look at it, and the plan that it
// suggests.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <span>

#include "vattn/call/call.hpp"
#include "vattn/exact_attention.hpp"
#include "vattn/sample/importance.hpp"
#include "vattn/settings.hpp"
#include "vattn/stats/judge.hpp"
#include "vattn/store/shuffled_store.hpp"
#include "vattn/store/store_plan.hpp"
#include "vattn/store/store_reader.hpp"

namespace vattn::VATTN_ABI {

/// Memory of a group of heads, taken from the call's workspace.
struct store_scratch {
  std::span<std::uint8_t> tables;    // [heads][groups][64]
  std::span<float> table;            // of query_tables::make
  std::span<float> queries;          // [heads, dk]
  std::span<float> output, vectors;  // [heads, dv], [2, dv]
  store_reader_memory reader;
  std::span<float> plan;        // plan_rows::storage_size
  std::span<float> plan_terms;  // store_planner::storage_size
  exact_scratch exact;

  /// More picks than this cost more than reading all rows.
  [[nodiscard]] static index_t most_picks(index_t n) noexcept { return n / 6 + 512; }

  [[nodiscard]] static store_scratch take(arena& a, index_t n, index_t heads, index_t dk, index_t dv) noexcept {
    const auto h = static_cast<std::size_t>(heads), width = static_cast<std::size_t>(dv);
    const sketch::code_layout codes(dk);
    const auto entries = h * static_cast<std::size_t>(codes.groups) * 64;
    store_scratch s;
    static_cast<void>(a.take<std::byte>(exact_scratch::piece_bytes(heads, dv)));  // in front
    s.tables = a.take<std::uint8_t>(entries);
    s.table = a.take<float>(entries + codes.width);
    s.queries = a.take<float>(h * static_cast<std::size_t>(dk));
    s.output = a.take<float>(h * width);
    s.vectors = a.take<float>(2 * width);
    s.reader = store_reader_memory::take(a, heads, dk, dv, most_picks(n));
    s.plan = a.take<float>(plan_rows::storage_size(heads));
    s.plan_terms = a.take<float>(store_planner::storage_size(heads));
    s.exact = exact_scratch::take(a, heads, dk, dv);
    return s;
  }
};

/// Bytes of `store_scratch` for a group.
[[nodiscard]] inline std::size_t store_bytes(index_t n, index_t heads, index_t dk, index_t dv) noexcept {
  arena count;
  static_cast<void>(store_scratch::take(count, n, heads, dk, dv));
  return count.used() + workspace::alignment;
}

/// Whether a store of n tokens, `past` of them in random order, may be sampled for less than it takes to read them all.
/// A pilot that ends in exact attention is about a twentieth of it at most, where the past is this long.
[[nodiscard]] inline bool worth_sampling(index_t n, index_t past, const read_costs& costs) noexcept {
  return past >= 32 * kernel::scan_keys && costs.may_pay(past, n);
}

/// A store's codes know products alone.
template <class Store>
[[nodiscard]] status check_store_call(const Store&, const attention_options& options) noexcept {
  static_assert(
      requires(const Store& s) { s.head(0, 0).codes(); },
      "a policy that samples from a store needs a vattn::shuffled_store as its cache: assign() the view to one");
  if (options.softcap > 0) {
    return status::error(errc::invalid_argument,
                         "a store is attended whole and without soft cap: use a view and an importance policy for this "
                         "call");
  }
  return {};
}

/// A group's first look at a store, and the plan that it suggests: how many rows to pick by their codes, and how many
/// to take as they lie.
template <class Policy, class Head>
class store_pilot {
 public:
  store_pilot(head_group<Head>& group, const config& settings, const read_costs& costs,
              const store_scratch& memory) noexcept
      : group_(group),
        settings_(settings),
        promise_{settings.epsilon, settings.delta, settings.scale, shape.kappa},
        costs_(costs),
        s_(memory),
        head_(group[0].row.head),
        codes_(head_.codes()),
        heads_(group.size()),
        blocks_(head_.past() / kernel::scan_keys),
        rows_(blocks_ * kernel::scan_keys),
        random_(group[0].stream) {
    tables_.query.numbers = (std::uint64_t{random_.next()} << 32) | random_.next();
    first_block_ = random_.below(static_cast<std::uint32_t>(std::max<index_t>(1, blocks_)));
  }

 protected:
  using B = typename Policy::bound;
  using stage = sample::store_stage;
  static void enter(stage s) noexcept { Policy::sampler::enter(s); }
  [[nodiscard]] static constexpr std::size_t at(index_t i) noexcept { return static_cast<std::size_t>(i); }
  static constexpr index_t pilot_blocks = 4;

  // Lengths of values are in the queries' value unit.
  [[nodiscard]] float unit() const noexcept { return group_[0].row.value_unit; }
  [[nodiscard]] float reach_unit() const noexcept { return codes_.reach_unit() * unit(); }

  // No more than any threshold can be lowered by: goals may shrink to nothing.
  [[nodiscard]] index_t steps(double nats) const noexcept {
    return static_cast<index_t>(std::lround(std::min(1e6, nats / static_cast<double>(tables_.step))));
  }
  [[nodiscard]] index_t fixed() const noexcept { return head_.size() - rows_; }

  // Tables and a reader. False: all rows are to be read.
  [[nodiscard]] bool open() noexcept {
    if (!worth_sampling(head_.size(), head_.past(), costs_)) return false;
    // Values that are unlike those from which the codes have their typical distance: its square would be no float.
    if (!(reach_unit() > 0x1p-40f && reach_unit() < 0x1p40f)) return false;
    enter(stage::tables);
    for (index_t g = 0; g < heads_; ++g)
      std::copy_n(group_[g].row.scaled_query, head_.dk(), s_.queries.data() + g * head_.dk());
    if (!tables_.make(codes_, s_.queries.data(), heads_, head_.dk(), s_.tables, s_.table)) return false;
    reader_.emplace(head_, tables_, heads_, s_.queries.data(), group_[0].row.scale, s_.reader, random_.fork(1), unit());
    return true;
  }

  [[nodiscard]] bool read_fixed() noexcept {
    const index_t sinks = head_.sinks(), after = sinks + rows_;
    return reader_->read_fixed(0, sinks) && reader_->read_fixed(after, head_.size() - after);
  }

  // Picks of blocks [first, last), around the end, at thresholds `lower` than chosen, nats. There may be `room`; -1 if
  // there are more.
  [[nodiscard]] index_t scan(index_t first, index_t last, double lower, index_t room) noexcept {
    set_thresholds(lower);
    const kernel::isa how = kernel::active_isa();
    room = std::min(room, s_.reader.capacity);
    index_t picks = kernel::scan(how, tables_.query, codes_.view(), first, std::min(last, blocks_),
                                 s_.reader.picks.data(), 0, room);
    if (picks < 0 || last <= blocks_) return picks;
    return kernel::scan(how, tables_.query, codes_.view(), 0, last - blocks_, s_.reader.picks.data(), picks, room);
  }

  // A first look: a slice, and the picks of an eighth of the past at thresholds that a few scores suggest.
  [[nodiscard]] bool pilot() noexcept {
    kernel::scan_query& query = tables_.query;
    const index_t part = std::max<index_t>(32, blocks_ / 8);
    query.plain = query.floor = query.slack = query.sure_floor = query.sure = {};
    query.least_reach = -32767;
    query.cut = 0;
    std::array<double, max_group> mass{};
    constexpr index_t looks = 8;
    const kernel::isa how = kernel::active_isa();
    kernel::scanned_keys keys;
    Eigen::Array<float, kernel::scan_keys, 1> score, reach;
    const auto look = [&](index_t b) { return (first_block_ + b * part / looks) % blocks_; };
    for (index_t b = 0; b < looks; ++b) kernel::fetch_codes(codes_.view(), look(b));
    for (index_t b = 0; b < looks; ++b) {
      kernel::scan_all(how, query, codes_.view(), look(b), keys);
      for (index_t i = 0; i < kernel::scan_keys; ++i) reach[i] = tables_.log_reach(keys.reach[i]);
      for (index_t g = 0; g < heads_; ++g) {
        using steps = Eigen::Array<std::int16_t, kernel::scan_keys, 1>;
        score = Eigen::Map<const steps>(keys.score[g]).cast<float>() * tables_.step;
        score_mean_[at(g)] += static_cast<double>(score.mean()) / looks;
        score_variance_[at(g)] += static_cast<double>(score.square().mean()) / looks;
        score += reach;
        const float top = score.maxCoeff();
        mass[at(g)] += static_cast<double>(kernel::block_exponentials(how, score.data(), kernel::scan_keys, top)) *
                       std::exp(static_cast<double>(top));
      }
    }
    // A second scan of a long past costs more than a better plan. Where scores spread by little but their error, the
    // slice says all.
    double spread = 0;
    const auto sigma = static_cast<double>(codes_.largest_radius(first_block_));
    for (index_t g = 0; g < heads_; ++g) {
      score_variance_[at(g)] -= score_mean_[at(g)] * score_mean_[at(g)];
      const double error = static_cast<double>(tables_.error(g)) * sigma;
      spread = std::max(spread, score_variance_[at(g)] - error * error);
    }
    const bool flat = spread < 2;
    const double pilot_picks = std::clamp(36.0 * std::sqrt(static_cast<double>(rows_) / 65536), 32.0, 120.0);
    const double pilot_share = static_cast<double>(part) / static_cast<double>(blocks_);
    const double keys_scanned = static_cast<double>(part * kernel::scan_keys);
    for (index_t g = 0; g < heads_; ++g) {
      // Σ π = keys·E e^{s + log r − A} = pilot_picks
      choice_.plain[at(g)] = std::log(keys_scanned * mass[at(g)] / (looks * 64.0) / pilot_picks);
      choice_.floor[at(g)] = std::numeric_limits<double>::infinity();
    }
    choice_.slice = pilot_blocks * kernel::scan_keys;
    choice_.share = static_cast<double>(choice_.slice) / static_cast<double>(rows_) / pilot_share;
    index_t picks = flat ? 0 : -1;
    if (flat) query.cut = std::numeric_limits<std::int16_t>::max();
    for (int attempt = 0; picks < 0; ++attempt) {
      const index_t limit = attempt < 3 ? 8 * heads_ * static_cast<index_t>(pilot_picks) : s_.reader.capacity;
      picks = scan(first_block_, first_block_ + part, 0.0, limit + kernel::scan_keys);
      if (picks >= 0) break;
      if (attempt == 3) return false;
      for (double& a : choice_.plain) a += 1.5;  // the few scores missed what is heavy
    }
    plan_ = plan_rows(s_.plan, heads_);
    reader_->clear();
    if (!read_fixed() || !reader_->weigh_picks(0, picks)) return false;
    reader_->set_probabilities(picks, 0, static_cast<float>(pilot_share));
    reader_->note_picks(picks, plan_);
    reader_->read_picks();
    if (!reader_->read_slice(first_block_, 0, pilot_blocks, &plan_)) return false;
    for (index_t g = 0; g < heads_; ++g) {
      estimate_[at(g)] = estimate(g, choice_.slice);
      if (!estimate_[at(g)].finite()) return false;
    }
    return true;
  }

  // Score from which on a typical token is a pick: lower than that of its goal where the floor's is.
  [[nodiscard]] double weighed_from(index_t g) const noexcept {
    const auto rho = static_cast<double>(codes_.largest_radius(first_block_));
    return std::min(choice_.plain[at(g)], choice_.floor[at(g)] - shape.z * static_cast<double>(tables_.error(g)) * rho);
  }

  // Thresholds, cut and reach of the current choice.
  void set_thresholds(double lower) noexcept {
    kernel::scan_query& query = tables_.query;
    float away = 0;
    for (index_t g = 0; g < heads_; ++g) away = std::max(away, away_[at(g)]);
    const float step = tables_.step, least = away > 0 ? std::log(away / reach_unit()) / step : -32767.0f;
    query.least_reach = static_cast<std::int16_t>(std::clamp(least, -32767.0f, 32767.0f));
    for (index_t g = 0; g < heads_; ++g) {
      const auto in_steps = [&](double nats) {
        return static_cast<float>(std::min(1e6, nats / static_cast<double>(step)));
      };
      const double floor = choice_.floor[at(g)] - shape.z * static_cast<double>(tables_.table_error);
      query.plain[at(g)] = in_steps(choice_.plain[at(g)] - lower);
      query.floor[at(g)] = in_steps(floor - lower);
      query.sure_floor[at(g)] = in_steps(floor - std::min(lower, sure_reserve));
      query.slack[at(g)] = static_cast<float>(shape.z) * tables_.error(g) / step;
      query.sure[at(g)] = static_cast<float>(shape.sure) * tables_.error(g) / step;
    }
    query.sure_level = static_cast<std::int16_t>(std::lround(lower / static_cast<double>(step)));
    const double cut = std::log(std::min(1.0, choice_.share)) + lower;
    query.cut = static_cast<std::int16_t>(std::max(-32767.0, std::floor(cut / static_cast<double>(step))));
  }

  [[nodiscard]] stats::evidence estimate(index_t g, index_t m) noexcept {
    const float sink = group_[g].row.sink_logit;
    const double extra = std::isfinite(sink) ? std::exp(static_cast<double>(sink - reader_->reference(g))) : 0;
    const auto dv = at(head_.dv());
    return estimate_strata(reader_->picked(), reader_->light(), g, rows_, m, extra, {head_.value_centre(), dv},
                           s_.output.subspan(at(g) * dv, dv), s_.vectors.data());
  }

  // log(κ ε T D) as a threshold of scores of k − μ plus log(r/unit): a token that is missed although it may move the
  // output by f must cost at most κ·ε·T, and moves it by x‖v − ô‖ <= x(r + ‖ô − c‖), at a typical r.
  [[nodiscard]] double floor_threshold(index_t g, const stats::evidence& e) const noexcept {
    const double typical = static_cast<double>(reach_unit()), away = std::max(1e-12 * typical, std::sqrt(e.away2));
    return std::log(stats::missable(e, promise_) / (typical + std::min(away, typical * (typical / away)))) +
           static_cast<double>(reader_->reference(g)) - static_cast<double>(tables_.offset[at(g)]);
  }

  [[nodiscard]] store_choice choose() noexcept {
    store_planner planner(kernel::active_isa(), plan_, s_.plan_terms, heads_, rows_);
    for (index_t g = 0; g < heads_; ++g) {
      const stats::evidence& e = estimate_[at(g)];
      const double margin = plan_margin / stats::planned_radius2<B>(e.dimension, settings_.delta);
      away_[at(g)] = std::max(reach_unit() / 2, static_cast<float>(1.1 * std::sqrt(e.away2)));
      planner.head(g, {.goal = margin * stats::squared_goal(e, promise_) * e.denominator * e.denominator,
                       .reference = reader_->reference(g),
                       .away2 = e.away2,
                       .mean = score_mean_[at(g)],
                       .variance = score_variance_[at(g)],
                       .floor = floor_threshold(g, e) - 0.15,
                       .error = static_cast<double>(tables_.error(g)),
                       .z = shape.z,
                       .sure = shape.sure});
    }
    return planner.choose(costs_, fixed());
  }

  static constexpr floor_sampling shape{};
  // Of the variance that verifies: what the picks are planned for.
  static constexpr double plan_margin = 0.9;
  // Nats by which the scan's thresholds for keys that are certain are lower than the plan's. These are weighed whatever
  // else is: there are many, and few are worth a value.
  static constexpr double sure_reserve = 0.45;

  head_group<Head>& group_;
  const config& settings_;
  const stats::promise promise_;
  const read_costs costs_;
  store_scratch s_;
  const Head head_;
  const sketch::block_codes& codes_;
  sketch::query_tables tables_;
  std::optional<store_reader<Head>> reader_;  // once there are tables
  index_t heads_, blocks_, rows_, first_block_ = 0;
  random_stream random_;
  plan_rows plan_;
  store_choice choice_{};
  std::array<double, max_group> score_mean_{}, score_variance_{};  // over all keys, from a few blocks
  std::array<float, max_group> away_{};
  std::array<stats::evidence, max_group> estimate_{};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
