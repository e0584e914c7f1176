// The run of a sharded call: what a rank checks and lays out, and its exchanges.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <span>

#include "vattn/call/call.hpp"
#include "vattn/dist/agreement.hpp"
#include "vattn/dist/shard_group.hpp"

namespace vattn::VATTN_ABI::dist {

/// What a functor brings to a call: the shard's indices, [n_batch] or none, and what their last steps left to remember,
/// [n_batch, n_kv_heads] or none.
struct shard_setup {
  config settings{};
  std::span<const kv_index> indices{};
  split how = split::blocks;
  std::span<index_memory> memory{};
};

/// One call: the first exchange, then groups of heads from look to look, as many at once as memory is laid out for.
template <class Policy, class Q, class KV, class C, class E>
class sharded_call {
  using head_type = std::remove_cvref_t<decltype(std::declval<const KV&>().head(0, 0))>;
  static_assert(rows_in_order<head_type>, "sharded_attention: supply a cache whose rows lie in order of their cells");

 public:
  sharded_call(const shard_setup& self, const tensor_view<const Q, 4>& q, const KV& cache,
               const attention_options& options, const attention_result& result, workspace& memory, C& comm,
               const draw_key& key, E& exec, traffic& cost) noexcept
      : self_(self),
        q_(q),
        cache_(cache),
        options_(options),
        result_(result),
        memory_(memory),
        comm_(comm, cost),
        key_(key),
        exec_(exec),
        settings_(self.settings),
        ranks_(comm.size()),
        rank_(comm.rank()) {}

  [[nodiscard]] status run() noexcept {
    if (ranks_ < 1 || ranks_ > most_ranks || rank_ < 0 || rank_ >= ranks_) {
      return status::error(errc::invalid_argument, "rank %d of %d: a call has 1 to %d ranks", rank_, ranks_,
                           most_ranks);
    }
    const status local = prepare();
    bool heads_apart = !options_.mask.same_for_heads();
    if (status s = agree(
            comm_, self_.how, local,
            local ? terms_of_call(settings_, q_, cache_.n_kv_heads(), cache_.dv(), self_.how, options_, key_) : terms{},
            shards_, heads_apart);
        !s)
      return s;
    set_groups(heads_apart);
    arena run(memory_.memory());
    lay_out(run);
    for (index_t first = 0; first < groups_; first += at_once_) {
      if (status s = attend(first, std::min(groups_, first + at_once_)); !s) return s;
    }
    return {};
  }

 private:
  // One KV head's query heads, up to max_group of them.
  struct group_state {
    config settings;
    head_group<head_type> heads;
    std::array<float, max_group> sink_logits{};
    std::optional<shard_sampler<Policy, head_type>> sampler;
    index_t first_place = 0;  // of its first head, in the results
    std::size_t message = 0;  // begins there
    index_t judged = 0;       // exchanges
  };
  struct group_memory {
    std::span<std::byte> state, pieces;
    index_scratch index;
    shard_scratch own;
    std::array<scratch, static_cast<std::size_t>(max_group)> heads;
  };

