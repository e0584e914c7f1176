#include <cstring>
#include <vattn/vattn.hpp>

// A call that fails, with a message, and one that does not.
int RUN() {
  float k[1200] = {1e38f}, v[1200] = {}, q[4] = {1e38f}, o[4];
  vattn::workspace memory;
  const auto attend = [&] {
    return vattn::vattention<>()(vattn::tensor_view<const float, 4>(q, {1, 1, 1, 4}),
                                 vattn::contiguous_kv(k, v, {.n_tokens = 300, .dk = 4, .dv = 4}), {.scale = 1},
                                 {.output = {o, {1, 1, 1, 4}}}, memory);
  };
  const vattn::status failed = attend();
  q[0] = 1, k[0] = 1;
  return !failed && std::strlen(failed.message()) > 20 && attend().ok() ? 0 : 1;
}
