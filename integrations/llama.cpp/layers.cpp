#include "layers.hpp"

#include <algorithm>

namespace vattn_ggml {

layer_cache::layer_cache(const ggml_tensor* k_tensor, const ggml_tensor* v_tensor, index_t heads, index_t dk,
                         index_t dv)
    : k(k_tensor),
      v(v_tensor),
      k_data(k->data),
      v_data(v->data),
      k_buffer(k->buffer),
      v_buffer(v->buffer),
      kv_heads(heads),
      cells(k->ne[1]),
      streams(k->ne[2]) {
  indices.reserve(static_cast<std::size_t>(streams * kv_heads));
  for (index_t s = 0; s < streams; ++s) {
    for (index_t h = 0; h < kv_heads; ++h)
      indices.emplace_back(
          vattn::index_shape{.n_kv_heads = 1, .dk = dk, .dv = dv, .bits = 2, .seed = static_cast<std::uint64_t>(h)});
  }
  current.resize(static_cast<std::size_t>(streams));
  for (cell_set& s : current) s.resize(cells);
  coding.resize(current.size());
}

bool layer_cache::is_of(const ggml_tensor* k_tensor, const ggml_tensor* v_tensor, index_t heads) const noexcept {
  return k_tensor == k && v_tensor == v && k->data == k_data && v->data == v_data && k->buffer == k_buffer &&
         v->buffer == v_buffer && heads == kv_heads && k->ne[1] == cells && k->ne[2] == streams;
}

index_t layer_cache::first_stream(const ggml_tensor* k_view, const ggml_tensor* v_view) const noexcept {
  const auto stream = [&](const ggml_tensor* view, const ggml_tensor* root) -> index_t {
    const auto offset = static_cast<const char*>(view->data) - static_cast<const char*>(root->data);
    const auto page = static_cast<index_t>(root->nb[2]);
    if (offset < 0 || page <= 0 || offset % page != 0 || view->nb[1] != root->nb[1] || view->ne[1] > cells) return -1;
    if (view->ne[3] > 1 && view->nb[3] != root->nb[2]) return -1;
    const index_t first = offset / page;
    return first + view->ne[3] <= streams ? first : -1;
  };
  const index_t first = stream(k_view, k);
  return first == stream(v_view, v) ? first : -1;
}

void layer_cache::written(const void* first, std::size_t bytes) noexcept {
  for (const ggml_tensor* t : {k, v}) {
    const auto base = reinterpret_cast<std::uintptr_t>(t->data), from = reinterpret_cast<std::uintptr_t>(first);
    const std::uintptr_t size = t->nb[1] * static_cast<std::uintptr_t>(cells * streams);
    if (from >= base + size || from + bytes <= base) continue;
    const std::uintptr_t a = std::max(from, base) - base, b = std::min(from + bytes, base + size) - base;
    const auto row = static_cast<index_t>(a / t->nb[1]), end = static_cast<index_t>((b + t->nb[1] - 1) / t->nb[1]);
    for (index_t s = row / cells; s * cells < end && s < streams; ++s)
      current[static_cast<std::size_t>(s)].remove(std::max(row, s * cells) - s * cells,
                                                  std::min(end, (s + 1) * cells) - s * cells);
  }
}

std::size_t layer_cache::bytes() const noexcept {
  std::size_t sum = memory.size() * sizeof(vattn::index_memory);
  for (const vattn::kv_index& i : indices) sum += i.bytes();
  for (const cell_set& s : current) sum += s.words().size_bytes();
  return sum;
}

layer_registry& layer_registry::instance() {
  static auto* const one = new layer_registry;  // not destroyed: buffers may be freed after everything else
  return *one;
}

layer_cache* layer_registry::get(const ggml_tensor* k, const ggml_tensor* v, index_t kv_heads, index_t dk, index_t dv) {
  std::lock_guard lock(mutex_);
  if (const auto found = layers_.find(k); found != layers_.end()) {
    if (found->second->is_of(k, v, kv_heads)) return found->second.get();
    const std::shared_ptr<layer_cache> old = found->second;
    layers_.erase(old->k), layers_.erase(old->v);
  }
  // Rows of a cache lie one after the other, stream after stream, and are whole heads.
  const auto plain = [&](const ggml_tensor* t, index_t d) {
    return t->buffer != nullptr && t->data != nullptr && t->ne[0] == d * kv_heads && t->ne[3] == 1 &&
           t->nb[2] == t->nb[1] * static_cast<std::size_t>(t->ne[1]) && t->ne[1] < index_t{1} << 31;
  };
  if (!plain(k, dk) || !plain(v, dv) || k->ne[1] != v->ne[1] || k->ne[2] != v->ne[2]) return nullptr;
  auto fresh = std::make_shared<layer_cache>(k, v, kv_heads, dk, dv);
  watch(k->buffer);
  watch(v->buffer);
  layers_[v] = fresh;
  layers_[k] = fresh;
  return fresh.get();
}

layer_cache* layer_registry::find(const ggml_tensor* t) {
  std::lock_guard lock(mutex_);
  const auto found = layers_.find(t);
  return found == layers_.end() ? nullptr : found->second.get();
}

std::array<std::size_t, 2> layer_registry::bytes() {
  std::lock_guard lock(mutex_);
  std::size_t codes = 0, cache = 0;
  for (const auto& [tensor, layer] : layers_) {
    if (tensor == layer->k) codes += layer->bytes();
    cache += tensor->nb[1] * static_cast<std::size_t>(layer->cells * layer->streams);
  }
  if (codes > code_bytes_) code_bytes_ = codes, cache_bytes_ = cache;
  return {code_bytes_, cache_bytes_};
}

ggml_backend_buffer_i layer_registry::original(ggml_backend_buffer_t b) noexcept {
  std::lock_guard lock(mutex_);
  return buffers_[b].original;
}

void layer_registry::written(ggml_backend_buffer_t b, const void* first, std::size_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  for (const auto& [tensor, layer] : layers_) {
    if (tensor == layer->k && (layer->k_buffer == b || layer->v_buffer == b)) layer->written(first, bytes);
  }
}

void layer_registry::freed(ggml_backend_buffer_t b) noexcept {
  static_cast<void>(bytes());
  std::lock_guard lock(mutex_);
  std::erase_if(layers_, [&](const auto& entry) { return entry.second->k_buffer == b || entry.second->v_buffer == b; });
  buffers_.erase(b);
}

void layer_registry::watch(ggml_backend_buffer_t b) {
  if (buffers_.count(b) != 0) return;
  buffers_[b].original = b->iface;
  if (b->iface.memset_tensor) {
    b->iface.memset_tensor = [](ggml_backend_buffer_t to, ggml_tensor* t, uint8_t value, size_t at, size_t size) {
      instance().original(to).memset_tensor(to, t, value, at, size);
      instance().written(to, static_cast<char*>(t->data) + at, size);
    };
  }
  if (b->iface.set_tensor) {
    b->iface.set_tensor = [](ggml_backend_buffer_t to, ggml_tensor* t, const void* from, size_t at, size_t size) {
      instance().original(to).set_tensor(to, t, from, at, size);
      instance().written(to, static_cast<char*>(t->data) + at, size);
    };
  }
  if (b->iface.set_tensor_2d) {
    b->iface.set_tensor_2d = [](ggml_backend_buffer_t to, ggml_tensor* t, const void* from, size_t at, size_t size,
                                size_t copies, size_t stride, size_t from_stride) {
      instance().original(to).set_tensor_2d(to, t, from, at, size, copies, stride, from_stride);
      if (copies > 0) instance().written(to, static_cast<char*>(t->data) + at, stride * (copies - 1) + size);
    };
  }
  if (b->iface.cpy_tensor) {
    b->iface.cpy_tensor = [](ggml_backend_buffer_t to, const ggml_tensor* from, ggml_tensor* t) {
      const bool copied = instance().original(to).cpy_tensor(to, from, t);
      if (copied) instance().written(to, t->data, t->nb[3] * static_cast<size_t>(t->ne[3]));
      return copied;
    };
  }
  b->iface.clear = [](ggml_backend_buffer_t to, uint8_t value) {
    const ggml_backend_buffer_i table = instance().original(to);
    table.clear(to, value);
    instance().written(to, table.get_base(to), to->size);
  };
  b->iface.free_buffer = [](ggml_backend_buffer_t gone) {
    const ggml_backend_buffer_i table = instance().original(gone);
    instance().freed(gone);
    if (table.free_buffer) table.free_buffer(gone);
  };
}

}  // namespace vattn_ggml
