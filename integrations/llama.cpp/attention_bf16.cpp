#include "attention_of.hpp"

namespace vattn_ggml {
extern const kernels attention_bf16;
const kernels attention_bf16 = attention_of<Eigen::bfloat16, Eigen::bfloat16>::table;
}  // namespace vattn_ggml
