// Random hyperplanes: the sign bits from which locality-sensitive hashes are made.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "vattn/base/floating_point.hpp"
#include "vattn/base/philox.hpp"
#include "vattn/base/room.hpp"
#include "vattn/kernel/row_size.hpp"
#include "vattn/kernel/units.hpp"
#include "vattn/sketch/recent_keys.hpp"

namespace vattn::VATTN_ABI::sketch {

/// `count` directions of independent N(0, 1) coordinates, a function of (dim, count, seed) alone. Two vectors at an
/// angle θ lie on the same side of one with probability 1 − θ/π (Charikar, STOC 2002). Copies share the memory,
/// count·dim floats.
class hyperplanes {
 public:
  hyperplanes() = default;
  hyperplanes(index_t dim, index_t count, std::uint64_t seed) : dim_(dim), count_(count), seed_(seed) {
    const kernel::floating_point_scope standard;
    auto normals = std::make_shared<std::vector<float>>(static_cast<std::size_t>(dim * count));
    random_stream random({.seed = seed, .layer = purpose}, 0);
    for (float& x : *normals) x = static_cast<float>(random.normal());
    normals_ = std::move(normals);
  }

  [[nodiscard]] index_t dim() const noexcept { return dim_; }
  [[nodiscard]] index_t count() const noexcept { return count_; }
  [[nodiscard]] std::uint64_t seed() const noexcept { return seed_; }

  /// out[i] = ⟨normal i, x⟩; x [dim], out [count].
  void project(const float* x, float* out) const noexcept {
    const kernel::const_float_map v(x, static_cast<Eigen::Index>(dim_));
    for (index_t i = 0; i < count_; ++i) out[i] = kernel::const_float_map(normals_->data() + i * dim_, v.size()).dot(v);
  }

 private:
  static constexpr std::uint32_t purpose = 0x48595045;  // keeps these apart from any layer's draws
  index_t dim_ = 0, count_ = 0;
  std::uint64_t seed_ = 0;
  std::shared_ptr<const std::vector<float>> normals_;
};

/// Hash tables over keys: of each key, `tables` buckets of `bits` sign bits each, bit p of table l the side of
/// hyperplane l·bits + p. Keys are centred by a mean that is given once (softmax does not see it, angles do).
/// What MagicPIG and SOCKET share. 2·tables bytes a key.
class hash_tables {
 public:
  hash_tables() = default;
  /// bits 1 to 16; `centre` [dim], or empty for none.
  hash_tables(index_t dim, index_t bits, index_t tables, std::uint64_t seed, std::vector<float> centre)
      : bits_(bits), tables_(tables), planes_(dim, bits * tables, seed), centre_(std::move(centre)) {
    centre_.resize(static_cast<std::size_t>(dim));
    allocate();
  }

  [[nodiscard]] index_t size() const noexcept { return tables_ ? static_cast<index_t>(buckets_.size()) / tables_ : 0; }
  [[nodiscard]] index_t bits() const noexcept { return bits_; }
  [[nodiscard]] index_t tables() const noexcept { return tables_; }
  [[nodiscard]] index_t dim() const noexcept { return planes_.dim(); }
  [[nodiscard]] std::size_t bytes() const noexcept { return buckets_.size() * sizeof(std::uint16_t); }
  [[nodiscard]] recent_keys& recent() noexcept { return recent_; }
  /// Projections of a query on all hyperplanes.
  [[nodiscard]] std::size_t projections() const noexcept { return static_cast<std::size_t>(planes_.count()); }
  [[nodiscard]] const std::vector<float>& centre() const noexcept { return centre_; }

  /// Adds a key; returns the norm of what is left of it after centring. A key that is not of dim() elements is not
  /// taken, and -1 returned.
  template <kernel::row R>
  float append(const R& key) {
    using kernel::load;
    if (!kernel::has_size(key, dim())) return -1;
    const kernel::floating_point_scope standard;
    vattn::detail::make_room(buckets_, static_cast<std::size_t>(tables_));
    load(key, key_.data());
    recent_.add(size(), key_);
    for (std::size_t j = 0; j < key_.size(); ++j) key_[j] -= centre_[j];
    planes_.project(key_.data(), projected_.data());
    for (index_t l = 0; l < tables_; ++l) buckets_.push_back(static_cast<std::uint16_t>(bucket(projected_.data(), l)));
    return kernel::norm(kernel::const_float_map(key_.data(), static_cast<Eigen::Index>(key_.size())));
  }
  void truncate(index_t n) {
    if (n < size()) buckets_.resize(static_cast<std::size_t>(std::max<index_t>(n, 0) * tables_));
  }

  void project(const float* query, float* out) const noexcept { planes_.project(query, out); }
  [[nodiscard]] std::uint32_t bucket(const float* projected, index_t table) const noexcept {
    std::uint32_t b = 0;
    for (index_t p = 0; p < bits_; ++p) b |= static_cast<std::uint32_t>(projected[table * bits_ + p] >= 0) << p;
    return b;
  }
  /// The buckets of a token, [tables].
  [[nodiscard]] const std::uint16_t* of(index_t token) const noexcept { return buckets_.data() + token * tables_; }

  template <class Archive>
  void archive(Archive& a) {
    index_t dim = planes_.dim();
    std::uint64_t seed = planes_.seed();
    a(bits_, tables_, dim, seed, centre_, buckets_);
    // The planes are made anew, so a file must not be able to ask for more of them than anybody has: 1 GiB.
    const bool sane = bits_ >= 1 && bits_ <= 16 && tables_ >= 0 && tables_ <= 4096 && dim >= 0 && dim <= 65536 &&
                      bits_ * tables_ * dim <= index_t{1} << 28 && centre_.size() == static_cast<std::size_t>(dim);
    if (!sane) {
      bits_ = 0;  // invalid
    } else if (dim != planes_.dim() || seed != planes_.seed() || bits_ * tables_ != planes_.count()) {
      planes_ = hyperplanes(dim, bits_ * tables_, seed);
      allocate();
    }
  }
  [[nodiscard]] bool valid() const noexcept {
    return bits_ >= 1 && centre_.size() == static_cast<std::size_t>(dim()) &&
           std::all_of(buckets_.begin(), buckets_.end(), [this](std::uint16_t b) { return b >> bits_ == 0; }) &&
           (tables_ == 0 ? buckets_.empty() : buckets_.size() % static_cast<std::size_t>(tables_) == 0);
  }

 private:
  void allocate() {
    key_.resize(static_cast<std::size_t>(planes_.dim()));
    projected_.resize(projections());
  }

  index_t bits_ = 0, tables_ = 0;
  hyperplanes planes_;
  std::vector<float> centre_, key_, projected_;
  std::vector<std::uint16_t> buckets_;  // [n, tables]
  recent_keys recent_;
};

}  // namespace vattn::VATTN_ABI::sketch

#include "vattn/macros_pop.hpp"
