// Rows whose elements lie in groups at a distance: transposed values, and vLLM's x-packed layouts.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <span>

#include "vattn/kernel/decoded.hpp"

namespace vattn::VATTN_ABI::kernel {

/// Element j is at `first + (j / group)·stride + (j % group)·sizeof(T)`, stride in bytes. With a group of one, each
/// element lies on a cache line of its own: reading a row costs as many lines as it has elements.
template <element T>
class grouped_row {
 public:
  grouped_row(const std::byte* first, std::size_t size, std::size_t group, std::ptrdiff_t stride) noexcept
      : first_(first), size_(size), group_(group), stride_(stride) {}
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  void decode(std::size_t first, std::size_t count, float* out) const noexcept {
    for (std::size_t done = 0; done < count;) {
      const std::size_t at = first + done, inside = at % group_;
      const std::size_t run = std::min(group_ - inside, count - done);
      const auto* from = reinterpret_cast<const T*>(first_ + static_cast<std::ptrdiff_t>(at / group_) * stride_);
      load(std::span<const T>(from + inside, run), out + done);
      done += run;
    }
  }

 private:
  const std::byte* first_;
  std::size_t size_, group_;
  std::ptrdiff_t stride_;
};
static_assert(row<grouped_row<float>>);

}  // namespace vattn::VATTN_ABI::kernel

#include "vattn/macros_pop.hpp"
