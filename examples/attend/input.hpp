// Arrays from files, checked until nothing about them can surprise the attention.
#pragma once

#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

#include "attend/problem.hpp"

namespace vattn::examples {

/// The element type as the user means it: uint16 is bfloat16 if --kv-dtype says so.
enum class element_type : std::uint8_t { float32, float16, bfloat16 };

[[nodiscard]] inline element_type element_type_of(const char* name, const npy::array& a, bool bfloat16) {
  if (a.type == npy::dtype::float32) return element_type::float32;
  if (a.type == npy::dtype::float16) return element_type::float16;
  if (a.type == npy::dtype::uint16) {
    if (bfloat16) return element_type::bfloat16;
    throw std::runtime_error(std::string(name) + " is uint16: if it holds bfloat16, say --kv-dtype bf16");
  }
  throw std::runtime_error(std::string(name) + " is " + npy::to_string(a.type) +
                           ": convert it with a.astype(numpy.float32), or numpy.float16");
}

[[nodiscard]] inline float element_at(const npy::array& a, element_type type, std::size_t i) {
  if (type == element_type::float32) return a.as<float>()[i];
  const std::uint16_t bits = a.as<std::uint16_t>()[i];
  return type == element_type::float16 ? kernel::half_to_float(bits) : kernel::bfloat16_to_float(bits);
}

inline void require_finite(const char* name, const npy::array& a, element_type type) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    const float x = element_at(a, type, i);
    if (std::isfinite(x)) continue;
    std::vector<std::int64_t> at(a.shape.size());
    for (std::size_t axis = at.size(), rest = i; axis-- > 0;) {
      at[axis] = static_cast<std::int64_t>(rest % static_cast<std::size_t>(a.shape[axis]));
      rest /= static_cast<std::size_t>(a.shape[axis]);
    }
    throw std::runtime_error(std::string(name) + npy::to_string(at) + " is " + (std::isnan(x) ? "NaN" : "infinite") +
                             ": every element must be finite");
  }
}

/// Reads and checks q, k and v. `type` receives the element type of k and v. Throws std::runtime_error.
[[nodiscard]] inline problem load_problem(const request& r, element_type& type) {
  const auto shape_text = [](const npy::array& a) { return npy::to_string(a.shape); };
  const auto load = [&](const char* name, const std::string& path, const char* axes) {
    npy::array a = npy::read(path);
    if (a.shape.size() != 3) {
      throw std::runtime_error(std::string(name) + " is " + shape_text(a) + ", not " + axes + ": give it three axes");
    }
    return a;
  };
  const npy::array q = load("q", r.q_path, "[T, Hq, Dk]");
  problem p;
  p.k = load("k", r.k_path, "[n, Hkv, Dk]");
  p.v = load("v", r.v_path, "[n, Hkv, Dv]");
  if (p.k.shape[0] != p.v.shape[0] || p.k.shape[1] != p.v.shape[1]) {
    throw std::runtime_error("k is " + shape_text(p.k) + " but v is " + shape_text(p.v) +
                             ": tokens and KV heads, the first two extents, must agree");
  }
  if (q.shape[0] == 0 || q.shape[1] == 0 || q.shape[2] == 0)
    throw std::runtime_error("q is " + shape_text(q) + ": there is nothing to attend with");
  if (q.shape[2] != p.k.shape[2]) {
    throw std::runtime_error("q is " + shape_text(q) + " but k is " + shape_text(p.k) +
                             ": the head sizes, their last extents, must agree" +
                             (q.shape[2] == p.v.shape[2] ? " (are k and v swapped?)" : ""));
  }
  const element_type q_type = element_type_of("q", q, r.bfloat16);
  type = element_type_of("k", p.k, r.bfloat16);
  if (element_type_of("v", p.v, r.bfloat16) != type) {
    throw std::runtime_error(std::string("k is ") + npy::to_string(p.k.type) + " but v is " + npy::to_string(p.v.type) +
                             ": give both the same type");
  }
  require_finite("q", q, q_type);
  require_finite("k", p.k, type);
  require_finite("v", p.v, type);

  p.queries = q.shape[0], p.heads = q.shape[1], p.dk = q.shape[2];
  p.n = p.k.shape[0], p.kv_heads = p.k.shape[1], p.dv = p.v.shape[2];
  p.q.resize(q.size());
  for (std::size_t i = 0; i < p.q.size(); ++i) p.q[i] = element_at(q, q_type, i);
  return p;
}

}  // namespace vattn::examples
