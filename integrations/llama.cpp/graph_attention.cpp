#include "graph_attention.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdlib>
#include <cstring>

namespace vattn_ggml {
namespace {

using clock = std::chrono::steady_clock;
double since(clock::time_point start) { return std::chrono::duration<double>(clock::now() - start).count(); }

constexpr index_t most_queries = 16;  // of a node: decode, several sequences, drafts; more is prefill
constexpr index_t most_head_size = 1024;
constexpr index_t least_cells = 512;            // below, a node takes microseconds, and ggml's own is as good
constexpr index_t least_visible = 5120;         // from here codes are faster than exact attention by our kernels
constexpr index_t coding_steps = 24;            // over which the codes of a context are spread, at least
constexpr index_t coding_steps_quantised = 64;  // where exact attention is not that much faster than ggml's
constexpr index_t least_coded = 128;            // cells a step
constexpr index_t unit_rows = 512;              // of which a layer's units are taken
constexpr index_t most_parts = 4;  // of a KV head's query heads, where there are more threads than KV heads

vattn::ggml_layout layout(const ggml_tensor* t) { return {t->data, t->ne, t->nb}; }

bool is_view(ggml_op op) {
  return op == GGML_OP_NONE || op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE ||
         op == GGML_OP_TRANSPOSE;
}
const ggml_tensor* root_of(const ggml_tensor* t) { return t->view_src ? t->view_src : t; }
bool is_cache(const ggml_tensor* t) {
  return std::strncmp(t->name, "cache_k", 7) == 0 || std::strncmp(t->name, "cache_v", 7) == 0;
}

std::uint32_t layer_number(const ggml_tensor* cache) {
  const char* digits = std::strstr(cache->name, "_l");
  return digits ? static_cast<std::uint32_t>(std::strtoul(digits + 2, nullptr, 10)) : 0;
}

}  // namespace

bool graph_attention::takes(const ggml_tensor* node, const kernels*& how) const noexcept {
  const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3],
                    *sinks = node->src[4];
  how = kernels_for(k->type, v->type);
  float bias;
  std::memcpy(&bias, reinterpret_cast<const char*>(node->op_params) + sizeof(float), sizeof bias);
  const bool types = how && q->type == GGML_TYPE_F32 && node->type == GGML_TYPE_F32 &&
                     (!mask || mask->type == GGML_TYPE_F16) && (!sinks || sinks->type == GGML_TYPE_F32);
  const bool shapes = q->ne[1] >= 1 && q->ne[1] * q->ne[3] <= most_queries && k->ne[1] >= least_cells &&
                      k->ne[2] == v->ne[2] && k->ne[2] > 0 && q->ne[2] % k->ne[2] == 0 && k->ne[3] == q->ne[3] &&
                      v->ne[3] == q->ne[3] && k->ne[0] <= most_head_size && v->ne[0] <= most_head_size &&
                      q->nb[0] == sizeof(float) && (!mask || (mask->nb[0] == 2 && mask->ne[1] >= q->ne[1])) &&
                      (!mask || mask->ne[0] >= k->ne[1]) && (!sinks || sinks->nb[0] == sizeof(float));
  // ALiBi, and values that are a view of the keys (MLA), are ggml's.
  return types && shapes && bias == 0 && root_of(k) != root_of(v);
}

void graph_attention::take(ggml_tensor* node, const kernels* how) {
  if (used_ == calls_.size()) calls_.push_back(std::make_unique<call>());
  call& c = *calls_[used_];
  const ggml_tensor *k = node->src[1], *v = node->src[2];
  c.owner = this, c.node = node, c.how = how;
  c.layer = nullptr;
  c.late = false;
  c.counts = &report::instance().layer(layer_number(root_of(k)));
  if (settings_.mode == run_mode::verified && k->view_src && v->view_src && is_cache(k->view_src) &&
      is_cache(v->view_src) && k->ne[1] >= least_visible) {
    c.layer = layer_registry::instance().get(k->view_src, v->view_src, k->ne[2], k->ne[0], v->ne[0]);
    if (c.layer) c.first_stream = c.layer->first_stream(k, v);
    if (c.layer && c.first_stream < 0) c.layer = nullptr;
  }
  ++used_;
  std::memcpy(c.parameters.data(), node->op_params, sizeof node->op_params);
  c.threads.reset();
  const custom_parameters custom{run, GGML_N_TASKS_MAX, &c};
  std::memcpy(node->op_params, &custom, sizeof custom);
  node->op = GGML_OP_CUSTOM;
}

