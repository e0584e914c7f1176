// Random attention problems in the library's types, and the same numbers for the reference.
#pragma once

#include <concepts>
#include <cstddef>
#include <limits>
#include <random>
#include <vector>

#include "reference/attention.hpp"
#include "vattn/vattn.hpp"

namespace vattn::test {

inline constexpr float infinity = std::numeric_limits<float>::infinity();
inline constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

/// The value, hidden from the optimiser: GCC 12 sees through small vectors and warns of reads past their
/// ends in branches of Eigen's that such sizes never take.
template <class T>
[[nodiscard]] T opaque(T value) {
  volatile T hidden = value;
  return hidden;
}

struct shape {
  index_t batch = 1, queries = 1, heads = 1, kv_heads = 1, n = 0, dk = 16, dv = 16;
};

/// `result` buffers of the right sizes, filled with a number that no test expects.
struct results {
  explicit results(const shape& s)
      : extents{s.batch, s.queries, s.heads, s.dv},
        output(static_cast<std::size_t>(s.batch * s.queries * s.heads * s.dv), -12345.0f),
        log_sum_exp(static_cast<std::size_t>(s.batch * s.queries * s.heads), -12345.0f),
        certificates(log_sum_exp.size()) {}

  [[nodiscard]] attention_result view() {
    const std::array<index_t, 3> rows{extents[0], extents[1], extents[2]};
    return {{output.data(), extents}, {log_sum_exp.data(), rows}, {certificates.data(), rows}};
  }
  /// Row of batch b, query t, head h.
  [[nodiscard]] std::size_t at(index_t b, index_t t, index_t h) const {
    return static_cast<std::size_t>((b * extents[1] + t) * extents[2] + h);
  }
  [[nodiscard]] const float* row(std::size_t at) const {
    return output.data() + at * static_cast<std::size_t>(extents[3]);
  }

  std::array<index_t, 4> extents;
  std::vector<float> output, log_sum_exp;
  std::vector<certificate> certificates;
};

/// q in float, K and V in T, laid out as contiguous_kv does; values N(0, I) plus a shared vector of ones.
template <class T = float>
struct problem {
  explicit problem(const shape& dimensions, unsigned seed = 1, float spread = 1)
      : problem(dimensions, spread,
                [random = std::mt19937(seed), normal = std::normal_distribution<float>()]() mutable {
                  return normal(random);
                }) {}
  /// `draw()`: the next of N(0, 1).
  template <std::invocable Draw>
  problem(const shape& dimensions, float spread, Draw&& draw) : s(dimensions) {
    const auto fill = [&](auto& to, index_t count, float factor, float shift) {
      using element = typename std::remove_reference_t<decltype(to)>::value_type;
      to.resize(static_cast<std::size_t>(count));
      for (auto& x : to) x = element(factor * draw() + shift);
    };
    fill(q, s.batch * s.queries * s.heads * s.dk, spread, 0);
    fill(k, s.batch * s.kv_heads * s.n * s.dk, 1, 0);
    fill(v, s.batch * s.kv_heads * s.n * s.dv, 1, 1);
    options.scale = 1 / std::sqrt(static_cast<float>(s.dk));
  }

  [[nodiscard]] tensor_view<const float, 4> query() const { return {q.data(), {s.batch, s.queries, s.heads, s.dk}}; }
  [[nodiscard]] kv_shape cache_shape() const {
    return {.n_batch = s.batch, .n_kv_heads = s.kv_heads, .n_tokens = s.n, .dk = s.dk, .dv = s.dv};
  }
  [[nodiscard]] kv_view<T> cache() const { return contiguous_kv(k.data(), v.data(), cache_shape()); }

  // Options that need storage.
  void set_mask(std::vector<float> values) {
    mask = std::move(values);
    options.mask = mask_view(tensor_view<const float, 4>(mask.data(), {s.batch, s.heads, s.queries, s.n}));
  }
  void set_sinks(std::vector<float> values) {
    sinks = std::move(values);
    options.sink_logits = sinks.data();
  }
  void set_alibi(std::vector<float> values) {
    alibi = std::move(values);
    options.alibi_slopes = alibi.data();
  }

  [[nodiscard]] reference::problem exactly() const {
    const auto wide = [](const auto& from) {
      std::vector<double> to;
      to.reserve(from.size());
      for (const auto x : from) to.push_back(static_cast<double>(static_cast<float>(x)));
      return to;
    };
    return {.n_batch = s.batch,
            .n_queries = s.queries,
            .n_heads = s.heads,
            .n_kv_heads = s.kv_heads,
            .n_tokens = s.n,
            .dk = s.dk,
            .dv = s.dv,
            .q = wide(q),
            .k = wide(k),
            .v = wide(v),
            .scale = static_cast<double>(options.scale),
            .softcap = static_cast<double>(options.softcap),
            .causal = options.causal,
            .sliding_window = options.sliding_window,
            .mask = wide(mask),
            .alibi = wide(alibi),
            .sinks = wide(sinks)};
  }

  shape s;
  std::vector<float> q;
  std::vector<T> k, v;
  std::vector<float> mask, sinks, alibi;
  attention_options options;
};

/// Largest relative error of the outputs, and of exp(lse), over all rows of the problem.
struct disagreement {
  double output = 0, denominator = 0;
};
template <class T>
[[nodiscard]] disagreement compare(const problem<T>& p, const results& r) {
  const reference::problem exact = p.exactly();
  disagreement worst;
  for (index_t b = 0; b < p.s.batch; ++b) {
    for (index_t t = 0; t < p.s.queries; ++t) {
      for (index_t h = 0; h < p.s.heads; ++h) {
        const reference::row want = reference::attend(exact, b, t, h);
        const std::size_t at = r.at(b, t, h);
        worst.output = std::max(worst.output, reference::relative_error(r.row(at), want.output));
        const double lse = static_cast<double>(r.log_sum_exp[at]);
        const double off = lse == want.log_sum_exp ? 0.0 : std::abs(std::expm1(lse - want.log_sum_exp));
        worst.denominator =
            std::isnan(off) ? std::numeric_limits<double>::infinity() : std::max(worst.denominator, off);
      }
    }
  }
  return worst;
}

}  // namespace vattn::test