  // Everything that can be known to be wrong on this rank, and the memory of the call.
  [[nodiscard]] status prepare() noexcept {
    if (status s = settings_.validate(); !s) return s;
    if (status s = check_call(q_, cache_, options_, result_); !s) return s;
    if (status s = key_.check(q_.extents[0], q_.extents[2]); !s) return s;
    if (status s = check_split(self_.how, options_, ranks_); !s) return s;
    if (!self_.indices.empty()) {
      if (status s = check_index_call(cache_, select::beside{self_.indices, self_.memory}); !s) return s;
    }
    workers_ = workers_of(exec_);
    if (workers_ < 1) {
      return status::error(errc::executor_failed, "the executor has %lld workers: it needs 1 or more",
                           static_cast<long long>(workers_));
    }
    if (settings_.joint) {
      settings_.delta /= static_cast<double>(std::max<index_t>(1, q_.extents[0] * q_.extents[1] * q_.extents[2]));
    }
    n_ = longest(cache_);
    sparse_ = {.sinks = settings_.sinks, .window = settings_.window};
    std::size_t bytes = 0;
    for (const bool apart : {false, true}) {
      if (apart && !options_.mask) continue;  // only masks differ by head, and another rank's may
      set_groups(apart);
      arena count;
      lay_out(count);
      bytes = std::max(bytes, count.used() + workspace::alignment);
    }
    if (status s = memory_.reserve(bytes); !s) return s;
    arena run(memory_.memory());
    lay_out(run);  // where `shards_` lies depends on nothing else
    for (index_t b = 0; b < cache_.n_batch(); ++b) {
      sequence_shard& s = shards_[static_cast<std::size_t>(b)] = {.total = cache_.head(b, 0).size()};
      const cell_positions::line positions = options_.positions.at(b);
      for (index_t c = 0; positions && c < s.total; ++c) s.last = std::max<index_t>(s.last, positions(c));
    }
    return {};
  }
  // Heads that see the same tokens share a sample.
  void set_groups(bool heads_apart) noexcept {
    const index_t group = q_.extents[2] / cache_.n_kv_heads();
    shared_ = heads_apart ? 1 : std::clamp<index_t>(group, 1, max_group);
    parts_ = (group + shared_ - 1) / shared_;
    groups_ = result_.output.size() == 0 ? 0 : q_.extents[0] * q_.extents[1] * cache_.n_kv_heads() * parts_;
    at_once_ = std::min(most_groups, std::max<index_t>(1, groups_));
  }
  [[nodiscard]] bool masked() const noexcept { return options_.mask || options_.positions; }
  [[nodiscard]] group_memory take_group(arena& a) const noexcept {
    const index_t dk = q_.extents[3], dv = cache_.dv(), fixed = settings_.sinks + settings_.window;
    group_memory m;
    m.state = a.take<std::byte>(sizeof(group_state));
    m.pieces =
        a.take<std::byte>(std::max(exact_scratch::piece_bytes(shared_, dv), index_piece::bytes(shared_, dk, dv)));
    m.index = index_scratch::take(a, self_.indices.empty() ? 0 : n_, shared_, dk, dv, std::min(fixed, n_));
    m.own = shard_scratch::take(a, look_format(shared_, dv), ranks_);
    for (index_t h = 0; h < shared_; ++h)
      m.heads[static_cast<std::size_t>(h)] = scratch::take(a, n_, dk, dv, masked(), sparse_);
    return m;
  }
  // A dry run and the run.
  void lay_out(arena& a) noexcept {
    const auto ranks = static_cast<std::size_t>(ranks_), groups = static_cast<std::size_t>(at_once_);
    const index_t dv = cache_.dv();
    const std::size_t opening = sizeof(notice) + groups * shard_opening::bytes(shared_, dv);
    const std::size_t look =
        sizeof(notice) +
        groups * std::max(look_format(shared_, dv).bytes(), shard_sampler<Policy, head_type>::exact_bytes(shared_, dv));
    shards_ = a.take<sequence_shard>(static_cast<std::size_t>(cache_.n_batch()));
    states_ = a.take<group_state*>(groups);
    sent_ = a.take<std::byte>(std::max(opening, look));
    openings_ = a.take<std::byte>(ranks * opening);
    received_ = a.take<std::byte>(ranks * look);
    groups_memory_ = a;
    for (std::size_t g = 0; g < groups; ++g) static_cast<void>(take_group(a));
  }

