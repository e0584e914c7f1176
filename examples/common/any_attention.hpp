// A method_choice as an object that attends: any of its policies over a kv_view, with the state that it keeps of keys.
#pragma once

#include <memory>

#include "common/executor_ref.hpp"
#include "common/method_choice.hpp"
#include "common/reference.hpp"

namespace vattn::examples {

/// T is float, Eigen::half or Eigen::bfloat16: the element type of a cache, of one sequence. Compiled once for each, in
/// any_attention_*.cpp. Indices are built from the cache at the first call and brought up to it in later ones; so is
/// the store of method::store, which has rows of its own.
template <class T>
class any_attention {
 public:
  explicit any_attention(const method_choice& choice);
  ~any_attention();
  any_attention(any_attention&&) noexcept;
  any_attention& operator=(any_attention&&) noexcept;

  /// What a call would say before it reads a row.
  [[nodiscard]] status check(const tensor_view<const float, 4>& q, const kv_view<T>& cache,
                             const attention_options& options, const attention_result& result) const;

  /// Other ε, δ, sinks and so on for the next calls; indices stay.
  void configure(const config& settings);

  /// Takes the cache's new tokens into the indices, if the method has any. A call does it too.
  void append(const kv_view<T>& cache);
  /// Forgets the tokens from n on.
  void truncate(index_t n);
  /// Memory of the indices, or of the store.
  [[nodiscard]] std::size_t bytes() const;

  /// Shapes and errors as `vattention`. Give the view value norms: selectors then need not read values.
  [[nodiscard]] status operator()(const tensor_view<const float, 4>& q, const kv_view<T>& cache,
                                  const attention_options& options, const attention_result& result, const draw_key& key,
                                  executor_ref exec);

  /// The exact result in double precision.
  [[nodiscard]] static reference exact(const tensor_view<const float, 4>& q, const kv_view<T>& cache,
                                       const attention_options& options, executor_ref exec);

 private:
  class engine;
  std::unique_ptr<engine> engine_;
};

extern template class any_attention<float>;
extern template class any_attention<Eigen::half>;
extern template class any_attention<Eigen::bfloat16>;

}  // namespace vattn::examples
