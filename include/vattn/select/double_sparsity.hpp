// DoubleSparsity: logits from a few channels that matter, kept at four bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <string_view>
#include <vector>

#include "vattn/kernel/row.hpp"

namespace vattn::select {

/// Channels by the mean of |q_d k_d| over calibration queries and keys, largest first. Offline, once a layer and
/// head. `queries` [any, dim], or empty: then by the mean of |k_d|, for where no queries are at hand; `keys` [any,
/// dim].
[[nodiscard]] inline std::vector<ordinal> heavy_channels(std::span<const float> queries, std::span<const float> keys,
                                                         index_t dim, index_t count) {
  const auto d = static_cast<std::size_t>(dim);
  const auto mean = [d](std::span<const float> rows) {
    std::vector<double> sum(d);
    for (std::size_t i = 0; i < rows.size(); ++i) sum[i % d] += std::abs(static_cast<double>(rows[i]));
    return sum;
  };
  std::vector<double> weight = mean(keys);
  if (!queries.empty()) {
    // Σ_{i,j} |q_id k_jd| = Σ_i |q_id| · Σ_j |k_jd|
    const std::vector<double> asked = mean(queries);
    for (std::size_t j = 0; j < d; ++j) weight[j] *= asked[j];
  }
  std::vector<ordinal> order(d);
  std::iota(order.begin(), order.end(), ordinal{0});
  std::sort(order.begin(), order.end(),
            [&](ordinal a, ordinal b) { return weight[a] != weight[b] ? weight[a] > weight[b] : a < b; });
  order.resize(std::min(d, static_cast<std::size_t>(std::max<index_t>(count, 0))));
  return order;
}

/// Score = Σ over the heavy channels of q_d·label_d, labels the keys' channels at four bits, uniform between the
/// token's own smallest and largest. Source: DoubleSparsity, arXiv 2408.07092; its experiments keep a sixteenth to a
/// quarter of the channels. When to use: a model whose keys have outlier channels and calibration data for it;
/// r/2 + 8 bytes a token for r channels. On isotropic keys r of d channels rank little better than chance.
class double_sparsity {
 public:
  static constexpr bool estimates = false;

  double_sparsity() = default;
  /// `channels`: see heavy_channels().
  explicit double_sparsity(std::vector<ordinal> channels) : channels_(std::move(channels)) {}

  [[nodiscard]] index_t size() const noexcept { return static_cast<index_t>(scale_.size()); }
  [[nodiscard]] const std::vector<ordinal>& channels() const noexcept { return channels_; }
  [[nodiscard]] std::size_t bytes() const noexcept {
    return labels_.size() + (scale_.size() + zero_.size()) * sizeof(float);
  }
  [[nodiscard]] std::size_t scratch_size() const noexcept { return channels_.size(); }

  template <kernel::row R>
  void append(const R& key) {
    using kernel::load;
    key_.resize(std::max(key_.size(), std::size_t{key.size()}));
    load(key, key_.data());
    float low = 0, high = 0;
    for (std::size_t c = 0; c < channels_.size(); ++c) {
      const float x = key_[channels_[c]];
      low = c == 0 ? x : std::min(low, x);
      high = c == 0 ? x : std::max(high, x);
    }
    const float step = (high - low) / 15;
    scale_.push_back(step);
    zero_.push_back(low);
    labels_.resize(labels_.size() + row_bytes());
    std::uint8_t* out = labels_.data() + labels_.size() - row_bytes();
    for (std::size_t c = 0; c < channels_.size(); ++c) {
      const float level = step > 0 ? std::round((key_[channels_[c]] - low) / step) : 0;
      const auto code = static_cast<unsigned>(std::clamp(level, 0.0f, 15.0f));
      out[c / 2] = static_cast<std::uint8_t>(out[c / 2] | code << (c % 2 * 4));
    }
  }
  void truncate(index_t n) {
    if (n >= size()) return;
    const auto to = static_cast<std::size_t>(std::max<index_t>(n, 0));
    scale_.resize(to), zero_.resize(to), labels_.resize(to * row_bytes());
  }
  void clear() { truncate(0); }

  void score(const float* scaled_query, index_t first, std::span<float> scores, std::span<float>,
             std::span<float> scratch) const noexcept {
    float sum = 0;
    for (std::size_t c = 0; c < channels_.size(); ++c) sum += scratch[c] = scaled_query[channels_[c]];
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const std::size_t token = static_cast<std::size_t>(first) + i;
      const std::uint8_t* label = labels_.data() + token * row_bytes();
      float product = 0;
      for (std::size_t c = 0; c < channels_.size(); ++c)
        product += scratch[c] * static_cast<float>(label[c / 2] >> (c % 2 * 4) & 15);
      scores[i] = zero_[token] * sum + scale_[token] * product;
    }
  }

  static constexpr std::string_view format() noexcept { return "double sparsity v1"; }
  template <class Archive>
  void archive(Archive& a) {
    a(channels_, labels_, scale_, zero_);
  }
  [[nodiscard]] bool valid() const noexcept {
    return zero_.size() == scale_.size() && labels_.size() == scale_.size() * row_bytes();
  }

 private:
  [[nodiscard]] std::size_t row_bytes() const noexcept { return (channels_.size() + 1) / 2; }

  std::vector<ordinal> channels_;
  std::vector<std::uint8_t> labels_;  // [n, channels/2]
  std::vector<float> scale_, zero_, key_;
};

}  // namespace vattn::select
