// A cache of any layout behind virtual functions: policies that are instantiated once meet every layout's own rows.
#pragma once

#include <functional>
#include <memory>
#include <vattn/call/arguments.hpp>
#include <vector>

namespace vattn::product {

/// A KV head, by virtual functions. `keys`: of K, or of V.
struct any_rows {
  any_rows() = default;
  any_rows(const any_rows&) = delete;
  any_rows& operator=(const any_rows&) = delete;
  virtual ~any_rows() = default;
  [[nodiscard]] virtual float dot(bool keys, index_t token, const float* q) const noexcept = 0;
  [[nodiscard]] virtual float squared_norm(bool keys, index_t token) const noexcept = 0;
  [[nodiscard]] virtual float squared_distance(bool keys, index_t token, const float* centre) const noexcept = 0;
  virtual void axpy(bool keys, index_t token, float w, float* acc) const noexcept = 0;
  virtual void load(bool keys, index_t token, float* out) const noexcept = 0;
  [[nodiscard]] virtual float value_norm(index_t token) const noexcept = 0;
  [[nodiscard]] virtual float key_norm(index_t token) const noexcept = 0;

  index_t n = 0, dk = 0, dv = 0;
  bool key_norms = false, value_norms = false;
  const float* value_centre = nullptr;
};

struct any_row {
  const any_rows* rows;
  index_t token;
  bool keys;
  [[nodiscard]] std::size_t size() const noexcept { return static_cast<std::size_t>(keys ? rows->dk : rows->dv); }
};
[[nodiscard]] inline float dot(const float* q, const any_row& r) noexcept { return r.rows->dot(r.keys, r.token, q); }
[[nodiscard]] inline float squared_norm(const any_row& r) noexcept { return r.rows->squared_norm(r.keys, r.token); }
[[nodiscard]] inline float squared_distance(const any_row& r, const float* centre) noexcept {
  return r.rows->squared_distance(r.keys, r.token, centre);
}
inline void axpy(float w, const any_row& r, float* acc) noexcept { r.rows->axpy(r.keys, r.token, w, acc); }
inline void load(const any_row& r, float* out) noexcept { r.rows->load(r.keys, r.token, out); }

struct any_head {
  const any_rows* rows;
  [[nodiscard]] index_t size() const noexcept { return rows->n; }
  [[nodiscard]] index_t dk() const noexcept { return rows->dk; }
  [[nodiscard]] index_t dv() const noexcept { return rows->dv; }
  [[nodiscard]] any_row key(index_t token) const noexcept { return {rows, token, true}; }
  [[nodiscard]] any_row value(index_t token) const noexcept { return {rows, token, false}; }
  [[nodiscard]] bool has_key_norms() const noexcept { return rows->key_norms; }
  [[nodiscard]] float key_norm(index_t token) const noexcept { return rows->key_norm(token); }
  [[nodiscard]] bool has_value_norms() const noexcept { return rows->value_norms; }
  [[nodiscard]] float value_norm(index_t token) const noexcept { return rows->value_norm(token); }
  [[nodiscard]] const float* value_centre() const noexcept { return rows->value_centre; }
};

template <kv_head Head>
class rows_of_head final : public any_rows {
 public:
  explicit rows_of_head(const Head& head) : head_(head) {
    n = head.size(), dk = head.dk(), dv = head.dv();
    if constexpr (kv_head_with_key_norms<Head>) key_norms = head.has_key_norms();
    if constexpr (kv_head_with_value_norms<Head>)
      value_norms = head.has_value_norms(), value_centre = head.value_centre();
  }
  float dot(bool keys, index_t token, const float* q) const noexcept override {
    using kernel::dot;
    return visit(keys, token, [&](const auto& r) { return dot(q, r); });
  }
  float squared_norm(bool keys, index_t token) const noexcept override {
    using kernel::squared_norm;
    return visit(keys, token, [&](const auto& r) { return squared_norm(r); });
  }
  float squared_distance(bool keys, index_t token, const float* centre) const noexcept override {
    using kernel::squared_distance;
    return visit(keys, token, [&](const auto& r) { return squared_distance(r, centre); });
  }
  void axpy(bool keys, index_t token, float w, float* acc) const noexcept override {
    using kernel::axpy;
    visit(keys, token, [&](const auto& r) { return axpy(w, r, acc), 0; });
  }
  void load(bool keys, index_t token, float* out) const noexcept override {
    using kernel::load;
    visit(keys, token, [&](const auto& r) { return load(r, out), 0; });
  }
  float value_norm(index_t token) const noexcept override {
    if constexpr (kv_head_with_value_norms<Head>) return head_.value_norm(token);
    return 0;
  }
  float key_norm(index_t token) const noexcept override {
    if constexpr (kv_head_with_key_norms<Head>) return head_.key_norm(token);
    return 0;
  }

 private:
  template <class F>
  auto visit(bool keys, index_t token, F&& f) const noexcept {
    return keys ? f(head_.key(token)) : f(head_.value(token));
  }
  Head head_;
};

class any_kv {
 public:
  template <kv_cache KV>
  explicit any_kv(const KV& cache)
      : n_batch_(cache.n_batch()),
        n_kv_heads_(cache.n_kv_heads()),
        dk_(cache.dk()),
        dv_(cache.dv()),
        in_order_(rows_in_order<std::remove_cvref_t<decltype(cache.head(0, 0))>>),
        validate_([&cache] { return cache.validate(); }),
        check_([&cache](const attention_options& o, const attention_result& r, const std::array<index_t, 4>& q) {
          const float any = 0;
          return check_call(tensor_view<const float, 4>(&any, q), cache, o, r);
        }) {
    using head_type = std::remove_cvref_t<decltype(cache.head(0, 0))>;
    if (!cache.validate()) return;
    for (index_t b = 0; b < n_batch_; ++b) {
      for (index_t h = 0; h < n_kv_heads_; ++h)
        rows_.push_back(std::make_shared<rows_of_head<head_type>>(cache.head(b, h)));
    }
  }
  [[nodiscard]] index_t n_batch() const noexcept { return n_batch_; }
  [[nodiscard]] index_t n_kv_heads() const noexcept { return n_kv_heads_; }
  [[nodiscard]] index_t dk() const noexcept { return dk_; }
  [[nodiscard]] index_t dv() const noexcept { return dv_; }
  [[nodiscard]] any_head head(index_t b, index_t h) const noexcept {
    return {rows_[static_cast<std::size_t>(b * n_kv_heads_ + h)].get()};
  }
  [[nodiscard]] status validate() const noexcept { return validate_(); }
  [[nodiscard]] bool in_order() const noexcept { return in_order_; }
  /// What the cache's own type has against a call with q of such extents.
  [[nodiscard]] status check(const attention_options& o, const attention_result& r,
                             const std::array<index_t, 4>& q) const {
    return check_(o, r, q);
  }

 private:
  index_t n_batch_, n_kv_heads_, dk_, dv_;
  bool in_order_;
  std::function<status()> validate_;
  std::function<status(const attention_options&, const attention_result&, const std::array<index_t, 4>&)> check_;
  std::vector<std::shared_ptr<const any_rows>> rows_;
};

}  // namespace vattn::product
