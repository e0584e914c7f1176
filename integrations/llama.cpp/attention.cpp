#include "attention.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace vattn_ggml {

// Null where its file is not compiled: see VATTN_LLAMACPP_TYPES.
__attribute__((weak)) extern const kernels attention_f32, attention_f16, attention_bf16, attention_q8_0, attention_q4_0,
    attention_q8_0_q4_0;

const kernels* kernels_for(ggml_type k, ggml_type v) noexcept {
  if (k == GGML_TYPE_Q8_0 && v == GGML_TYPE_Q4_0) return &attention_q8_0_q4_0;
  if (k != v) return nullptr;
  switch (k) {
    case GGML_TYPE_F32:
      return &attention_f32;
    case GGML_TYPE_F16:
      return &attention_f16;
    case GGML_TYPE_BF16:
      return &attention_bf16;
    case GGML_TYPE_Q8_0:
      return &attention_q8_0;
    case GGML_TYPE_Q4_0:
      return &attention_q4_0;
    default:
      return nullptr;
  }
}

void plain_attention(const attention_node& n, void (*decode_k)(const void*, float*, int64_t),
                     void (*decode_v)(const void*, float*, int64_t)) noexcept {
  constexpr float none = -std::numeric_limits<float>::infinity();
  std::array<float, 1024> row{}, sum{};
  const auto at = [](const vattn::ggml_layout& l, index_t i1, index_t i2, index_t i3) {
    return static_cast<const char*>(l.data) + i1 * l.nb[1] + i2 * l.nb[2] + i3 * l.nb[3];
  };
  const auto decoded = [&](auto* decode, const vattn::ggml_layout& l, index_t i1, index_t i2, index_t i3) {
    if (decode) {
      decode(at(l, i1, i2, i3), row.data(), l.ne[0]);
    } else {
      std::copy_n(reinterpret_cast<const float*>(at(l, i1, i2, i3)), l.ne[0], row.data());
    }
  };
  const auto dk = static_cast<std::size_t>(n.k.ne[0]), dv = static_cast<std::size_t>(n.v.ne[0]);
  for (index_t s = 0; s < n.streams(); ++s) {
    for (index_t t = 0; t < n.queries(); ++t) {
      for (index_t h = 0; h < n.heads(); ++h) {
        const auto* q = reinterpret_cast<const float*>(at(n.q, t, h, s));
        const auto* mask =
            n.mask.data ? reinterpret_cast<const std::uint16_t*>(at(n.mask, t, h % n.mask.ne[2], s % n.mask.ne[3]))
                        : nullptr;
        float top = none, weight = 0;
        std::fill(sum.begin(), sum.end(), 0.0f);
        const auto add = [&](float logit, bool value) {
          const float higher = logit > top ? logit : top;
          const float shrink = std::exp(top - higher), w = std::exp(logit - higher);
          for (std::size_t j = 0; j < dv; ++j) sum[j] = sum[j] * (top == none ? 0 : shrink) + (value ? w * row[j] : 0);
          weight = weight * (top == none ? 0 : shrink) + w;
          top = higher;
        };
        for (index_t c = 0; c < n.k.ne[1]; ++c) {
          const float bias = mask ? vattn::kernel::half_to_float(mask[c]) : 0;
          if (bias == none) continue;
          decoded(decode_k, n.k, c, h / n.group(), s);
          float l = 0;
          for (std::size_t j = 0; j < dk; ++j) l += q[j] * row[j];
          l *= n.scale;
          if (n.softcap > 0) l = n.softcap * std::tanh(l / n.softcap);
          decoded(decode_v, n.v, c, h / n.group(), s);
          add(l + bias, true);
        }
        if (n.sinks) add(n.sinks[h], false);
        auto* to = reinterpret_cast<float*>(const_cast<char*>(at(n.output, h, t, s)));
        for (std::size_t j = 0; j < dv; ++j) to[j] = weight == 0 ? 0 : sum[j] / weight;
      }
    }
  }
}

}  // namespace vattn_ggml
