// Real queries, keys and values from .npy files: PREFIX_q.npy, PREFIX_k.npy, PREFIX_v.npy.
#pragma once

#include <stdexcept>
#include <string>

#include "support/npy.hpp"
#include "support/regimes.hpp"
#include "vattn/kernel/row.hpp"

namespace vattn::support {

/// q float32 [T, Hq, D], the last T positions; k and v float16 [n, Hkv, D]. Throws std::runtime_error.
class real_tensors {
 public:
  explicit real_tensors(const std::string& prefix)
      : name_(prefix.substr(prefix.find_last_of('/', prefix.find_last_of('/') - 1) + 1)),
        q_(npy::read(prefix + "_q.npy")),
        k_(npy::read(prefix + "_k.npy")),
        v_(npy::read(prefix + "_v.npy")) {
    if (q_.shape.size() != 3 || k_.shape.size() != 3 || v_.shape != k_.shape || q_.type != npy::dtype::float32 ||
        k_.type != npy::dtype::float16 || v_.type != npy::dtype::float16) {
      throw std::runtime_error(prefix + ": expected q float32 [T, Hq, D], k and v float16 [n, Hkv, D]");
    }
  }

  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] index_t queries() const { return q_.shape[0]; }
  [[nodiscard]] index_t heads() const { return q_.shape[1]; }
  [[nodiscard]] index_t kv_heads() const { return k_.shape[1]; }
  [[nodiscard]] index_t dim() const { return q_.shape[2]; }
  [[nodiscard]] index_t tokens() const { return k_.shape[0]; }
  [[nodiscard]] index_t kv_head(index_t head) const { return head / (heads() / kv_heads()); }
  /// Tokens that a query sees: itself and all before it.
  [[nodiscard]] index_t visible(index_t query) const { return tokens() - queries() + query + 1; }

  [[nodiscard]] std::span<const float> query(index_t head, index_t i) const {
    return q_.as<float>().subspan(static_cast<std::size_t>((i * heads() + head) * dim()),
                                  static_cast<std::size_t>(dim()));
  }
  /// One head's query and the n first keys and values of its KV head.
  [[nodiscard]] synthetic::cache cache(index_t head, index_t i) const {
    synthetic::cache c;
    c.n = visible(i);
    c.dim = dim();
    const auto q = query(head, i);
    c.q.assign(q.begin(), q.end());
    const auto k = k_.as<std::uint16_t>(), v = v_.as<std::uint16_t>();
    for (index_t token = 0; token < c.n; ++token) {
      const auto at = static_cast<std::size_t>((token * kv_heads() + kv_head(head)) * dim());
      for (std::size_t j = 0; j < static_cast<std::size_t>(dim()); ++j) {
        c.k.push_back(kernel::half_to_float(k[at + j]));
        c.v.push_back(kernel::half_to_float(v[at + j]));
      }
    }
    return c;
  }

 private:
  std::string name_;
  npy::array q_, k_, v_;
};

}  // namespace vattn::support
