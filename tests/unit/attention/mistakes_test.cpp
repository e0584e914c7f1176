// The first five mistakes of a new user: each meets a message that says what to do.
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

using namespace vattn::test;
using vattn::index_t;

namespace {

struct first_call {
  problem<float> p{{.n = 600, .dk = 16, .dv = 8}};
  results r{p.s};
  vattn::kv_view<float> cache = p.cache();
  vattn::attention_options options = p.options;
  vattn::config settings{};
  vattn::workspace memory{};

  std::string message() {
    const vattn::status s =
        vattn::vattention<vattn::ranked_policy>(settings)(p.query(), cache, options, r.view(), memory);
    CHECK_FALSE(s.ok());
    return s.message();
  }
};

}  // namespace

TEST_CASE("first mistakes: strides in elements", "[arguments]") {
  first_call c;
  const vattn::kv_strides elements{.token = 16}, bytes{.token = 8 * sizeof(float)};
  c.cache = {c.p.k.data(), elements, c.p.v.data(), bytes, c.p.cache_shape()};
  CHECK(c.message() ==
        "the token stride of K is 16 bytes, less than one row of 64 bytes: strides are in bytes, not in elements");
}

TEST_CASE("first mistakes: K and V swapped", "[arguments]") {
  first_call c;
  c.cache = vattn::contiguous_kv(c.p.v.data(), c.p.k.data(), {.n_tokens = 600, .dk = 8, .dv = 16});
  CHECK(c.message() == "q has head size 16, the keys 8: are K and V swapped?");
}

TEST_CASE("first mistakes: no scale", "[arguments]") {
  first_call c;
  c.options = {};
  CHECK(c.message() == "options.scale is not set: 1/sqrt(dk) = 0.25 for most models, 1 if the engine has scaled q");
}

TEST_CASE("first mistakes: an epsilon of 0", "[arguments]") {
  first_call c;
  c.settings.epsilon = 0;
  CHECK(c.message() == "epsilon is 0: give a relative error in (0, 1), such as 0.05");
}

TEST_CASE("first mistakes: no workspace", "[arguments]") {
  first_call c;
  c.memory = vattn::workspace(std::span<std::byte>{});
  const std::string m = c.message();
  CHECK(contains(m, "the workspace has 0 bytes but the call needs "));
  CHECK(contains(m, ": size it with workspace_bytes(), or pass a default-constructed workspace"));
  // Taken at its word:
  c.memory = {};
  CHECK(
      vattn::vattention<vattn::ranked_policy>(c.settings)(c.p.query(), c.cache, c.options, c.r.view(), c.memory).ok());
}
