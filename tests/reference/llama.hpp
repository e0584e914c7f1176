// A Llama-style model, slow and obvious, in double precision. Shares no code with examples/llama.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace vattn::reference {

struct llama_layer {
  std::vector<double> attention_norm, q, k, v, o, mlp_norm, gate, up, down;  // matrices row-major [out, in]
};

struct llama {
  std::size_t vocabulary = 256, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0;
  double rms_epsilon = 1e-5, rope_theta = 10000;
  bool scaled = false;  // as Llama 3.1, with the four numbers below
  double factor = 8, low = 1, high = 4, original = 8192;
  std::vector<double> embedding, norm, head;  // head [vocabulary, hidden]; the embedding again if tied
  std::vector<llama_layer> layers;

  [[nodiscard]] double frequency(std::size_t j) const {
    const double f = 1 / std::pow(rope_theta, 2.0 * static_cast<double>(j) / static_cast<double>(head_dim));
    if (!scaled) return f;
    const double wavelength = 2 * 3.14159265358979323846 / f;
    if (wavelength < original / high) return f;
    if (wavelength > original / low) return f / factor;
    const double smooth = (original / wavelength - low) / (high - low);
    return (1 - smooth) * f / factor + smooth * f;
  }
};

using doubles = std::vector<double>;

[[nodiscard]] inline doubles multiply(const doubles& w, const doubles& x) {
  doubles y(w.size() / x.size());
  for (std::size_t i = 0; i < y.size(); ++i) {
    for (std::size_t j = 0; j < x.size(); ++j) y[i] += w[i * x.size() + j] * x[j];
  }
  return y;
}

[[nodiscard]] inline doubles normalise(const doubles& x, const doubles& w, double epsilon) {
  double sum = 0;
  for (const double value : x) sum += value * value;
  doubles y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i)
    y[i] = x[i] / std::sqrt(sum / static_cast<double>(x.size()) + epsilon) * w[i];
  return y;
}

inline void rotate(const llama& m, doubles& x, std::size_t position) {
  const std::size_t half = m.head_dim / 2;
  for (std::size_t first = 0; first < x.size(); first += m.head_dim) {
    for (std::size_t j = 0; j < half; ++j) {
      const double angle = static_cast<double>(position) * m.frequency(j), c = std::cos(angle), s = std::sin(angle);
      const double a = x[first + j], b = x[first + half + j];
      x[first + j] = a * c - b * s;
      x[first + half + j] = b * c + a * s;
    }
  }
}

/// Logits after each token, [tokens][vocabulary].
[[nodiscard]] inline std::vector<doubles> logits(const llama& m, const std::vector<std::int32_t>& tokens) {
  std::vector<std::vector<doubles>> keys(m.layers.size()), values(m.layers.size());  // [layer][token]
  std::vector<doubles> all;
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    const auto row = m.embedding.begin() + tokens[t] * static_cast<std::ptrdiff_t>(m.hidden);
    doubles x(row, row + static_cast<std::ptrdiff_t>(m.hidden));
    const auto add = [&x](const doubles& y) {
      for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
    };
    for (std::size_t l = 0; l < m.layers.size(); ++l) {
      const llama_layer& w = m.layers[l];
      const doubles h = normalise(x, w.attention_norm, m.rms_epsilon);
      doubles q = multiply(w.q, h), k = multiply(w.k, h);
      rotate(m, q, t);
      rotate(m, k, t);
      keys[l].push_back(k);
      values[l].push_back(multiply(w.v, h));
      doubles out(m.heads * m.head_dim);
      for (std::size_t head = 0; head < m.heads; ++head) {
        const std::size_t kv = head / (m.heads / m.kv_heads);
        doubles weight(t + 1);
        double sum = 0;
        for (std::size_t i = 0; i <= t; ++i) {
          double dot = 0;
          for (std::size_t j = 0; j < m.head_dim; ++j)
            dot += q[head * m.head_dim + j] * keys[l][i][kv * m.head_dim + j];
          weight[i] = std::exp(dot / std::sqrt(static_cast<double>(m.head_dim)));
          sum += weight[i];
        }
        for (std::size_t i = 0; i <= t; ++i) {
          for (std::size_t j = 0; j < m.head_dim; ++j)
            out[head * m.head_dim + j] += weight[i] / sum * values[l][i][kv * m.head_dim + j];
        }
      }
      add(multiply(w.o, out));
      const doubles g = normalise(x, w.mlp_norm, m.rms_epsilon);
      doubles gate = multiply(w.gate, g);
      const doubles up = multiply(w.up, g);
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      add(multiply(w.down, gate));
    }
    all.push_back(multiply(m.head, normalise(x, m.norm, m.rms_epsilon)));
  }
  return all;
}

}  // namespace vattn::reference
