// The example of docs/selectors.md: a selector, an index, and a cache whose rows are signed bytes with a scale.
#include <cmath>
#include <vattn/vattn.hpp>
#include <vector>

namespace my {

using vattn::index_t;

// A selector: every `stride`-th token first, whatever it holds.
struct every_nth {
  index_t stride = 16;

  template <class Row>
  vattn::score_result score(const Row&, const vattn::population& tokens,
                            const vattn::score_buffers& out) const noexcept {
    for (index_t j = 0; j < tokens.size(); ++j)
      out.scores[static_cast<std::size_t>(j)] = tokens[j] % stride == 0 ? 1.0f : 0.0f;
    return {.kind = vattn::score_kind::ranking};  // an order, and no more
  }
  index_t heavy_count(const vattn::ranking& r, index_t n, const vattn::config&) const noexcept {
    return std::min(r.size(), n / stride);
  }
};

// An index: the norm of each key, so that ‖q‖‖k‖ bounds the product.
class norms {
 public:
  static constexpr bool estimates = false;
  static constexpr bool upper_bounds = true;

  template <vattn::kernel::row R>
  void append(const R& key) {
    using vattn::kernel::squared_norm;
    norms_.push_back(std::sqrt(squared_norm(key)) * (1 + 1e-4f));  // covers the rounding of what it bounds
  }
  void truncate(index_t n) {
    if (n < size()) norms_.resize(static_cast<std::size_t>(std::max<index_t>(n, 0)));
  }
  void clear() { truncate(0); }
  [[nodiscard]] index_t size() const noexcept { return static_cast<index_t>(norms_.size()); }
  [[nodiscard]] std::size_t bytes() const noexcept { return norms_.size() * sizeof(float); }
  [[nodiscard]] std::size_t scratch_size() const noexcept { return 0; }

  void score(const float* scaled_query, index_t first, std::span<float> scores, std::span<float>,
             std::span<float>) const noexcept {
    float q = 0;
    for (std::size_t j = 0; j < 8; ++j) q += scaled_query[j] * scaled_query[j];
    for (std::size_t i = 0; i < scores.size(); ++i)
      scores[i] = std::sqrt(q) * norms_[static_cast<std::size_t>(first) + i];
  }

 private:
  std::vector<float> norms_;
};
static_assert(vattn::key_index<norms>);

// A row of a layout: dk signed bytes and a scale. The functions of kernel/row.hpp are found beside it.
struct byte_row {
  const std::int8_t* data;
  std::size_t width;
  float scale;
};
inline void load(const byte_row& r, float* out) {
  for (std::size_t j = 0; j < r.width; ++j) out[j] = r.scale * static_cast<float>(r.data[j]);
}
inline float dot(const float* q, const byte_row& r) {
  float sum = 0;
  for (std::size_t j = 0; j < r.width; ++j) sum += q[j] * static_cast<float>(r.data[j]);
  return r.scale * sum;
}
inline void axpy(float w, const byte_row& r, float* sum) {
  for (std::size_t j = 0; j < r.width; ++j) sum[j] += w * r.scale * static_cast<float>(r.data[j]);
}
inline float squared_distance(const byte_row& r, const float* centre) {
  float sum = 0;
  for (std::size_t j = 0; j < r.width; ++j) {
    const float d = r.scale * static_cast<float>(r.data[j]) - centre[j];
    sum += d * d;
  }
  return sum;
}
inline float squared_norm(const byte_row& r) {
  float sum = 0;
  for (std::size_t j = 0; j < r.width; ++j) sum += static_cast<float>(r.data[j]) * static_cast<float>(r.data[j]);
  return r.scale * r.scale * sum;
}
static_assert(vattn::kernel::row<byte_row>);

// The cache: one sequence, one head.
struct byte_head {
  const std::int8_t *k, *v;  // [n, 8]
  const float* scales;       // [n], of key and value
  index_t n;

  [[nodiscard]] index_t size() const { return n; }
  [[nodiscard]] index_t dk() const { return 8; }
  [[nodiscard]] index_t dv() const { return 8; }
  [[nodiscard]] byte_row key(index_t token) const { return {k + token * 8, 8, scales[token]}; }
  [[nodiscard]] byte_row value(index_t token) const { return {v + token * 8, 8, scales[token]}; }
};
struct byte_cache {
  byte_head only;

  [[nodiscard]] index_t n_batch() const { return 1; }
  [[nodiscard]] index_t n_kv_heads() const { return 1; }
  [[nodiscard]] index_t dk() const { return 8; }
  [[nodiscard]] index_t dv() const { return 8; }
  [[nodiscard]] byte_head head(index_t, index_t) const { return only; }
  [[nodiscard]] vattn::status validate() const {
    if (only.n > 0 && (only.k == nullptr || only.v == nullptr))
      return vattn::status::error(vattn::errc::invalid_argument, "K or V is null: pass its first row");
    return {};
  }
};
static_assert(vattn::kv_cache<byte_cache>);

struct nth_policy : vattn::default_policy {
  using selector = every_nth;
};
struct norm_policy : vattn::default_policy {
  using selector = vattn::select::indexed<norms>;
};

}  // namespace my

int main() {
  constexpr vattn::index_t n = 2000;
  std::vector<std::int8_t> k(n * 8), v(n * 8);
  std::vector<float> scales(n, 0.02f), q(8, 1.0f), sparse(8), dense(8);
  for (std::size_t i = 0; i < k.size(); ++i) {
    k[i] = static_cast<std::int8_t>(static_cast<int>(i * 37 % 101) - 50);
    v[i] = static_cast<std::int8_t>(static_cast<int>(i * 53 % 90) + 10);
  }
  const my::byte_cache cache{{k.data(), v.data(), scales.data(), n}};
  const vattn::tensor_view<const float, 4> query(q.data(), {1, 1, 1, 8});
  vattn::attention_options options;
  options.scale = 0.35f;
  vattn::workspace memory;
  vattn::certificate c;
  if (!vattn::exact_attention(query, cache, options, {.output = {dense.data(), {1, 1, 1, 8}}}, memory).ok()) return 1;

  const auto close = [&](const vattn::status& s) {
    float off = 0, norm = 0;
    for (std::size_t j = 0; j < 8; ++j) {
      off += (sparse[j] - dense[j]) * (sparse[j] - dense[j]);
      norm += dense[j] * dense[j];
    }
    return s.ok() && !c.exact() && off < 0.04f * norm;
  };
  const vattn::attention_result result{.output = {sparse.data(), {1, 1, 1, 8}}, .certificates = {&c, {1, 1, 1}}};
  const vattn::config settings{.epsilon = 0.1, .delta = 0.1, .sinks = 16, .window = 16};
  if (!close(vattn::vattention<my::nth_policy>(settings)(query, cache, options, result, memory))) return 2;
  my::norms index;
  vattn::append_from(index, cache.head(0, 0));
  if (!close(vattn::vattention<my::norm_policy>(settings, {{&index, 1}})(query, cache, options, result, memory)))
    return 3;
  return 0;
}
