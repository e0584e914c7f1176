// DoubleSparsity: logits from a few channels that matter, kept at four bits.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <string_view>
#include <vector>

#include "vattn/base/floating_point.hpp"
#include "vattn/base/room.hpp"
#include "vattn/kernel/row.hpp"
#include "vattn/sketch/recent_keys.hpp"

namespace vattn::VATTN_ABI::select {

/// Channels by the mean of |q_d k_d| over all pairs of a calibration query and a key, largest first. Offline, once a
/// layer and head. `queries` [any, dim], or empty: then by the mean of |k_d|, for where no queries are at hand; `keys`
/// [any, dim]; both as attention sees them, after RoPE. The authors' code pairs each token's query with its own key
/// alone, and names all pairs as another rule; these need no pairing, so the queries of a group's heads may be joined.
/// Values that are not finite are left out.
[[nodiscard]] inline std::vector<ordinal> heavy_channels(std::span<const float> queries, std::span<const float> keys,
                                                         index_t dim, index_t count) {
  if (dim <= 0) return {};
  const kernel::floating_point_scope standard;
  const auto d = static_cast<std::size_t>(dim);
  const auto mean = [d](std::span<const float> rows) {
    std::vector<double> sum(d);
    for (std::size_t i = 0; i < rows.size(); ++i)
      sum[i % d] += std::isfinite(rows[i]) ? std::abs(static_cast<double>(rows[i])) : 0;
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
/// r/2 + 8 bytes a token for r channels. On isotropic keys r of d channels rank little better than chance. A token
/// whose score would be NaN (a channel of its key is not finite) scores +inf: read first.
class double_sparsity {
 public:
  static constexpr bool estimates = false;

  double_sparsity() = default;
  /// `channels`: see heavy_channels(). Those that the keys do not have are dropped at the first append.
  explicit double_sparsity(std::vector<ordinal> channels) : channels_(std::move(channels)) {}

  [[nodiscard]] index_t size() const noexcept { return static_cast<index_t>(scale_.size()); }
  /// Of the keys; 0 before the first.
  [[nodiscard]] index_t dim() const noexcept { return static_cast<index_t>(dim_); }
  [[nodiscard]] recent_keys& recent() noexcept { return recent_; }
  [[nodiscard]] const std::vector<ordinal>& channels() const noexcept { return channels_; }
  [[nodiscard]] std::size_t bytes() const noexcept {
    return labels_.size() + (scale_.size() + zero_.size()) * sizeof(float);
  }
  [[nodiscard]] std::size_t scratch_size() const noexcept { return channels_.size(); }

  /// A key that is not of the first one's size is not taken: calls then say that the index lags.
  template <kernel::row R>
  void append(const R& key) {
    using kernel::load;
    if (!scale_.empty() && key.size() != dim_) return;
    const kernel::floating_point_scope standard;
    key_.resize(std::max(key_.size(), std::size_t{key.size()}));
    vattn::detail::make_room(scale_, 1);
    vattn::detail::make_room(zero_, 1);
    vattn::detail::make_room(labels_, row_bytes());
    if (scale_.empty()) {
      dim_ = key.size();
      std::erase_if(channels_, [&](ordinal c) { return c >= dim_; });
    }
    load(key, key_.data());
    recent_.add(size(), std::span<const float>(key_).first(dim_));
    float low = 0, high = 0;
    bool finite = true;
    for (std::size_t c = 0; c < channels_.size(); ++c) {
      const float x = key_[channels_[c]];
      low = c == 0 ? x : std::min(low, x);
      high = c == 0 ? x : std::max(high, x);
      finite = finite && std::isfinite(x);
    }
    // In double, where differences of floats do not overflow.
    const auto step = static_cast<float>((static_cast<double>(high) - static_cast<double>(low)) / 15);
    scale_.push_back(finite ? step : std::numeric_limits<float>::quiet_NaN());
    zero_.push_back(low);
    labels_.resize(labels_.size() + row_bytes());
    std::uint8_t* out = labels_.data() + labels_.size() - row_bytes();
    for (std::size_t c = 0; c < channels_.size(); ++c) {
      const double above = static_cast<double>(key_[channels_[c]]) - static_cast<double>(low);
      const double level = finite && step > 0 ? std::round(above / static_cast<double>(step)) : 0;
      const auto code = static_cast<unsigned>(std::clamp(level, 0.0, 15.0));
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
    if (scores.empty()) return;
    float sum = 0;
    for (std::size_t c = 0; c < channels_.size(); ++c) sum += scratch[c] = scaled_query[channels_[c]];
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const std::size_t token = static_cast<std::size_t>(first) + i;
      const std::uint8_t* label = labels_.data() + token * row_bytes();
      float product = 0;
      for (std::size_t c = 0; c < channels_.size(); ++c)
        product += scratch[c] * static_cast<float>(label[c / 2] >> (c % 2 * 4) & 15);
      const float score = zero_[token] * sum + scale_[token] * product;
      scores[i] = std::isnan(score) ? std::numeric_limits<float>::infinity() : score;
    }
  }

  static constexpr std::string_view format() noexcept { return "double sparsity v2"; }
  template <class Archive>
  void archive(Archive& a) {
    a(dim_, channels_, labels_, scale_, zero_);
  }
  [[nodiscard]] bool valid() const noexcept {
    const bool has_all =
        scale_.empty() || std::all_of(channels_.begin(), channels_.end(), [this](ordinal c) { return c < dim_; });
    return dim_ <= std::size_t{1} << 20 && has_all && zero_.size() == scale_.size() &&
           labels_.size() == scale_.size() * row_bytes();
  }

 private:
  [[nodiscard]] std::size_t row_bytes() const noexcept { return (channels_.size() + 1) / 2; }

  std::size_t dim_ = 0;  // of the keys, once there are any
  std::vector<ordinal> channels_;
  std::vector<std::uint8_t> labels_;  // [n, channels/2]
  std::vector<float> scale_, zero_, key_;
  recent_keys recent_;
};

}  // namespace vattn::VATTN_ABI::select

#include "vattn/macros_pop.hpp"
