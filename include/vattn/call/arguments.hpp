// The edge of the library: where results go, and whatever can be known to be wrong with a call before a row is read.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "vattn/certificate.hpp"
#include "vattn/certify/decision.hpp"
#include "vattn/kv/query.hpp"
#include "vattn/kv/view.hpp"

namespace vattn::VATTN_ABI {

/// Where results go. `output` is required, the others may be left empty: null. No two elements of a result may share
/// memory.
struct attention_result {
  tensor_view<float, 4> output{};              ///< [n_batch, n_queries, n_q_heads, dv]
  tensor_view<float, 3> log_sum_exp{};         ///< [n_batch, n_queries, n_q_heads], natural log
  tensor_view<certificate, 3> certificates{};  ///< [n_batch, n_queries, n_q_heads]
  decision_result decisions{};                 ///< which rows, with which weights
};

/// The longest sequence of a batch.
template <kv_cache KV>
[[nodiscard]] index_t longest(const KV& cache) noexcept {
  index_t n = 0;
  for (index_t b = 0; b < cache.n_batch(); ++b) n = std::max<index_t>(n, cache.head(b, 0).size());
  return n;
}

namespace detail {

/// Extents of a call.
struct call_shape {
  index_t batch, queries, heads, dk, dv, n;
};
[[nodiscard]] constexpr long long ll(index_t value) noexcept { return static_cast<long long>(value); }

template <class Q>
[[nodiscard]] status check_query(const tensor_view<const Q, 4>& q, const call_shape& s, index_t n_batch,
                                 index_t n_kv_heads, index_t cache_dk) noexcept {
  if (s.batch != n_batch)
    return status::error(errc::invalid_argument, "q has n_batch %lld, the cache %lld", ll(s.batch), ll(n_batch));
  if (s.queries < 0 || s.queries >> 31 != 0)
    return status::error(errc::invalid_argument, "q has %lld queries: give 0 to 2^31 - 1", ll(s.queries));
  if (s.heads < 0 || s.heads >> 31 != 0 || s.heads % n_kv_heads != 0) {
    return status::error(errc::invalid_argument,
                         "q has %lld heads, the cache %lld: the number of query heads must be a multiple of KV heads",
                         ll(s.heads), ll(n_kv_heads));
  }
  if (s.dk != cache_dk) {
    return status::error(errc::invalid_argument, "q has head size %lld, the keys %lld%s", ll(s.dk), ll(cache_dk),
                         s.dk == s.dv ? ": are K and V swapped?" : "");
  }
  if (q.size() == 0) return {};
  if (q.data == nullptr) return status::error(errc::invalid_argument, "q is null");
  if (q.strides[3] != static_cast<index_t>(sizeof(Q))) {
    return status::error(errc::invalid_argument,
                         "the elements of a query must be adjacent: the last byte stride of q is %lld, not %zu",
                         ll(q.strides[3]), sizeof(Q));
  }
  return check_elements("q", q);
}

[[nodiscard]] inline status check_numbers(const attention_options& options, index_t dk) noexcept {
  if (std::isnan(options.scale)) {
    return status::error(errc::invalid_argument,
                         "options.scale is not set: 1/sqrt(dk) = %g for most models, 1 if the engine has scaled q",
                         1 / std::sqrt(static_cast<double>(dk)));
  }
  if (!std::isfinite(options.scale)) return status::error(errc::invalid_argument, "options.scale is not finite");
  if (!(options.softcap >= 0) || std::isinf(options.softcap)) {
    return status::error(errc::invalid_argument, "options.softcap is %g: give a positive cap, or 0 for none",
                         static_cast<double>(options.softcap));
  }
  if (options.sliding_window < 0) {
    return status::error(errc::invalid_argument,
                         "options.sliding_window is %lld: give a number of tokens, or 0 for all",
                         ll(options.sliding_window));
  }
  if (status s = check_aligned("options.sink_logits", options.sink_logits, alignof(float)); !s) return s;
  return check_aligned("options.alibi_slopes", options.alibi_slopes, alignof(float));
}

[[nodiscard]] inline status check_mask(const mask_view& mask, const call_shape& s) noexcept {
  if (!mask) return {};
  const auto& m = mask.extents();
  if (m[0] < s.batch || m[1] < s.heads || m[2] < s.queries || m[3] < s.n) {
    return status::error(
        errc::invalid_argument,
        "the mask is [%lld, %lld, %lld, %lld], less than [%lld, %lld, %lld, %lld]: give the full extents, with "
        "byte stride 0 where an axis repeats",
        ll(m[0]), ll(m[1]), ll(m[2]), ll(m[3]), ll(s.batch), ll(s.heads), ll(s.queries), ll(s.n));
  }
  return check_elements<4>("the mask", mask.data(), {s.batch, s.heads, s.queries, s.n}, mask.strides(),
                           mask.element_bytes());
}

[[nodiscard]] inline status check_positions(const attention_options& options, const call_shape& s) noexcept {
  const cell_positions& p = options.positions;
  if (!p.cells && p.queries)
    return status::error(errc::invalid_argument, "positions.queries without positions.cells: give both, or neither");
  if (!p) return {};
  if (p.cells.extents[0] < s.batch || p.cells.extents[1] < s.n) {
    return status::error(errc::invalid_argument, "positions.cells is [%lld, %lld], less than [%lld, %lld]",
                         ll(p.cells.extents[0]), ll(p.cells.extents[1]), ll(s.batch), ll(s.n));
  }
  const bool needed = options.causal || options.sliding_window > 0 || options.alibi_slopes != nullptr;
  const bool enough = p.queries && p.queries.extents[0] >= s.batch && p.queries.extents[1] >= s.queries;
  if (needed && !enough) {
    return status::error(errc::invalid_argument,
                         "causal, sliding_window and alibi_slopes need positions.queries [%lld, %lld] where cells have "
                         "positions",
                         ll(s.batch), ll(s.queries));
  }
  if (p.queries && !enough) {
    return status::error(errc::invalid_argument, "positions.queries is [%lld, %lld], less than [%lld, %lld]",
                         ll(p.queries.extents[0]), ll(p.queries.extents[1]), ll(s.batch), ll(s.queries));
  }
  if (status st = check_elements("positions.cells", p.cells); !st) return st;
  return check_elements("positions.queries", p.queries);
}

[[nodiscard]] inline status check_results(const attention_result& result, const call_shape& s) noexcept {
  const auto& o = result.output.extents;
  if (o != std::array<index_t, 4>{s.batch, s.queries, s.heads, s.dv}) {
    return status::error(errc::invalid_argument, "output is [%lld, %lld, %lld, %lld], not [%lld, %lld, %lld, %lld]%s",
                         ll(o[0]), ll(o[1]), ll(o[2]), ll(o[3]), ll(s.batch), ll(s.queries), ll(s.heads), ll(s.dv),
                         o[3] == s.dk && o[3] != s.dv ? ": are K and V swapped?" : "");
  }
  if (result.output.size() > 0 && result.output.data == nullptr)
    return status::error(errc::invalid_argument, "output is null");
  if (status st = check_results("output", result.output); !st) return st;
  const std::array<index_t, 3> rows{s.batch, s.queries, s.heads};
  if ((result.log_sum_exp && result.log_sum_exp.extents != rows) ||
      (result.certificates && result.certificates.extents != rows)) {
    return status::error(errc::invalid_argument, "log_sum_exp and certificates must be [%lld, %lld, %lld], or empty",
                         ll(s.batch), ll(s.queries), ll(s.heads));
  }
  if (result.log_sum_exp) {
    if (status st = check_results("log_sum_exp", result.log_sum_exp); !st) return st;
  }
  if (result.certificates) {
    if (status st = check_results("certificates", result.certificates); !st) return st;
  }
  return result.decisions.check(rows, s.n);
}

}  // namespace detail

/// Everything about a call that can be known to be wrong before a row is read: shapes, pointers (null, misaligned),
/// strides, numbers. What lies behind a pointer, and how much of it, the caller alone knows.
template <class Q, kv_cache KV>
[[nodiscard]] status check_call(const tensor_view<const Q, 4>& q, const KV& cache, const attention_options& options,
                                const attention_result& result) noexcept {
  if (status s = cache.validate(); !s) return s;
  const auto [batch, queries, heads, dk] = q.extents;
  detail::call_shape shape{batch, queries, heads, dk, cache.dv(), 0};
  if (status s = detail::check_query(q, shape, cache.n_batch(), cache.n_kv_heads(), cache.dk()); !s) return s;
  if (status s = detail::check_numbers(options, dk); !s) return s;
  shape.n = longest(cache);
  if (shape.n >= population::max_size)
    return status::error(errc::invalid_argument, "%lld tokens: sequences end at 2^31", detail::ll(shape.n));
  if (status s = detail::check_mask(options.mask, shape); !s) return s;
  if (status s = detail::check_positions(options, shape); !s) return s;
  using head = std::remove_cvref_t<decltype(cache.head(0, 0))>;
  if (!rows_in_order<head> && ((options.causal && queries > 1) || options.sliding_window > 0 || options.mask ||
                               options.positions || options.alibi_slopes != nullptr)) {
    return status::error(errc::invalid_argument,
                         "a store is attended whole and without masks, windows, positions, ALiBi or several causal "
                         "queries: use a view and an importance policy for this call");
  }
  return detail::check_results(result, shape);
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
