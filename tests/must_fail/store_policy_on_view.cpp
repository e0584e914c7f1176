#include <vattn/vattn.hpp>

#if defined(VATTN_CORRECTED)
using cache = vattn::shuffled_store<float>;
#else
using cache = vattn::kv_view<float>;
#endif

vattn::status call(const vattn::tensor_view<const float, 4>& q, const cache& c, const vattn::attention_result& result,
                   vattn::workspace& memory) {
  return vattn::vattention<vattn::store_policy>{}(q, c, {.scale = 1}, result, memory);
}
