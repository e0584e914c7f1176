#include "product/axes.hpp"

namespace vattn::product {

const std::vector<axis_table>& axes() {
  static const std::vector<axis_table> tables{
      {"policy", {}},
      {"layout",
       {"contiguous", "token-major", "padded rows", "FlashInfer NHD", "FlashInfer HND", "FlashInfer K and V in one",
        "vLLM", "vLLM fused", "vLLM x-packed", "ggml", "ggml V transposed", "gemma.cpp ring", "ragged",
        "interleaved_store", "shuffled_store"}},
      {"element", {"f32", "f16", "bf16", "f16 and f32", "e4m3", "q8_0", "q4_0", "q8_0 and f16"}},
      {"query", {"f32", "f16", "bf16"}},
      {"page", {"1", "16", "64"}},
      {"norms", {"none", "values", "values, centres, keys"}},
      {"n", {"0", "1", "17", "300", "1200", "4100", "20000", "70000"}},
      {"dk/dv", {"8/8", "64/64", "32/64", "33/17", "1/3", "96/32"}},
      {"heads", {"1/1", "8/8", "8/2", "7/1", "9/3", "71/1"}},
      {"batch", {"1", "2", "3"}},
      {"queries", {"1", "2", "5"}},
      {"causal", {"no", "yes"}},
      {"window", {"none", "40", "900"}},
      {"mask", {"none", "f32 by head", "f16 for all heads"}},
      {"positions", {"none", "in order", "shuffled"}},
      {"alibi", {"no", "yes"}},
      {"softcap", {"no", "yes"}},
      {"sinks", {"no", "yes"}},
      {"executor", {"serial", "pool", "OpenMP", "plan, 1 share", "plan, 3 shares"}},
      {"observer", {"none", "auditor", "auditor of a half"}},
      {"decisions", {"no", "yes"}},
      {"log-sum-exp", {"no", "yes"}},
      {"certificates", {"no", "yes"}},
      {"buffers", {"dense", "permuted and padded"}},
      {"workspace", {"grows", "one byte short"}},
      {"promise", {"0.3 at 0.3", "0.1 at 0.1", "0.3 at 0.3 jointly"}},
      {"scale", {"output", "rms"}},
      {"ends", {"4 and 8", "none", "16 and 40"}},
      {"rule", {"8 looks", "2 looks, the last accepted", "density 1", "1 look"}},
      {"regime", {"flat", "peaked", "needles"}},
      {"values", {"1", "2^-14", "2^13"}},
  };
  return tables;
}

namespace {

constexpr bool any(int level) { return level > 0; }

// Elements that are generated, and products that the reference forms: a tenth of a second each.
bool too_large(const scenario& s) {
  for (const axis a : {length_axis, size_axis, heads_axis}) {
    if (s[a] < 0) return false;
  }
  const auto at = [](const auto& table, int level) {
    return static_cast<double>(table[static_cast<std::size_t>(level)]);
  };
  const head_size d = all_sizes[static_cast<std::size_t>(s[size_axis])];
  const head_counts h = all_heads[static_cast<std::size_t>(s[heads_axis])];
  const double n = at(all_lengths, s[length_axis]), batch = s[batch_axis] < 0 ? 1 : at(all_batches, s[batch_axis]);
  const double rows = batch * (s[queries_axis] < 0 ? 1 : at(all_queries, s[queries_axis])) * h.query;
  const bool large = n > 4100;
  return n * batch * h.kv * (d.dk + d.dv) > 9e6 || n * rows * (d.dk + d.dv) > (large ? 80e6 : 40e6) ||
         (!large && n * rows > 1e6);
}

// Where a store's order of rows would show.
bool ordered(const scenario& s) {
  return (s[causal_axis] == 1 && s[queries_axis] > 0) || any(s[window_axis]) || any(s[mask_axis]) ||
         any(s[positions_axis]) || s[alibi_axis] == 1;
}

const rule table[] = {
    // What has no arguments, or does not compile.
    {verdict::unwritten, "a store's policy takes a store: must_fail/store_policy_on_view.cpp",
     [](const scenario& s, family f) {
       return f == family::store && s[layout_axis] >= 0 && s[layout_axis] != shuffled;
     }},
    {verdict::unwritten, "the layout does not hold such elements",
     [](const scenario& s, family) {
       return s[layout_axis] >= 0 && s[element_axis] >= 0 && !stores(s[layout_axis], s[element_axis]);
     }},
    {verdict::unwritten, "the layout holds one sequence",
     [](const scenario& s, family) {
       return s[batch_axis] > 0 && s[layout_axis] >= 0 && of_one_sequence(s[layout_axis]);
     }},
    {verdict::unwritten, "the layout has keys and values of one size",
     [](const scenario& s, family) {
       return s[layout_axis] >= 0 && s[size_axis] >= 0 && of_one_size(s[layout_axis]) &&
              all_sizes[static_cast<std::size_t>(s[size_axis])].dk !=
                  all_sizes[static_cast<std::size_t>(s[size_axis])].dv;
     }},
    {verdict::unwritten, "quantised rows are whole blocks of 32",
     [](const scenario& s, family) {
       if (s[element_axis] < 0 || s[size_axis] < 0 || !quantised(s[element_axis])) return false;
       const head_size d = all_sizes[static_cast<std::size_t>(s[size_axis])];
       return d.dk % 32 != 0 || (d.dv % 32 != 0 && s[element_axis] != q8_0_f16);
     }},
    {verdict::unwritten, "the element does not hold such values",
     [](const scenario& s, family) {
       return s[element_axis] >= 0 && s[values_axis] > 0 && !holds_values(s[element_axis], s[values_axis]);
     }},
    {verdict::unwritten, "the layout has no pages",
     [](const scenario& s, family) { return s[page_axis] > 0 && s[layout_axis] >= 0 && !paged(s[layout_axis]); }},
    {verdict::unwritten, "norms are kept where rows lie in the order of the tokens",
     [](const scenario& s, family) {
       return s[norms_axis] > 0 && s[layout_axis] >= 0 && !keeps_norms(s[layout_axis]);
     }},
    {verdict::unwritten, "exact attention by itself has no plan, observer or settings",
     [](const scenario& s, family f) {
       return f == family::exact && (s[executor_axis] >= one_share || any(s[observer_axis]) || any(s[promise_axis]) ||
                                     any(s[scale_axis]) || any(s[ends_axis]) || any(s[rule_axis]));
     }},
    {verdict::costly, "", [](const scenario& s, family) { return too_large(s); }},
    // What is refused.
    {verdict::refused, "a store is attended whole",
     [](const scenario& s, family f) { return f == family::store && (ordered(s) || s[softcap_axis] == 1); }},
    {verdict::refused, "store",
     [](const scenario& s, family f) { return f != family::store && s[layout_axis] == shuffled && ordered(s); }},
};

}  // namespace

std::span<const rule> rules() { return table; }

}  // namespace vattn::product