  void make_group(group_state& to, const group_memory& m, index_t group) noexcept {
    const index_t part = group % parts_, kv = group / parts_ % cache_.n_kv_heads();
    const index_t t = group / parts_ / cache_.n_kv_heads() % q_.extents[1];
    const index_t b = group / parts_ / cache_.n_kv_heads() / q_.extents[1];
    const index_t each = q_.extents[2] / cache_.n_kv_heads(), first = kv * each + part * shared_;
    const index_t heads = std::min(shared_, each - part * shared_);
    const auto head = cache_.head(b, kv);
    const sequence_shard& whole = shards_[static_cast<std::size_t>(b)];
    to.settings = settings_;
    to.heads.memory = m.pieces;
    to.first_place = (b * q_.extents[1] + t) * q_.extents[2] + first;
    for (index_t h = 0; h < heads; ++h) {
      const scratch& s = m.heads[static_cast<std::size_t>(h)];
      query_row<head_type> row = make_row(q_, head, options_, b, t, first + h, b * cache_.n_kv_heads() + kv, s.query);
      if (!row.positions) row.position = whole.total - q_.extents[1] + t;
      const visible_part seen =
          visible_cells(head.size(), self_.how, whole, rank_, ranks_, row.position, row.mask, row.positions, options_,
                        settings_.sinks, settings_.window, s.visible, s.ends);
      if (!row.positions) row.position -= self_.how == split::blocks ? whole.first : 0;
      to.settings.sinks = seen.sinks, to.settings.window = seen.window;
      // A learned sink is of the whole: added once, when the shards are merged.
      to.sink_logits[static_cast<std::size_t>(h)] = row.sink_logit;
      row.sink_logit = -std::numeric_limits<float>::infinity();
      const random_stream stream(key_.at(b, t), key_.first_head + static_cast<std::uint32_t>(first + h));
      head_task<head_type> one{.row = row,
                               .tokens = seen.tokens,
                               .stream = stream.fork(first_purpose + static_cast<std::uint32_t>(rank_)),
                               .s = s,
                               .query = t};
      one.state = softmax_state(s.state);
      one.c.epsilon = settings_.epsilon, one.c.delta = settings_.delta, one.c.scale = settings_.scale;
      one.c.target = Policy::target::kind, one.c.shards = ranks_;
      const float sink = to.sink_logits[static_cast<std::size_t>(h)];
      one.ok = std::isfinite(sink) || sink == -std::numeric_limits<float>::infinity();
      one.s.chosen = result_.decisions.at(b, t, first + h);
      one.s.chosen.clear();
      to.heads.push(std::move(one));
    }
    static const cell_codes none;
    const bool indexed = !self_.indices.empty();
    const kv_index* const index = indexed ? &self_.indices[static_cast<std::size_t>(b)] : nullptr;
    // Several groups would write what is remembered of one KV head.
    const bool remembers = indexed && !self_.memory.empty() && q_.extents[1] == 1 && shared_ == each;
    index_memory* const remembered =
        remembers ? &self_.memory[static_cast<std::size_t>(b * cache_.n_kv_heads() + kv)] : nullptr;
    to.sampler.emplace(to.heads, to.settings, index ? index->codes(kv) : none,
                       index ? index->value_centre(kv) : nullptr, remembered, indexed, m.index, m.own,
                       look_format(heads, cache_.dv()), to.sink_logits, index_t{rank_},
                       static_cast<double>(head.size()) / static_cast<double>(std::max<index_t>(1, whole.total)));
  }

  // f(group) of all groups that are at hand, by the executor.
  template <class F>
  [[nodiscard]] status for_groups(index_t count, F&& f) noexcept {
    return run_tasks(exec_, workers_, count, [&](index_t g, index_t) { f(*states_[static_cast<std::size_t>(g)]); });
  }

  [[nodiscard]] status attend(index_t first, index_t last) noexcept {
    const index_t count = last - first;
    arena a = groups_memory_;
    for (index_t g = 0; g < count; ++g) {
      const group_memory m = take_group(a);
      group_state* const state = std::construct_at(reinterpret_cast<group_state*>(m.state.data()));
      states_[static_cast<std::size_t>(g)] = state;
      make_group(*state, m, first + g);
    }
    std::size_t size = sizeof(notice);
    for (index_t g = 0; g < count; ++g) {
      group_state& s = *states_[static_cast<std::size_t>(g)];
      s.message = size;
      size += shard_opening::bytes(s.heads.size(), cache_.dv());
    }
    const auto message = [&](group_state& s) { return sent_.subspan(s.message); };
    status local = for_groups(count, [&](group_state& s) { s.sampler->open(message(s)); });
    if (status s = exchange(local, size, openings_); !s) return s;
    if (status s = by_all(count,
                          [&](group_state& g) {
                            g.sampler->agree({openings_.data() + g.message, size, ranks_});
                          });
        !s)
      return s;

    for (;;) {
      size = sizeof(notice);
      index_t waiting = 0;
      for (index_t g = 0; g < count; ++g) {
        group_state& s = *states_[static_cast<std::size_t>(g)];
        s.message = size;
        size += s.sampler->message_bytes();
        waiting += s.sampler->at_stage() == stage::done ? 0 : 1;
      }
      if (waiting == 0) break;
      local = for_groups(count, [&](group_state& s) {
        if (const std::size_t bytes = s.sampler->message_bytes(); bytes > 0) s.sampler->work(message(s).first(bytes));
      });
      if (local) local = find_odd(count, false);
      if (status s = exchange(local, size, received_); !s) return s;
      if (status s = by_all(count,
                            [&](group_state& g) {
                              if (g.sampler->at_stage() != stage::done)
                                g.sampler->judge_all({received_.data() + g.message, size, ranks_});
                            });
          !s)
        return s;
    }
    // The same numbers everywhere, and so the same end.
    if (status s = find_odd(count, true); !s) return s;
    for (index_t g = 0; g < count; ++g) write(*states_[static_cast<std::size_t>(g)]);
    return {};
  }

