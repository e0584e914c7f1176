// One token at a time: the layers around a layer_attention, and what is measured of it.
#pragma once

#include <chrono>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "llama/attention.hpp"
#include "llama/model.hpp"
#include "llama/prefill.hpp"
#include "vattn/base/thread_pool.hpp"

namespace vattn::llama {

using decode_clock = std::chrono::steady_clock;
[[nodiscard]] inline double seconds_since(decode_clock::time_point start) {
  return std::chrono::duration<double>(decode_clock::now() - start).count();
}

/// What was seen of the heads of one (layer, head) over the tokens.
struct head_record {
  double density = 0;  // sum
  double error = 0, largest_error = 0;
  std::int64_t violations = 0, breaches = 0;
};

/// Sums over the tokens that were decoded.
struct decode_record {
  std::int64_t tokens = 0;
  double seconds = 0, attention_seconds = 0;  // audit not counted
  bool audited = false;
  std::vector<head_record> heads;  // [layers, heads]

  void add(const decode_record& other) {
    tokens += other.tokens, seconds += other.seconds, attention_seconds += other.attention_seconds;
    audited |= other.audited;
    heads.resize(std::max(heads.size(), other.heads.size()));
    for (std::size_t i = 0; i < other.heads.size(); ++i) {
      heads[i].density += other.heads[i].density, heads[i].error += other.heads[i].error;
      heads[i].largest_error = std::max(heads[i].largest_error, other.heads[i].largest_error);
      heads[i].violations += other.heads[i].violations, heads[i].breaches += other.heads[i].breaches;
    }
  }
  [[nodiscard]] double density() const {
    double sum = 0;
    for (const head_record& h : heads) sum += h.density;
    return tokens > 0 ? sum / static_cast<double>(tokens) / static_cast<double>(heads.size()) : 0;
  }
};

/// How a decode attends.
struct decode_settings {
  config settings{};
  std::uint64_t seed = 0;
  bool audit = false;  ///< measure each output against the exact one
};

/// Refers to a model, its caches after a prefill, one layer_attention a layer, and a pool; owns its activations.
class decoder {
 public:
  decoder(const model& m, std::vector<layer_cache>& caches, std::vector<std::unique_ptr<layer_attention>>& attention,
          thread_pool& pool, const decode_settings& settings)
      : m_(m), caches_(caches), attention_(attention), pool_(pool), settings_(settings) {
    const model_config& c = m.config;
    x_.resize(c.hidden, 1);
    qkv_.resize(c.q_width() + 2 * c.kv_width());
    attended_.resize(c.q_width());
    gate_up_.resize(2 * c.intermediate);
    hidden_.resize(c.hidden);
    logits_.resize(c.vocabulary);
    certificates_.resize(static_cast<std::size_t>(c.heads));
    record_.heads.resize(static_cast<std::size_t>(c.layers * c.heads));
    record_.audited = settings.audit;
    for (auto& layer : attention_) layer->configure(settings.settings);
  }

