// The result of a call: a code and one line that says what to do. Never allocates, never throws.
#include "vattn/macros_push.hpp"
#pragma once

#include <cstdarg>
#include <cstdio>

#include "vattn/base/config.hpp"

namespace vattn::VATTN_ABI {

enum class errc : std::uint8_t {
  ok,
  invalid_argument,      ///< a shape, stride, pointer or setting that cannot be meant
  non_finite,            ///< a NaN or infinity in q, K, V or the mask was read
  workspace_too_small,   ///< `reserve` the number of bytes that the message names
  out_of_memory,         ///< an owning object could not grow
  executor_failed,       ///< the executor threw, or did not run every task once
  communication_failed,  ///< ranks did not exchange what they had to (dist/)
};

/// [[nodiscard]]: an ignored status is an unverified output.
class [[nodiscard]] status {
 public:
  constexpr status() = default;

  /// printf-style; the text is cut at `capacity - 1` characters.
#if defined(__GNUC__)
  __attribute__((format(printf, 2, 3)))
#endif
  static status
  error(errc code, const char* format, ...) noexcept {
    status s;
    s.code_ = code;
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(s.text_, capacity, format, arguments);
    va_end(arguments);
    return s;
  }

  [[nodiscard]] constexpr bool ok() const noexcept { return code_ == errc::ok; }
  [[nodiscard]] constexpr explicit operator bool() const noexcept { return ok(); }
  [[nodiscard]] constexpr errc code() const noexcept { return code_; }
  /// One line, "" when ok.
  [[nodiscard]] constexpr const char* message() const noexcept { return text_; }

 private:
  static constexpr std::size_t capacity = 232;
  errc code_ = errc::ok;
  char text_[capacity] = {};
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
