// An index beside a cache: a code of each key and the distance of each value, by cell, from which samples are chosen.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

#include "vattn/base/floating_point.hpp"
#include "vattn/base/status.hpp"
#include "vattn/index/cell_codes.hpp"
#include "vattn/index/index_bits.hpp"
#include "vattn/kv/view.hpp"

namespace vattn::VATTN_ABI {

struct index_shape {
  index_t n_kv_heads = 1;
  index_t dk = 0, dv = 0;
  int bits = 0;            ///< a coordinate of a key, 1 to 4; 0: chosen by `build`
  std::uint64_t seed = 0;  ///< of the codes' rotations
};

/// Codes for one layer's KV heads and one sequence, or a whole cache of cells: cell c is token c of the views that it
/// is built from and used with. Holds nothing of the rows: 37 bytes a cell and KV head at 2 bits and head size 128, a
/// fourteenth of a cache of 16 bits. A row that has no code here costs a call time, never its promise: rows that a
/// query sees and the index does not know are read for certain. A code that no longer says what the row is (a cell that
/// was written again without `update`) is what callers must avoid; rows that are read anyway are checked for it.
///
/// What a cell's code is depends on its rows and on the units that `build` took from a sample of all rows, not on what
/// else was written in which order. `update` allocates where cells are added (amortised; `reserve` to avoid that).
/// Errors are statuses; after one nothing has changed but what the message says. Not for concurrent writers; reading
/// from many threads is fine.
class kv_index {
 public:
  kv_index() = default;
  kv_index(kv_index&&) noexcept = default;
  kv_index& operator=(kv_index&&) noexcept = default;
  kv_index(const kv_index&) = delete;  // it is large: save() and load() make another
  kv_index& operator=(const kv_index&) = delete;
  explicit kv_index(const index_shape& shape) : shape_(shape) {
    if (!valid_shape()) return;
    key_.resize(static_cast<std::size_t>(shape.dk));
    mean_.resize(key_.size());
    centres_.resize(static_cast<std::size_t>(shape.n_kv_heads * shape.dv));
    heads_ = make_heads(shape.bits == 0 ? default_bits : shape.bits);
  }

  [[nodiscard]] const index_shape& shape() const noexcept { return shape_; }
  [[nodiscard]] int bits() const noexcept { return heads_.empty() ? 0 : heads_[0].layout().bits; }
  /// Cells, whether they have codes or not.
  [[nodiscard]] index_t size() const noexcept { return heads_.empty() ? 0 : heads_[0].size(); }
  /// Cells from whose rows the units were taken; 0: not built yet.
  [[nodiscard]] index_t built_from() const noexcept { return built_from_; }
  [[nodiscard]] const cell_codes& codes(index_t h) const noexcept { return heads_[static_cast<std::size_t>(h)]; }
  [[nodiscard]] const float* value_centre(index_t h) const noexcept { return centres_.data() + h * shape_.dv; }
  [[nodiscard]] std::size_t bytes() const noexcept {
    std::size_t bytes = centres_.size() * sizeof(float);
    for (const cell_codes& c : heads_) bytes += c.bytes();
    return bytes;
  }
  [[nodiscard]] status validate() const noexcept {
    if (valid_shape() && !heads_.empty()) return {};
    return status::error(errc::invalid_argument,
                         "the index has %lld KV heads of sizes %lld and %lld and %d bits: give heads and sizes of at "
                         "least 1, and 1 to 4 bits, or 0 to have them chosen",
                         ll(shape_.n_kv_heads), ll(shape_.dk), ll(shape_.dv), shape_.bits);
  }

  [[nodiscard]] status reserve(index_t cells) noexcept {
    if (status s = validate(); !s) return s;
    for (cell_codes& c : heads_) {
      if (!c.reserve(cells)) return no_memory(cells);
    }
    return {};
  }

  /// Codes of all cells of a cache (batch `b`), in units taken from up to `sample` of them. O(n). Where the shape
  /// leaves the bits open they are chosen from `bits_predictor::rows` of the rows: 2, or more where keys that ask in
  /// the place of queries want them.
  template <kv_cache KV>
  [[nodiscard]] status build(const KV& cache, index_t b = 0) noexcept {
    return build(cache, tensor_view<const float, 4>(), 0.0f, b);
  }

