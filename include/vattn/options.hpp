// What a call carries besides q, K and V.
#include "vattn/macros_push.hpp"
#pragma once

#include <limits>

#include "vattn/base/config.hpp"
#include "vattn/base/tensor.hpp"
#include "vattn/kernel/row.hpp"

namespace vattn::VATTN_ABI {

/// Additive mask, [n_batch, n_q_heads, n_queries, n_tokens] with byte strides (0 broadcasts an axis).
/// −inf removes a token from the population; any other value is added to the logit. float or half.
class mask_view {
 public:
  mask_view() = default;
  explicit mask_view(const tensor_view<const float, 4>& mask) noexcept
      : data_(reinterpret_cast<const std::byte*>(mask.data)), extents_(mask.extents), strides_(mask.strides) {}
  explicit mask_view(const tensor_view<const Eigen::half, 4>& mask) noexcept
      : data_(reinterpret_cast<const std::byte*>(mask.data)),
        extents_(mask.extents),
        strides_(mask.strides),
        half_(true) {}

  /// The mask of one query: `operator()(token)` for token in [0, n_tokens).
  class line {
   public:
    line() = default;
    [[nodiscard]] explicit operator bool() const noexcept { return first_ != nullptr; }
    [[nodiscard]] float operator()(index_t token) const noexcept {
      const std::byte* at = first_ + token * stride_;
      if (half_) return kernel::half_to_float(*reinterpret_cast<const std::uint16_t*>(at));
      return *reinterpret_cast<const float*>(at);
    }
    /// Whether it removes the token.
    [[nodiscard]] bool hides(index_t token) const noexcept {
      const std::byte* at = first_ + token * stride_;
      if (half_) return *reinterpret_cast<const std::uint16_t*>(at) == 0xFC00;
      return *reinterpret_cast<const float*>(at) == -std::numeric_limits<float>::infinity();
    }
    /// Whether it may add anything to the logits of what it leaves.
    [[nodiscard]] bool adds() const noexcept { return first_ != nullptr && !only_hides_; }

   private:
    friend class mask_view;
    const std::byte* first_ = nullptr;
    index_t stride_ = 0;
    bool half_ = false, only_hides_ = false;
  };

  [[nodiscard]] explicit operator bool() const noexcept { return data_ != nullptr; }
  [[nodiscard]] const std::array<index_t, 4>& extents() const noexcept { return extents_; }
  [[nodiscard]] const std::array<index_t, 4>& strides() const noexcept { return strides_; }  ///< bytes
  [[nodiscard]] const void* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t element_bytes() const noexcept { return half_ ? sizeof(Eigen::half) : sizeof(float); }
  /// Heads see the same mask: none at all, or one that repeats.
  [[nodiscard]] bool same_for_heads() const noexcept { return data_ == nullptr || strides_[1] == 0; }
  /// The same, where the caller knows that every value is 0 or −inf: spares each logit a look at its value.
  [[nodiscard]] mask_view only_hiding() const noexcept {
    mask_view copy = *this;
    copy.only_hides_ = true;
    return copy;
  }
  [[nodiscard]] line at(index_t batch, index_t head, index_t query) const noexcept {
    line l;
    if (data_ == nullptr) return l;
    l.first_ = data_ + batch * strides_[0] + head * strides_[1] + query * strides_[2];
    l.stride_ = strides_[3];
    l.half_ = half_;
    l.only_hides_ = only_hides_;
    return l;
  }

 private:
  const std::byte* data_ = nullptr;
  std::array<index_t, 4> extents_{}, strides_{};
  bool half_ = false, only_hides_ = false;
};

/// Positions of cells, where a cell's index is not its token's position: caches that recycle cells or hold several
/// sequences. Sinks, windows and causality then go by position. Costs a pass over the cells for each head, and, where
/// the visible cells are not in order of position, a partial sort for the sinks and the window.
struct cell_positions {
  /// [n_batch, n_tokens], any byte strides. Negative: the cell is empty, and absent.
  tensor_view<const std::int32_t, 2> cells{};
  /// [n_batch, n_queries]. Needed with causal, sliding_window and alibi_slopes; not where a mask does it all.
  tensor_view<const std::int32_t, 2> queries{};

  /// Positions of one sequence's cells: `operator()(cell)`.
  class line {
   public:
    line() = default;
    line(const std::int32_t* first, index_t stride) noexcept
        : first_(reinterpret_cast<const std::byte*>(first)), stride_(stride) {}
    [[nodiscard]] explicit operator bool() const noexcept { return first_ != nullptr; }
    [[nodiscard]] std::int32_t operator()(index_t token) const noexcept {
      return *reinterpret_cast<const std::int32_t*>(first_ + token * stride_);
    }

   private:
    const std::byte* first_ = nullptr;
    index_t stride_ = 0;
  };

  [[nodiscard]] explicit operator bool() const noexcept { return static_cast<bool>(cells); }
  [[nodiscard]] line at(index_t batch) const noexcept {
    return cells ? line(&cells(batch, 0), cells.strides[1]) : line();
  }
};

/// logit(i) = cap·tanh(scale·q·k_i / cap) + mask(i) + alibi·(i − position of the query)
struct attention_options {
  /// Required: 1/sqrt(dk) for most models, 1 for engines that scale q themselves.
  float scale = std::numeric_limits<float>::quiet_NaN();
  /// Gemma-style cap of the scaled logit; 0 = none.
  float softcap = 0;
  /// Query t of T sees the tokens at positions up to its own: n − T + t (aligned to the bottom right), or
  /// positions.queries where cells have positions.
  bool causal = false;
  /// Query t sees the tokens at the latest `sliding_window` positions up to its own; 0 = no window. Nothing after the
  /// query is in its window, so with one `causal` changes nothing. Windows to both sides: say them by a mask.
  index_t sliding_window = 0;
  mask_view mask{};
  cell_positions positions{};
  /// Learned sinks, [n_q_heads]: adds exp(sink − max) to the denominator alone. Null = none.
  const float* sink_logits = nullptr;
  /// ALiBi slopes, [n_q_heads]. Null = none.
  const float* alibi_slopes = nullptr;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
