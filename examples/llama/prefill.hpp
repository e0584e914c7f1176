// Dense prefill: a context through all layers, blocks of tokens at a time, without an n x n buffer.
#pragma once

#include <algorithm>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "llama/cache.hpp"
#include "llama/model.hpp"
#include "support/progress.hpp"
#include "vattn/base/thread_pool.hpp"

namespace vattn::llama {

/// Tokens of a block, and keys of a tile: 128 queries of 4 heads against 128 keys are 256 KiB of logits, which
/// stay in a core's second-level cache.
inline constexpr index_t block_tokens = 128, tile_keys = 128;

/// One layer's rotated queries, keys and values in float, one column a token.
struct layer_activations {
  matrix q;  // [heads · head_dim, n], scaled by 1/sqrt(head_dim)
  matrix k;  // [kv_heads · head_dim, n]
  matrix v;  // [kv_heads · head_dim, n]
};

/// Causal attention of the queries [first, first + count): tiles of keys with a running maximum and sum. `out` is
/// [heads · head_dim, count].
inline void attend_block(const layer_activations& a, const model_config& c, index_t first, index_t count, matrix& out) {
  const index_t d = c.head_dim, group = c.group(), columns = group * count;
  out.resize(c.q_width(), count);
  matrix q(d, columns), o(d, columns), logits;
  Eigen::ArrayXf largest(columns), sum(columns);
  for (index_t g = 0; g < c.kv_heads; ++g) {
    for (index_t h = 0; h < group; ++h)
      q.middleCols(h * count, count) = a.q.block((g * group + h) * d, first, d, count);
    o.setZero();
    largest.setConstant(-std::numeric_limits<float>::infinity());
    sum.setZero();
    for (index_t at = 0; at < first + count; at += tile_keys) {
      const index_t keys = std::min(tile_keys, first + count - at);
      logits.noalias() = a.k.block(g * d, at, d, keys).transpose() * q;
      for (index_t column = 0; column < columns; ++column) {
        const index_t visible = std::clamp<index_t>(first + column % count - at + 1, 0, keys);
        auto x = logits.col(column).array();
        if (visible > 0) {
          const float most = std::max(largest[column], x.head(visible).maxCoeff());
          if (most > largest[column]) {
            const float fade = std::exp(largest[column] - most);  // of nothing yet: exp(-inf) = 0
            sum[column] *= fade;
            o.col(column) *= fade;
            largest[column] = most;
          }
          x.head(visible) = (x.head(visible) - most).exp();
          sum[column] += x.head(visible).sum();
        }
        x.tail(keys - visible).setZero();
      }
      o.noalias() += a.v.block(g * d, at, d, keys) * logits;
    }
    for (index_t h = 0; h < group; ++h) {
      for (index_t i = 0; i < count; ++i)
        out.block((g * group + h) * d, i, d, 1) = o.col(h * count + i) / sum[h * count + i];
    }
  }
}

/// Runs `tokens` from position 0, fills the caches, and returns the last layer's residual stream, [hidden, n].
/// Attention is exact, from keys and values in float; the caches get them rounded. Memory: some 3 · n · hidden floats.
[[nodiscard]] inline matrix prefill(const model& m, std::span<const std::int32_t> tokens,
                                    std::vector<layer_cache>& caches, thread_pool& pool, const std::string& label) {
  const model_config& c = m.config;
  const auto n = static_cast<index_t>(tokens.size());
  const index_t blocks = (n + block_tokens - 1) / block_tokens;
  support::progress count(label + ", blocks", 2 * blocks * c.layers);
  matrix x(c.hidden, n);
  for (index_t i = 0; i < n; ++i) x.col(i) = m.embedding.view().row(tokens[static_cast<std::size_t>(i)]).transpose();
  layer_activations a{matrix(c.q_width(), n), matrix(c.kv_width(), n), matrix(c.kv_width(), n)};
  const float scale = 1 / std::sqrt(static_cast<float>(c.head_dim));

  for (index_t l = 0; l < c.layers; ++l) {
    const layer_weights& w = m.layers[static_cast<std::size_t>(l)];
    layer_cache& cache = caches[static_cast<std::size_t>(l)];
    pool.for_each(blocks, [&](index_t block, index_t) {
      const index_t first = block * block_tokens, size = std::min(block_tokens, n - first);
      matrix normed, qkv;
      rms_norm(x.middleCols(first, size), w.attention_norm, c.rms_epsilon, normed);
      qkv.noalias() = w.qkv.view() * normed;
      for (index_t i = 0; i < size; ++i) rotate(qkv.col(i).head(c.q_width() + c.kv_width()), first + i, m.frequencies);
      a.q.middleCols(first, size) = qkv.topRows(c.q_width()) * scale;
      a.k.middleCols(first, size) = qkv.middleRows(c.q_width(), c.kv_width());
      a.v.middleCols(first, size) = qkv.bottomRows(c.kv_width());
      cache.write(first, size, a.k.col(first).data(), a.v.col(first).data());
      count.step();
    });
    pool.for_each(blocks, [&](index_t task, index_t) {
      const index_t block = blocks - 1 - task;  // the longest first, so that threads end together
      const index_t first = block * block_tokens, size = std::min(block_tokens, n - first);
      matrix attended, normed, gate_up;
      attend_block(a, c, first, size, attended);
      auto residual = x.middleCols(first, size);
      residual.noalias() += w.output.view() * attended;
      rms_norm(residual, w.mlp_norm, c.rms_epsilon, normed);
      gate_up.noalias() = w.gate_up.view() * normed;
      normed = swiglu(gate_up);
      residual.noalias() += w.down.view() * normed;
      count.step();
    });
    cache.begin(n);
  }
  return x;
}

/// Logits [vocabulary, columns of x] of residual streams.
[[nodiscard]] inline matrix logits_of(const model& m, const const_matrix_ref& x) {
  matrix normed;
  rms_norm(x, m.norm, m.config.rms_epsilon, normed);
  return m.output().view() * normed;
}

}  // namespace vattn::llama
