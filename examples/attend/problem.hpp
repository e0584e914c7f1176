// What attend was asked to do, on which arrays.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/method_choice.hpp"
#include "support/npy.hpp"
#include "vattn/vattn.hpp"

namespace vattn::examples {

/// The command line.
struct request : method_choice {
  std::string q_path, k_path, v_path, out_path, json_path, html_path;
  bool bfloat16 = false;  ///< uint16 arrays hold bfloat16
  attention_options options{};
  std::optional<float> scale;  ///< default 1/sqrt(Dk)
  std::uint64_t seed = 0;
  std::int64_t trials = 1;
  index_t threads = 1;
};

/// The arrays, with shapes that fit each other.
struct problem {
  std::vector<float> q;  // [T, Hq, Dk]
  npy::array k, v;       // [n, Hkv, Dk], [n, Hkv, Dv], of one type
  index_t queries = 0, heads = 0, kv_heads = 0, n = 0, dk = 0, dv = 0;

  [[nodiscard]] std::size_t rows() const { return static_cast<std::size_t>(queries * heads); }
  [[nodiscard]] tensor_view<const float, 4> query_view() const { return {q.data(), {1, queries, heads, dk}}; }
};

}  // namespace vattn::examples
