// Numbers from a fuzzer's bytes; zeros once they are used up.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace vattn::fuzz {

class bytes {
 public:
  bytes(const std::uint8_t* data, std::size_t size) : rest_(data, size) {}

  template <class T>
  [[nodiscard]] T take() {
    T value{};
    const std::size_t size = std::min(sizeof(T), rest_.size());
    if (size > 0) std::memcpy(&value, rest_.data(), size);
    rest_ = rest_.subspan(size);
    return value;
  }
  /// In [low, high], from one byte.
  [[nodiscard]] std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + take<std::uint8_t>() % (high - low + 1);
  }
  [[nodiscard]] bool flag() { return take<std::uint8_t>() & 1; }
  [[nodiscard]] std::span<const std::uint8_t> rest() const { return rest_; }

 private:
  std::span<const std::uint8_t> rest_;
};

}  // namespace vattn::fuzz
