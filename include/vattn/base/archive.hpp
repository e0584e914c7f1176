// State to bytes and back: what an index keeps of a cache, saved and loaded beside it.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "vattn/base/status.hpp"

namespace vattn::VATTN_ABI {

// Members are written as they lie in memory: by a machine of the same byte order to another.
static_assert(std::endian::native == std::endian::little,
              "saved state is little-endian: convert it, or do not include this");

namespace detail {
inline constexpr std::uint64_t archive_magic = 0x0131786e74746176;  // "vattnx1" and 1
}

/// Appends values to bytes.
class archive_writer {
 public:
  explicit archive_writer(std::vector<std::byte>& out) noexcept : out_(out) {}

  template <class T>
  requires std::is_trivially_copyable_v<T>
  void operator()(const T& value) {
    put(&value, sizeof(T));
  }
  template <class T>
  requires std::is_trivially_copyable_v<T>
  void operator()(const std::vector<T>& values) {
    (*this)(static_cast<std::uint64_t>(values.size()));
    put(values.data(), values.size() * sizeof(T));
  }
  template <class A, class B, class... Rest>
  void operator()(const A& a, const B& b, const Rest&... rest) {
    (*this)(a);
    (*this)(b, rest...);
  }

 private:
  void put(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::byte*>(data);
    out_.insert(out_.end(), bytes, bytes + size);
  }
  std::vector<std::byte>& out_;
};

/// Takes values from bytes. Past the end, or at a length that the bytes cannot hold, it stops, once and for
/// all: `ok()` is false and values are left as they were.
class archive_reader {
 public:
  explicit archive_reader(std::span<const std::byte> in) noexcept : in_(in) {}

  template <class T>
  requires std::is_trivially_copyable_v<T>
  void operator()(T& value) noexcept {
    if (take(sizeof(T))) std::memcpy(static_cast<void*>(&value), taken_, sizeof(T));
  }
  template <class T>
  requires std::is_trivially_copyable_v<T>
  void operator()(std::vector<T>& values) {
    std::uint64_t size = 0;
    (*this)(size);
    if (!ok_ || size > in_.size() / sizeof(T)) return void(ok_ = false);
    values.resize(static_cast<std::size_t>(size));
    if (take(values.size() * sizeof(T)) && !values.empty())
      std::memcpy(values.data(), taken_, values.size() * sizeof(T));
  }
  template <class A, class B, class... Rest>
  void operator()(A& a, B& b, Rest&... rest) {
    (*this)(a);
    (*this)(b, rest...);
  }

  [[nodiscard]] bool ok() const noexcept { return ok_; }
  [[nodiscard]] bool at_end() const noexcept { return in_.empty(); }

 private:
  bool take(std::size_t size) noexcept {
    if (!ok_ || size > in_.size()) return ok_ = false;
    taken_ = in_.data();
    in_ = in_.subspan(size);
    return true;
  }
  std::span<const std::byte> in_;
  const std::byte* taken_ = nullptr;
  bool ok_ = true;
};

/// State that can be saved: `archive(a)` passes every member to `a`, in one order for both directions;
/// `format` names the layout and its version; `valid()` says whether loaded members agree with each other
/// (they come from a file: every size and offset that other members are addressed by is to be checked).
template <class T>
concept archivable = requires(T& t, const T& c, archive_reader& in) {
  t.archive(in);
  { T::format() } -> std::convertible_to<std::string_view>;
  { c.valid() } -> std::convertible_to<bool>;
};

/// The state as bytes: 8 of magic, the format's name, the members.
template <archivable T>
[[nodiscard]] std::vector<std::byte> save(const T& state) {
  std::vector<std::byte> out;
  archive_writer a(out);
  const std::string_view format = T::format();
  a(detail::archive_magic, std::vector<char>(format.begin(), format.end()));
  const_cast<T&>(state).archive(a);  // a writer reads: one member for both directions
  return out;
}

/// Replaces `state` by what `save` has written; on an error it is unchanged.
template <archivable T>
[[nodiscard]] status load(std::span<const std::byte> bytes, T& state) {
  archive_reader a(bytes);
  std::uint64_t magic = 0;
  std::vector<char> format;
  a(magic, format);
  if (!a.ok() || magic != detail::archive_magic) {
    return status::error(errc::invalid_argument, "not a saved index: %zu bytes without the right beginning",
                         bytes.size());
  }
  if (std::string_view(format.data(), format.size()) != std::string_view(T::format())) {
    return status::error(errc::invalid_argument, "the saved index is of format '%.*s', not '%s': load it as what it is",
                         static_cast<int>(std::min<std::size_t>(format.size(), 64)), format.data(),
                         std::string(T::format()).c_str());
  }
  T fresh = [&] {
    if constexpr (std::is_copy_constructible_v<T>) {
      return state;
    } else {
      return T();
    }
  }();
  fresh.archive(a);
  if constexpr (requires { fresh.recent(); }) fresh.recent() = {};  // it is not of these keys
  if (!a.ok() || !a.at_end() || !fresh.valid()) {
    return status::error(errc::invalid_argument, "the saved index is damaged or cut short: build it again");
  }
  state = std::move(fresh);
  return {};
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
