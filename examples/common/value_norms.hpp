// What a cache may keep of its values, so that a ranking need not read them: their mean and distances from it.
#pragma once

#include <cmath>
#include <vector>

#include "vattn/vattn.hpp"

namespace vattn::examples {

struct value_norms {
  std::vector<float> centres;    // [n_batch, n_kv_heads, dv]
  std::vector<float> distances;  // [n_batch, n_kv_heads, n]

  [[nodiscard]] row_norms view() const { return {.values = distances.data(), .value_centres = centres.data()}; }
};

/// One pass over V for the mean of each head, one for the distances. All sequences must be of length n.
template <kv_cache KV>
[[nodiscard]] value_norms measure_values(const KV& cache, index_t n) {
  const index_t heads = cache.n_batch() * cache.n_kv_heads();
  const auto width = static_cast<std::size_t>(cache.dv()), length = static_cast<std::size_t>(n);
  value_norms norms;
  norms.centres.resize(static_cast<std::size_t>(heads) * width);
  norms.distances.resize(static_cast<std::size_t>(heads) * length);
  for (index_t h = 0; h < heads; ++h) {
    const auto head = cache.head(h / cache.n_kv_heads(), h % cache.n_kv_heads());
    float* const centre = norms.centres.data() + static_cast<std::size_t>(h) * width;
    using kernel::axpy, kernel::squared_distance;
    for (index_t i = 0; i < n; ++i) axpy(1 / static_cast<float>(n), head.value(i), centre);
    for (index_t i = 0; i < n; ++i)
      norms.distances[static_cast<std::size_t>(h) * length + static_cast<std::size_t>(i)] =
          std::sqrt(squared_distance(head.value(i), centre));
  }
  return norms;
}

}  // namespace vattn::examples
