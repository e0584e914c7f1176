// Merges the outputs of dense shards, whoever made them: (o, log-sum-exp) of each rank into those of the whole.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "vattn/base/tensor.hpp"
#include "vattn/base/workspace.hpp"
#include "vattn/call/call.hpp"
#include "vattn/dist/agreement.hpp"
#include "vattn/estimate/state.hpp"

namespace vattn::VATTN_ABI::dist {

/// `output` [n_batch, n_queries, n_heads, dv] and `log_sum_exp` [n_batch, n_queries, n_heads], natural, of exact
/// attention to the rank's shard (an empty shard: 0 and −∞), replaced by those of all shards: the same bits on every
/// rank. A learned sink belongs to one shard alone. One exchange of a call's size; `local` is what the shard's own
/// attention returned, and makes the call fail everywhere if it failed. Shapes must be equal on all ranks. A
/// log-sum-exp that is no number, or +∞, is a status on every rank, and nothing is written.
template <communicator C>
[[nodiscard]] status merge_outputs(const tensor_view<float, 4>& output, const tensor_view<float, 3>& log_sum_exp,
                                   workspace& memory, C& comm, const status& local = {}) noexcept {
  const index_t batch = output.extents[0], queries = output.extents[1], heads = output.extents[2],
                dv = output.extents[3];
  status ready = local;
  if (ready && (batch < 0 || queries < 0 || heads < 0 || dv < 1 ||
                log_sum_exp.extents != std::array<index_t, 3>{batch, queries, heads} ||
                (output.size() > 0 && (output.data == nullptr || log_sum_exp.data == nullptr)))) {
    ready = status::error(errc::invalid_argument,
                          "output is [%lld, %lld, %lld, %lld]: give it, and log_sum_exp of its first three extents",
                          detail::ll(batch), detail::ll(queries), detail::ll(heads), detail::ll(dv));
  }
  if (ready) ready = detail::check_results("output", output);
  if (ready) ready = detail::check_results("log_sum_exp", log_sum_exp);
  const std::size_t row = (static_cast<std::size_t>(dv) + 1) * sizeof(float);
  const std::size_t size = sizeof(notice) + static_cast<std::size_t>(output.size() / std::max<index_t>(1, dv)) * row;
  const auto ranks = static_cast<std::size_t>(comm.size());
  // Shapes first, for messages must be of one size; and memory, for whoever has none cannot take part.
  terms shapes;
  shapes.of[terms::shapes].add_bytes(output.extents.data(), 4);
  shapes.add_arithmetic();
  std::span<std::byte> mine, all;
  std::span<float> total, part;
  const auto lay_out = [&](arena a) {
    mine = a.take<std::byte>(size), all = a.take<std::byte>(ranks * size);
    total = a.take<float>(static_cast<std::size_t>(dv)), part = a.take<float>(static_cast<std::size_t>(dv));
    return a.used() + workspace::alignment;
  };
  if (ready) ready = memory.reserve(lay_out({}));
  bool apart = false;
  if (status s = agree(comm, split::blocks, ready, shapes, {}, apart); !s) return s;
  static_cast<void>(lay_out(arena(memory.memory())));
  const auto each = [&](auto&& visit) {
    std::size_t at = sizeof(notice);
    for (index_t b = 0; b < batch; ++b) {
      for (index_t t = 0; t < queries; ++t) {
        for (index_t h = 0; h < heads; ++h, at += row) visit(b, t, h, at);
      }
    }
  };
  const notice none;
  std::memcpy(mine.data(), &none, sizeof none);
  each([&](index_t b, index_t t, index_t h, std::size_t at) {
    for (index_t j = 0; j < dv; ++j) part[static_cast<std::size_t>(j)] = output(b, t, h, j);
    std::memcpy(mine.data() + at, part.data(), part.size_bytes());
    std::memcpy(mine.data() + at + part.size_bytes(), &log_sum_exp(b, t, h), sizeof(float));
  });
  if (status s = comm.all_gather(mine, all); !s) return s;
  index_t odd = -1;
  each([&](index_t b, index_t t, index_t h, std::size_t at) {
    for (std::size_t r = 0; r < ranks && odd < 0; ++r) {
      float lse;
      std::memcpy(&lse, all.data() + r * size + at + part.size_bytes(), sizeof lse);
      if (!(lse < std::numeric_limits<float>::infinity())) odd = (b * queries + t) * heads + h;
    }
  });
  if (odd >= 0) return non_finite_error(odd, queries, heads);
  each([&](index_t b, index_t t, index_t h, std::size_t at) {
    softmax_state state(total);
    for (std::size_t r = 0; r < ranks; ++r) {
      const std::byte* const from = all.data() + r * size + at;
      float lse;
      std::memcpy(part.data(), from, part.size_bytes());
      std::memcpy(&lse, from + part.size_bytes(), sizeof lse);
      if (lse > -std::numeric_limits<float>::infinity()) state.merge(softmax_state(lse, 1, part));
    }
    log_sum_exp(b, t, h) = state.finish(part);
    for (index_t j = 0; j < dv; ++j) output(b, t, h, j) = part[static_cast<std::size_t>(j)];
  });
  return {};
}

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
