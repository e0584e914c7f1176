// What a call brings to be served by indices: one for each sequence, and what the last step remembers.
#include "vattn/macros_push.hpp"
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/estimate/strata.hpp"
#include "vattn/index/cell_tables.hpp"
#include "vattn/index/index_costs.hpp"
#include "vattn/index/kv_index.hpp"
#include "vattn/sample/importance.hpp"
#include "vattn/select/selector.hpp"
#include "vattn/settings.hpp"
#include "vattn/stats/evidence.hpp"

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
  float value_unit = 1;                     ///< of the estimates' lengths (query_row::value_unit)
  std::int32_t failures = 0, rest = 0;      ///< times in a row that all rows were read instead; steps to do so unasked
  /// Of several samples (dist/), this one's part of the error's square and of D; 0: unset.
  std::array<double, max_group> share{}, part{};

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
/// and left alone by others; one call at a time may use it. `costs`: what reading costs where the calls run.
template <bool needed>
struct indices_of_call {
  std::span<const kv_index> sequences{};
  std::span<index_memory> memory{};
  index_costs costs{};

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
  const index_costs& c = indices.costs;
  if (!(c.scan >= 0 && c.key >= 0 && c.once >= 0)) {
    return status::error(errc::invalid_argument,
                         "costs of an index are scan %g, key %g, once %g: give 0 or more, in the time of reading a row",
                         c.scan, c.key, c.once);
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
