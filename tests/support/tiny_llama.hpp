// A random model in double precision, and as a folder of a Hugging Face model.
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "reference/llama.hpp"
#include "support/program.hpp"

namespace vattn::test {

/// One safetensors file: tensors in the order in which they are added.
class safetensors_writer {
 public:
  void add(const std::string& name, const std::string& dtype, const std::vector<std::int64_t>& shape,
           const std::string& bytes) {
    header_[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {data_.size(), data_.size() + bytes.size()}}};
    data_ += bytes;
  }
  [[nodiscard]] static std::string length(std::uint64_t n) {
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &n, 8);
    return bytes;
  }
  [[nodiscard]] static std::string file(const std::string& header, const std::string& data) {
    return length(header.size()) + header + data;
  }
  [[nodiscard]] nlohmann::ordered_json& header() { return header_; }
  [[nodiscard]] const std::string& data() const { return data_; }
  [[nodiscard]] std::string bytes() const { return file(header_.dump(), data_); }

 private:
  nlohmann::ordered_json header_ = {{"__metadata__", {{"format", "pt"}}}};
  std::string data_;
};

struct tiny_llama {
  reference::llama m;
  std::string dtype;  // F32, F16 or BF16: the weights are rounded to it
  bool tied;
  nlohmann::json config;
  std::vector<std::tuple<std::string, std::vector<std::int64_t>, std::vector<double>*>> tensors;

  explicit tiny_llama(std::string type = "F32", bool tie = true, bool scaled = false, std::size_t vocabulary = 256,
                      unsigned seed = 1)
      : dtype(std::move(type)), tied(tie) {
    m.vocabulary = vocabulary, m.hidden = 24, m.heads = 4, m.kv_heads = 2, m.head_dim = 8, m.intermediate = 40;
    m.scaled = scaled, m.original = 64;
    m.layers.resize(2);
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto draw = [&](const std::string& name, std::vector<double>& to, std::size_t rows, std::size_t columns) {
      to.resize(rows * columns);
      const double spread = columns == 1 ? 0.1 : 1.5 / std::sqrt(static_cast<double>(columns));
      for (double& x : to) x = rounded((columns == 1 ? 1 : 0) + spread * normal(random));
      std::vector<std::int64_t> shape{static_cast<std::int64_t>(rows)};
      if (columns > 1) shape.push_back(static_cast<std::int64_t>(columns));
      tensors.emplace_back(name, shape, &to);
    };
    draw("model.embed_tokens.weight", m.embedding, m.vocabulary, m.hidden);
    const std::size_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
    for (std::size_t l = 0; l < m.layers.size(); ++l) {
      reference::llama_layer& w = m.layers[l];
      const std::string at = "model.layers." + std::to_string(l) + ".";
      draw(at + "input_layernorm.weight", w.attention_norm, m.hidden, 1);
      draw(at + "self_attn.q_proj.weight", w.q, q, m.hidden);
      draw(at + "self_attn.k_proj.weight", w.k, kv, m.hidden);
      draw(at + "self_attn.v_proj.weight", w.v, kv, m.hidden);
      draw(at + "self_attn.o_proj.weight", w.o, m.hidden, q);
      draw(at + "post_attention_layernorm.weight", w.mlp_norm, m.hidden, 1);
      draw(at + "mlp.gate_proj.weight", w.gate, m.intermediate, m.hidden);
      draw(at + "mlp.up_proj.weight", w.up, m.intermediate, m.hidden);
      draw(at + "mlp.down_proj.weight", w.down, m.hidden, m.intermediate);
    }
    draw("model.norm.weight", m.norm, m.hidden, 1);
    if (tied) {
      m.head = m.embedding;
    } else {
      draw("lm_head.weight", m.head, m.vocabulary, m.hidden);
    }
    config = {{"model_type", "llama"},          {"vocab_size", m.vocabulary},
              {"hidden_size", m.hidden},        {"num_hidden_layers", m.layers.size()},
              {"num_attention_heads", m.heads}, {"num_key_value_heads", m.kv_heads},
              {"head_dim", m.head_dim},         {"intermediate_size", m.intermediate},
              {"rope_theta", m.rope_theta},     {"rms_norm_eps", m.rms_epsilon},
              {"hidden_act", "silu"},           {"tie_word_embeddings", tied}};
    if (scaled)
      config["rope_scaling"] = {{"rope_type", "llama3"},
                                {"factor", m.factor},
                                {"low_freq_factor", m.low},
                                {"high_freq_factor", m.high},
                                {"original_max_position_embeddings", 64}};
  }
  tiny_llama(const tiny_llama&) = delete;
  tiny_llama& operator=(const tiny_llama&) = delete;

  [[nodiscard]] double rounded(double x) const {
    if (dtype == "F16") return static_cast<double>(static_cast<float>(Eigen::half(static_cast<float>(x))));
    if (dtype == "BF16") return static_cast<double>(static_cast<float>(Eigen::bfloat16(static_cast<float>(x))));
    return static_cast<double>(static_cast<float>(x));
  }
  [[nodiscard]] std::string encoded(const std::vector<double>& numbers) const {
    const auto all = [&]<class T>(T) {
      std::string bytes;
      for (const double x : numbers) {
        const T element(static_cast<float>(x));
        bytes.append(reinterpret_cast<const char*>(&element), sizeof element);
      }
      return bytes;
    };
    if (dtype == "F16") return all(Eigen::half());
    return dtype == "BF16" ? all(Eigen::bfloat16()) : all(float());
  }

  /// Tensors number `first`, first + step, ... of the model.
  [[nodiscard]] safetensors_writer writer(std::size_t first = 0, std::size_t step = 1) const {
    safetensors_writer w;
    for (std::size_t i = first; i < tensors.size(); i += step)
      w.add(std::get<0>(tensors[i]), dtype, std::get<1>(tensors[i]), encoded(*std::get<2>(tensors[i])));
    return w;
  }
  void write(const folder& f, std::size_t shards = 1) const {
    write_bytes(f / "config.json", config.dump());
    if (shards == 1) return write_bytes(f / "model.safetensors", writer().bytes());
    nlohmann::json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", nlohmann::json::object()}};
    for (std::size_t s = 0; s < shards; ++s) {
      const std::string name = "model-" + std::to_string(s) + ".safetensors";
      write_bytes(f / name, writer(s, shards).bytes());
      for (std::size_t i = s; i < tensors.size(); i += shards) index["weight_map"][std::get<0>(tensors[i])] = name;
    }
    write_bytes(f / "model.safetensors.index.json", index.dump());
  }
};

}  // namespace vattn::test