// What is written to a cache: rows whose numbers are known before the graph runs, or whatever.
void graph_attention::note_write(const ggml_tensor* node) {
  const ggml_tensor* root = node->view_src;
  layer_cache* layer = layer_registry::instance().find(root);
  if (!layer) return;
  for (std::size_t i = 0; i < used_; ++i) {
    if (calls_[i]->layer == layer) {
      calls_[i]->late = true;
      return;
    }
  }
  const ggml_tensor* rows = node->op == GGML_OP_SET_ROWS ? node->src[1] : nullptr;
  const auto offset = static_cast<const char*>(node->data) - static_cast<const char*>(root->data);
  const auto row_bytes = static_cast<std::ptrdiff_t>(root->nb[1]);
  const bool known = rows && rows->type == GGML_TYPE_I64 && is_view(root_of(rows)->op) && rows->data &&
                     rows->ne[1] == 1 && rows->ne[2] == 1 && rows->ne[3] == 1 && offset >= 0 &&
                     offset % row_bytes == 0 && node->nb[1] == root->nb[1];
  if (!known) return layer->all_written();
  for (int64_t i = 0; i < rows->ne[0]; ++i) {
    int64_t row;
    std::memcpy(&row, static_cast<const char*>(rows->data) + static_cast<std::size_t>(i) * rows->nb[0], sizeof row);
    layer->row_written(offset / row_bytes + row);
  }
}

void graph_attention::before(ggml_cgraph* graph) noexcept {
  used_ = seen_ = 0;
  builds_ = 0;
  report::instance().write_if_asked();
  const int n = ggml_.n_nodes(graph);
  for (int i = 0; i < n; ++i) {
    ggml_tensor* node = ggml_.node(graph, i);
    if (node->view_src && !is_view(node->op)) note_write(node);
    const kernels* how = nullptr;
    if (node->op != GGML_OP_FLASH_ATTN_EXT || !takes(node, how)) continue;
    try {
      take(node, how);
    } catch (...) {  // no memory: the node stays ggml's
    }
  }
}

void graph_attention::after() noexcept {
  for (std::size_t i = 0; i < used_; ++i) {
    call& c = *calls_[i];
    c.node->op = GGML_OP_FLASH_ATTN_EXT;
    std::memcpy(c.node->op_params, c.parameters.data(), sizeof c.node->op_params);
    if (c.late) c.layer->all_written();
  }
}

void graph_attention::run(ggml_tensor*, int ith, int nth, void* user) {
  call& c = *static_cast<call*>(user);
  if (ith != 0) return c.threads.serve(ith);
  c.threads.lead(nth, [&](team::executor_of_team& threads) { c.owner->serve(c, threads); });
}

attention_node graph_attention::node_of(const call& c) const noexcept {
  attention_node n;
  n.q = layout(c.node->src[0]), n.k = layout(c.node->src[1]), n.v = layout(c.node->src[2]);
  if (c.node->src[3]) n.mask = layout(c.node->src[3]);
  n.output = layout(c.node);
  std::memcpy(&n.scale, c.parameters.data(), sizeof n.scale);
  std::memcpy(&n.softcap, c.parameters.data() + 2, sizeof n.softcap);
  if (c.node->src[4]) n.sinks = static_cast<const float*>(c.node->src[4]->data);
  return n;
}

void graph_attention::serve(call& c, team::executor_of_team& threads) noexcept {
  const clock::time_point start = clock::now();
  attention_node n = node_of(c);
  bool verified = false;
  try {
    const sight& s = look(n, c.node->src[3]);
    n.mask_only_hides = s.only_hides;
    index_t most = 0;
    for (const sight::line& l : s.lines) most = std::max(most, l.visible);
    const bool codes = c.layer && most >= least_visible;
    if (codes) verified = verify(c, n, s, threads);
    if (!verified) {
      const clock::time_point exact = clock::now();
      exactly(c, n, &s, threads);
      double rows = 0;
      for (const sight::line& l : s.lines) rows += static_cast<double>(l.visible * n.heads());
      if (codes) report::instance().exact_took(since(exact), rows);
    }
  } catch (...) {  // no memory for what is kept beside the cache
    verified = false;
    exactly(c, n, nullptr, threads);
  }
  const double seconds = since(start);
  report::instance().add([&] {
    ++c.counts->calls;
    c.counts->seconds += seconds;
    if (!verified) return;
    ++c.counts->verified;
    c.counts->verified_seconds += seconds;
  });
}

