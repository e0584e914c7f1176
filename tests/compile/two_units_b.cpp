#include <vattn/vattn.hpp>

const char* attend_in_b(const vattn::tensor_view<const float, 4>& q, const vattn::kv_view<float>& cache,
                        vattn::tensor_view<float, 4> output) {
  static vattn::status s;
  vattn::attention_options options;
  options.scale = 0.5f;
  vattn::workspace memory;
  const vattn::vattention<vattn::verified_sdpa> attend;
  s = attend(q, cache, options, {.output = output}, memory, {}, vattn::thread_executor(2));
  return s.message();
}
