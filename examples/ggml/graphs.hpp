// The three graphs of a decode step: they write the token's row into the cache, and attend.
#pragma once

#include <ggml-cpu.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <vector>

#include "ggml/ops.hpp"

namespace vattn::examples {

/// Threads that stay, as an engine's do.
class graph_threads {
 public:
  explicit graph_threads(int count) : count_(count) {
    ggml_threadpool_params settings = ggml_threadpool_params_default(count);
    pool_.reset(ggml_threadpool_new(&settings));
    if (!pool_) throw std::runtime_error("ggml started no threads: give a lower --threads");
  }
  [[nodiscard]] int count() const noexcept { return count_; }
  [[nodiscard]] ggml_threadpool* get() const noexcept { return pool_.get(); }

 private:
  struct deleter {
    void operator()(ggml_threadpool* p) const noexcept { ggml_threadpool_free(p); }
  };
  int count_;
  std::unique_ptr<ggml_threadpool, deleter> pool_;
};

/// A graph that ends in attention's node.
class decode_graph {
 public:
  decode_graph(ggml_context* c, ggml_tensor* result, const graph_threads& threads)
      : result_(result), graph_(ggml_new_graph(c)) {
    ggml_build_forward_expand(graph_, result);
    plan_ = ggml_graph_plan(graph_, threads.count(), threads.get());
    work_.resize(plan_.work_size);
    plan_.work_data = work_.data();
  }

  /// Milliseconds of one computation.
  double compute() {
    const auto start = std::chrono::steady_clock::now();
    if (ggml_graph_compute(graph_, &plan_) != GGML_STATUS_SUCCESS)
      throw std::runtime_error("ggml could not compute the graph");
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  /// [heads, dv]
  [[nodiscard]] std::span<const float> output() const noexcept {
    return {static_cast<const float*>(result_->data), static_cast<std::size_t>(ggml_nelements(result_))};
  }

 private:
  ggml_tensor* result_;
  ggml_cgraph* graph_;
  ggml_cplan plan_{};
  std::vector<std::uint8_t> work_;
};

/// What attention takes, in the order of axes that it takes it.
struct attention_inputs {
  attention_inputs(ggml_context* c, const layer_tensors& t, const decode_shape& s)
      : k_rows(ggml_set_rows(c, t.k, t.k_new, t.cell)),
        v_rows(ggml_set_rows(c, t.v, t.v_new, t.cell)),
        q(ggml_permute(c, t.q, 0, 2, 1, 3)),
        k(heads_of(c, k_rows, s)),
        v(heads_of(c, v_rows, s)) {}

  ggml_tensor *k_rows, *v_rows;  // [dim·kv_heads, cells], after the write
  ggml_tensor* q;                // [dim, 1, heads]
  ggml_tensor *k, *v;            // [dim, cells, kv_heads]

 private:
  static ggml_tensor* heads_of(ggml_context* c, ggml_tensor* rows, const decode_shape& s) {
    const std::size_t head = ggml_row_size(rows->type, s.dim);
    ggml_tensor* view = ggml_view_4d(c, rows, s.dim, s.kv_heads, s.cells(), 1, head, rows->nb[1], rows->nb[2], 0);
    return ggml_permute(c, view, 0, 2, 1, 3);
  }
};

inline ggml_tensor* flash_node(ggml_context* c, const layer_tensors& t, const decode_shape& s, float scale) {
  const attention_inputs in(c, t, s);
  return ggml_flash_attn_ext(c, in.q, in.k, in.v, t.mask, scale, 0, 0);
}

template <class T>
ggml_tensor* exact_node(ggml_context* c, const layer_tensors& t, const decode_shape& s, exact_layer<T>& layer) {
  const attention_inputs in(c, t, s);
  ggml_tensor* sources[] = {in.q, in.k, in.v, t.mask};
  return ggml_custom_4d(c, GGML_TYPE_F32, s.dim, s.heads, 1, 1, sources, 4, exact_layer<T>::attend, GGML_N_TASKS_MAX,
                        &layer);
}

/// The store takes the row once the cache has it, and attention comes after: an edge of the graph is the barrier.
template <class T>
ggml_tensor* sparse_node(ggml_context* c, const layer_tensors& t, const decode_shape& s, sparse_layer<T>& layer) {
  const attention_inputs in(c, t, s);
  ggml_tensor* rows[] = {in.k_rows, in.v_rows, t.cell};
  ggml_tensor* appended = ggml_custom_4d(c, GGML_TYPE_F32, 1, 1, 1, 1, rows, 3, sparse_layer<T>::append, 1, &layer);
  ggml_tensor* sources[] = {in.q, appended};
  return ggml_custom_4d(c, GGML_TYPE_F32, s.dim, s.heads, 1, 1, sources, 2, sparse_layer<T>::attend, GGML_N_TASKS_MAX,
                        &layer);
}

}  // namespace vattn::examples
