#include <cmath>
#include <vattn/exact_attention.hpp>

// One token: its value is the output.
int main() {
  const float q[] = {1, 2}, k[] = {3, 4}, v[] = {5, 6};
  float o[2] = {};
  vattn::workspace memory;
  const vattn::status s = vattn::exact_attention(vattn::tensor_view<const float, 4>(q, {1, 1, 1, 2}),
                                                 vattn::contiguous_kv(k, v, {.n_tokens = 1, .dk = 2, .dv = 2}),
                                                 {.scale = 1}, {.output = {o, {1, 1, 1, 2}}}, memory);
  return s && std::abs(o[0] - 5) < 1e-5f && std::abs(o[1] - 6) < 1e-5f ? 0 : 1;
}
