// Attention's results in a running llama.cpp, held against the definition in double precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml.h"

/// Looks at each attention node once it is computed, whoever computed it. Errors are ‖ô − o‖/‖o‖ of a query and head.
class attention_watch {
 public:
  /// Of a node's outputs, about one in `one_in` is checked. `rounding`: error of exact attention at most.
  attention_watch(int one_in, double epsilon, double rounding)
      : one_in_(one_in), epsilon_(epsilon), rounding_(rounding) {}

  static bool callback(ggml_tensor* node, bool ask, void* user) {
    auto& watch = *static_cast<attention_watch*>(user);
    if (ask) return node->op == GGML_OP_FLASH_ATTN_EXT && watch.wanted(node);
    watch.check(node);
    return true;
  }

  std::uint64_t checked = 0;     ///< outputs
  std::uint64_t rough = 0;       ///< of them, off by more than rounding: sampled
  std::uint64_t violations = 0;  ///< off by more than epsilon
  double largest = 0;
  std::map<std::string, std::uint64_t> by_layer;  ///< violations
  bool paused = false;

 private:
  [[nodiscard]] bool wanted(const ggml_tensor* node) const { return !paused && node->src[0]->ne[1] <= 16; }
  static const char* at(const ggml_tensor* t, int64_t i1, int64_t i2, int64_t i3) {
    return static_cast<const char*>(t->data) + static_cast<std::size_t>(i1) * t->nb[1] +
           static_cast<std::size_t>(i2) * t->nb[2] + static_cast<std::size_t>(i3) * t->nb[3];
  }
  static void row(const ggml_tensor* t, int64_t cell, int64_t head, int64_t stream, std::vector<float>& to) {
    to.resize(static_cast<std::size_t>(t->ne[0]));
    const char* from = at(t, cell, head, stream);
    if (t->type == GGML_TYPE_F32) {
      std::memcpy(to.data(), from, to.size() * sizeof(float));
    } else {
      ggml_get_type_traits(t->type)->to_float(from, to.data(), t->ne[0]);
    }
  }

  void check(const ggml_tensor* node) {
    const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
    const auto* sinks = node->src[4] ? static_cast<const float*>(node->src[4]->data) : nullptr;
    float scale, cap;
    std::memcpy(&scale, node->op_params, sizeof scale);
    std::memcpy(&cap, reinterpret_cast<const char*>(node->op_params) + 8, sizeof cap);
    const int64_t group = q->ne[2] / k->ne[2];
    std::vector<float> key, value;
    std::vector<double> logits, output(static_cast<std::size_t>(v->ne[0]));
    for (int64_t s = 0; s < q->ne[3]; ++s) {
      for (int64_t t = 0; t < q->ne[1]; ++t) {
        for (int64_t h = 0; h < q->ne[2]; ++h) {
          random_ = random_ * 6364136223846793005u + 1442695040888963407u;
          if ((random_ >> 33) % static_cast<std::uint64_t>(one_in_) != 0) continue;
          const auto* query = reinterpret_cast<const float*>(at(q, t, h, s));
          const auto* hides =
              mask ? reinterpret_cast<const ggml_fp16_t*>(at(mask, t, h % mask->ne[2], s % mask->ne[3])) : nullptr;
          logits.assign(static_cast<std::size_t>(k->ne[1]), -std::numeric_limits<double>::infinity());
          double top = -std::numeric_limits<double>::infinity(), weight = 0;
          for (int64_t c = 0; c < k->ne[1]; ++c) {
            const double bias = hides ? static_cast<double>(ggml_fp16_to_fp32(hides[c])) : 0;
            if (std::isinf(bias)) continue;
            row(k, c, h / group, s, key);
            double dot = 0;
            for (std::size_t j = 0; j < key.size(); ++j)
              dot += static_cast<double>(query[j]) * static_cast<double>(key[j]);
            dot *= static_cast<double>(scale);
            if (cap > 0) dot = static_cast<double>(cap) * std::tanh(dot / static_cast<double>(cap));
            logits[static_cast<std::size_t>(c)] = dot + bias;
            top = std::max(top, dot + bias);
          }
          if (sinks) {
            top = std::max(top, static_cast<double>(sinks[h]));
            weight = std::exp(static_cast<double>(sinks[h]) - top);
          }
          std::fill(output.begin(), output.end(), 0.0);
          for (int64_t c = 0; c < k->ne[1]; ++c) {
            const double w = std::exp(logits[static_cast<std::size_t>(c)] - top);
            if (!(w > 0)) continue;
            row(v, c, h / group, s, value);
            weight += w;
            for (std::size_t j = 0; j < value.size(); ++j) output[j] += w * static_cast<double>(value[j]);
          }
          const auto* got = reinterpret_cast<const float*>(at(node, h, t, s));
          double off = 0, norm = 0;
          for (std::size_t j = 0; j < output.size(); ++j) {
            const double o = weight > 0 ? output[j] / weight : 0, d = static_cast<double>(got[j]) - o;
            off += d * d, norm += o * o;
          }
          const double error = norm > 0 ? std::sqrt(off / norm) : off > 0 ? std::numeric_limits<double>::infinity() : 0;
          ++checked;
          if (!(error <= rounding_)) ++rough;
          if (!(error <= epsilon_)) ++violations, ++by_layer[node->name];
          largest = error > largest || std::isnan(error) ? error : largest;
        }
      }
    }
  }

  int one_in_;
  double epsilon_, rounding_;
  std::uint64_t random_ = 1;
};