  /// The same with a sample of queries [n_batch, T, n_q_heads, dk], such as the prompt's last ones, and the scale of
  /// their logits: bits that are open are then those of the least predicted time of a step.
  template <kv_cache KV, class Q>
  [[nodiscard]] status build(const KV& cache, const tensor_view<const Q, 4>& queries, float scale,
                             index_t b = 0) noexcept {
    if (status s = check(cache, b); !s) return s;
    const kernel::floating_point_scope standard;
    if (queries && (queries.extents[0] != cache.n_batch() || queries.extents[3] != cache.dk() ||
                    queries.extents[2] % cache.n_kv_heads() != 0 || !(std::abs(scale) < 1e30f))) {
      return status::error(
          errc::invalid_argument,
          "queries [%lld, %lld, %lld, %lld] and a scale of %g: give [n_batch, T, n_q_heads, dk] of the "
          "cache's, and a finite scale",
          ll(queries.extents[0]), ll(queries.extents[1]), ll(queries.extents[2]), ll(queries.extents[3]),
          static_cast<double>(scale));
    }
    if (status s = detail::check_elements("queries", queries); !s) return s;
    const index_t n = cache.head(b, 0).size();
    if (shape_.bits == 0) {
      const int chosen = choose_bits(cache, queries, scale, b);
      if (chosen != bits() && !remake_heads(chosen, n)) return no_memory(n);
    }
    if (status s = reserve(n); !s) return s;  // before anything is forgotten
    clear();
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) measure(cache.head(b, h), h);
    built_from_ = n;
    return update(cache, 0, n, b);
  }

  /// Codes of the cells [size(), n) of a cache, once the engine has written them. An index that was not built, or only
  /// from few cells, is built again each time there are twice as many, up to 4096.
  template <kv_cache KV>
  [[nodiscard]] status append_from(const KV& cache, index_t b = 0) noexcept {
    if (status s = check(cache, b); !s) return s;
    const index_t n = cache.head(b, 0).size();
    if (n >= 2 * built_from_ && built_from_ < sample) return build(cache, b);
    return update(cache, size(), n, b);
  }

