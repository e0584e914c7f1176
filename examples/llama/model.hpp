// The weights of a model, and the arithmetic of its layers on columns of tokens.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "llama/config.hpp"
#include "support/safetensors.hpp"

namespace vattn::llama {

/// Activations: one column a token.
using matrix = Eigen::MatrixXf;
using matrix_ref = Eigen::Ref<matrix>;
using const_matrix_ref = Eigen::Ref<const matrix>;

/// Row-major [rows, columns], as files have it: y = W x.
struct weight {
  index_t rows = 0, columns = 0;
  std::vector<float> values;

  using map = Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;
  [[nodiscard]] map view() const { return {values.data(), rows, columns}; }
  [[nodiscard]] auto slice(index_t first, index_t count) const { return view().middleRows(first, count); }
};

/// Matrices that are multiplied with the same vector are one.
struct layer_weights {
  std::vector<float> attention_norm;  // [hidden]
  weight qkv;                         // [(heads + 2 kv_heads) head_dim, hidden]
  weight output;                      // [hidden, heads head_dim]
  std::vector<float> mlp_norm;        // [hidden]
  weight gate_up;                     // [2 intermediate, hidden]
  weight down;                        // [hidden, intermediate]
};

struct model {
  model_config config;
  weight embedding;  // [vocabulary, hidden]
  weight head;       // the same; empty if they are tied
  std::vector<layer_weights> layers;
  std::vector<float> norm;         // [hidden]
  std::vector<float> frequencies;  // [head_dim / 2], radians a position
  std::uint64_t fingerprint = 0;   // of all that the above says

  [[nodiscard]] const weight& output() const { return config.tied ? embedding : head; }
};

/// FNV-1a over 64-bit words: tells files apart, is no defence.
class fingerprint {
 public:
  void add(const void* data, std::size_t bytes) {
    const auto* at = static_cast<const unsigned char*>(data);
    for (; bytes >= 8; bytes -= 8, at += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, at, 8);
      mix(word);
    }
    std::uint64_t rest = bytes;
    for (; bytes > 0; --bytes) rest = rest << 8 | *at++;
    mix(rest);
  }
  [[nodiscard]] std::uint64_t value() const { return hash_; }

 private:
  void mix(std::uint64_t word) {
    hash_ = (hash_ ^ word) * 0x100000001b3;
    hash_ ^= hash_ >> 29;  // high bits back into low ones, which a product never reaches
  }
  std::uint64_t hash_ = 0xcbf29ce484222325;
};

