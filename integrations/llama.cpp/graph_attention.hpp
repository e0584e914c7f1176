// What becomes of the attention nodes of one backend's graphs: which are taken over, and how each is served.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "attention.hpp"
#include "ggml-backend-impl.h"
#include "host.hpp"
#include "layers.hpp"
#include "report.hpp"
#include "settings.hpp"

namespace vattn_ggml {

/// What the queries of a node see, by its mask; the same for all layers that share it.
struct sight {
  const ggml_tensor* mask = nullptr;
  index_t streams = 0, queries = 0, cells = 0;
  bool only_hides = true;  // no value but 0 and −inf
  struct line {
    index_t visible = 0, last = 0;  // cells that it sees, and the end of the last of them
  };
  std::vector<line> lines;         // [streams, queries]
  std::vector<cell_set> together;  // [streams]: cells that any of its queries sees
  [[nodiscard]] const line& of(index_t stream, index_t query) const noexcept {
    return lines[static_cast<std::size_t>(stream * queries + query)];
  }
};

/// For one CPU backend, whose graphs run one at a time. For the time of a graph it makes GGML_OP_CUSTOM of the
/// attention nodes that it takes over, so that ggml's own threads run them, and puts the nodes back.
class graph_attention {
 public:
  graph_attention(const host& ggml, const settings& s) : ggml_(ggml), settings_(s) {
    config_.epsilon = s.epsilon, config_.delta = s.delta;
    config_.sinks = 16, config_.window = 64;
  }

  /// Notes what the graph writes to caches, and takes over nodes.
  void before(ggml_cgraph* graph) noexcept;
  void after() noexcept;

 private:
  struct call {
    graph_attention* owner = nullptr;
    ggml_tensor* node = nullptr;
    const kernels* how = nullptr;
    layer_cache* layer = nullptr;  // null: exact only
    layer_counts* counts = nullptr;
    index_t first_stream = 0;
    bool late = false;  // the layer is written after it is attended
    std::array<std::int32_t, GGML_MAX_OP_PARAMS / sizeof(std::int32_t)> parameters{};
    team threads;
  };

  [[nodiscard]] bool takes(const ggml_tensor* node, const kernels*& how) const noexcept;
  void take(ggml_tensor* node, const kernels* how);
  void note_write(const ggml_tensor* node);

  static void run(ggml_tensor* node, int ith, int nth, void* user);
  void serve(call& c, team::executor_of_team& threads) noexcept;
  [[nodiscard]] attention_node node_of(const call& c) const noexcept;
  [[nodiscard]] const sight& look(const attention_node& n, const ggml_tensor* mask);
  [[nodiscard]] bool verify(call& c, const attention_node& n, const sight& s, team::executor_of_team& threads);
  [[nodiscard]] bool bring_up(call& c, const attention_node& n, const sight& s, team::executor_of_team& threads);
  void exactly(call& c, const attention_node& n, const sight* s, team::executor_of_team& threads);

  const host& ggml_;
  const settings& settings_;
  vattn::config config_;
  std::vector<std::unique_ptr<call>> calls_;  // kept from graph to graph
  std::size_t used_ = 0;
  int builds_ = 0;  // layers whose units were taken in this graph
  std::vector<sight> sights_;
  std::size_t seen_ = 0;
  vattn::workspace shared_;            // of exact calls
  std::vector<vattn::workspace> own_;  // [threads], of verified ones
  std::vector<vattn::certificate> certificates_;
  std::vector<vattn::status> statuses_;
};

}  // namespace vattn_ggml
