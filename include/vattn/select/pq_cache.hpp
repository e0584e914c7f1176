// PQCache: tokens ranked by product-quantised keys.
#include "vattn/macros_push.hpp"
#pragma once

#include <span>
#include <string_view>

#include "vattn/sketch/learned_codes.hpp"

namespace vattn::VATTN_ABI::select {

/// Tokens by the inner product of the query with product-quantised keys: m sub-vectors of consecutive coordinates, 2^b
/// centroids each (Euclidean k-means), later keys assigned to the nearest. Source: PQCache, arXiv 2407.12820, whose
/// scripts run m = 2, b = 6: 12 bits, 2 bytes, a key. How and when it learns: sketch::learned_codes; the paper learns
/// from the whole prefill, which is train(head) with train_size its length. Differences: no key is left out of the
/// codes (the paper's sinks are; here `config::sinks` reads them exactly in any case), and every query ranks for
/// itself (the paper sums the softmax over a group of query heads). When to use: the cheapest ranking by bytes. When
/// not: for mode I, since the scores state no error; sketch::product_codes is this with principal axes and errors.
class pq_cache : public sketch::learned_codes<false> {
 public:
  static constexpr bool estimates = false;

  pq_cache() = default;
  explicit pq_cache(index_t dim, index_t m = 2, int b = 6, const sketch::learning& how = {})
      : learned_codes(dim, m, b, how) {}

  /// scores[i] = product of the query with what the code of key first + i stands for; `errors` is left alone.
  void score(const float* scaled_query, index_t first, std::span<float> scores, std::span<float>,
             std::span<float> scratch) const noexcept {
    score_tokens(scaled_query, first, scores, scratch);
  }

  static constexpr std::string_view format() noexcept { return "pq cache v2"; }
};

}  // namespace vattn::VATTN_ABI::select

#include "vattn/macros_pop.hpp"