const sight& graph_attention::look(const attention_node& n, const ggml_tensor* mask) {
  const auto same = [&](const sight& s) {
    return s.mask == mask && s.streams == n.streams() && s.queries == n.queries() && s.cells == n.k.ne[1];
  };
  for (std::size_t i = 0; i < seen_; ++i) {
    if (same(sights_[i])) return sights_[i];
  }
  if (seen_ == sights_.size()) sights_.emplace_back();
  sight& s = sights_[seen_++];
  s.mask = mask, s.streams = n.streams(), s.queries = n.queries(), s.cells = n.k.ne[1];
  s.only_hides = true;
  s.lines.assign(static_cast<std::size_t>(s.streams * s.queries), {});
  s.together.resize(static_cast<std::size_t>(s.streams));
  for (index_t b = 0; b < s.streams; ++b) {
    cell_set& together = s.together[static_cast<std::size_t>(b)];
    together.resize(s.cells);
    together.clear();
    for (index_t t = 0; t < s.queries; ++t) {
      sight::line& line = s.lines[static_cast<std::size_t>(b * s.queries + t)];
      // Heads may have masks of their own: what one of them sees.
      const index_t masks = mask ? n.mask.ne[2] : 1;
      for (index_t h = 0; h < masks; ++h) {
        const auto* values =
            mask ? reinterpret_cast<const std::uint16_t*>(static_cast<const char*>(n.mask.data) + t * n.mask.nb[1] +
                                                          h * n.mask.nb[2] + b % n.mask.ne[3] * n.mask.nb[3])
                 : nullptr;
        index_t visible = 0, last = 0;
        std::uint16_t added = 0;
        for (index_t c = 0; c < s.cells; c += 64) {
          const index_t count = std::min<index_t>(64, s.cells - c);
          std::uint64_t word = 0;
          if (values) {
            for (index_t i = 0; i < count; ++i) {
              const std::uint16_t v = values[c + i];
              const bool sees = v != 0xFC00;
              word |= std::uint64_t{sees} << i;
              added |= sees ? v & 0x7FFF : 0;
            }
          } else {
            word = count == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
          }
          if (word == 0) continue;
          visible += std::popcount(word);
          last = c + 64 - std::countl_zero(word);
          together.words()[static_cast<std::size_t>(c / 64)] |= word;
        }
        line.visible = std::max(line.visible, visible), line.last = std::max(line.last, last);
        s.only_hides = s.only_hides && added == 0;
      }
    }
  }
  return s;
}

