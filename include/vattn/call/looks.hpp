// The look loop: how a sampling design comes from its first rows to verified outputs.
#include "vattn/macros_push.hpp"
#pragma once

#include <concepts>
#include <span>

#include "vattn/call/call.hpp"
#include "vattn/certify/certify.hpp"

namespace vattn::VATTN_ABI {

/// What a draw leaves to judge.
enum class draw_outcome : std::uint8_t {
  sample,   ///< a sample that is larger than the last, or another: judge it
  nothing,  ///< not yet enough of one: draw again
  too_much  ///< more than sampling is worth, or a number that is not finite: all rows are to be read
};

/// Whether a head's sample can be judged at all.
enum class soundness : std::uint8_t {
  sound,
  not_this_head,  ///< its scores do not know their own errors, or a number is not finite: no look will do
  no_head         ///< the same, for every head of the group
};

/// A sampling design, for the heads of one group. It says which rows are drawn and what they show, and
/// `look_until_verified` when that is enough:
///  - begin(): what is done once: scores, tables, rows that are read for certain, a first plan. False: no look.
///  - draw(): reads the rows that the plan, or the last look, asks for. Limits of rows are kept here, where rows are
///    counted before they are read.
///  - evidence(h, e): what the sample says of head h's error.
///  - judge(h, e): the verdict, by stats::judge (of a uniform sample through a target).
///  - suffices(h, e, v): whether an output may rest on it: the promise holds, and no token that was left to chance
///    could cost more than its share of ε.
///  - next(h, e, v): otherwise, notes what the head asks of the next draw. False: nothing.
///  - record(h, e, v): the head's output, its certificate (stats::certify), and its rows where the call asks for them.
template <class D>
concept sampling_design = requires(D& d, index_t h, stats::evidence& e) {
  { d.begin() } -> std::same_as<bool>;
  { d.draw() } -> std::same_as<draw_outcome>;
  { d.evidence(h, e) } -> std::same_as<soundness>;
  { d.judge(h, e) } -> std::derived_from<stats::verdict>;
  { d.suffices(h, e, d.judge(h, e)) } -> std::same_as<bool>;
  { d.next(h, e, d.judge(h, e)) } -> std::same_as<bool>;
  d.record(h, e, d.judge(h, e));
};

/// One look: judges every head that is not done. True: a head asks for another look.
template <class Design, kv_head Head>
[[nodiscard]] bool judge_look(Design& design, head_group<Head>& heads, index_t look) noexcept {
  bool more = false;
  for (index_t h = 0; h < heads.size(); ++h) {
    head_task<Head>& task = heads[h];
    if (task.done || !task.ok) continue;
    stats::evidence e;
    task.c.rounds = look;
    const soundness worth = design.evidence(h, e);
    if (worth == soundness::no_head) return false;
    if (worth == soundness::not_this_head) continue;
    const auto v = design.judge(h, e);
    if (design.suffices(h, e, v)) {
      design.record(h, e, v);
      task.done = true;
    } else {
      more = design.next(h, e, v) || more;
    }
  }
  return more;
}

/// Looks until each head is done or no look helps. Heads that are not `done` then are the caller's to attend exactly.
template <sampling_design Design, kv_head Head>
void look_until_verified(Design& design, head_group<Head>& heads, index_t most_looks) noexcept {
  if (!design.begin()) return;
  for (index_t look = 1; look <= most_looks; ++look) {
    const draw_outcome got = design.draw();
    if (got == draw_outcome::too_much) return;
    if (got == draw_outcome::sample && !judge_look(design, heads, look)) return;
  }
}

/// Puts an estimate into the head's state: D̂ relative to exp(reference), and ô [dv] in units of 1/`unit`.
template <kv_head Head>
void put_estimate(head_task<Head>& task, float reference, double denominator, const float* output,
                  float unit = 1) noexcept {
  task.state.clear();
  task.state.raise(reference);
  task.state.add_denominator(denominator);
  const std::span<float> to = task.state.numerator();
  for (std::size_t j = 0; j < to.size(); ++j) to[j] = output[j] * unit * static_cast<float>(denominator);
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
