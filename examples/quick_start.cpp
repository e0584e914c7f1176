// A dozen lines: one query, one head, 32768 tokens; the output, and what it is promised to be worth.
#include <cmath>
#include <cstdio>
#include <random>
#include <vattn/vattn.hpp>
#include <vector>

int main() {
  constexpr vattn::index_t n = 32768, d = 128;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> q(d), k(n * d), v(n * d), o(d), dense(d);
  for (auto* x : {&q, &k})
    for (float& y : *x) y = normal(random);
  for (float& y : v) y = 1 + normal(random);

  const vattn::tensor_view<const float, 4> query(q.data(), {1, 1, 1, d});  // [batch, queries, heads, dk]
  const auto cache = vattn::contiguous_kv(k.data(), v.data(), {.n_tokens = n, .dk = d, .dv = d});
  const vattn::attention_options options{.scale = 1 / std::sqrt(static_cast<float>(d))};
  std::vector<vattn::kv_index> index;  // a code of each key, beside the cache
  index.emplace_back(vattn::index_shape{.dk = d, .dv = d});
  if (auto s = index[0].build(cache); !s) return std::fprintf(stderr, "quick_start: %s\n", s.message()), 1;
  const vattn::vattention<> attend({.epsilon = 0.05, .delta = 0.1}, {index});  // P(||error|| > 5 % of ||o||) <= 10 %
  vattn::certificate c;
  vattn::workspace memory;
  if (auto s =
          attend(query, cache, options, {.output = {o.data(), {1, 1, 1, d}}, .certificates = {&c, {1, 1, 1}}}, memory);
      !s)
    return std::fprintf(stderr, "quick_start: %s\n", s.message()), 1;

  if (auto s = vattn::exact_attention(query, cache, options, {.output = {dense.data(), {1, 1, 1, d}}}, memory); !s)
    return std::fprintf(stderr, "quick_start: %s\n", s.message()), 1;
  double error = 0, norm = 0;
  for (std::size_t j = 0; j < d; ++j) {
    error += (o[j] - dense[j]) * (o[j] - dense[j]);
    norm += dense[j] * dense[j];
  }
  std::printf("rows read  %lld of %lld (%.1f %%): %lld for certain, %lld sampled\n", static_cast<long long>(c.rows()),
              static_cast<long long>(c.n), 100 * c.density(), static_cast<long long>(c.rows_exact),
              static_cast<long long>(c.rows_sampled));
  std::printf("promised   error <= %.4f of ||o|| with probability %g (%s, asked %g)\n", c.epsilon_achieved, 1 - c.delta,
              vattn::to_string(c.promise), c.epsilon);
  std::printf("measured   error  = %.4f of ||o||\n", std::sqrt(error / norm));
}
