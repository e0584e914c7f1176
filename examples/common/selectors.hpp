// The selectors by name: what they are, and how an empty index of each is made for a KV head.
#pragma once

#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "common/any_index.hpp"

namespace vattn::examples {

/// What an index may need to know before its first key.
struct index_request {
  index_t dim = 0;
  int bits = 4;                 ///< of a coordinate, for codes
  std::uint64_t seed = 1;       ///< rotations, hyperplanes, k-means
  std::vector<float> centre{};  ///< mean key of the prefill, [dim]
  std::vector<float> keys{};    ///< some keys of the prefill, [any, dim], for calibration
  std::string weights{};        ///< bytes of a file of learned weights
};

using index_variant =
    std::variant<any_index<score_says::order>, any_index<score_says::estimate>, any_index<score_says::bound>>;

struct selector_entry {
  std::string name;
  std::string text;                                         ///< one line: what it does, its source
  std::function<index_variant(const index_request&)> make;  ///< none: needs no index
  bool learned = false;                                     ///< needs index_request::weights
};

/// Learns from the prefill's keys.
template <class Index>
void train(Index& index, const index_request& r) {
  const auto count = static_cast<index_t>(r.keys.size()) / std::max<index_t>(1, r.dim);
  const kv_shape shape{.n_batch = 1, .n_kv_heads = 1, .n_tokens = count, .dk = r.dim, .dv = r.dim};
  index.train(contiguous_kv(r.keys.data(), r.keys.data(), shape).head(0, 0));
}

/// In the order of a list that a person reads.
[[nodiscard]] inline const std::vector<selector_entry>& selector_catalogue() {
  using order = any_index<score_says::order>;
  using estimate = any_index<score_says::estimate>;
  static const std::vector<selector_entry> all{
      {"exact", "every key is read: the oracle ranking, by what a token can move the output", nullptr},
      {"streaming-llm", "sinks and window alone, nothing is ranked (arXiv 2309.17453)", nullptr},
      {"codes", "rotated keys of --bits 1, 2, 4 or 8 a coordinate, with error bounds (after RaBitQ, SIGMOD 2024)",
       [](const index_request& r) -> index_variant {
         switch (r.bits) {
           case 1:
             return estimate(sketch::key_codes<1>(r.dim, r.seed));
           case 2:
             return estimate(sketch::key_codes<2>(r.dim, r.seed));
           case 8:
             return estimate(sketch::key_codes<8>(r.dim, r.seed));
           default:
             return estimate(sketch::key_codes<4>(r.dim, r.seed));
         }
       }},
      {"product-codes",
       "learned product codes of --bits 1 or 2 a coordinate, trained on the prefill (docs/sketches.md)",
       [](const index_request& r) -> index_variant {
         sketch::product_codes codes(r.dim, std::max<index_t>(1, r.bits * r.dim / 6), {.seed = r.seed});
         train(codes, r);
         return estimate(std::move(codes));
       }},
      {"pq-cache", "2 sub-vectors of 6 bits, trained on the prefill (arXiv 2407.12820)",
       [](const index_request& r) -> index_variant {
         select::pq_cache index(r.dim, 2, 6, {.seed = r.seed});
         train(index, r);
         return order(std::move(index));
       }},
      {"quest", "bounds of pages of 16 tokens from the extremes of their keys (arXiv 2406.10774)",
       [](const index_request& r) -> index_variant { return any_index<score_says::bound>(select::quest(r.dim)); }},
      {"double-sparsity", "a quarter of the channels at 4 bits, chosen by the size of the keys (arXiv 2408.07092)",
       [](const index_request& r) -> index_variant {
         return order(select::double_sparsity(select::heavy_channels({}, r.keys, r.dim, (r.dim + 3) / 4)));
       }},
      {"simhash", "32 random sign bits; hash_attention untrained (arXiv 2412.14468)",
       [](const index_request& r) -> index_variant {
         return order(select::hash_attention(select::simhash_map(r.dim, 32, r.seed)));
       }},
      {"hash-attention", "learned bit signatures from --weights FILE (arXiv 2412.14468)",
       [](const index_request& r) -> index_variant {
         select::learned_map map;
         if (const status ok = map.load(std::as_bytes(std::span(r.weights))); !ok)
           throw std::runtime_error(ok.message());
         if (map.dim() != r.dim)
           throw std::runtime_error("HashAttention weights: they are for heads of " + std::to_string(map.dim()) +
                                    ", the keys' are of " + std::to_string(r.dim));
         return order(select::hash_attention(std::move(map)));
       },
       true},
      {"magic-pig", "collisions in 150 hash tables of 10 sign bits (arXiv 2410.16179)",
       [](const index_request& r) -> index_variant {
         return order(select::magic_pig(r.dim, 10, 150, r.seed, r.centre));
       }},
      {"socket", "soft collisions in 60 hash tables of 10 sign bits (arXiv 2602.06283)",
       [](const index_request& r) -> index_variant {
         return order(select::socket(r.dim, 10, 60, 0.3, r.seed, r.centre));
       }},
      {"random", "scores that know nothing: the baseline",
       [](const index_request& r) -> index_variant { return order(select::random_ranking(r.seed)); }},
  };
  return all;
}

[[nodiscard]] inline const selector_entry* find_selector(const std::string& name) {
  for (const selector_entry& entry : selector_catalogue()) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

/// What a selector may learn from a prefill of keys: their mean, and up to 1024 of them.
template <kv_head Head>
[[nodiscard]] index_request prefill_of(const Head& head, int bits, std::uint64_t seed) {
  using kernel::load;
  index_request r{.dim = head.dk(), .bits = bits, .seed = seed};
  const auto dim = static_cast<std::size_t>(r.dim);
  std::vector<double> sum(dim);
  std::vector<float> key(dim);
  const index_t stride = std::max<index_t>(1, head.size() / 1024);
  for (index_t i = 0; i < head.size(); ++i) {
    load(head.key(i), key.data());
    for (std::size_t j = 0; j < dim; ++j) sum[j] += static_cast<double>(key[j]);
    if (i % stride == 0 && r.keys.size() < 1024 * dim) r.keys.insert(r.keys.end(), key.begin(), key.end());
  }
  for (const double x : sum)
    r.centre.push_back(static_cast<float>(x / static_cast<double>(std::max<index_t>(1, head.size()))));
  return r;
}

}  // namespace vattn::examples
