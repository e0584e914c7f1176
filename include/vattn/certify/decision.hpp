// The decision behind an output: which rows, with which weights. For engines that attend by kernels of their own.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "vattn/base/status.hpp"
#include "vattn/base/tensor.hpp"
#include "vattn/kv/query.hpp"

namespace vattn::VATTN_ABI {

/// The rows of one query of one head, as they are recorded. The output is that of a softmax over them alone in which
/// e^logit is multiplied by the weight: 1 for rows that are read for certain, N_r/m or 1/π for sampled ones.
class chosen_rows {
 public:
  chosen_rows() = default;
  chosen_rows(std::int32_t* tokens, float* weights, std::int32_t* count, index_t capacity) noexcept
      : tokens_(tokens), weights_(weights), count_(count), capacity_(capacity) {}

  [[nodiscard]] explicit operator bool() const noexcept { return tokens_ != nullptr; }
  void clear() const noexcept {
    if (tokens_) *count_ = 0;
  }
  void add(index_t token, double weight) const noexcept {
    if (!tokens_ || *count_ >= capacity_) return;  // no more than n rows are ever chosen
    tokens_[*count_] = static_cast<std::int32_t>(token);
    weights_[(*count_)++] = static_cast<float>(weight);
  }
  /// The first `sinks` and the last `window` places.
  void add_ends(const population& tokens, index_t sinks, index_t window) const noexcept {
    if (!tokens_) return;
    for (index_t j = 0; j < sinks; ++j) add(tokens[j], 1);
    for (index_t j = tokens.size() - window; j < tokens.size(); ++j) add(tokens[j], 1);
  }
  void all(const population& tokens) const noexcept {
    clear();
    if (!tokens_) return;
    for (index_t j = 0; j < tokens.size(); ++j) add(tokens[j], 1);
  }

 private:
  std::int32_t* tokens_ = nullptr;
  float* weights_ = nullptr;
  std::int32_t* count_ = nullptr;
  index_t capacity_ = 0;
};

/// Where a call writes its decisions; all three, or none. `capacity` is at least the longest sequence, because a call
/// may have to read all of it. Tokens are rows of the cache: of a shuffled_store `position(row)` says which token.
struct decision_result {
  tensor_view<std::int32_t, 4> tokens{};  ///< [n_batch, n_queries, n_q_heads, capacity], in no order
  tensor_view<float, 4> weights{};        ///< [n_batch, n_queries, n_q_heads, capacity]
  tensor_view<std::int32_t, 3> counts{};  ///< [n_batch, n_queries, n_q_heads]

  [[nodiscard]] chosen_rows at(index_t b, index_t t, index_t h) const noexcept {
    if (!tokens) return {};
    return {&tokens(b, t, h, 0), &weights(b, t, h, 0), &counts(b, t, h),
            std::min(tokens.extents[3], weights.extents[3])};
  }
  [[nodiscard]] status check(const std::array<index_t, 3>& rows, index_t n) const noexcept {
    if (!tokens && !weights && !counts) return {};
    const auto fits = [&](const auto& view) {
      return view && view.extents[0] == rows[0] && view.extents[1] == rows[1] && view.extents[2] == rows[2];
    };
    if (fits(tokens) && fits(weights) && fits(counts) && tokens.extents[3] >= n && weights.extents[3] >= n &&
        tokens.strides[3] == 4 && weights.strides[3] == 4) {
      if (status s = detail::check_results("decisions.tokens", tokens); !s) return s;
      if (status s = detail::check_results("decisions.weights", weights); !s) return s;
      return detail::check_results("decisions.counts", counts);
    }
    return status::error(errc::invalid_argument,
                         "decisions need tokens and weights [%lld, %lld, %lld, at least %lld], adjacent along the last "
                         "axis, and counts [%lld, %lld, %lld]; or none of them",
                         static_cast<long long>(rows[0]), static_cast<long long>(rows[1]),
                         static_cast<long long>(rows[2]), static_cast<long long>(n), static_cast<long long>(rows[0]),
                         static_cast<long long>(rows[1]), static_cast<long long>(rows[2]));
  }
};

/// The same decision as an additive mask [n]: log weight for chosen rows, −inf for the rest. It is added to whatever
/// mask, cap and bias the logits have. Rows that were drawn more than once add their weights; those that the mask does
/// not reach to are left out.
inline void additive_mask(std::span<const std::int32_t> tokens, std::span<const float> weights,
                          std::span<float> mask) noexcept {
  for (float& m : mask) m = 0;
  for (std::size_t i = 0; i < std::min(tokens.size(), weights.size()); ++i) {
    const auto token = static_cast<std::size_t>(tokens[i]);  // of a negative one: past any mask
    if (token < mask.size()) mask[token] += weights[i];
  }
  for (float& m : mask) m = m > 0 ? std::log(m) : -std::numeric_limits<float>::infinity();
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
