// Verified attention to a cache that is split over ranks: one sample of all shards, one judgement, the same output on
// every rank.
#include "vattn/macros_push.hpp"
#pragma once

#include <span>

#include "vattn/dist/sharded_call.hpp"
#include "vattn/policy.hpp"

namespace vattn::VATTN_ABI::dist {

/// Attention of queries that every rank has, to a cache of which each rank has a shard: its rows as any kv_cache, and
/// beside them a kv_index for each sequence. Every rank makes the same call with its own shard; every rank's output,
/// log-sum-exp and certificates are then those of the whole cache, with the same bits.
///
///     dist::thread_rank comm(group, rank);                          // or mpi_communicator, nccl_communicator
///     dist::sharded_attention<> attend({.epsilon = 0.05, .delta = 0.1}, index, dist::split::round_robin);
///     status s = attend(query, shard, options, result, memory, comm, {.step = step}, pool);
///
/// Without indices (an empty span) a rank reads all of its rows; if no rank has any, this is exact attention, split and
/// merged. Shards may be empty and of any lengths; small ones are read whole. Masks and positions are of the shard's
/// own cells; sinks, window, causality and sliding windows go by a token's place in the whole sequence (`split`): sinks
/// are the first places that a query may see, window the last, and masked places among them are not made up for.
///
/// Exchanges of a call: a first one of 424 bytes a rank and 8 sequences, one of values' centres, one for each look
/// (`look_format`: at most 24 kB for the heads of a group at head size 128), one where rows are read after all. What is
/// in a look is judged by every rank from the same bytes in the same order; so ranks must run the same build of the
/// library on machines whose exp() agrees, which the first exchange checks. A rank whose call fails makes the call fail
/// everywhere, with its message, before anything is written; errors are those of `vattention` else, and of the
/// communicator. Settings, shapes, options, draw key and query must be equal on all ranks: the first exchange finds
/// what is not.
///
/// Ranks draw by the key and their rank. Allocates nothing but a growing workspace: about 40 bytes for each token of
/// the shard and KV head, of which a small part is ever touched, and the ranks' messages. When not to use it: where the
/// cache fits one memory, and for prefill.
///
/// With `memory` a step begins where the last one ended, as index_memory has it, if all ranks that sample remember:
/// that spares the exchange of a first look, and the plan. `result.decisions` are of the rank's own shard: its cells,
/// with their weights. Softmaxes over them, of all ranks, merged by (o, log-sum-exp), are the output. They are written
/// as heads are verified, and of no use where the call fails.
template <class Policy = index_policy>
class sharded_attention {
  static_assert(has_slots<Policy> && samples_by_index<typename Policy::sampler>,
                "sharded_attention<Policy>: supply sample::from_index (derive from vattn::index_policy): shards are "
                "sampled by an index beside each");
  static_assert(attention_policy<Policy>, "sharded_attention<Policy>: vattn/policy.hpp says what a policy needs");

 public:
  /// `indices`: of the shard's sequences, [n_batch] or none; `memory`: of the shard's own KV heads, [n_batch,
  /// n_kv_heads], or none, used by calls of one query and groups of up to 8 heads. They must outlive the calls.
  explicit sharded_attention(const config& settings = {}, std::span<const kv_index> indices = {},
                             split how = split::blocks, std::span<index_memory> memory = {}) noexcept
      : setup_{settings, indices, how, memory} {}

  [[nodiscard]] const vattn::config& settings() const noexcept { return setup_.settings; }

  /// As `vattention`. `cost`, if not null, receives what was sent.
  template <class Q, kv_cache KV, communicator C, executor E = serial_executor>
  status operator()(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
                    const attention_result& result, workspace& memory, C& comm, const draw_key& key = {},
                    E&& exec = E{}, traffic* cost = nullptr) const noexcept {
    static_assert(!partial_executor<std::remove_cvref_t<E>>,
                  "sharded_attention: supply an executor that does all tasks of a call: other ranks wait for them");
    const kernel::floating_point_scope standard;
    traffic ignored;
    sharded_call<Policy, Q, KV, C, std::remove_cvref_t<E>> one(setup_, q, cache, options, result, memory, comm, key,
                                                               exec, cost ? *cost : ignored);
    return one.run();
  }

 private:
  shard_setup setup_;
};

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
