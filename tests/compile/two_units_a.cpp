// Two translation units that include and use everything must link: no function is defined twice.
#include <vattn/vattn.hpp>
#include <vector>

const char* attend_in_b(const vattn::tensor_view<const float, 4>& q, const vattn::kv_view<float>& cache,
                        vattn::tensor_view<float, 4> output);

int main() {
  const std::vector<float> numbers(64, 1.0f);
  std::vector<float> a(4), b(4);
  const vattn::tensor_view<const float, 4> q(numbers.data(), {1, 1, 1, 4});
  const auto cache = vattn::contiguous_kv(numbers.data(), numbers.data(), {.n_tokens = 16, .dk = 4, .dv = 4});
  vattn::attention_options options;
  options.scale = 0.5f;
  vattn::workspace memory;
  const vattn::vattention<> attend;
  const vattn::status s =
      attend(q, cache, options, {.output = {a.data(), {1, 1, 1, 4}}}, memory, {}, vattn::thread_executor(2));
  const char* message = attend_in_b(q, cache, {b.data(), {1, 1, 1, 4}});
  return s.ok() && message[0] == '\0' && a == b ? 0 : 1;
}
