#include <vattn/vattn.hpp>

#if defined(VATTN_CORRECTED)
using number = float;
#else
using number = int;
#endif

const number buffer[16] = {};
const vattn::kv_view<number> cache(buffer, {.token = 16}, buffer, {.token = 16}, {.n_tokens = 4, .dk = 4, .dv = 4});
