// Attention as ggml custom ops: ours from a shuffled store, and exact from the cache's own tensors.
//
// ggml calls a custom op from every thread of the graph, whatever its n_tasks, as (ith, nth), without work buffer and
// without a barrier inside the op; between nodes there is one. So scratch comes through the user data, in a part for
// each thread, and what must be done once is done by thread 0.
#pragma once

#include <atomic>
#include <stdexcept>
#include <vector>

#include "ggml/tensors.hpp"

namespace vattn::examples {

/// The first error of an op, which has no other way to tell.
class op_error {
 public:
  void note(const status& s) noexcept {
    if (!s && !noted_.exchange(true)) status_ = s;
  }
  /// Once the graph is computed.
  void check() const {
    if (noted_) throw std::runtime_error(status_.message());
  }

 private:
  std::atomic<bool> noted_{false};
  status status_;
};

/// One layer's store beside its cache, and what its nodes need. Lives as long as the graph.
template <class T>
struct sparse_layer {
  sparse_layer(const decode_shape& s, const config& settings, index_t threads)
      : store({.n_kv_heads = s.kv_heads, .dk = s.dim, .dv = s.dim}),
        attention(plan<store_policy>({.n_q_heads = s.heads,
                                      .n_kv_heads = s.kv_heads,
                                      .max_tokens = s.cells(),
                                      .dk = s.dim,
                                      .dv = s.dim,
                                      .threads = threads},
                                     settings)),
        scratch(workspace_bytes(attention)),
        certificates(static_cast<std::size_t>(s.heads)) {}

  shuffled_store<T> store;
  attention_plan<store_policy> attention;
  std::vector<std::byte> scratch;         // workspace_bytes(attention), a part for each thread
  std::vector<certificate> certificates;  // [heads]
  attention_options options;
  draw_key key;  // .step is the cell of the latest token
  op_error error;

  /// dst unused; src: K and V [dk·kv_heads, cells] with the new row in them, its cell [1].
  static void append(ggml_tensor* dst, int ith, int, void* user) {
    if (ith != 0) return;
    auto& self = *static_cast<sparse_layer*>(user);
    const auto cell = static_cast<index_t>(*static_cast<const std::int64_t*>(dst->src[2]->data));
    if (cell > self.store.size()) {
      return self.error.note(status::error(errc::invalid_argument,
                                           "the store has %lld tokens and the next is in cell %lld: assign() the cache",
                                           static_cast<long long>(self.store.size()), static_cast<long long>(cell)));
    }
    if (cell < self.store.size()) self.store.truncate(cell);  // rewound, or computed again
    const auto row = [cell](const ggml_tensor* t) {
      return reinterpret_cast<const T*>(static_cast<const char*>(t->data) + static_cast<std::size_t>(cell) * t->nb[1]);
    };
    self.error.note(self.store.append(row(dst->src[0]), row(dst->src[1])));
    self.key.step = static_cast<std::uint32_t>(cell);
  }

  /// dst [dv, heads, 1]; src: q [dk, 1, heads], and the node of `append`.
  static void attend(ggml_tensor* dst, int ith, int nth, void* user) {
    auto& self = *static_cast<sparse_layer*>(user);
    const auto q = ggml_query<float>(layout_of(dst->src[0]));
    const attention_result result{
        .output = ggml_output(static_cast<float*>(dst->data), layout_of(dst)),
        .certificates = {self.certificates.data(), {q.extents[0], q.extents[1], q.extents[2]}}};
    const run_arguments call{q, kv_reference(self.store), self.options, result, self.key};
    self.error.note(run(self.attention, call, self.scratch, ith, nth));
  }
};

/// Exact attention straight from ggml's tensors.
template <class T>
struct exact_layer {
  explicit exact_layer(index_t threads) : memory(static_cast<std::size_t>(threads)) {}

  std::vector<workspace> memory;  // [threads]
  attention_options options;
  op_error error;

  /// dst [dv, heads, 1]; src: q, K, V and mask as ggml_flash_attn_ext has them. A thread does KV heads of its own.
  static void attend(ggml_tensor* dst, int ith, int nth, void* user) {
    auto& self = *static_cast<exact_layer*>(user);
    const index_t kv_heads = dst->src[1]->ne[2], group = dst->src[0]->ne[2] / kv_heads;
    const auto part = [](const ggml_tensor* t, std::size_t axis, index_t first, index_t count) {
      ggml_layout l = layout_of(t);
      l.data = static_cast<const char*>(l.data) + first * l.nb[axis];
      l.ne[axis] = count;
      return l;
    };
    attention_options options = self.options;
    options.mask = ggml_mask<Eigen::half>(layout_of(dst->src[3]), group);
    for (index_t h = ith; h < kv_heads; h += nth) {
      const ggml_layout out = part(dst, 1, h * group, group);
      self.error.note(exact_attention(
          ggml_query<float>(part(dst->src[0], 2, h * group, group)),
          ggml_kv<T>(part(dst->src[1], 2, h, 1), part(dst->src[2], 2, h, 1)), options,
          {.output = ggml_output(const_cast<float*>(static_cast<const float*>(out.data)), out)},  // dst's own
          self.memory[static_cast<std::size_t>(ith)]));
    }
  }
};

}  // namespace vattn::examples
