// How many bits a coordinate an index should have: by the predicted time of a step over the cache's own rows.
#include "vattn/macros_push.hpp"
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vattn/base/philox.hpp"
#include "vattn/index/cell_codes.hpp"
#include "vattn/index/index_costs.hpp"
#include "vattn/kernel/units.hpp"
#include "vattn/kv/view.hpp"

namespace vattn::VATTN_ABI {

/// Predicted times of a step over all cells for 1 to 4 bits, in the time of reading them all: 1 where that is cheaper.
using times_by_bits = std::array<double, static_cast<std::size_t>(cell_codes::most_bits)>;

/// What a step would read of one KV head, from a sample of its rows that stands for all. A score is the logit and a
/// normal error of σ = ‖q‖ρ/sqrt(P), as the codes of those keys have it; probabilities, floors and the variance that
/// verifies are those of docs/index.md, at ε = 0.05 or what is asked for. Queries are the caller's, or keys in their
/// place. Allocates; a few milliseconds.
class bits_predictor {
 public:
  static constexpr index_t rows = 512, queries = 16;

  explicit bits_predictor(double epsilon = 0.05) noexcept : epsilon_(epsilon) {}

  /// Rows of a head that are spread over it; false where hardly any are finite.
  template <kv_head Head>
  [[nodiscard]] bool take(const Head& head) {
    using kernel::load;
    cells_ = head.size();
    const index_t count = std::min(cells_, rows);
    keys_.resize(head.dk(), count), values_.resize(head.dv(), count);
    index_t used = 0;
    for (index_t i = 0; i < count; ++i) {
      const index_t cell = i * cells_ / count;
      if (!(kernel::norm_of(head.key(cell)) < 1e30f && kernel::norm_of(head.value(cell)) < 1e30f)) continue;
      load(head.key(cell), keys_.col(used).data());
      load(head.value(cell), values_.col(used).data());
      ++used;
    }
    keys_.conservativeResize(Eigen::NoChange, used), values_.conservativeResize(Eigen::NoChange, used);
    if (used < 64) return false;
    values_ *= kernel::unit_for(values_.cwiseAbs().maxCoeff());
    mean_ = keys_.rowwise().mean();
    return true;
  }

  /// Adds the times of a query [dk], scaled, to `sum`; keys are a query each where it is null.
  void add(const float* query, times_by_bits& sum) {
    if (radius_[0].size() != keys_.cols()) measure();
    const auto dk = keys_.rows(), n = keys_.cols();
    const Eigen::Map<const Eigen::VectorXf> q(query, dk);
    const Eigen::ArrayXd logits = (keys_.transpose() * q).array().cast<double>();
    const double top = logits.maxCoeff(), stands_for = static_cast<double>(cells_) / static_cast<double>(n);
    const Eigen::ArrayXd x = (logits - top).exp();
    const double d = x.sum();
    const Eigen::VectorXf o = values_ * (x / d).matrix().cast<float>();
    const double length = std::max(1e-12, static_cast<double>(o.norm()));
    const Eigen::ArrayXd far = (values_.colwise() - o).colwise().norm().transpose().array().cast<double>() / length;
    const Eigen::ArrayXd moves = x * far / (d * stands_for);  // by which a row moves the output, over its length
    const double goal = epsilon_ * epsilon_ / radius2;
    Eigen::ArrayXd noise(n);
    random_stream stream(draw_key{.seed = 0x62697473}, 0);
    for (Eigen::Index i = 0; i < n; ++i) noise[i] = stream.normal();
    for (std::size_t b = 0; b < sum.size(); ++b) {
      const Eigen::ArrayXd sigma = static_cast<double>(q.norm()) * radius_[b];
      const Eigen::ArrayXd score = (sigma * noise).exp() * moves;
      const Eigen::ArrayXd floor = (shape.z * sigma).exp() * score / (shape.kappa * epsilon_);
      double low = -5, high = 25;  // log of what a score is multiplied with
      Eigen::ArrayXd p;
      for (int i = 0; i < 24; ++i) {
        const double middle = (low + high) / 2;
        p = (std::exp(middle) * score).max(floor).min(1.0);
        const double variance = stands_for * (moves.square() * (1 / p.max(1e-300) - 1)).sum();
        (variance <= goal ? high : low) = middle;
      }
      const double read = union_of_heads * p.mean();
      sum[b] += std::min(1.0, scan_bit * static_cast<double>(b + 1) + costs.key * read);
    }
  }
  /// As if keys were queries that lie as far from their mean: `scale` of the logits.
  void add_keys(float scale, times_by_bits& sum) {
    Eigen::VectorXf q(keys_.rows());
    for (index_t i = 0; i < queries; ++i) {
      q = scale * keys_.col(i * keys_.cols() / queries);
      add(q.data(), sum);
    }
  }

 private:
  static constexpr index_costs costs{};
  static constexpr index_shape_of_sample shape{};
  static constexpr double radius2 = 1.5;              // F's quantile for rows of many dimensions
  static constexpr double scan_bit = costs.scan / 2;  // which is that of 2 bits
  static constexpr double union_of_heads = 2;         // rows of a group over those of a head

  // 1/sqrt(P) times ρ of every key, for each number of bits.
  void measure() {
    for (int bits = 1; bits <= cell_codes::most_bits; ++bits) {
      cell_codes codes(keys_.rows(), bits, 0);
      const std::vector<float> mean(mean_.data(), mean_.data() + mean_.size());
      codes.measure_from(mean, {});
      Eigen::ArrayXd& r = radius_[static_cast<std::size_t>(bits - 1)];
      r.resize(keys_.cols());
      const double each = 1 / std::sqrt(static_cast<double>(codes.layout().width));
      for (Eigen::Index i = 0; i < keys_.cols(); ++i) {
        const std::span<const float> k(keys_.col(i).data(), static_cast<std::size_t>(keys_.rows()));
        r[i] = each * static_cast<double>(codes.measure(k).radius);
      }
    }
  }

  double epsilon_;
  index_t cells_ = 0;
  Eigen::MatrixXf keys_, values_;  // [dk, used], [dv, used]
  Eigen::VectorXf mean_;
  std::array<Eigen::ArrayXd, static_cast<std::size_t>(cell_codes::most_bits)> radius_;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
