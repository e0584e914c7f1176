// Keys in codes that are learned from the first of them: what product_codes and PQCache share.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "vattn/base/floating_point.hpp"
#include "vattn/base/room.hpp"
#include "vattn/kernel/row_size.hpp"
#include "vattn/kernel/units.hpp"
#include "vattn/kv/view.hpp"
#include "vattn/sketch/codebook.hpp"
#include "vattn/sketch/principal_axes.hpp"
#include "vattn/sketch/recent_keys.hpp"

namespace vattn::VATTN_ABI::sketch {

struct learning {
  index_t train_size = 1024;  ///< keys to learn from; fewer than 16 a centroid make poor centroids
  int iterations = 8;         ///< of Lloyd's algorithm
  std::uint64_t seed = 0;     ///< of k-means++
};

/// Tokens of one KV head of one layer, at first as they are, then as codes. State, and when it changes:
///   waiting   fewer than train_size tokens have come since the last clear(): keys are kept in float, scores are exact
///   trained   train_size tokens came, or train() was called: all tokens are codes, and what was learned stays
/// Appending one by one or in blocks gives the same state. So does truncating and appending the same keys again,
/// since a code depends on what was learned and on its key alone. Truncating below train_size does NOT unlearn (the
/// forgotten keys are gone); only clear() and truncate(0) do. A draft that was learned from and then rejected
/// therefore leaves a trace in the centroids, never in the honesty of the errors, which are measured token by token.
/// To learn anew, when drift() says so: train(head), then append_from.
/// `Balanced`: in principal axes about the mean, with error statements; else in the keys' own coordinates, without.
/// Owns its memory. append allocates as a vector does, and learns once (milliseconds to a second, with head size
/// and train_size); score allocates nothing.
template <bool Balanced>
class learned_codes {
 public:
  learned_codes() = default;
  /// groups are cut to [1, dim], bits to [1, 8], train_size to at least 1.
  learned_codes(index_t dim, index_t groups, int bits, const learning& how)
      : dim_(std::max<index_t>(dim, 0)),
        groups_(std::clamp<index_t>(groups, 1, std::max<index_t>(dim, 1))),
        bits_(std::clamp(bits, 1, 8)),
        how_{std::max<index_t>(how.train_size, 1), how.iterations, how.seed} {
    forget();
  }

  [[nodiscard]] index_t size() const noexcept { return size_; }
  [[nodiscard]] index_t dim() const noexcept { return dim_; }
  [[nodiscard]] recent_keys& recent() noexcept { return recent_; }
  [[nodiscard]] index_t groups() const noexcept { return groups_; }
  [[nodiscard]] bool trained() const noexcept { return trained_ != 0; }
  /// Of the tokens, and of what was learned.
  [[nodiscard]] std::size_t bytes() const noexcept {
    return codes_.size() +
           (residual_.size() + waiting_.size() + (trained() ? mean_.size() + axes_.size() + moments_.size() : 0)) *
               sizeof(float) +
           (trained() ? book_.bytes() : 0);
  }

  /// Adds the next token's key. A key that is not of dim() elements is not taken: calls then say that the index lags.
  template <kernel::row R>
  void append(const R& key) {
    using kernel::load;
    if (!kernel::has_size(key, dim_)) return;
    const kernel::floating_point_scope standard;
    load(key, point_.data());
    recent_.add(size_, point_);
    if (!trained() && size_ + 1 == how_.train_size) {
      learned_codes next = *this;  // aside, so that memory that runs out while it learns changes nothing
      next.waiting_.insert(next.waiting_.end(), point_.begin(), point_.end());
      next.learn(next.waiting_);
      for (next.size_ = 0; next.size_ < how_.train_size; ++next.size_) {
        std::copy_n(next.waiting_.begin() + next.size_ * dim_, dim_, next.point_.begin());
        next.encode();
      }
      next.waiting_ = {};
      *this = std::move(next);
      return;
    }
    if (trained()) {
      encode();
    } else {
      vattn::detail::make_room(waiting_, point_.size());
      waiting_.insert(waiting_.end(), point_.begin(), point_.end());
    }
    ++size_;
  }

  /// Learns from up to train_size keys of `head`, evenly spaced, and forgets all tokens: append_from brings them
  /// back. After a prefill this is better than to learn from its beginning.
  template <kv_head Head>
  void train(const Head& head) {
    using kernel::load;
    const kernel::floating_point_scope standard;
    clear();
    const index_t n = std::min(head.size(), how_.train_size);
    std::vector<float> points(static_cast<std::size_t>(n * dim_));
    for (index_t i = 0; i < n; ++i) load(head.key(i * head.size() / n), points.data() + i * dim_);
    if (n > 0) learn(points);
  }

  void truncate(index_t n) {
    if (n >= size_) return;
    if (n <= 0) return clear();
    size_ = n;
    if (trained()) {
      codes_.resize(static_cast<std::size_t>(n) * book_.code_bytes());
      if constexpr (Balanced) residual_.resize(static_cast<std::size_t>(n));
    } else {
      waiting_.resize(static_cast<std::size_t>(n * dim_));
    }
  }
  void clear() {
    forget();
    waiting_.clear();
    codes_.clear();
    residual_.clear();
    size_ = 0;
  }

