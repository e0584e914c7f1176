// What a cache may keep of its values, so that a ranking need not read them: their mean and distances from it.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vattn/vattn.hpp"

namespace vattn::examples {

struct value_norms {
  index_t capacity = 0;
  std::vector<float> centres;    // [n_batch, n_kv_heads, dv]
  std::vector<float> distances;  // [n_batch, n_kv_heads, capacity]

  [[nodiscard]] row_norms view() const {
    return {.values = distances.data(), .value_centres = centres.data(), .per_head = capacity};
  }

  /// Distances of the tokens [first, n) of every head, n <= capacity, from the centres that were measured before.
  template <kv_cache KV>
  void measure(const KV& cache, index_t first, index_t n) {
    const auto width = static_cast<std::size_t>(cache.dv());
    for (index_t h = 0; h < cache.n_batch() * cache.n_kv_heads(); ++h) {
      const auto head = cache.head(h / cache.n_kv_heads(), h % cache.n_kv_heads());
      const float* const centre = centres.data() + static_cast<std::size_t>(h) * width;
      using kernel::squared_distance;
      for (index_t i = first; i < n; ++i)
        distances[static_cast<std::size_t>(h * capacity + i)] = std::sqrt(squared_distance(head.value(i), centre));
    }
  }
};

/// One pass over V for the mean of each head, one for the distances, with room for `capacity` tokens. All sequences
/// must be of length n.
template <kv_cache KV>
[[nodiscard]] value_norms measure_values(const KV& cache, index_t n, index_t capacity = 0) {
  const index_t heads = cache.n_batch() * cache.n_kv_heads();
  const auto width = static_cast<std::size_t>(cache.dv());
  value_norms norms;
  norms.capacity = std::max(n, capacity);
  norms.centres.resize(static_cast<std::size_t>(heads) * width);
  norms.distances.resize(static_cast<std::size_t>(heads * norms.capacity));
  for (index_t h = 0; h < heads; ++h) {
    const auto head = cache.head(h / cache.n_kv_heads(), h % cache.n_kv_heads());
    float* const centre = norms.centres.data() + static_cast<std::size_t>(h) * width;
    using kernel::axpy;
    for (index_t i = 0; i < n; ++i) axpy(1 / static_cast<float>(n), head.value(i), centre);
  }
  norms.measure(cache, 0, n);
  return norms;
}

}  // namespace vattn::examples
