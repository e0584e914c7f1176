// The axes of the product of what the library offers, as tables; a scenario is one level of each. And the one table
// that says which combinations are served, which are refused with which status, and which cannot be written down.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vattn/base/status.hpp>
#include <vector>

namespace vattn::product {

enum axis : int {
  policy_axis,
  layout_axis,
  element_axis,      // of K and V
  query_axis,        // of q
  page_axis,         // tokens of a page
  norms_axis,        // kept beside K and V
  length_axis,       // tokens
  size_axis,         // of a head: dk, dv
  heads_axis,        // of q and of the cache
  batch_axis,        // sequences
  queries_axis,      // of a sequence
  causal_axis,       //
  window_axis,       // sliding
  mask_axis,         //
  positions_axis,    // of cells
  alibi_axis,        //
  softcap_axis,      //
  sink_axis,         // learned sinks' logits
  executor_axis,     // or threads of an engine that share a plan
  observer_axis,     //
  decisions_axis,    // exported
  lse_axis,          // asked for
  certificate_axis,  // asked for
  buffers_axis,      // strides of q and of the results
  workspace_axis,    //
  promise_axis,      // epsilon, delta, for each head or jointly
  scale_axis,        // of epsilon
  ends_axis,         // sinks and window of the config
  rule_axis,         // when to stop
  regime_axis,       // of the logits
  values_axis,       // what V is multiplied with
  n_axes
};

enum class family : std::uint8_t { exact, uniform, importance, group, two_phases, certified, store, index };

enum layout : int {
  contiguous,
  token_major,
  padded_rows,
  flashinfer_nhd,
  flashinfer_hnd,
  flashinfer_fused,
  vllm,
  vllm_fused,
  vllm_x_packed,
  ggml,
  ggml_transposed,
  gemma_ring,
  ragged_rows,
  interleaved,
  shuffled,
  n_layouts
};
enum element : int { f32, f16, bf16, f16_f32, e4m3, q8_0, q4_0, q8_0_f16, n_elements };
enum executor_kind : int { serial, pool, openmp, one_share, three_shares, n_executors };
enum mask_kind : int { no_mask, head_mask, half_mask, n_masks };
enum positions_kind : int { no_positions, ordered_positions, shuffled_positions, n_positions };
enum window_kind : int { no_window, short_window, long_window, n_windows };
enum observer_kind : int { nobody, audit_all, audit_half, n_observers };
enum workspace_kind : int { growing, one_byte_short, n_workspaces };

struct head_counts {
  int query, kv;
};
struct head_size {
  int dk, dv;
};
inline constexpr std::array<head_counts, 6> all_heads{{{1, 1}, {8, 8}, {8, 2}, {7, 1}, {9, 3}, {71, 1}}};
inline constexpr std::array<head_size, 6> all_sizes{{{8, 8}, {64, 64}, {32, 64}, {33, 17}, {1, 3}, {96, 32}}};
inline constexpr std::array<int, 8> all_lengths{0, 1, 17, 300, 1200, 4100, 20000, 70000};
/// A half holds them, and bfloat16; past 2^±12 squares are taken in another unit (kernel/units.hpp).
inline constexpr std::array<float, 3> all_values{1, 0x1p-14f, 0x1p13f};
inline constexpr std::array<int, 3> all_batches{1, 2, 3}, all_queries{1, 2, 5}, all_pages{1, 16, 64};

/// A level of each axis (`unset` while a row is being made), and the seed of all that is drawn.
struct scenario {
  std::array<int, n_axes> level{};
  std::uint32_t seed = 1;
  [[nodiscard]] int operator[](axis a) const { return level[static_cast<std::size_t>(a)]; }
};

struct axis_table {
  const char* name;
  std::vector<std::string> values;
};
/// The policies' names come from where they are instantiated (policies.hpp).
[[nodiscard]] const std::vector<axis_table>& axes();

[[nodiscard]] constexpr bool paged(int l) { return l >= flashinfer_nhd && l <= vllm_x_packed; }
[[nodiscard]] constexpr bool of_one_sequence(int l) { return l == gemma_ring || l == interleaved || l == shuffled; }
[[nodiscard]] constexpr bool of_one_size(int l) {  // dk = dv
  return l == flashinfer_fused || l == vllm || l == vllm_fused || l == vllm_x_packed || l == gemma_ring;
}
[[nodiscard]] constexpr bool keeps_norms(int l) {
  return l <= padded_rows || l == ggml || l == ggml_transposed || l == ragged_rows;
}
[[nodiscard]] constexpr bool quantised(int e) { return e >= q8_0; }
/// Whether values of an element may be multiplied with all_values[level].
[[nodiscard]] constexpr bool holds_values(int e, int level) {
  return level == 0 || (level == 1 ? e <= f16_f32 : e == f32 || e == bf16);
}
/// Which elements a layout holds.
[[nodiscard]] constexpr bool stores(int l, int e) {
  switch (l) {
    case contiguous:
    case padded_rows:
      return e <= f16_f32;
    case flashinfer_nhd:
    case vllm:
    case ragged_rows:
      return e <= bf16 || e == e4m3;
    case ggml:
      return e != e4m3;
    case ggml_transposed:
      return e <= f16_f32;
    case gemma_ring:
      return e == f32;
    default:
      return e <= bf16;
  }
}

/// What becomes of a scenario to which a rule applies.
enum class verdict : std::uint8_t {
  unwritten,  ///< there is no such call: it has no arguments, or does not compile
  costly,     ///< served, but too large for a test
  refused,    ///< invalid_argument, with a message that says `text`
};
struct rule {
  verdict v;
  const char* text;
  bool (*applies)(const scenario&, family);  ///< false where a level that it asks for is unset
};
[[nodiscard]] std::span<const rule> rules();

}  // namespace vattn::product