  /// The query in the codes' coordinates, and its products with all centroids.
  [[nodiscard]] std::size_t scratch_size() const noexcept {
    return static_cast<std::size_t>(dim_) + (static_cast<std::size_t>(groups_) << bits_);
  }

  template <class Archive>
  void archive(Archive& a) {
    a(dim_, groups_, bits_, how_.train_size, how_.iterations, how_.seed, size_, trained_, unit_, mean_, axes_, moments_,
      learned_square_, waiting_, codes_, residual_);
    book_.archive(a);
    if (dim_ >= 0 && dim_ <= max_dim) allocate();
  }
  [[nodiscard]] bool valid() const noexcept {
    if (dim_ < 0 || dim_ > max_dim || groups_ < 1 || groups_ > std::max<index_t>(dim_, 1) || bits_ < 1 || bits_ > 8 ||
        how_.train_size < 1 || size_ < 0 || size_ > population_limit)
      return false;
    if (!(unit_ > 0) || !std::isfinite(unit_)) return false;
    const auto d = static_cast<std::size_t>(dim_), n = static_cast<std::size_t>(size_);
    if (!trained()) return size_ < how_.train_size && waiting_.size() == n * d && codes_.empty() && residual_.empty();
    return waiting_.empty() && book_.valid(dim_, groups_, bits_) && codes_.size() == n * book_.code_bytes() &&
           residual_.size() == (Balanced ? n : 0) && mean_.size() == (Balanced ? d : 0) &&
           axes_.size() == (Balanced ? d * d : 0) && moments_.size() == (Balanced ? d * d : 0);
  }

 protected:
  /// The scores, and the query in the codes' coordinates and over their unit (at scratch, if trained).
  void score_tokens(const float* scaled_query, index_t first, std::span<float> scores,
                    std::span<float> scratch) const noexcept {
    const kernel::const_float_map q(scaled_query, dim_);
    if (!trained()) {
      for (std::size_t i = 0; i < scores.size(); ++i)
        scores[i] = q.dot(kernel::const_float_map(waiting_.data() + (first + static_cast<index_t>(i)) * dim_, dim_));
      return;
    }
    float base = 0;
    const float back = 1 / unit_;
    if constexpr (Balanced) {
      for (index_t j = 0; j < dim_; ++j) scratch[static_cast<std::size_t>(j)] = axis(j).dot(q) * back;
      base = q.dot(kernel::const_float_map(mean_.data(), dim_)) * back;
    } else {
      kernel::float_map(scratch.data(), dim_) = q * back;
    }
    float* table = scratch.data() + dim_;
    book_.tabulate(scratch.data(), table);
    const std::uint8_t* code = codes_.data() + static_cast<std::size_t>(first) * book_.code_bytes();
    for (float& s : scores) {
      s = base + book_.product(code, table);
      code += book_.code_bytes();
    }
  }

  /// Of tokens, in the unit.
  [[nodiscard]] const std::vector<float>& residuals() const noexcept { return residual_; }
  /// What keys are multiplied by before they are compared with what was learned.
  [[nodiscard]] float unit() const noexcept { return unit_; }
  [[nodiscard]] const std::vector<float>& moments() const noexcept { return moments_; }
  [[nodiscard]] double learned_square() const noexcept { return learned_square_; }

 private:
  static constexpr index_t max_dim = 65536;
  static constexpr index_t population_limit = index_t{1} << 40;

  [[nodiscard]] kernel::const_float_map axis(index_t j) const noexcept { return {axes_.data() + j * dim_, dim_}; }

  void forget() {
    trained_ = 0;
    unit_ = 1;
    mean_.clear(), axes_.clear(), moments_.clear();
    learned_square_ = 0;
    book_ = {};
    allocate();
  }
  void allocate() {
    point_.resize(static_cast<std::size_t>(dim_));
    moved_.resize(static_cast<std::size_t>(dim_));
  }

  // The key in point_, which is lost. ρ is rounded up: it is used as a bound.
  void encode() {
    vattn::detail::make_room(codes_, book_.code_bytes());
    if constexpr (Balanced) vattn::detail::make_room(residual_, 1);
    codes_.resize(codes_.size() + book_.code_bytes());
    std::uint8_t* code = codes_.data() + codes_.size() - book_.code_bytes();
    if (unit_ != 1) kernel::float_map(point_.data(), dim_) *= unit_;
    if constexpr (!Balanced) {
      book_.encode(point_.data(), code);
    } else {
      kernel::float_map x(point_.data(), dim_);
      x -= kernel::const_float_map(mean_.data(), dim_);
      double before = 0, after = 0;
      for (index_t j = 0; j < dim_; ++j) {
        const float y = axis(j).dot(x);
        before += double{y} * double{y};
        moved_[static_cast<std::size_t>(j)] = y;
      }
      book_.encode(moved_.data(), code);
      for (const float r : moved_) after += double{r} * double{r};
      const double rho = std::sqrt(after + 1e-12 * before) * (1 + 1e-6);
      // A key that is not finite: its score means nothing, and its error says so.
      residual_.push_back(std::isfinite(rho) ? static_cast<float>(rho) : std::numeric_limits<float>::infinity());
    }
  }

