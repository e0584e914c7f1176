// HashAttention: bit signatures of keys and queries, compared by how many bits they share.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "vattn/base/floating_point.hpp"
#include "vattn/base/status.hpp"
#include "vattn/kernel/row_size.hpp"
#include "vattn/sketch/hyperplanes.hpp"
#include "vattn/sketch/recent_keys.hpp"

namespace vattn::VATTN_ABI::select {

/// Random hyperplanes (SimHash): the untrained form, the same map for keys and queries. `bits` is cut to [0, 64].
class simhash_map {
 public:
  simhash_map() = default;
  explicit simhash_map(index_t dim, index_t bits = 32, std::uint64_t seed = 0)
      : planes_(std::max<index_t>(dim, 0), std::clamp<index_t>(bits, 0, 64), seed) {}

  [[nodiscard]] index_t dim() const noexcept { return planes_.dim(); }
  [[nodiscard]] index_t bits() const noexcept { return planes_.count(); }
  [[nodiscard]] std::size_t scratch_size() const noexcept { return static_cast<std::size_t>(bits()); }
  void key(const float* x, float* out, float*) const noexcept { planes_.project(x, out); }
  void query(const float* x, float* out, float*) const noexcept { planes_.project(x, out); }

  template <class Archive>
  void archive(Archive& a) {
    index_t dim = planes_.dim(), bits = planes_.count();
    std::uint64_t seed = planes_.seed();
    a(dim, bits, seed);
    if (dim < 0 || dim > 65536 || bits < 0 || bits > 64) dim = bits = 0;
    if (dim != planes_.dim() || bits != planes_.count() || seed != planes_.seed())
      planes_ = sketch::hyperplanes(dim, bits, seed);
  }

 private:
  sketch::hyperplanes planes_;
};

/// Learned maps of one KV head, one network for keys and one for queries: linear layers with SiLU between them, the
/// signs of the last layer's outputs are the bits. The query's network is given scale·q: divide its first layer's
/// weights by the scale if it was trained on q. The authors' code trains a pair for each query head, over keys
/// repeated for the heads of a group; here a group shares one pair, so with grouped queries train one a KV head.
///
/// Format of the weights, little-endian: "vattnha1", then for the keys' and for the queries' network: uint32 layers
/// (1 to 8), uint32 sizes[layers + 1] (sizes[0] the head size, the last the bits, equal in both networks, at most 64),
/// and for each layer float32 weight[out][in], bias[out].
class learned_map {
 public:
  learned_map() = default;

  /// Replaces the weights; on an error they are unchanged.
  [[nodiscard]] status load(std::span<const std::byte> bytes) {
    const auto bad = [](const char* what) {
      return status::error(errc::invalid_argument, "HashAttention weights: %s", what);
    };
    if (bytes.size() < 8 || std::memcmp(bytes.data(), "vattnha1", 8) != 0) return bad("no 'vattnha1' at the beginning");
    bytes = bytes.subspan(8);
    network nets[2];
    for (network& net : nets) {
      std::uint32_t layers = 0;
      if (!take(bytes, &layers, 1) || layers < 1 || layers > 8) return bad("the number of layers must be 1 to 8");
      net.sizes.resize(layers + 1);
      if (!take(bytes, net.sizes.data(), net.sizes.size())) return bad("cut short in the layers' sizes");
      std::size_t floats = 0;
      for (std::size_t l = 0; l < layers; ++l) {
        if (net.sizes[l] < 1 || net.sizes[l] > 65536 || net.sizes[l + 1] < 1 || net.sizes[l + 1] > 65536)
          return bad("a layer's size must be 1 to 65536");
        floats += (std::size_t{net.sizes[l]} + 1) * net.sizes[l + 1];
      }
      if (floats > bytes.size() / sizeof(float)) return bad("cut short in the weights");
      net.weights.resize(floats);
      static_cast<void>(take(bytes, net.weights.data(), floats));
      for (const float w : net.weights) {
        if (!std::isfinite(w)) return bad("a weight is not finite");
      }
    }
    if (!bytes.empty()) return bad("bytes are left after the last weight");
    if (nets[0].sizes.front() != nets[1].sizes.front() || nets[0].sizes.back() != nets[1].sizes.back())
      return bad("keys and queries must have the same head size and number of bits");
    if (nets[0].sizes.back() > 64) return bad("at most 64 bits");
    keys_ = std::move(nets[0]), queries_ = std::move(nets[1]);
    return {};
  }

  [[nodiscard]] index_t dim() const noexcept { return keys_.sizes.empty() ? 0 : index_t{keys_.sizes.front()}; }
  [[nodiscard]] index_t bits() const noexcept { return keys_.sizes.empty() ? 0 : index_t{keys_.sizes.back()}; }
  [[nodiscard]] std::size_t scratch_size() const noexcept { return 2 * std::max(keys_.widest(), queries_.widest()); }
  void key(const float* x, float* out, float* scratch) const noexcept { keys_.apply(x, out, scratch); }
  void query(const float* x, float* out, float* scratch) const noexcept { queries_.apply(x, out, scratch); }

  template <class Archive>
  void archive(Archive& a) {
    a(keys_.sizes, keys_.weights, queries_.sizes, queries_.weights);
    const auto agree = [](const network& x, const network& y) {
      if (x.sizes.empty() || y.sizes.empty()) return x.sizes.empty() && y.sizes.empty();
      return x.sizes.front() == y.sizes.front() && x.sizes.back() == y.sizes.back();
    };
    if (!keys_.valid() || !queries_.valid() || !agree(keys_, queries_) || bits() > 64) keys_ = queries_ = {};
  }

