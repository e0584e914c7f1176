#include <vattn/vattn.hpp>
#include <vector>

// Keys and query such that every logit is 1.
float log_sum_exp_of_ones(vattn::index_t n) {
  const std::vector<float> rows(static_cast<std::size_t>(4 * n), 0.5f), q(4, 0.5f);
  std::vector<float> output(4);
  float lse = 0;
  vattn::attention_options options;
  options.scale = 1;
  vattn::workspace memory;
  const vattn::status s =
      vattn::vattention<>{}(vattn::tensor_view<const float, 4>(q.data(), {1, 1, 1, 4}),
                            vattn::contiguous_kv(rows.data(), rows.data(), {.n_tokens = n, .dk = 4, .dv = 4}), options,
                            {.output = {output.data(), {1, 1, 1, 4}}, .log_sum_exp = {&lse, {1, 1, 1}}}, memory);
  return s.ok() ? lse : -1.0f;
}
