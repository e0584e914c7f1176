// What attend was asked to do, and the part of it that depends on the element type of the cache.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/reference.hpp"
#include "support/npy.hpp"
#include "support/progress.hpp"
#include "vattn/vattn.hpp"

namespace vattn::examples {

enum class method : std::uint8_t { dense, top_k, sample, magic_pig, vattention };
enum class sampler_kind : std::uint8_t { uniform, importance };
enum class bound_kind : std::uint8_t { clt, student, bernstein, hoeffding };

/// The command line.
struct request {
  std::string q_path, k_path, v_path, out_path, json_path;
  bool bfloat16 = false;  ///< uint16 arrays hold bfloat16
  attention_options options{};
  std::optional<float> scale;         ///< default 1/sqrt(Dk)
  std::optional<double> heavy, base;  ///< default: the target chooses, or 0.02
  method how = method::vattention;
  target_kind target = target_kind::output;
  bound_kind bound = bound_kind::clt;
  sampler_kind sampler = sampler_kind::uniform;
  std::string selector = "exact";  ///< of selector_catalogue()
  int bits = 4;                    ///< of the codes
  bool share_group = false;        ///< one sample for the query heads of a KV head
  bool two_phases = false;         ///< scan codes of 1 bit, then the selector's for what they keep
  config settings{};
  double top_p = 0;  ///< share of the softmax mass to read exactly; 0 = `heavy` decides
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

/// `call` runs the method once; `exact` what it is measured against. Both refer to the problem and the
/// request that they were made of.
struct engine {
  std::function<status(const attention_result&, const draw_key&, support::progress&)> call;
  std::function<status(const attention_result&)> check;
  std::function<reference(support::progress&)> exact;
};

/// T is float, Eigen::half or Eigen::bfloat16: the element type of k and v. One translation unit each.
template <class T>
[[nodiscard]] engine make_engine(const problem& p, const request& r);

extern template engine make_engine<float>(const problem&, const request&);
extern template engine make_engine<Eigen::half>(const problem&, const request&);
extern template engine make_engine<Eigen::bfloat16>(const problem&, const request&);

}  // namespace vattn::examples
