#include "attention_of.hpp"

namespace vattn_ggml {
extern const kernels attention_f16;
const kernels attention_f16 = attention_of<Eigen::half, Eigen::half>::table;
}  // namespace vattn_ggml