 private:
  struct network {
    std::vector<std::uint32_t> sizes;
    std::vector<float> weights;

    [[nodiscard]] std::size_t widest() const noexcept {
      return sizes.empty() ? 0 : std::size_t{*std::max_element(sizes.begin(), sizes.end())};
    }
    [[nodiscard]] bool valid() const noexcept {
      std::size_t floats = 0;
      for (std::size_t l = 0; l + 1 < sizes.size(); ++l) {
        if (sizes[l] < 1 || sizes[l] > 65536 || sizes[l + 1] < 1 || sizes[l + 1] > 65536) return false;
        floats += (std::size_t{sizes[l]} + 1) * sizes[l + 1];
      }
      return sizes.size() != 1 && floats == weights.size();
    }
    void apply(const float* x, float* out, float* scratch) const noexcept {
      const float* w = weights.data();
      const float* in = x;
      for (std::size_t l = 0; l + 1 < sizes.size(); ++l) {
        const auto n = static_cast<Eigen::Index>(sizes[l]), m = static_cast<Eigen::Index>(sizes[l + 1]);
        const bool last = l + 2 == sizes.size();
        float* to = last ? out : scratch + (l % 2) * widest();
        for (Eigen::Index i = 0; i < m; ++i) {
          const float z = kernel::const_float_map(w + i * n, n).dot(kernel::const_float_map(in, n)) + w[m * n + i];
          to[i] = last ? z : z / (1 + std::exp(-z));
        }
        w += (n + 1) * m;
        in = to;
      }
    }
  };

  template <class T>
  [[nodiscard]] static bool take(std::span<const std::byte>& bytes, T* to, std::size_t count) noexcept {
    if (count > bytes.size() / sizeof(T)) return false;
    if (count > 0) std::memcpy(to, bytes.data(), count * sizeof(T));
    bytes = bytes.subspan(count * sizeof(T));
    return true;
  }

  network keys_, queries_;
};

/// Score = minus the Hamming distance of the signatures of key and query. Source: HashAttention, arXiv 2412.14468,
/// 32 bits from a three-layer network a head. When to use: with weights trained for the model (learned_map), 8 bytes
/// a token rank well; untrained (simhash_map) they rank poorly, as any few random bits do.
template <class Map>
class hash_attention {
 public:
  static constexpr bool estimates = false;

  hash_attention() = default;
  explicit hash_attention(Map map) : map_(std::move(map)) { allocate(); }

  [[nodiscard]] index_t size() const noexcept { return static_cast<index_t>(signatures_.size()); }
  [[nodiscard]] std::size_t bytes() const noexcept { return signatures_.size() * sizeof(std::uint64_t); }
  [[nodiscard]] std::size_t scratch_size() const noexcept {
    return static_cast<std::size_t>(map_.bits()) + map_.scratch_size();
  }
  [[nodiscard]] std::uint64_t signature(index_t token) const noexcept {
    return signatures_[static_cast<std::size_t>(token)];
  }

  [[nodiscard]] index_t dim() const noexcept { return map_.dim(); }
  [[nodiscard]] recent_keys& recent() noexcept { return recent_; }

  /// A key that is not of dim() elements is not taken: calls then say that the index lags.
  template <kernel::row R>
  void append(const R& key) {
    using kernel::load;
    if (!kernel::has_size(key, dim())) return;
    const kernel::floating_point_scope standard;
    load(key, key_.data());
    recent_.add(size(), key_);
    map_.key(key_.data(), buffer_.data(), buffer_.data() + map_.bits());
    signatures_.push_back(signs(buffer_.data()));
  }
  void truncate(index_t n) {
    if (n < size()) signatures_.resize(static_cast<std::size_t>(std::max<index_t>(n, 0)));
  }
  void clear() { truncate(0); }

  void score(const float* scaled_query, index_t first, std::span<float> scores, std::span<float>,
             std::span<float> scratch) const noexcept {
    map_.query(scaled_query, scratch.data(), scratch.data() + map_.bits());
    const std::uint64_t q = signs(scratch.data());
    for (std::size_t i = 0; i < scores.size(); ++i)
      scores[i] = -static_cast<float>(std::popcount(q ^ signatures_[static_cast<std::size_t>(first) + i]));
  }

  static constexpr std::string_view format() noexcept { return "hash attention v1"; }
  template <class Archive>
  void archive(Archive& a) {
    map_.archive(a);
    a(signatures_);
    allocate();
  }
  [[nodiscard]] bool valid() const noexcept { return map_.dim() > 0 && map_.bits() > 0; }

 private:
  void allocate() {
    key_.resize(static_cast<std::size_t>(map_.dim()));
    buffer_.resize(scratch_size());
  }
  [[nodiscard]] std::uint64_t signs(const float* z) const noexcept {
    std::uint64_t s = 0;
    for (index_t b = 0; b < map_.bits(); ++b) s |= static_cast<std::uint64_t>(z[b] >= 0) << b;
    return s;
  }

  Map map_;
  std::vector<float> key_, buffer_;
  std::vector<std::uint64_t> signatures_;
  recent_keys recent_;
};

}  // namespace vattn::VATTN_ABI::select

#include "vattn/macros_pop.hpp"