  /// Feeds a token at the caches' end. With `want_logits` returns those of the next token, [vocabulary], else nothing.
  std::span<const float> step(std::int32_t token, bool want_logits) {
    const auto start = decode_clock::now();
    const model_config& c = m_.config;
    const index_t position = caches_.front().size();
    double audit_seconds = 0;
    x_ = m_.embedding.view().row(token).transpose();
    for (index_t l = 0; l < c.layers; ++l) {
      const layer_weights& w = m_.layers[static_cast<std::size_t>(l)];
      layer_cache& cache = caches_[static_cast<std::size_t>(l)];
      rms_norm(x_, w.attention_norm, c.rms_epsilon, normed_);
      multiply(w.qkv, normed_.col(0), qkv_);
      rotate(qkv_.head(c.q_width() + c.kv_width()), position, m_.frequencies);
      const float* k = qkv_.data() + c.q_width();

      const auto attention_start = decode_clock::now();
      cache.append(k, k + c.kv_width());
      layer_attention& attention = *attention_[static_cast<std::size_t>(l)];
      attention.append(cache);
      const std::span<const float> q(qkv_.data(), static_cast<std::size_t>(c.q_width()));
      const std::span<float> out(attended_.data(), q.size());
      const draw_key key{settings_.seed, static_cast<std::uint32_t>(l), static_cast<std::uint32_t>(position)};
      if (const status s = attention.attend(cache, q, out, certificates_, key, examples::executor_ref(pool_)); !s)
        throw std::runtime_error("layer " + std::to_string(l) + ", position " + std::to_string(position) + ": " +
                                 s.message());
      record_.attention_seconds += seconds_since(attention_start);
      audit_seconds += note(l, cache, q, out);

      multiply(w.output, attended_, hidden_);
      x_.col(0) += hidden_;
      rms_norm(x_, w.mlp_norm, c.rms_epsilon, normed_);
      multiply(w.gate_up, normed_.col(0), gate_up_);
      activated_ = swiglu(gate_up_);
      multiply(w.down, activated_, hidden_);
      x_.col(0) += hidden_;
    }
    if (want_logits) {
      rms_norm(x_, m_.norm, c.rms_epsilon, normed_);
      multiply(m_.output(), normed_.col(0), logits_);
    }
    ++record_.tokens;
    record_.seconds += seconds_since(start) - audit_seconds;
    return {logits_.data(), want_logits ? static_cast<std::size_t>(logits_.size()) : 0};
  }

  [[nodiscard]] const decode_record& record() const { return record_; }

  /// Back to n tokens.
  void truncate(index_t n) {
    for (auto& cache : caches_) cache.truncate(n);
    for (auto& layer : attention_) layer->truncate(n);
  }

 private:
  // y = W x, rows shared out in parts that are worth a thread's while.
  void multiply(const weight& w, const Eigen::Ref<const Eigen::VectorXf>& x, Eigen::VectorXf& y) {
    constexpr index_t part_weights = 1 << 16;
    const index_t rows = std::max<index_t>(1, part_weights / w.columns), parts = (w.rows + rows - 1) / rows;
    pool_.for_each(parts, [&](index_t part, index_t) {
      const index_t first = part * rows, count = std::min(rows, w.rows - first);
      y.segment(first, count).noalias() = w.slice(first, count) * x;
    });
  }

  // Into the record; returns the seconds that the audit took.
  double note(index_t l, const layer_cache& cache, std::span<const float> q, std::span<const float> out) {
    const auto start = decode_clock::now();
    const index_t heads = m_.config.heads;
    const auto width = static_cast<std::size_t>(m_.config.head_dim);
    head_record* const records = record_.heads.data() + l * heads;
    for (index_t h = 0; h < heads; ++h) {
      records[h].density += certificates_[static_cast<std::size_t>(h)].density();
      records[h].breaches += certificates_[static_cast<std::size_t>(h)].breaches;
    }
    if (!settings_.audit) return seconds_since(start);
    const examples::reference exact = exact_result(cache, q, heads, examples::executor_ref(pool_));
    for (std::size_t h = 0; h < static_cast<std::size_t>(heads); ++h) {
      const double error = examples::error_of(exact, h, out.subspan(h * width, width), certificates_[h].log_denominator,
                                              settings_.settings.scale)
                               .output;
      records[h].error += error;
      records[h].largest_error = std::max(records[h].largest_error, error);
      records[h].violations += !(error <= settings_.settings.epsilon);
    }
    return seconds_since(start);
  }

  const model& m_;
  std::vector<layer_cache>& caches_;
  std::vector<std::unique_ptr<layer_attention>>& attention_;
  thread_pool& pool_;
  decode_settings settings_;
  matrix x_, normed_;
  Eigen::VectorXf qkv_, attended_, gate_up_, activated_, hidden_, logits_;
  std::vector<certificate> certificates_;
  decode_record record_;
};

}  // namespace vattn::llama
