// One head after one look at its sample: the pieces of vattention::attend, laid open.
#pragma once

#include <functional>
#include <vector>

#include "support/problem.hpp"

namespace vattn::test {

template <class T>
struct type_tag {
  using type = T;
};

struct plan {
  index_t sinks = 0, window = 0, heavy = 0, rows = 0;
  std::uint64_t seed = 1;
};

/// Ranks by contribution, reads sinks, window and the heavy rows exactly, and samples `rows` of the rest.
template <class Sampler>
struct basic_sampled_head {
  using head_view = decltype(std::declval<kv_view<float>>().head(0, 0));
  using size = std::size_t;

  basic_sampled_head(const shape& s, unsigned problem_seed, float spread, const plan& wanted,
                     const std::function<void(problem<float>&)>& edit = {})
      : p(edited(s, problem_seed, spread, edit)),
        steps(wanted),
        tokens(0, s.n),
        scaled(scale(p)),
        row{.head = p.cache().head(0, 0), .scaled_query = scaled.data()},
        scores(size(s.n)),
        scored(select::exact_contributions{}.score(row, tokens, {scores, {}, value_centre, {}})),
        order(scores, steps.sinks, s.n - steps.window, ranks),
        sample(row, tokens, steps.sinks, steps.window, order,
               Sampler(static_cast<ordinal>(s.n), random_stream({steps.seed, 0, 0}, 0), table), drawn, moments) {
    const index_t fixed = steps.sinks + steps.window;
    exact = accumulate_exact(
        row, fixed, [&](index_t j) { return tokens[j < steps.sinks ? j : s.n - fixed + j]; }, state, part, true);
    extend_heavy(steps.heavy);
    state.finish(centre);
    moments.clear(centre, state.max_logit());
    exact = sample.grow(steps.rows) && exact;
    look();
  }
  basic_sampled_head(const basic_sampled_head&) = delete;
  basic_sampled_head& operator=(const basic_sampled_head&) = delete;

  void extend_heavy(index_t k) {
    const index_t have = order.count();
    order.extend(k);
    exact = accumulate_exact(
                row, order.count() - have, [&](index_t j) { return tokens[order.top()[size(have + j)]]; }, state, part,
                true) &&
            exact;
  }
  void look() { now = make_estimate(state, moments, sample.population_size(), offset); }
  [[nodiscard]] vattn::look seen() {
    return {.now = now,
            .moments = moments,
            .offset = offset,
            .order = order,
            .rows = sample.rows(),
            .n = tokens.size(),
            .fixed = steps.sinks + steps.window,
            .scores = scored,
            .value_centre = value_centre,
            .settings = settings,
            .with_replacement = Sampler::with_replacement};
  }

  static problem<float> edited(const shape& s, unsigned seed, float spread,
                               const std::function<void(problem<float>&)>& edit) {
    problem<float> made(s, seed, spread);
    if (edit) edit(made);
    return made;
  }
  static std::vector<float> scale(const problem<float>& p) {
    std::vector<float> q = p.q;
    for (float& x : q) x *= p.options.scale;
    return q;
  }

  // In the order in which the constructor needs them.
  problem<float> p;
  plan steps;
  population tokens;
  std::vector<float> scaled;
  query_row<head_view> row;
  std::vector<float> value_centre = std::vector<float>(size(p.s.dv)), scores;
  std::vector<ordinal> ranks = std::vector<ordinal>(size(p.s.n));
  score_result scored;
  ranking order;
  std::vector<float> state_storage = std::vector<float>(size(p.s.dv)), part_storage = state_storage,
                     centre = state_storage, offset = state_storage;
  softmax_state state{state_storage}, part{part_storage};
  std::vector<float> moment_storage = std::vector<float>(residual_moments::storage_size(p.s.dv));
  residual_moments moments{moment_storage, p.s.dv};
  std::vector<drawn_row> drawn = std::vector<drawn_row>(size(p.s.n) * 2);
  std::vector<std::uint64_t> table = std::vector<std::uint64_t>(Sampler::table_size(static_cast<ordinal>(p.s.n)));
  residual_sample<head_view, Sampler> sample;
  estimate now;
  config settings;
  bool exact = true;
};

using sampled_head = basic_sampled_head<sample::uniform_without_replacement>;

/// What a contribution is measured in.
[[nodiscard]] inline double unit_of(const sampled_head& s) { return static_cast<double>(s.scored.contribution_unit); }

/// The largest sqrt(((t + r)² + along²)/(t² + offset²)) over t >= 0, by trying: r from the ranking's centre to the
/// point.
template <class Point>
[[nodiscard]] double widest(const look& l, Point&& point, double along) {
  double r2 = 0;
  for (std::size_t j = 0; j < l.value_centre.size(); ++j)
    r2 += std::pow(point(j) - static_cast<double>(l.value_centre[j]), 2);
  const double r = std::sqrt(r2), offset = static_cast<double>(l.scores.value_offset);
  double most = 1;  // of a value that is infinitely far
  for (int i = 0; i < 40000; ++i) {
    const double t = (r + offset) * i / (40000.0 - i);
    most = std::max(most, ((t + r) * (t + r) + along * along) / (t * t + offset * offset));
  }
  return std::sqrt(most);
}

}  // namespace vattn::test
