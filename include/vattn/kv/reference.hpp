// A cache by reference, where views are taken by value and the cache is what owns the rows.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/kv/view.hpp"

namespace vattn::VATTN_ABI {

/// A kv_cache that is another one, which must outlive it: what a plan's `run_arguments` take for a shuffled_store.
template <kv_cache KV>
class kv_reference {
 public:
  explicit kv_reference(const KV& cache) noexcept : cache_(&cache) {}

  [[nodiscard]] index_t n_batch() const noexcept { return cache_->n_batch(); }
  [[nodiscard]] index_t n_kv_heads() const noexcept { return cache_->n_kv_heads(); }
  [[nodiscard]] index_t dk() const noexcept { return cache_->dk(); }
  [[nodiscard]] index_t dv() const noexcept { return cache_->dv(); }
  [[nodiscard]] auto head(index_t b, index_t h) const noexcept { return cache_->head(b, h); }
  [[nodiscard]] status validate() const noexcept { return cache_->validate(); }

 private:
  const KV* cache_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