  [[nodiscard]] status exchange(const status& local, std::size_t size, std::span<std::byte> to) noexcept {
    const notice n(local);
    std::memcpy(sent_.data(), &n, sizeof n);
    if (status s = comm_.all_gather(sent_.first(size), to.first(size * static_cast<std::size_t>(ranks_))); !s) return s;
    return first_failure(to.data(), size, ranks_);
  }

  // What all ranks must do alike once they have exchanged, whatever the executor does.
  template <class F>
  [[nodiscard]] status by_all(index_t count, F&& f) noexcept {
    const index_t turn = comm_.cost.exchanges;
    const auto once = [&](group_state& g) {
      if (g.judged == turn) return;
      g.judged = turn;
      f(g);
    };
    if (!for_groups(count, once)) {
      for (index_t g = 0; g < count; ++g) once(*states_[static_cast<std::size_t>(g)]);
    }
    return {};
  }

  // `outputs`: of what is to be written, else of what this rank has read.
  [[nodiscard]] status find_odd(index_t count, bool outputs) noexcept {
    for (index_t g = 0; g < count; ++g) {
      group_state& s = *states_[static_cast<std::size_t>(g)];
      for (index_t h = 0; h < s.heads.size(); ++h) {
        bool ok = s.heads[h].ok;
        if (outputs) {
          ok = ok &&
               kernel::const_float_map(s.heads[h].s.output.data(), static_cast<Eigen::Index>(cache_.dv())).allFinite();
        }
        if (!ok) return non_finite_error(s.first_place + h, q_.extents[1], q_.extents[2]);
      }
    }
    return {};
  }

  void write(group_state& s) noexcept {
    for (index_t h = 0; h < s.heads.size(); ++h) {
      const head_task<head_type>& task = s.heads[h];
      const index_t place = s.first_place + h, head = place % q_.extents[2];
      const index_t t = place / q_.extents[2] % q_.extents[1], b = place / q_.extents[2] / q_.extents[1];
      for (index_t j = 0; j < cache_.dv(); ++j)
        result_.output(b, t, head, j) = task.s.output[static_cast<std::size_t>(j)];
      if (result_.log_sum_exp) result_.log_sum_exp(b, t, head) = static_cast<float>(task.c.log_denominator);
      if (result_.certificates) result_.certificates(b, t, head) = task.c;
    }
  }

  // Of KV heads and queries: what is more is attended in turn, so that memory does not grow with the queries.
  static constexpr index_t most_groups = 128;
  static constexpr std::uint32_t first_purpose = 0x1000;  // of streams, one a rank: philox.hpp

  const shard_setup& self_;
  const tensor_view<const Q, 4>& q_;
  const KV& cache_;
  const attention_options& options_;
  const attention_result& result_;
  workspace& memory_;
  counting_communicator<C> comm_;
  const draw_key& key_;
  E& exec_;
  config settings_;
  int ranks_, rank_;
  index_t n_ = 0, workers_ = 1, shared_ = 1, parts_ = 1, groups_ = 0, at_once_ = 1;
  scratch::sparse_sizes sparse_{};
  std::span<sequence_shard> shards_{};
  std::span<group_state*> states_{};
  std::span<std::byte> sent_{}, openings_{}, received_{};
  arena groups_memory_{};
};

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
