#include "attention_of.hpp"

namespace vattn_ggml {
extern const kernels attention_q4_0;
const kernels attention_q4_0 = attention_of<vattn::kernel::q4_0_block, vattn::kernel::q4_0_block>::table;
}  // namespace vattn_ggml