  /// Codes of the cells [first, last) of a cache again, whatever they held: new ones, and ones that were overwritten.
  template <kv_cache KV>
  [[nodiscard]] status update(const KV& cache, index_t first, index_t last, index_t b = 0) noexcept {
    if (status s = check(cache, b); !s) return s;
    if (first < 0 || last > cache.head(b, 0).size()) {
      return status::error(errc::invalid_argument, "cells [%lld, %lld) of a cache of %lld: give some that it has",
                           ll(first), ll(last), ll(cache.head(b, 0).size()));
    }
    if (last > size() && !grow(last)) return no_memory(last);
    const kernel::floating_point_scope standard;
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
      const auto head = cache.head(b, h);
      for (index_t cell = first; cell < last; ++cell) write(h, cell, head.key(cell), head.value(cell));
    }
    return {};
  }

  /// The code of one cell from its rows: keys and values as functions of the KV head that return rows.
  template <class Key, class Value>
  [[nodiscard]] status set(index_t cell, Key&& key, Value&& value) noexcept {
    if (status s = validate(); !s) return s;
    if (cell < 0 || cell >= (index_t{1} << 31))
      return status::error(errc::invalid_argument, "cell %lld: give one of 0 to 2^31 - 1", ll(cell));
    if constexpr (requires { key(cell).size(), value(cell).size(); }) {  // rows of a user's own may not say
      for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
        const auto dk = static_cast<index_t>(key(h).size()), dv = static_cast<index_t>(value(h).size());
        if (dk == shape_.dk && dv == shape_.dv) continue;
        return status::error(errc::invalid_argument,
                             "a key of %lld and a value of %lld elements, the index is of %lld and %lld", ll(dk),
                             ll(dv), ll(shape_.dk), ll(shape_.dv));
      }
    }
    if (cell >= size() && !grow(cell + 1)) return no_memory(cell + 1);
    const kernel::floating_point_scope standard;
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) write(h, cell, key(h), value(h));
    return {};
  }

  /// Cells [first, last) are empty: no code until they are written again. Queries that see them read them for certain.
  void erase(index_t first, index_t last) noexcept {
    for (cell_codes& c : heads_) {
      for (index_t cell = std::max<index_t>(0, first); cell < std::min(last, c.size()); ++cell) c.erase(cell);
    }
  }
  /// Forgets the cells from n on.
  void truncate(index_t n) noexcept {
    for (cell_codes& c : heads_) {
      if (n < c.size()) static_cast<void>(c.resize(std::max<index_t>(0, n)));
    }
  }
  void clear() noexcept { truncate(0); }

  static constexpr std::string_view format() noexcept { return "kv index v2"; }
  template <class Archive>
  void archive(Archive& a) {
    std::uint64_t n = heads_.size();
    a(shape_, built_from_, centres_, n);
    if (n > 65536 || n != static_cast<std::uint64_t>(std::max<index_t>(0, shape_.n_kv_heads))) n = 0;
    heads_.resize(static_cast<std::size_t>(n));
    for (cell_codes& c : heads_) c.archive(a);
    key_.resize(static_cast<std::size_t>(std::clamp<index_t>(shape_.dk, 0, index_t{1} << 20)));
    mean_.resize(key_.size());
  }
  [[nodiscard]] bool valid() const noexcept {
    if (heads_.empty()) return !valid_shape() && centres_.empty();
    bool ok = valid_shape() && built_from_ >= 0 && static_cast<index_t>(heads_.size()) == shape_.n_kv_heads &&
              static_cast<index_t>(centres_.size()) == shape_.n_kv_heads * shape_.dv &&
              static_cast<index_t>(key_.size()) == shape_.dk;
    for (const cell_codes& c : heads_) {
      ok = ok && c.valid() && c.dim() == shape_.dk && c.size() == heads_[0].size() &&
           c.layout().bits == heads_[0].layout().bits;
    }
    return ok;
  }

  /// Cells of which units and means are taken, spread over all.
  static constexpr index_t sample = 4096;

 private:
  static constexpr int default_bits = 2;

  static constexpr long long ll(index_t value) noexcept { return static_cast<long long>(value); }
  [[nodiscard]] bool valid_shape() const noexcept {
    return shape_.n_kv_heads >= 1 && shape_.n_kv_heads <= 65536 && shape_.dk >= 1 && shape_.dk <= (index_t{1} << 20) &&
           shape_.dv >= 1 && shape_.dv <= (index_t{1} << 20) && shape_.bits >= 0 &&
           shape_.bits <= cell_codes::most_bits;
  }
  [[nodiscard]] std::vector<cell_codes> make_heads(int bits) const {
    std::vector<cell_codes> heads;
    heads.reserve(static_cast<std::size_t>(shape_.n_kv_heads));
    for (index_t h = 0; h < shape_.n_kv_heads; ++h)
      heads.emplace_back(shape_.dk, bits, shape_.seed + static_cast<std::uint64_t>(h));
    return heads;
  }

  // Heads of so many bits with room for so many cells; as it was where there is no memory.
  [[nodiscard]] bool remake_heads(int bits, index_t cells) noexcept {
#if VATTN_HAS_EXCEPTIONS
    try {
#endif
      std::vector<cell_codes> heads = make_heads(bits);
      for (cell_codes& c : heads) {
        if (!c.reserve(cells)) return false;
      }
      heads_.swap(heads);
      return true;
#if VATTN_HAS_EXCEPTIONS
    } catch (...) {
      return false;
    }
#endif
  }

  // More cells in all heads, or in none: a head with fewer than the others would be read past its end.
  [[nodiscard]] bool grow(index_t cells) noexcept {
    const index_t had = size();
    for (cell_codes& c : heads_) {
      if (c.resize(cells)) continue;
      truncate(had);
      return false;
    }
    return true;
  }

  // Of the heads' predicted times together, a few heads and queries of each.
  template <kv_cache KV, class Q>
  [[nodiscard]] int choose_bits(const KV& cache, const tensor_view<const Q, 4>& queries, float scale,
                                index_t b) noexcept {
    if (cache.head(b, 0).size() < sample) return default_bits;
#if VATTN_HAS_EXCEPTIONS
    try {
#endif
      times_by_bits sum{};
      const index_t heads = std::min<index_t>(4, shape_.n_kv_heads);
      for (index_t i = 0; i < heads; ++i) {
        const index_t h = i * shape_.n_kv_heads / heads;
        bits_predictor predict;
        if (!predict.take(cache.head(b, h))) continue;
        if (!queries || queries.extents[1] * queries.extents[2] == 0) {
          predict.add_keys(1 / std::sqrt(static_cast<float>(shape_.dk)), sum);
          continue;
        }
        const index_t group = queries.extents[2] / shape_.n_kv_heads, count = queries.extents[1] * group;
        const index_t asked = std::min(count, bits_predictor::queries);
        for (index_t j = 0; j < asked; ++j) {
          const index_t at = j * count / asked;
          for (index_t d = 0; d < shape_.dk; ++d)
            key_[static_cast<std::size_t>(d)] =
                scale * static_cast<float>(queries(b, at / group, h * group + at % group, d));
          predict.add(key_.data(), sum);
        }
      }
      int best = default_bits;
      for (int bits = queries ? 1 : default_bits; bits <= cell_codes::most_bits; ++bits) {
        const auto time = [&](int of) { return sum[static_cast<std::size_t>(of - 1)]; };
        // What keys say of queries is a guess.
        if (time(bits) < (queries ? 0.97 : 0.85) * time(best)) best = bits;
      }
      return best;
#if VATTN_HAS_EXCEPTIONS
    } catch (...) {
      return default_bits;
    }
#endif
  }

  template <kv_cache KV>
  [[nodiscard]] status check(const KV& cache, index_t b) const noexcept {
    if (status s = validate(); !s) return s;
    if (status s = cache.validate(); !s) return s;
    if (b < 0 || b >= cache.n_batch() || cache.n_kv_heads() != shape_.n_kv_heads || cache.dk() != shape_.dk ||
        cache.dv() != shape_.dv) {
      return status::error(errc::invalid_argument,
                           "the index is of %lld KV heads of sizes %lld and %lld, the cache has %lld of sizes %lld and "
                           "%lld in %lld sequences: make one of the same shape for each sequence",
                           ll(shape_.n_kv_heads), ll(shape_.dk), ll(shape_.dv), ll(cache.n_kv_heads()), ll(cache.dk()),
                           ll(cache.dv()), ll(cache.n_batch()));
    }
    if (cache.head(b, 0).size() >= (index_t{1} << 31))
      return status::error(errc::invalid_argument, "%lld cells: an index ends at 2^31", ll(cache.head(b, 0).size()));
    return {};
  }
  [[nodiscard]] static status no_memory(index_t cells) noexcept {
    return status::error(errc::out_of_memory, "no memory for the codes of %lld cells: what was there is unchanged",
                         ll(cells));
  }

  // Means of keys and values, and units, from cells spread over all. What is not finite is left out.
  template <kv_head Head>
  void measure(const Head& head, index_t h) noexcept {
    using kernel::axpy, kernel::load;
    cell_codes& codes = heads_[static_cast<std::size_t>(h)];
    const index_t n = head.size(), count = std::min(n, sample);
    const auto cell = [&](index_t i) { return i * n / count; };
    const auto usable = [&](index_t c) {
      return kernel::norm_of(head.key(c)) < 1e30f && kernel::norm_of(head.value(c)) < 1e30f;
    };
    float* centre = centres_.data() + h * shape_.dv;
    std::fill_n(centre, shape_.dv, 0.0f);
    std::fill(mean_.begin(), mean_.end(), 0.0f);
    index_t used = 0;
    for (index_t i = 0; i < count; ++i) {
      if (!usable(cell(i))) continue;
      axpy(1.0f, head.key(cell(i)), mean_.data());
      axpy(1.0f, head.value(cell(i)), centre);
      ++used;
    }
    const float share = used > 0 ? 1 / static_cast<float>(used) : 0.0f;
    for (float& x : mean_) x *= share;
    for (index_t j = 0; j < shape_.dv; ++j) centre[j] *= share;
    codes.measure_from(mean_, {});
    code_units units{0, 0, 0};
    double distance = 0;
    for (index_t i = 0; i < count; ++i) {
      if (!usable(cell(i))) continue;
      load(head.key(cell(i)), key_.data());
      const cell_codes::measured m = codes.measure(key_);
      units.scale = std::max(units.scale, m.scale);
      units.radius = std::max(units.radius, m.radius);
      distance += static_cast<double>(kernel::distance_of(head.value(cell(i)), centre));
    }
    // Room for keys that come later.
    units.scale *= 2, units.radius *= 2;
    units.reach = static_cast<float>(distance * static_cast<double>(share));
    if (!(distance > 0)) {  // all values are equal: any length of their size will do
      for (index_t j = 0; j < shape_.dv; ++j) units.reach = std::max(units.reach, std::abs(centre[j]));
    }
    codes.measure_from(mean_, units);
  }

  template <kernel::row K, kernel::row V>
  void write(index_t h, index_t cell, const K& key, const V& value) noexcept {
    using kernel::load;
    load(key, key_.data());
    static_cast<void>(heads_[static_cast<std::size_t>(h)].set(cell, key_, kernel::distance_of(value, value_centre(h))));
  }

  index_shape shape_{};
  index_t built_from_ = 0;
  std::vector<cell_codes> heads_;  // [n_kv_heads]
  std::vector<float> centres_;     // [n_kv_heads, dv]
  std::vector<float> key_, mean_;  // [dk]: the key at hand, the mean of a head's keys
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