// Codes of the cells that are seen and whose rows were written since they were coded. Coding a cell takes as long as
// attending some twenty exactly: it is spread over steps, in which attention is exact, so that a step takes no
// longer than ggml's own. False: there is more to do.
bool graph_attention::bring_up(call& c, const attention_node& n, const sight& s, team::executor_of_team& threads) {
  layer_cache& layer = *c.layer;
  const index_t kv_heads = n.kv_heads();
  struct work {
    bool build = false, stale = false, ready = true;
    std::int32_t checked = -1;  // a cell whose code is compared
    index_t last = 0;
  };
  std::vector<work> works(static_cast<std::size_t>(s.streams));
  const auto work_of = [&](index_t b) -> work& { return works[static_cast<std::size_t>(b)]; };
  const auto coding_of = [&](index_t b) -> std::vector<std::int32_t>& {
    return layer.coding[static_cast<std::size_t>(c.first_stream + b)];
  };
  const auto current_of = [&](index_t b) -> cell_set& {
    return layer.current[static_cast<std::size_t>(c.first_stream + b)];
  };
  std::uint64_t coded = 0;
  bool any = false;
  for (index_t b = 0; b < s.streams; ++b) {
    work& w = work_of(b);
    const std::span<const std::uint64_t> current = current_of(b).words();
    std::vector<std::int32_t>& coding = coding_of(b);
    coding.clear();
    for (index_t t = 0; t < s.queries; ++t) w.last = std::max(w.last, s.of(b, t).last);
    index_t visible = 0, missing = 0;
    const std::span<const std::uint64_t> seen = s.together[static_cast<std::size_t>(b)].words();
    for (std::size_t i = 0; i < seen.size(); ++i)
      visible += std::popcount(seen[i]), missing += std::popcount(seen[i] & ~current[i]);
    if (visible < least_visible) continue;  // none of its queries will use codes: their turn comes
    const vattn::kv_index& first = layer.index(c.first_stream + b, 0);
    // Units are taken again where many keys do not fit them, and while few keys were known.
    const bool misfit =
        missing == 0 && layer.step - layer.built > 1024 && 16 * (visible - first.codes(0).codes()) > visible;
    w.build = first.built_from() == 0 || misfit || layer.rows_at_build * 4 < w.last;
    if (w.build && builds_ > 0) {
      w.build = false, w.ready = false;  // a layer at a time
      continue;
    }
    const bool quantised = c.node->src[1]->type == GGML_TYPE_Q8_0 || c.node->src[1]->type == GGML_TYPE_Q4_0;
    const index_t most = std::max(least_coded, visible / (quantised ? coding_steps_quantised : coding_steps));
    w.ready = w.build ? false : missing <= most;
    for (std::size_t i = 0; i < seen.size() && static_cast<index_t>(coding.size()) < most; ++i) {
      if (w.build) break;
      for (std::uint64_t left = seen[i] & ~current[i]; left != 0; left &= left - 1)
        coding.push_back(static_cast<std::int32_t>(i * 64) + std::countr_zero(left));
    }
    coded += coding.size();
    if (w.ready) {
      // One of the cells whose codes are to be used, at random.
      layer.random ^= layer.random << 13, layer.random ^= layer.random >> 7, layer.random ^= layer.random << 17;
      const std::size_t i = layer.random % seen.size();
      if (const std::uint64_t there = seen[i] & current[i]) {
        const int turn = static_cast<int>(layer.random >> 32 & 63);
        w.checked = static_cast<std::int32_t>(i * 64) + ((std::countr_zero(std::rotr(there, turn)) + turn) & 63);
      }
    }
    any = any || w.build || !coding.empty() || w.checked >= 0;
  }
  std::vector<std::uint8_t> failed(static_cast<std::size_t>(s.streams * kv_heads), 0), stale = failed;
  threads.for_each(any ? s.streams * kv_heads : 0, [&](index_t task, index_t) {
    const index_t b = task / kv_heads, h = task % kv_heads;
    const work& w = work_of(b);
    vattn::kv_index& index = layer.index(c.first_stream + b, h);
    const attention_node head = n.of_head(b, h);
    vattn::status done;
    if (w.build) {  // units of rows that are spread over all; their codes are of no use
      const index_t step = std::max<index_t>(1, w.last / unit_rows);
      attention_node some = head.of_cells(w.last / step);
      some.k.nb[1] *= step, some.v.nb[1] *= step;
      done = c.how->build(some, index);
      index.clear();
    } else if (w.checked >= 0 && w.checked < index.size()) {
      const std::size_t bytes = index.codes(0).layout().block_bytes();
      const std::span<const std::byte> block =
          index.codes(0).blocks().subspan(static_cast<std::size_t>(w.checked) / 64 * bytes, bytes);
      std::array<std::byte, 16384> was;
      const std::size_t kept = std::min(bytes, was.size());
      std::memcpy(was.data(), block.data(), kept);
      done = c.how->update(head, index, {&w.checked, 1});
      // A code is a function of its rows: any difference shows rows that were written unseen.
      stale[static_cast<std::size_t>(task)] = std::memcmp(was.data(), block.data(), kept) != 0 ? 1 : 0;
    }
    if (done) done = c.how->update(head, index, coding_of(b));
    failed[static_cast<std::size_t>(task)] = done ? 0 : 1;
  });
  if (std::any_of(failed.begin(), failed.end(), [](std::uint8_t f) { return f != 0; })) throw std::bad_alloc();
  bool ready = true, lost = false;
  for (index_t b = 0; b < s.streams; ++b) {
    work& w = work_of(b);
    const auto mine =
        std::span(stale).subspan(static_cast<std::size_t>(b * kv_heads), static_cast<std::size_t>(kv_heads));
    w.stale = std::any_of(mine.begin(), mine.end(), [](std::uint8_t x) { return x != 0; });
    lost = lost || w.stale;
    ready = ready && w.ready && !w.stale;
    if (w.build) {
      ++builds_;
      layer.built = layer.step;
      layer.rows_at_build = w.last;
    }
    if (w.build || w.stale) {
      current_of(b).clear();
      continue;
    }
    for (const std::int32_t cell : coding_of(b))
      current_of(b).words()[static_cast<std::size_t>(cell) / 64] |= std::uint64_t{1} << (cell % 64);
  }
  report::instance().add([&] {
    c.counts->coded += coded;
    c.counts->stale += lost ? 1u : 0u;
  });
  return ready;
}

