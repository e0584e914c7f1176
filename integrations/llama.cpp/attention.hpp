// Attention of one node of ggml's, in the library's terms: what each pair of cache types compiles to.
#pragma once

#include <span>

#include "ggml.h"
#include "team.hpp"
#include "vattn/call/audit.hpp"
#include "vattn/index/index_attention.hpp"
#include "vattn/kv/ggml.hpp"

namespace vattn_ggml {

using vattn::index_t;

/// A GGML_OP_FLASH_ATTN_EXT as the library sees it: its tensors by ne and nb (bytes), and its numbers.
struct attention_node {
  vattn::ggml_layout q;       ///< f32 [dk, n_q, heads, streams]
  vattn::ggml_layout k, v;    ///< [d, n_kv, kv_heads, streams]
  vattn::ggml_layout mask;    ///< f16 [n_kv, n_q or more, 1 or heads, 1 or streams]; data null: none
  vattn::ggml_layout output;  ///< f32 [dv, heads, n_q, streams]
  float scale = 1, softcap = 0;
  const float* sinks = nullptr;  ///< [heads]
  bool mask_only_hides = false;  ///< its values are 0 and −inf

  [[nodiscard]] index_t queries() const noexcept { return q.ne[1]; }
  [[nodiscard]] index_t heads() const noexcept { return q.ne[2]; }
  [[nodiscard]] index_t streams() const noexcept { return q.ne[3]; }
  [[nodiscard]] index_t kv_heads() const noexcept { return k.ne[2]; }
  [[nodiscard]] index_t group() const noexcept { return heads() / kv_heads(); }

  /// The first `cells` cells alone.
  [[nodiscard]] attention_node of_cells(index_t cells) const noexcept {
    attention_node n = *this;
    n.k.ne[1] = n.v.ne[1] = cells;
    return n;
  }
  [[nodiscard]] attention_node without_mask() const noexcept {
    attention_node n = *this;
    n.mask.data = nullptr;
    return n;
  }
  /// KV head `kv` of a stream, all cells.
  [[nodiscard]] attention_node of_head(index_t stream, index_t kv) const noexcept {
    attention_node n = *this;
    take(n.k, 3, stream, 1), take(n.v, 3, stream, 1);
    take(n.k, 2, kv, 1), take(n.v, 2, kv, 1);
    return n;
  }
  /// One query of `count` query heads from `first` on, all of KV head `kv`.
  [[nodiscard]] attention_node of_query(index_t stream, index_t query, index_t kv, index_t first,
                                        index_t count) const noexcept {
    attention_node n = of_head(stream, kv);
    take(n.q, 3, stream, 1), take(n.q, 1, query, 1), take(n.q, 2, first, count);
    take(n.output, 3, stream, 1), take(n.output, 2, query, 1), take(n.output, 1, first, count);
    if (n.mask.data) {
      take(n.mask, 1, query, 1);
      if (n.mask.ne[2] > 1) take(n.mask, 2, first, count);
      take(n.mask, 3, n.mask.ne[3] > 1 ? stream : 0, 1);
    }
    if (n.sinks) n.sinks += first;
    return n;
  }

 private:
  static void take(vattn::ggml_layout& l, std::size_t axis, index_t first, index_t count) noexcept {
    l.data = static_cast<const char*>(l.data) + first * l.nb[axis];
    l.ne[axis] = count;
  }
};

/// What a step of one KV head needs besides: see vattention<index_policy>.
struct verified_call {
  const vattn::config* settings;
  const vattn::kv_index* index;      ///< of this KV head alone, by cell
  vattn::index_memory* memory;       ///< of these query heads
  vattn::draw_key key;               ///< first_head: its first query head
  vattn::certificate* certificates;  ///< [heads]
  vattn::auditor* audit;             ///< sees each head's output
};

/// The library's calls, compiled for one type of K and one of V. None allocates but the workspace and the index.
struct kernels {
  vattn::status (*exact)(const attention_node&, vattn::workspace&, team::executor_of_team&);
  /// Of one query, one KV head (`of_query`).
  vattn::status (*verified)(const attention_node&, const verified_call&, vattn::workspace&);
  /// Of one KV head (`of_head`): codes of all its cells in units of their own, or of some in the index's.
  vattn::status (*build)(const attention_node&, vattn::kv_index&);
  vattn::status (*update)(const attention_node&, vattn::kv_index&, std::span<const std::int32_t> cells);
  std::size_t (*verified_bytes)(const vattn::config&, index_t cells, index_t dk, index_t dv);
};

/// Null: this pair is left to ggml.
[[nodiscard]] const kernels* kernels_for(ggml_type k, ggml_type v) noexcept;

/// Attention as its definition has it, from rows that `decode` makes floats of; for what no kernel is ready to take: a
/// cache with numbers that are not finite, or memory that ran out. Allocates nothing: head sizes up to 1024.
void plain_attention(const attention_node& n, void (*decode_k)(const void*, float*, int64_t),
                     void (*decode_v)(const void*, float*, int64_t)) noexcept;

}  // namespace vattn_ggml