/// Every tensor is checked before the first is read. Throws std::runtime_error with one line.
[[nodiscard]] inline model load_model(const std::filesystem::path& path) {
  model m;
  m.config = read_config(path);
  const model_config& c = m.config;
  safetensors::folder files(path);
  const auto layer = [](index_t l, const char* name) {
    return "model.layers." + std::to_string(l) + "." + name + ".weight";
  };
  struct part {
    std::string name;
    std::vector<std::int64_t> shape;
  };
  const auto walk = [&](auto&& vector_of, auto&& matrix_of) {
    matrix_of(m.embedding, std::vector<part>{{"model.embed_tokens.weight", {c.vocabulary, c.hidden}}});
    for (index_t l = 0; l < c.layers; ++l) {
      layer_weights& w = m.layers[static_cast<std::size_t>(l)];
      vector_of(w.attention_norm, layer(l, "input_layernorm"));
      matrix_of(w.qkv, std::vector<part>{{layer(l, "self_attn.q_proj"), {c.q_width(), c.hidden}},
                                         {layer(l, "self_attn.k_proj"), {c.kv_width(), c.hidden}},
                                         {layer(l, "self_attn.v_proj"), {c.kv_width(), c.hidden}}});
      matrix_of(w.output, std::vector<part>{{layer(l, "self_attn.o_proj"), {c.hidden, c.q_width()}}});
      vector_of(w.mlp_norm, layer(l, "post_attention_layernorm"));
      matrix_of(w.gate_up, std::vector<part>{{layer(l, "mlp.gate_proj"), {c.intermediate, c.hidden}},
                                             {layer(l, "mlp.up_proj"), {c.intermediate, c.hidden}}});
      matrix_of(w.down, std::vector<part>{{layer(l, "mlp.down_proj"), {c.hidden, c.intermediate}}});
    }
    vector_of(m.norm, "model.norm.weight");
    if (!c.tied) matrix_of(m.head, std::vector<part>{{"lm_head.weight", {c.vocabulary, c.hidden}}});
  };
  // A config that lies about its layers is found out by a missing tensor before memory is taken for them.
  files.require(layer(c.layers - 1, "mlp.down_proj"), std::vector<std::int64_t>{c.hidden, c.intermediate});
  m.layers.resize(static_cast<std::size_t>(c.layers));
  walk([&](auto&, const std::string& name) { files.require(name, std::vector<std::int64_t>{c.hidden}); },
       [&](auto&, const std::vector<part>& parts) {
         for (const part& p : parts) files.require(p.name, p.shape);
       });

  fingerprint all;
  const auto read = [&](const std::string& name, std::span<float> out) {
    files.read(name, out);
    for (const float x : out) {
      if (!std::isfinite(x)) throw std::runtime_error(path.string() + ": '" + name + "' holds a NaN or an infinity");
    }
    all.add(out.data(), out.size_bytes());
  };
  walk(
      [&](std::vector<float>& v, const std::string& name) {
        v.resize(static_cast<std::size_t>(c.hidden));
        read(name, v);
      },
      [&](weight& w, const std::vector<part>& parts) {
        for (const part& p : parts) w.rows += p.shape[0];
        w.columns = parts.front().shape[1];
        w.values.resize(static_cast<std::size_t>(w.rows * w.columns));
        std::span<float> rest(w.values);
        for (const part& p : parts) {
          const auto size = static_cast<std::size_t>(p.shape[0] * p.shape[1]);
          read(p.name, rest.first(size));
          rest = rest.subspan(size);
        }
      });
  m.frequencies = rope_frequencies(c);
  all.add(m.frequencies.data(), m.frequencies.size() * sizeof(float));
  const std::int64_t shape[] = {c.heads, c.kv_heads, c.head_dim, c.layers};
  all.add(shape, sizeof shape);
  all.add(&c.rms_epsilon, sizeof c.rms_epsilon);
  m.fingerprint = all.value();
  return m;
}

/// out = x / rms(x) · weight, column by column.
inline void rms_norm(const const_matrix_ref& x, const std::vector<float>& weights, double epsilon, matrix& out) {
  const Eigen::Map<const Eigen::ArrayXf> w(weights.data(), static_cast<Eigen::Index>(weights.size()));
  out.resize(x.rows(), x.cols());
  for (Eigen::Index i = 0; i < x.cols(); ++i) {
    const float mean = x.col(i).squaredNorm() / static_cast<float>(x.rows());
    out.col(i).array() = x.col(i).array() * w / std::sqrt(mean + static_cast<float>(epsilon));
  }
}

/// Rotates head by head, [any number of heads · head_dim]: coordinate j with j + head_dim/2 (rotate-half).
template <class Column>
void rotate(Column&& x, index_t position, std::span<const float> frequencies) {
  const auto half = static_cast<Eigen::Index>(frequencies.size());
  for (Eigen::Index j = 0; j < half; ++j) {
    const float angle = static_cast<float>(position) * frequencies[static_cast<std::size_t>(j)];
    const float cosine = std::cos(angle), sine = std::sin(angle);
    for (Eigen::Index head = 0; head < x.size(); head += 2 * half) {
      const float a = x[head + j], b = x[head + half + j];
      x[head + j] = a * cosine - b * sine;
      x[head + half + j] = b * cosine + a * sine;
    }
  }
}

/// silu(gate) · up of [gate; up].
template <class Columns>
[[nodiscard]] auto swiglu(const Columns& gate_up) {
  const Eigen::Index n = gate_up.rows() / 2;
  const auto gate = gate_up.topRows(n).array();
  return (gate / (1 + (-gate).exp()) * gate_up.bottomRows(n).array()).matrix();
}

}  // namespace vattn::llama