bool graph_attention::verify(call& c, const attention_node& n, const sight& s, team::executor_of_team& threads) {
  layer_cache& layer = *c.layer;
  const index_t kv_heads = n.kv_heads(), group = n.group(), slots = n.streams() * n.queries(), heads = n.heads();
  ++layer.step;
  if (!bring_up(c, n, s, threads)) return false;
  // Query heads of a KV head are attended together, at most 8; apart where threads would have nothing to do.
  index_t parts = (group + vattn::max_group - 1) / vattn::max_group;
  while (2 * parts <= std::min(group, most_parts) && slots * kv_heads * parts < threads.workers()) parts *= 2;
  const index_t each = (group + parts - 1) / parts;
  parts = (group + each - 1) / each;
  const index_t memories = slots * kv_heads * parts;
  if (static_cast<index_t>(layer.memory.size()) < memories) layer.memory.resize(static_cast<std::size_t>(memories));
  certificates_.resize(static_cast<std::size_t>(slots * heads));
  statuses_.assign(static_cast<std::size_t>(memories), {});
  if (own_.size() < static_cast<std::size_t>(threads.workers()))
    own_.resize(static_cast<std::size_t>(threads.workers()));
  index_t last = 0;
  for (const sight::line& l : s.lines) last = std::max(last, l.last);
  // Room for a while, so that a growing context does not ask for more at every step.
  const std::size_t bytes = c.how->verified_bytes(config_, (last + 4095) / 4096 * 4096, n.k.ne[0], n.v.ne[0]);
  for (vattn::workspace& w : own_) {
    if (!w.reserve(bytes)) throw std::bad_alloc();
  }
  const auto number = static_cast<std::uint32_t>(layer_number(layer.k));
  threads.for_each(memories, [&](index_t task, index_t worker) {
    const index_t part = task % parts, kv = task / parts % kv_heads, slot = task / parts / kv_heads;
    const index_t b = slot / n.queries(), t = slot % n.queries();
    const index_t first = kv * group + part * each, count = std::min(each, group - part * each);
    const sight::line& line = s.of(b, t);
    attention_node one = n.of_query(b, t, kv, first, count).of_cells(line.last);
    if (line.visible == line.last && s.only_hides) one = one.without_mask();
    const verified_call v{&config_,
                          &layer.index(c.first_stream + b, kv),
                          &layer.memory[static_cast<std::size_t>(task)],
                          {.seed = static_cast<std::uint64_t>(slot),
                           .layer = number,
                           .step = layer.step,
                           .first_head = static_cast<std::uint32_t>(first)},
                          &certificates_[static_cast<std::size_t>(slot * heads + first)],
                          &c.counts->audit};
    statuses_[static_cast<std::size_t>(task)] = c.how->verified(one, v, own_[static_cast<std::size_t>(worker)]);
  });
  for (const vattn::status& st : statuses_) {
    if (!st) return false;  // numbers that are not finite: exact attention says the same, or does without
  }
  report::instance().add([&] {
    for (const vattn::certificate& x : certificates_) {
      ++c.counts->heads;
      c.counts->dense += x.exact() ? 1u : 0u;
      c.counts->rows += static_cast<std::uint64_t>(x.n);
      c.counts->rows_read += static_cast<std::uint64_t>(x.rows());
    }
  });
  return true;
}

void graph_attention::exactly(call& c, const attention_node& n, const sight* s, team::executor_of_team& threads) {
  report::instance().add([&] { ++c.counts->exact; });
  attention_node node = n;
  if (s) {
    index_t last = 0;
    bool prefix = s->only_hides;
    for (const sight::line& l : s->lines) last = std::max(last, l.last);
    for (const sight::line& l : s->lines) prefix = prefix && l.visible == last;
    node = n.of_cells(last);
    if (prefix) node = node.without_mask();
  }
  if (c.how->exact(node, shared_, threads)) return;
  const auto decode = [&](const ggml_tensor* t) { return ggml_.type_traits(t->type)->to_float; };
  plain_attention(n, decode(c.node->src[1]), decode(c.node->src[2]));
  report::instance().add([&] { ++c.counts->plain; });
}

}  // namespace vattn_ggml
