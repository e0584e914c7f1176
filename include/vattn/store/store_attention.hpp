// Verified attention from a shuffled store: heavy tokens by a scan of key codes, the rest by a contiguous slice.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <span>
#include <utility>

#include "vattn/call/call.hpp"
#include "vattn/certify/certify.hpp"
#include "vattn/estimate/group.hpp"
#include "vattn/exact_attention.hpp"
#include "vattn/sample/importance.hpp"
#include "vattn/settings.hpp"
#include "vattn/store/shuffled_store.hpp"
#include "vattn/store/store_plan.hpp"
#include "vattn/store/store_reader.hpp"

namespace vattn::VATTN_ABI {

/// Scratch of a group of heads, taken from the call's workspace.
template <class Head>
struct store_scratch {
  std::span<std::uint8_t> tables;    // [heads][groups][64]
  std::span<float> table;            // of query_tables::make
  std::span<float> queries;          // [heads, dk]
  std::span<float> output, vectors;  // [heads, dv], [2, dv]
  store_reader_memory reader;
  std::span<float> plan;                      // plan_rows::storage_size
  std::span<float> plan_terms;                // store_planner::storage_size
  std::span<query_row<Head>> exact_rows;      // [heads]
  std::span<float> exact_part, exact_logits;  // as query_group wants them

  /// More picks than this cost more than reading all rows.
  [[nodiscard]] static index_t most_picks(index_t n) noexcept { return n / 6 + 512; }

