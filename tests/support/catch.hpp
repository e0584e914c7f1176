// Catch2 2 and 3 differ in their headers; the tests use what both have.
#pragma once

#if !defined(VATTN_CATCH2_MAJOR)
#error "define VATTN_CATCH2_MAJOR as 2 or 3: tests/CMakeLists.txt does, from the package that it finds"
#endif

#if VATTN_CATCH2_MAJOR >= 3
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <string_view>

namespace vattn::test {

using Catch::Matchers::WithinAbs;
using Catch::Matchers::WithinRel;

/// The string matchers of the two versions have different names.
[[nodiscard]] inline bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

}  // namespace vattn::test
