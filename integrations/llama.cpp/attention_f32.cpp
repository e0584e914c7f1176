#include "attention_of.hpp"

namespace vattn_ggml {
extern const kernels attention_f32;
const kernels attention_f32 = attention_of<float, float>::table;
}  // namespace vattn_ggml