  [[nodiscard]] static store_scratch take(arena& a, index_t n, index_t heads, index_t dk, index_t dv) noexcept {
    const auto h = static_cast<std::size_t>(heads), width = static_cast<std::size_t>(dv);
    const sketch::code_layout codes(dk);
    const auto entries = h * static_cast<std::size_t>(codes.groups) * 64;
    store_scratch s;
    s.tables = a.take<std::uint8_t>(entries);
    s.table = a.take<float>(entries + codes.width);
    s.queries = a.take<float>(h * static_cast<std::size_t>(dk));
    s.output = a.take<float>(h * width);
    s.vectors = a.take<float>(2 * width);
    s.reader = store_reader_memory::take(a, heads, dk, dv, most_picks(n));
    s.plan = a.take<float>(plan_rows::storage_size(heads));
    s.plan_terms = a.take<float>(store_planner::storage_size(heads));
    s.exact_rows = a.take<query_row<Head>>(h);
    s.exact_part = a.take<float>(h * width);
    s.exact_logits = a.take<float>(query_group<Head>::logits_size(heads));
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

/// Whether a store of n tokens, `past` of them in random order, may be sampled for less than it takes to read them all.
/// A pilot that ends in exact attention is about a twentieth of it at most, where the past is this long.
[[nodiscard]] inline bool worth_sampling(index_t n, index_t past, index_t heads) noexcept {
  return past >= 32 * kernel::scan_keys && read_costs(kernel::active_isa(), heads).may_pay(past, n);
}

/// One call's work for the heads of a group:
///   tables -> pilot -> plan -> scan -> keys -> thin -> values -> judge, again with more rows while a head is not
/// verified. Each token is sampled by whichever design gives it the larger probability: Poisson sampling with π from
/// its code (picked), or the slice of m of N rows (light, π < m/N). Of the picked ones the key is read, and the value
/// if the logit says that it is worth it. Both depend on the token alone, so every estimate is unbiased over the draw
/// and the store's order; docs/mathematics.md has the details.
template <class Policy, class Head>
class store_sampler {
  using B = typename Policy::bound;
  using T = typename Head::key_element;
  using stage = sample::store_stage;
  enum class next_step : std::uint8_t { done, extend, scan, give_up };
  static void enter(stage s) noexcept { Policy::sampler::enter(s); }

 public:
  store_sampler(head_group<Head>& group, const config& settings, const store_scratch<Head>& memory) noexcept
      : group_(group),
        settings_(settings),
        promise_{settings.epsilon, settings.delta, settings.scale, shape.kappa},
        s_(memory),
        head_(group[0].row.head),
        codes_(head_.codes()) {
    heads_ = group.size();
    blocks_ = head_.past() / kernel::scan_keys;
    rows_ = blocks_ * kernel::scan_keys;
    random_ = group[0].stream;
    tables_.query.numbers = (std::uint64_t{random_.next()} << 32) | random_.next();
    first_block_ = random_.below(static_cast<std::uint32_t>(std::max<index_t>(1, blocks_)));
  }

  /// Attends every head: verified, or exactly where that costs less or does not come to an end.
  void run() noexcept {
    if (!worth_sampling(head_.size(), head_.past(), heads_)) return rest_exactly();
    // Values that are unlike those from which the codes have their typical distance: its square would be no float.
    if (!(reach_unit() > 0x1p-40f && reach_unit() < 0x1p40f)) return rest_exactly();
    const read_costs costs(kernel::active_isa(), heads_);
    enter(stage::tables);
    for (index_t g = 0; g < heads_; ++g)
      std::copy_n(group_[g].row.scaled_query, head_.dk(), s_.queries.data() + g * head_.dk());
    if (!tables_.make(codes_, s_.queries.data(), heads_, head_.dk(), s_.tables, s_.table)) return rest_exactly();
    store_reader<Head> read(head_, tables_, heads_, s_.queries.data(), group_[0].row.scale, s_.reader, random_.fork(1),
                            unit());
    sample_until_verified(read, costs);
    for (index_t g = 0; g < heads_; ++g) group_[g].ok = group_[g].ok && (read.odd() >> g & 1) == 0;
    rest_exactly();
  }

 private:
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

  void sample_until_verified(store_reader<Head>& read, const read_costs& costs) noexcept {
    enter(stage::pilot);
    if (!pilot(read)) return;
    enter(stage::plan);
    choice_ = choose(costs, read);
    if (choice_.cost > costs.dense(head_.size())) return;
    const auto most = static_cast<index_t>(settings_.max_density * static_cast<double>(head_.size()));
    squeeze_.fill(1);
    next_step next = next_step::scan;
    index_t candidates = 0;
    for (index_t round = 1; round <= settings_.max_rounds; ++round) {
      if (next == next_step::scan) {
        enter(stage::scan);
        candidates = scan(0, blocks_, reserve, s_.reader.capacity);
        if (candidates < 0) return;
        read.clear();
        slice_read_ = picks_ = 0;
        above_ = steps(held_back);
      }
      if (fixed() + picks_ + choice_.slice > most) return;
      enter(stage::slice);
      read.clear_picked();
      if (!read_fixed(read)) return;
      if (!read_slice(read)) return;
      enter(stage::picks);
      next = weigh_enough(read, candidates);
      if (next == next_step::give_up) return;
      if (next == next_step::scan) continue;
      read.read_picks(picks_ > few_picks ? &goals_ : nullptr);
      enter(stage::judge);
      next = judge(read, round);
      if (next == next_step::done) return;
    }
  }

  // All rows, for the heads that are not done.
  void rest_exactly() noexcept {
    enter(stage::exact);
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
        kernel::prepare_queries<T>(how, s_.queries.data(), count, dk, group_[0].row.scale, s_.reader.prepared),
        s_.exact_part.first(at(count * head_.dv())), s_.exact_logits};
    std::uint32_t odd = 0;
    for (index_t from = 0; from < head_.size(); from += phase_rows)
      odd |= together.add(population(from, std::min(head_.size(), from + phase_rows)));
    for (index_t i = 0; i < count; ++i) {
      head_task<Head>& task = group_[which[at(i)]];
      task.ok = (odd >> i & 1) == 0;
      task.state = states[at(i)];
      add_sink(task.state, task.row.sink_logit);
      certify_exact(task.c);
    }
  }

  [[nodiscard]] bool read_fixed(store_reader<Head>& read) const noexcept {
    const index_t sinks = head_.sinks(), after = sinks + rows_;
    return read.read_fixed(0, sinks) && read.read_fixed(after, head_.size() - after);
  }

  // What the sums lack of the slice.
  [[nodiscard]] bool read_slice(store_reader<Head>& read) noexcept {
    const index_t from = std::exchange(slice_read_, choice_.slice / kernel::scan_keys);
    return read.read_slice(first_block_, from, slice_read_);
  }
  void lengthen_slice(double factor) noexcept {
    const auto wanted = static_cast<index_t>(factor * static_cast<double>(choice_.slice));
    choice_.slice = std::min(rows_, (wanted + kernel::scan_keys - 1) / kernel::scan_keys * kernel::scan_keys);
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
  [[nodiscard]] bool pilot(store_reader<Head>& read) noexcept {
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
    read.clear();
    if (!read_fixed(read) || !read.weigh_picks(0, picks)) return false;
    read.set_probabilities(picks, 0, static_cast<float>(pilot_share));
    read.note_picks(picks, plan_);
    read.read_picks();
    if (!read.read_slice(first_block_, 0, pilot_blocks, &plan_)) return false;
    for (index_t g = 0; g < heads_; ++g) {
      estimate_[at(g)] = estimate(read, g, choice_.slice);
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

  [[nodiscard]] stats::evidence estimate(const store_reader<Head>& read, index_t g, index_t m) noexcept {
    const float sink = group_[g].row.sink_logit;
    const double extra = std::isfinite(sink) ? std::exp(static_cast<double>(sink - read.reference(g))) : 0;
    const auto dv = at(head_.dv());
    return estimate_strata(read.picked(), read.light(), g, rows_, m, extra, {head_.value_centre(), dv},
                           s_.output.subspan(at(g) * dv, dv), s_.vectors.data());
  }

  [[nodiscard]] double goal2(const stats::evidence& e) const noexcept { return stats::squared_goal(e, promise_); }

  // log(κ ε T D) as a threshold of scores of k − μ plus log(r/unit): a token that is missed although it may move the
  // output by f must cost at most κ·ε·T, and moves it by x‖v − ô‖ <= x(r + ‖ô − c‖), at a typical r.
  [[nodiscard]] double floor_threshold(const store_reader<Head>& read, index_t g,
                                       const stats::evidence& e) const noexcept {
    const double typical = static_cast<double>(reach_unit()), away = std::max(1e-12 * typical, std::sqrt(e.away2));
    return std::log(stats::missable(e, promise_) / (typical + std::min(away, typical * (typical / away)))) +
           static_cast<double>(read.reference(g)) - static_cast<double>(tables_.offset[at(g)]);
  }

  [[nodiscard]] store_choice choose(const read_costs& costs, const store_reader<Head>& read) noexcept {
    store_planner planner(kernel::active_isa(), plan_, s_.plan_terms, heads_, rows_);
    for (index_t g = 0; g < heads_; ++g) {
      const stats::evidence& e = estimate_[at(g)];
      const double margin = plan_margin / known_variance_radius2(e.dimension);
      away_[at(g)] = std::max(reach_unit() / 2, static_cast<float>(1.1 * std::sqrt(e.away2)));
      planner.head(g, {.goal = margin * goal2(e) * e.denominator * e.denominator,
                       .reference = read.reference(g),
                       .away2 = e.away2,
                       .mean = score_mean_[at(g)],
                       .variance = score_variance_[at(g)],
                       .floor = floor_threshold(read, g, e) - 0.15,
                       .error = static_cast<double>(tables_.error(g)),
                       .z = shape.z,
                       .sure = shape.sure});
    }
    return planner.choose(costs, fixed());
  }

  // Weighs the picks of the chosen thresholds, and of lower ones as long as their keys show that this is not enough. A
  // slice that leaves the picks so little that all their values would be read is made longer, where that is cheaper.
  [[nodiscard]] next_step weigh_enough(store_reader<Head>& read, index_t candidates) noexcept {
    std::array<double, max_group> away2{};
    for (index_t g = 0; g < heads_; ++g) away2[at(g)] = estimate_[at(g)].away2;
    const index_t spare = steps(for_floors);
    for (bool lengthened = false;;) {
      const double weight = static_cast<double>(rows_) / static_cast<double>(choice_.slice);
      kernel::scan_pick* const all = s_.reader.picks.data();
      const index_t before = picks_;
      picks_ = std::partition(all + before, all + candidates,
                              [&](const kernel::scan_pick& p) { return p.margin >= above_; }) -
               all;
      if (!read.weigh_picks(before, picks_)) return next_step::give_up;
      read.set_probabilities(picks_, above_, 1.0f);
      std::array<typename store_reader<Head>::weighed, max_group> found;
      read.look_at_picks(picks_, away2, found);
      double worst = 0, longer = 1;
      bool again = false;
      goals_.fill(std::numeric_limits<double>::infinity());
      for (index_t g = 0; g < heads_; ++g) {
        if (done_[at(g)]) continue;
        const stats::evidence& e = estimate_[at(g)];
        const stratum_scalars& light = read.light().of(g);
        const double d = read.picked().of(g).x + found[at(g)].x + weight * light.x;
        const double slice = weight * (weight - 1) * (light.spread + light.square * e.away2);
        const double goal = squeeze_[at(g)] * thin_margin / known_variance_radius2(e.dimension) * goal2(e) * d * d;
        goals_[at(g)] = std::max(goal - slice, 0.2 * goal);  // a slice that is too short is for the judge
        // With the quantile's part for few effective terms, as store_planner has it.
        const double sure = found[at(g)].variance * (1 + 4 * found[at(g)].concentration);
        const double need = sure / goals_[at(g)];
        if (need > 0.75) longer = std::max(longer, slice / (0.4 * goal));
        worst = std::max(worst, need);
        if (need > 1.1 && sure > 0.5 * goal) {  // else a longer slice is cheaper
          again = true;
          if (above_ == 0) choice_.plain[at(g)] = weighed_from(g) - std::log(need / worth_thinning);
        }
      }
      if (longer > 1 && !lengthened &&
          (longer - 1) * static_cast<double>(choice_.slice) < static_cast<double>(picks_) / 2) {
        lengthened = true;
        lengthen_slice(longer);
        if (!read_slice(read)) return next_step::give_up;
        continue;
      }
      if (worst <= worth_thinning || picks_ <= few_picks || (above_ <= spare && !again)) return next_step::extend;
      if (above_ == 0) return next_step::scan;
      const index_t lower = std::max<index_t>(1, steps(std::max(0.05, std::log(worst / worth_thinning))));
      above_ = std::max<index_t>(above_ > spare ? spare : 0, above_ - lower);
    }
  }

  // The squared radius of a known variance of 1, by Wilson and Hilferty's cube root: for plans, which need no more.
  [[nodiscard]] double known_variance_radius2(double dimension) const noexcept {
    if (dimension < 3) return stats::squared_radius<B>(1, 0, {dimension, stats::infinity, 1e6}, settings_.delta);
    const double spread = 2 / (9 * dimension);
    const double root = 1 - spread + stats::normal_quantile(1 - settings_.delta) * std::sqrt(spread);
    return root * root * root;
  }

  // How much lower the thresholds of what was weighed ought to be for the floors, nats: 0 or less where they hold, and
  // infinity where keys are missing that were to be certain.
  [[nodiscard]] double uncovered(index_t g, double floor, double away) const noexcept {
    const double weighed =
        choice_.floor[at(g)] - reserve + static_cast<double>(above_) * static_cast<double>(tables_.step);
    // Levels have max(r, away_): keys whose r is less are too low by as much as away_ is.
    const double want = floor + 0.35 - std::max(0.0, std::log(0.8 * away / static_cast<double>(away_[at(g)])));
    if (choice_.floor[at(g)] - sure_reserve > want) return std::numeric_limits<double>::infinity();
    return weighed - want;
  }

  // Writes what is verified, and sets the next choice for the rest: more values and a longer slice where that is
  // enough, else lower thresholds.
  [[nodiscard]] next_step judge(const store_reader<Head>& read, index_t round) noexcept {
    next_step next = next_step::done;
    double longer = 1, more = 1;
    index_t lowest = above_;
    auto wanted_floor = choice_.floor, wanted_plain = choice_.plain;
    auto wanted_away = away_;
    for (index_t g = 0; g < heads_; ++g) {
      head_task<Head>& task = group_[g];
      if (done_[at(g)]) continue;
      certificate& c = task.c;
      c.rounds = round;
      c.breaches = read.breaches(g);
      const index_t sampled = picks_ + choice_.slice;
      if (c.breaches > stats::breaches_of_errors(sampled)) continue;
      const stats::evidence e = estimate(read, g, choice_.slice);
      if (!e.finite()) continue;
      const stats::verdict v = stats::judge<B>(e, promise_);
      const double floor = floor_threshold(read, g, e), away = std::sqrt(e.away2);
      const double missing = uncovered(g, floor, away);
      const bool covered = missing <= 0;
      if (v.met && covered) {
        done_[at(g)] = true;
        stats::certify(c, e, v,
                       {.rows_exact = fixed(),
                        .rows_sampled = sampled,
                        .budget = sampled,
                        .kind = B::kind,
                        .bound = B::name,
                        .assumptions = "asymptotic, as stated by the bound; the codes' stated errors are true; draws "
                                       "are over the store's order"});
        record(read, task);
        task.state.clear();
        task.state.raise(read.reference(g));
        task.state.add_denominator(e.denominator);
        const std::span<float> to = task.state.numerator();
        for (std::size_t j = 0; j < to.size(); ++j)
          to[j] = s_.output[at(g) * to.size() + j] * unit() * static_cast<float>(e.denominator);
        continue;
      }
      next = std::max(next, next_step::extend);
      if (!covered) {  // by candidates that are at hand, or by another scan
        const index_t lower = steps(missing + 0.15);
        if (lower > above_) next = next_step::scan;
        lowest = std::min(lowest, above_ - lower);
      }
      // Taken over where a scan follows; a floor that was never scanned covers nothing.
      wanted_floor[at(g)] = std::min(choice_.floor[at(g)], floor - 0.2);
      wanted_away[at(g)] = std::max(away_[at(g)], static_cast<float>(1.1 * away));
      estimate_[at(g)] = e;
      if (v.met) continue;
      const double goal_variance = 0.92 * 0.92 * v.needed_variance;
      squeeze_[at(g)] *= 0.95 / v.ratio;
      // More values and more of the candidates help as far as picks are what is uncertain.
      if (e.light < 0.5 * e.variance && (above_ > 0 || 10 * read.values_read() < 9 * picks_)) continue;
      const double left = goal_variance - (e.variance - e.light);
      const double factor = left > 0 ? 1.05 * e.light / left : 1e9;
      if (factor > 4) {
        next = next_step::scan;
        wanted_plain[at(g)] = weighed_from(g) - std::log(e.variance / goal_variance);
        more = std::max(more, e.variance / goal_variance);
      } else {
        longer = std::max(longer, factor);
      }
    }
    above_ = std::max<index_t>(0, lowest);
    const double grow = std::max(longer, next == next_step::scan ? std::min(more, 2.0) : 1.0);
    lengthen_slice(grow);
    if (next == next_step::scan) {
      choice_.share = static_cast<double>(choice_.slice) / static_cast<double>(rows_);
      choice_.floor = wanted_floor, choice_.plain = wanted_plain, away_ = wanted_away;
    }
    return next;
  }

  // The rows behind an output with their weights, where the call asks for them.
  void record(const store_reader<Head>& read, head_task<Head>& task) noexcept {
    const chosen_rows& to = task.s.chosen;
    to.clear();
    if (!to) return;
    const index_t sinks = head_.sinks();
    to.add_ends(task.tokens, sinks, fixed() - sinks);
    for (index_t i = 0; i < picks_; ++i) {
      if (const float w = read.weights()[at(i)]; w > 0)
        to.add(sinks + static_cast<index_t>(s_.reader.picks[at(i)].row), static_cast<double>(w));
    }
    kernel::scanned_keys keys;
    for (index_t k = 0; k < choice_.slice / kernel::scan_keys; ++k) {
      const index_t block = (first_block_ + k) % blocks_;
      kernel::scan_all(kernel::active_isa(), tables_.query, codes_.view(), block, keys);
      for (index_t i = 0; i < kernel::scan_keys; ++i) {
        if (keys.level[i] < tables_.query.cut) {
          to.add(sinks + block * kernel::scan_keys + i,
                 static_cast<double>(rows_) / static_cast<double>(choice_.slice));
        }
      }
    }
  }

  static constexpr floor_sampling shape{};
  // Of the variance that verifies: what the picks are planned for, and what is kept of them.
  static constexpr double plan_margin = 0.9, thin_margin = 0.75;
  // Of the picks' goal: more variance than this with all of them, and it is worth weighing more.
  static constexpr double worth_thinning = 0.85;
  // Nats by which the scan's thresholds are lower than the plan's; those between are weighed if the rest is not enough,
  // the last of them only where otherwise another scan would follow: mostly for floors that the pilot took for higher.
  static constexpr double reserve = 0.9, held_back = 0.72, for_floors = 0.3;
  // The same for keys that are certain, which are weighed whatever else is: there are many, and few are worth a value.
  static constexpr double sure_reserve = 0.45;
  static constexpr index_t few_picks = 256;  // that are not worth thinning

  head_group<Head>& group_;
  const config& settings_;
  stats::promise promise_;
  store_scratch<Head> s_;
  Head head_;
  const sketch::block_codes& codes_;
  sketch::query_tables tables_;
  index_t heads_ = 0, blocks_ = 0, rows_ = 0, first_block_ = 0;
  random_stream random_{};
  plan_rows plan_;
  std::array<double, max_group> score_mean_{}, score_variance_{};  // over all keys, from a few blocks
  std::array<float, max_group> away_{};
  std::array<double, max_group> squeeze_{};
  std::array<double, kernel::scan_heads> goals_{};  // variances that the slice leaves to the picks
  index_t picks_ = 0, above_ = 0;                   // weighed, by how many steps their thresholds are above the scan's
  index_t slice_read_ = 0;                          // blocks of the slice that are in the sums
  std::array<bool, max_group> done_{};
  std::array<stats::evidence, max_group> estimate_{};
  store_choice choice_{};
};

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

/// Every head of the group from its store.
template <class Policy, class Head>
void attend_from_store(head_group<Head>& group, const config& settings) noexcept {
  arena a(group.memory);
  const Head& head = group[0].row.head;
  const auto scratch = store_scratch<Head>::take(a, head.size(), group.size(), head.dk(), head.dv());
  store_sampler<Policy, Head>(group, settings, scratch).run();
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
