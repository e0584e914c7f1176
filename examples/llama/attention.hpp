// The decode attention of one layer, behind an interface: what an engine asks of a method.
#pragma once

#include <memory>
#include <vector>

#include "common/any_attention.hpp"
#include "llama/cache.hpp"

namespace vattn::llama {

/// One layer's method and what it keeps of the layer's tokens. A method with a store of its own copies the rows in
/// `append`; others read the cache.
class layer_attention {
 public:
  virtual ~layer_attention() = default;

  /// Other ε, δ, sinks and so on from now on.
  virtual void configure(const config& settings) = 0;
  /// The cache has new tokens: a prefill, or the one that is about to attend.
  virtual void append(const layer_cache& cache) = 0;
  /// The cache forgets the tokens from n on.
  virtual void truncate(index_t n) = 0;
  /// Of the latest token: q [heads, head_dim], rotated, not scaled -> out [heads, head_dim], certificates [heads].
  [[nodiscard]] virtual status attend(const layer_cache& cache, std::span<const float> q, std::span<float> out,
                                      std::span<certificate> certificates, const draw_key& key,
                                      examples::executor_ref exec) = 0;
};

/// How q, out and certificates of one token are seen by the library.
struct one_token {
  one_token(const layer_cache& cache, std::span<const float> q, index_t n_heads)
      : heads(n_heads), query(q.data(), {1, 1, n_heads, cache.head_dim()}) {
    options.scale = 1 / std::sqrt(static_cast<float>(cache.head_dim()));
  }
  index_t heads;
  tensor_view<const float, 4> query;
  attention_options options{};
};

/// Any method of examples/common over the cache's rows.
template <class T>
class cache_attention final : public layer_attention {
 public:
  explicit cache_attention(const examples::method_choice& choice) : attend_(choice) {}

  void configure(const config& settings) override { attend_.configure(settings); }
  void append(const layer_cache& cache) override { attend_.append(cache.view<T>()); }
  void truncate(index_t n) override { attend_.truncate(n); }
  [[nodiscard]] status attend(const layer_cache& cache, std::span<const float> q, std::span<float> out,
                              std::span<certificate> certificates, const draw_key& key,
                              examples::executor_ref exec) override {
    const auto heads = static_cast<index_t>(certificates.size());
    const one_token token(cache, q, heads);
    const attention_result result{.output = {out.data(), {1, 1, heads, cache.head_dim()}},
                                  .certificates = {certificates.data(), {1, 1, heads}}};
    const kv_view<T> view = cache.view<T>();
    if (status s = attend_.check(token.query, view, token.options, result); !s) return s;
    return attend_(token.query, view, token.options, result, key, exec);
  }

 private:
  examples::any_attention<T> attend_;
};

/// The one place that knows which methods there are.
[[nodiscard]] inline std::unique_ptr<layer_attention> make_attention(const examples::method_choice& choice,
                                                                     cache_type type) {
  if (type == cache_type::f32) return std::make_unique<cache_attention<float>>(choice);
  if (type == cache_type::f16) return std::make_unique<cache_attention<Eigen::half>>(choice);
  return std::make_unique<cache_attention<Eigen::bfloat16>>(choice);
}

/// The exact result of the same call, in double precision.
[[nodiscard]] inline examples::reference exact_result(const layer_cache& cache, std::span<const float> q, index_t heads,
                                                      examples::executor_ref exec) {
  const one_token token(cache, q, heads);
  return cache.visit([&]<class T>(const kv_view<T>& view) {
    return examples::any_attention<T>::exact(token.query, view, token.options, exec);
  });
}

}  // namespace vattn::llama