  void learn(const std::vector<float>& keys) {
    const auto d = static_cast<std::size_t>(dim_);
    std::vector<float> points;
    for (std::size_t i = 0; d > 0 && i < keys.size(); i += d) {
      const auto from = keys.begin() + static_cast<std::ptrdiff_t>(i), to = from + static_cast<std::ptrdiff_t>(d);
      if (std::all_of(from, to, [](float x) { return std::isfinite(x); })) points.insert(points.end(), from, to);
    }
    std::vector<float> largest;
    for (std::size_t i = 0; i < points.size(); i += d)
      largest.push_back(kernel::const_float_map(points.data() + i, dim_).cwiseAbs().maxCoeff());
    unit_ = kernel::unit_for(largest);
    for (float& x : points) x *= unit_;
    if constexpr (!Balanced) {
      book_ = codebook(equal_widths(dim_, groups_), bits_);
      book_.train(points, how_.iterations, how_.seed);
    } else {
      principal_axes p = balanced_principal_axes(points, dim_, groups_);
      mean_ = std::move(p.mean);
      axes_ = std::move(p.axes);
      book_ = codebook(std::move(p.widths), bits_);
      std::vector<float> moved(points.size());
      for (std::size_t i = 0; i < points.size(); i += d) {
        const Eigen::VectorXf x =
            kernel::const_float_map(points.data() + i, dim_) - kernel::const_float_map(mean_.data(), dim_);
        for (std::size_t j = 0; j < d; ++j) moved[i + j] = axis(static_cast<index_t>(j)).dot(x);
      }
      book_.train(moved, how_.iterations, how_.seed);
      learn_moments(moved);
    }
    trained_ = 1;
  }

  // Second moments of the residuals, as a share of their mean square norm. From centroids of one half of the keys on
  // the other, both ways: the mean square of keys that centroids did not see is what drift() is to be relative to.
  // (For the scales alone it hardly matters: on recordings 0.97 to 1.06 of the errors so, 0.96 to 1.06 from the keys
  // that centroids were fitted to.) Keys that come later leave residuals in directions of their own: `isotropic` of
  // the whole is spread evenly.
  void learn_moments(const std::vector<float>& moved) {
    const auto d = static_cast<std::size_t>(dim_);
    std::vector<double> sum(d * d);
    std::vector<std::uint8_t> code(book_.code_bytes());
    double trace = 0;
    for (std::size_t half = 0; half < 2; ++half) {
      std::vector<float> learned, held;
      for (std::size_t i = 0; i < moved.size(); i += d) {
        std::vector<float>& to = i / d % 2 == half ? learned : held;
        to.insert(to.end(), moved.begin() + static_cast<std::ptrdiff_t>(i),
                  moved.begin() + static_cast<std::ptrdiff_t>(i + d));
      }
      codebook book = book_;
      book.train(learned, how_.iterations, how_.seed);
      for (std::size_t i = 0; i < held.size(); i += d) {
        float* r = held.data() + i;
        std::fill(code.begin(), code.end(), std::uint8_t{0});
        book.encode(r, code.data());
        for (std::size_t j = 0; j < d; ++j) {
          trace += double{r[j]} * double{r[j]};
          for (std::size_t k = 0; k < d; ++k) sum[j * d + k] += double{r[j]} * double{r[k]};
        }
      }
    }
    const double share = trace > 0 ? isotropic : 1, even = share / static_cast<double>(d);
    moments_.resize(d * d);
    for (std::size_t j = 0; j < d; ++j) {
      for (std::size_t k = 0; k < d; ++k)
        moments_[j * d + k] =
            static_cast<float>((trace > 0 ? (1 - share) * sum[j * d + k] / trace : 0) + (j == k ? even : 0));
    }
    learned_square_ = moved.empty() ? 0 : trace * static_cast<double>(d) / static_cast<double>(moved.size());
  }

 protected:
  static constexpr double isotropic = 0.1;

 private:
  index_t dim_ = 0, groups_ = 1;
  int bits_ = 6;
  learning how_{};
  index_t size_ = 0;
  std::uint8_t trained_ = 0;
  float unit_ = 1;  // everything that is learned, and ρ, is of keys times this (kernel/units.hpp)
  std::vector<float> mean_, axes_, moments_;  // [dim], [dim, dim], [dim, dim]
  double learned_square_ = 0;                 // mean ρ² of keys that were held out
  std::vector<float> waiting_;                // [size, dim], until trained
  codebook book_;
  std::vector<std::uint8_t> codes_;  // [size, code bytes]
  std::vector<float> residual_;      // ρ, [size]
  std::vector<float> point_, moved_;
  recent_keys recent_;
};

}  // namespace vattn::VATTN_ABI::sketch

#include "vattn/macros_pop.hpp"
