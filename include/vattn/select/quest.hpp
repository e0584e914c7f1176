// Quest: pages of keys, ranked by the most that any of their logits can be.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

#include "vattn/base/floating_point.hpp"
#include "vattn/base/room.hpp"
#include "vattn/kernel/row.hpp"
#include "vattn/kernel/row_size.hpp"
#include "vattn/sketch/recent_keys.hpp"

namespace vattn::VATTN_ABI::select {

/// Of each page of tokens the smallest and the largest key in every channel; a page scores Σ_d max(q_d min_d, q_d
/// max_d), which no logit in it exceeds, and each of its tokens scores as the page. Source: Quest, arXiv 2406.10774,
/// page_size = 16. When to use: keys of neighbours are alike (real caches), and hard bounds are wanted for little
/// memory, 8·dk/page_size bytes a token; on keys without order the bounds say nothing.
///
/// A truncation inside the last page is exact, as its keys are kept; a page that loses tokens when it was no longer
/// the last keeps its extremes, which still bound what is left of it: looser than those of a rebuild until the page
/// is cut away, never below a logit. Where a bound would not be finite (huge keys, NaN in a key) it is +inf: read
/// first.
class quest {
 public:
  static constexpr bool estimates = false;
  static constexpr bool upper_bounds = true;

  quest() = default;
  explicit quest(index_t dim, index_t page_size = 16)
      : dim_(static_cast<std::size_t>(std::max<index_t>(dim, 0))),
        page_(static_cast<std::size_t>(std::max<index_t>(page_size, 1))) {}

  [[nodiscard]] index_t size() const noexcept { return static_cast<index_t>(size_); }
  [[nodiscard]] index_t dim() const noexcept { return static_cast<index_t>(dim_); }
  [[nodiscard]] recent_keys& recent() noexcept { return recent_; }
  [[nodiscard]] index_t page_size() const noexcept { return static_cast<index_t>(page_); }
  [[nodiscard]] std::size_t bytes() const noexcept { return (extremes_.size() + last_.size()) * sizeof(float); }
  [[nodiscard]] std::size_t scratch_size() const noexcept { return 0; }

  /// A key that is not of dim() elements is not taken: calls then say that the index lags.
  template <kernel::row R>
  void append(const R& key) {
    using kernel::load;
    if (!kernel::has_size(key, dim())) return;
    const kernel::floating_point_scope standard;
    const std::size_t in_page = size_ % page_;
    vattn::detail::make_room(extremes_, in_page == 0 ? 2 * dim_ : 0);
    vattn::detail::make_room(last_, dim_);
    buffer_.resize(dim_);
    if (in_page == 0) {
      last_.clear();
      extremes_.insert(extremes_.end(), dim_, std::numeric_limits<float>::infinity());
      extremes_.insert(extremes_.end(), dim_, -std::numeric_limits<float>::infinity());
    }
    if (last_.size() != in_page * dim_) {  // cut by a truncation: the page's keys are gone, its extremes are not
      load(key, buffer_.data());
      recent_.add(size(), buffer_);
      widen(buffer_.data());
    } else {
      last_.resize((in_page + 1) * dim_);
      load(key, last_.data() + in_page * dim_);
      recent_.add(size(), std::span<const float>(last_).subspan(in_page * dim_));
      widen(last_.data() + in_page * dim_);
    }
    ++size_;
  }

  void truncate(index_t n) {
    const auto to = static_cast<std::size_t>(std::max<index_t>(n, 0));
    if (to >= size_) return;
    const std::size_t page = to / page_, in_page = to % page_;
    const std::size_t last_page = (size_ - 1) / page_;
    const bool exact = page == last_page && last_.size() == (size_ - last_page * page_) * dim_;
    size_ = to;
    extremes_.resize((page + (in_page != 0)) * 2 * dim_);
    if (in_page == 0 || !exact) return last_.clear();
    const kernel::floating_point_scope standard;  // comparisons take subnormals for 0 in other modes
    last_.resize(in_page * dim_);
    std::fill_n(minimum(page), dim_, std::numeric_limits<float>::infinity());
    std::fill_n(minimum(page) + dim_, dim_, -std::numeric_limits<float>::infinity());
    for (std::size_t i = 0; i < in_page; ++i) widen(last_.data() + i * dim_);
  }
  void clear() { truncate(0); }

  void score(const float* scaled_query, index_t first, std::span<float> scores, std::span<float>,
             std::span<float>) const noexcept {
    const auto n = static_cast<Eigen::Index>(dim_);
    const Eigen::Map<const Eigen::ArrayXf> q(scaled_query, n);
    auto token = static_cast<std::size_t>(first);
    for (std::size_t i = 0; i < scores.size();) {
      const std::size_t page = token / page_, end = (page + 1) * page_;
      const Eigen::Map<const Eigen::ArrayXf> low(minimum(page), n), high(minimum(page) + dim_, n);
      const auto most = (q * low).max(q * high);
      // The sum and the dot products that it bounds are both rounded: each by at most dim·2⁻²⁴ of Σ|q_d k_d|.
      // Twice that, for the roundings of the slack; products that underflow lose at most 2⁻¹⁴⁹ each.
      const float slack =
          static_cast<float>(dim_) * (0x1p-22f * (q.abs() * low.abs().max(high.abs())).sum() + 0x1p-147f);
      const float sum = most.sum() + slack;
      // NaN: infinities of both signs, or one times 0. No bound is known then but +inf.
      const float bound = std::isnan(sum) ? std::numeric_limits<float>::infinity() : sum;
      for (; i < scores.size() && token < end; ++i, ++token) scores[i] = bound;
    }
  }

  static constexpr std::string_view format() noexcept { return "quest v2"; }
  template <class Archive>
  void archive(Archive& a) {
    a(dim_, page_, size_, extremes_, last_);
  }
  [[nodiscard]] bool valid() const noexcept {
    // Limits first: the products below must not wrap around.
    if (page_ < 1 || page_ > limit || dim_ > limit || size_ > std::size_t{1} << 40) return false;
    const std::size_t pages = (size_ + page_ - 1) / page_;
    const std::size_t in_last = pages == 0 ? 0 : size_ - (pages - 1) * page_;
    return extremes_.size() == pages * 2 * dim_ && (last_.empty() || last_.size() == in_last * dim_);
  }

 private:
  static constexpr std::size_t limit = std::size_t{1} << 20;  // of dim and page size

  // Of a page: [dim] smallest, then [dim] largest.
  [[nodiscard]] float* minimum(std::size_t page) noexcept { return extremes_.data() + page * 2 * dim_; }
  [[nodiscard]] const float* minimum(std::size_t page) const noexcept { return extremes_.data() + page * 2 * dim_; }
  void widen(const float* key) noexcept {
    float* low = extremes_.data() + extremes_.size() - 2 * dim_;
    for (std::size_t j = 0; j < dim_; ++j) {
      // A NaN bounds nothing, and comparisons would drop it.
      const bool nan = std::isnan(key[j]);
      low[j] = nan ? -std::numeric_limits<float>::infinity() : std::min(low[j], key[j]);
      low[dim_ + j] = nan ? std::numeric_limits<float>::infinity() : std::max(low[dim_ + j], key[j]);
    }
  }

  std::size_t dim_ = 0, page_ = 16, size_ = 0;
  std::vector<float> extremes_;  // [pages, 2, dim]
  std::vector<float> last_;      // [tokens of the last page, dim], or empty: they are not kept
  std::vector<float> buffer_;
  recent_keys recent_;
};

}  // namespace vattn::VATTN_ABI::select

#include "vattn/macros_pop.hpp"
