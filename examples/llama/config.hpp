// config.json of a Llama-style model: what is read of it, and what is refused.
#pragma once

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numbers>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/safetensors.hpp"
#include "vattn/base/config.hpp"

namespace vattn::llama {

/// Rotary embeddings of Llama 3.1 and later: low frequencies are slowed down by `factor`.
struct rope_scaling {
  double factor = 1, low_frequency_factor = 1, high_frequency_factor = 4, original_context = 8192;
};

struct model_config {
  index_t vocabulary = 0, hidden = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0;
  double rms_epsilon = 1e-6;
  double rope_theta = 10000;
  bool scaled = false;  // rope_scaling is in force
  rope_scaling scaling{};
  bool tied = false;  // the embedding is the output matrix too

  [[nodiscard]] index_t group() const { return heads / kv_heads; }
  [[nodiscard]] index_t q_width() const { return heads * head_dim; }
  [[nodiscard]] index_t kv_width() const { return kv_heads * head_dim; }
};

/// Radians a position, [head_dim / 2]. In float as models are trained with it; scaling as in Llama 3.1.
[[nodiscard]] inline std::vector<float> rope_frequencies(const model_config& c) {
  std::vector<float> frequencies;
  for (index_t j = 0; j < c.head_dim / 2; ++j) {
    double f = std::pow(c.rope_theta, -2.0 * static_cast<double>(j) / static_cast<double>(c.head_dim));
    if (c.scaled) {
      const rope_scaling& s = c.scaling;
      const double turns = s.original_context * f / (2 * std::numbers::pi);  // within the original context
      const double kept =
          std::clamp((turns - s.low_frequency_factor) / (s.high_frequency_factor - s.low_frequency_factor), 0.0, 1.0);
      f = (1 - kept) * f / s.factor + kept * f;
    }
    frequencies.push_back(static_cast<float>(f));
  }
  return frequencies;
}

namespace detail {

class config_reader {
 public:
  explicit config_reader(const nlohmann::json& j) : j_(j) {}

  [[nodiscard]] bool has(const char* key) const { return j_.contains(key) && !j_[key].is_null(); }
  [[nodiscard]] config_reader object(const char* key) const {
    if (!j_[key].is_object()) throw std::runtime_error(std::string(key) + " is no object");
    return config_reader(j_[key]);
  }
  [[nodiscard]] index_t count(const char* key, index_t fallback = 0) const {
    if (!has(key) && fallback > 0) return fallback;
    if (!has(key)) throw std::runtime_error(std::string(key) + " is missing");
    if (!j_[key].is_number_unsigned() || j_[key].get<std::uint64_t>() < 1 || j_[key].get<std::uint64_t>() > 1 << 24)
      throw std::runtime_error(std::string(key) + " is " + shown(key) + ": a whole number from 1 to 2^24 is expected");
    return j_[key].get<index_t>();
  }
  [[nodiscard]] double positive(const char* key, double fallback) const {
    if (!has(key)) return fallback;
    const double x = j_[key].is_number() ? j_[key].get<double>() : std::numeric_limits<double>::quiet_NaN();
    if (!(x > 0) || !std::isfinite(x))
      throw std::runtime_error(std::string(key) + " is " + shown(key) + ": a positive number is expected");
    return x;
  }
  [[nodiscard]] bool flag(const char* key, bool fallback) const {
    if (!has(key)) return fallback;
    if (!j_[key].is_boolean()) throw std::runtime_error(std::string(key) + " is " + shown(key) + ", not true or false");
    return j_[key].get<bool>();
  }
  [[nodiscard]] std::string text(const char* key, const std::string& fallback) const {
    if (!has(key)) return fallback;
    if (!j_[key].is_string()) throw std::runtime_error(std::string(key) + " is " + shown(key) + ", no string");
    return safetensors::detail::printable(j_[key].get_ref<const std::string&>());
  }

 private:
  [[nodiscard]] std::string shown(const char* key) const {
    return safetensors::detail::printable(j_[key].dump(-1, ' ', true, nlohmann::json::error_handler_t::replace), 40);
  }
  const nlohmann::json& j_;
};

inline void read_rope(const config_reader& r, model_config& c) {
  c.rope_theta = r.positive("rope_theta", c.rope_theta);
  const std::string type = r.text("rope_type", r.text("type", "default"));
  if (type == "default") return;
  if (type != "llama3")
    throw std::runtime_error("rope_scaling of type '" + type + "' is not known: default and llama3 are");
  c.scaled = true;
  for (const char* key : {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}) {
    if (!r.has(key)) throw std::runtime_error("rope_scaling llama3 lacks " + std::string(key));
  }
  c.scaling = {.factor = r.positive("factor", 1),
               .low_frequency_factor = r.positive("low_freq_factor", 1),
               .high_frequency_factor = r.positive("high_freq_factor", 4),
               .original_context = r.positive("original_max_position_embeddings", 8192)};
  if (!(c.scaling.high_frequency_factor > c.scaling.low_frequency_factor))
    throw std::runtime_error("rope_scaling: high_freq_factor must be above low_freq_factor");
}

[[nodiscard]] inline model_config parse_config(const nlohmann::json& j) {
  const config_reader r(j);
  model_config c;
  if (const std::string type = r.text("model_type", "llama"); type != "llama")
    throw std::runtime_error("model_type is '" + type + "': only llama is known");
  if (const std::string act = r.text("hidden_act", "silu"); act != "silu")
    throw std::runtime_error("hidden_act is '" + act + "': only silu (SwiGLU) is known");
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    if (r.flag(key, false))
      throw std::runtime_error(std::string(key) + " is true: projections with bias are not known");
  }
  if (r.has("quantization_config"))
    throw std::runtime_error("the model is quantised: give one in bfloat16, float16 or float32");
  if (r.positive("partial_rotary_factor", 1) != 1)
    throw std::runtime_error("partial_rotary_factor is not 1: rotary embeddings of part of a head are not known");
  c.vocabulary = r.count("vocab_size");
  c.hidden = r.count("hidden_size");
  c.layers = r.count("num_hidden_layers");
  c.heads = r.count("num_attention_heads");
  c.kv_heads = r.count("num_key_value_heads", c.heads);
  c.head_dim = r.count("head_dim", std::max<index_t>(1, c.hidden / c.heads));
  c.intermediate = r.count("intermediate_size");
  c.rms_epsilon = r.positive("rms_norm_eps", c.rms_epsilon);
  c.tied = r.flag("tie_word_embeddings", false);
  if (c.heads % c.kv_heads != 0)
    throw std::runtime_error("num_attention_heads " + std::to_string(c.heads) + " is no multiple of " +
                             std::to_string(c.kv_heads) + " num_key_value_heads");
  if (c.head_dim % 2 != 0) throw std::runtime_error("head_dim " + std::to_string(c.head_dim) + " is odd");
  // rope_theta stands beside rope_scaling, or with it in rope_parameters (transformers 5).
  c.rope_theta = r.positive("rope_theta", c.rope_theta);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (r.has(key)) read_rope(r.object(key), c);
  }
  return c;
}

}  // namespace detail

/// Throws std::runtime_error with one line that names the file.
[[nodiscard]] inline model_config read_config(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json";
  try {
    if (safetensors::detail::file_size(path) > 10'000'000) throw std::runtime_error("larger than 10^7 bytes");
    std::ifstream in(path, std::ios::binary);
    if (!in) throw std::runtime_error("cannot be opened: check its permissions");
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    return detail::parse_config(safetensors::detail::parse_object(text, "it"));
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(path.string() + ": " + e.what());
  }
}

}  // namespace vattn::llama
