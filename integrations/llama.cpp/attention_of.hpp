// The body of `kernels` for one pair of types; each pair is compiled in a file of its own.
#pragma once

#include "attention.hpp"
#include "vattn/vattention.hpp"

namespace vattn_ggml {

template <class K, class V>
struct attention_of {
  static auto cache(const attention_node& n) noexcept { return vattn::ggml_kv<K, V>(n.k, n.v); }
  static vattn::attention_options options(const attention_node& n) noexcept {
    vattn::attention_options o;
    o.scale = n.scale;
    o.softcap = n.softcap;
    o.sink_logits = n.sinks;
    if (n.mask.data) {
      o.mask = vattn::ggml_mask<Eigen::half>(n.mask, n.heads(), n.streams());
      if (n.mask_only_hides) o.mask = o.mask.only_hiding();
    }
    return o;
  }
  static auto output(const attention_node& n) noexcept {
    return vattn::ggml_output(static_cast<float*>(const_cast<void*>(n.output.data)), n.output);
  }

  static vattn::status exact(const attention_node& n, vattn::workspace& memory, team::executor_of_team& threads) {
    return vattn::exact_attention(vattn::ggml_query<float>(n.q), cache(n), options(n), {.output = output(n)}, memory,
                                  threads);
  }
  static vattn::status verified(const attention_node& n, const verified_call& c, vattn::workspace& memory) {
    const vattn::vattention<vattn::index_policy> attend(*c.settings, {{c.index, 1}, {c.memory, 1}});
    const vattn::attention_result r{.output = output(n), .certificates = {c.certificates, {1, 1, n.heads()}}};
    vattn::serial_executor one;
    return attend(vattn::ggml_query<float>(n.q), cache(n), options(n), r, memory, c.key, one, *c.audit);
  }
  static vattn::status build(const attention_node& n, vattn::kv_index& index) { return index.build(cache(n)); }
  static vattn::status update(const attention_node& n, vattn::kv_index& index, std::span<const std::int32_t> cells) {
    const auto rows = cache(n);
    if (vattn::status s = rows.validate(); !s) return s;
    const auto head = rows.head(0, 0);
    for (const std::int32_t c : cells) {
      const auto key = [&](index_t) { return head.key(c); };
      const auto value = [&](index_t) { return head.value(c); };
      if (vattn::status s = index.set(c, key, value); !s) return s;
    }
    return {};
  }
  static std::size_t verified_bytes(const vattn::config& settings, index_t cells, index_t dk, index_t dv) {
    return vattn::vattention<vattn::index_policy>(settings).workspace_bytes(cells, dk, dv, true, 1);
  }
  static constexpr kernels table{exact, verified, build, update, verified_bytes};
};

}  // namespace vattn_ggml
