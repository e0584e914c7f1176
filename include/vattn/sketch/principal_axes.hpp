// Principal axes of keys, dealt to groups so that every group has as much to say.
#include "vattn/macros_push.hpp"
#pragma once

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <vector>

#include "vattn/base/config.hpp"

namespace vattn::VATTN_ABI::sketch {

/// An orthogonal map to the principal axes of a set of points, grouped.
struct principal_axes {
  std::vector<float> mean;      // [dim]
  std::vector<float> axes;      // [dim, dim], a row an axis, those of a group adjacent
  std::vector<index_t> widths;  // [groups], axes of each group
};

/// Deals variances (descending) to groups: each to the group whose product of variances is the least so far, among
/// those with fewer than ceil(dim/groups) of them. Returns the group of each. Eigenvalue allocation (Ge, He, Ke, Sun:
/// optimised product quantisation, PAMI 2014): for Gaussian points equal products minimise the total distortion.
/// Variances are taken relative to the least positive one, lest products of numbers under 1 shrink as they grow.
[[nodiscard]] inline std::vector<index_t> deal_variances(std::span<const double> variances, index_t groups) {
  const auto dim = static_cast<index_t>(variances.size());
  if (groups < 1) return {};
  const index_t cap = (dim + groups - 1) / groups;
  const double top = dim > 0 ? std::max(variances[0], 1e-300) : 1.0, floor = top * 1e-9;
  double least = top;
  for (const double v : variances) least = v > floor ? std::min(least, v) : least;
  std::vector<double> logs(static_cast<std::size_t>(groups));
  std::vector<index_t> count(logs.size()), to(variances.size());
  for (std::size_t j = 0; j < variances.size(); ++j) {
    std::size_t best = logs.size();
    for (std::size_t g = 0; g < logs.size(); ++g) {
      if (count[g] < cap && (best == logs.size() || logs[g] < logs[best])) best = g;
    }
    logs[best] += std::log(std::max(variances[j], least) / least);
    ++count[best];
    to[j] = static_cast<index_t>(best);
  }
  return to;
}

/// Of points [n, dim], all finite. With no points: the identity. O(n·dim² + dim³), allocates. A template only so that
/// Eigen's solver is compiled where it is used, not wherever this header is read (2 s a translation unit).
template <class Scalar = double>
[[nodiscard]] principal_axes balanced_principal_axes(std::span<const float> points, index_t dim, index_t groups) {
  const auto d = static_cast<std::size_t>(dim);
  const std::size_t n = d > 0 ? points.size() / d : 0;
  principal_axes out{std::vector<float>(d), std::vector<float>(d * d), {}};
  using vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;
  using matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic>;
  vector mean = vector::Zero(dim);
  for (std::size_t i = 0; i < points.size(); ++i) mean[static_cast<Eigen::Index>(i % d)] += double{points[i]};
  if (n > 0) mean /= static_cast<double>(n);
  for (std::size_t j = 0; j < d; ++j) out.mean[j] = static_cast<float>(mean[static_cast<Eigen::Index>(j)]);
  matrix covariance = matrix::Zero(dim, dim);
  vector x(dim);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < d; ++j)
      x[static_cast<Eigen::Index>(j)] = double{points[i * d + j]} - double{out.mean[j]};
    for (Eigen::Index j = 0; j < dim; ++j) covariance.col(j) += x[j] * x;
  }
  const Eigen::SelfAdjointEigenSolver<matrix> solver(covariance);  // ascending
  std::vector<double> variances(d);
  for (std::size_t j = 0; j < d; ++j) variances[j] = solver.eigenvalues()[dim - 1 - static_cast<Eigen::Index>(j)];
  const std::vector<index_t> group = deal_variances(variances, groups);
  out.widths.resize(static_cast<std::size_t>(std::max<index_t>(groups, 0)));
  std::size_t row = 0;
  for (std::size_t g = 0; g < out.widths.size(); ++g) {
    for (std::size_t j = 0; j < d; ++j) {
      if (group[j] != static_cast<index_t>(g)) continue;
      for (std::size_t k = 0; k < d; ++k) {
        const auto from = static_cast<Eigen::Index>(k);
        out.axes[row * d + k] = static_cast<float>(solver.eigenvectors()(from, dim - 1 - static_cast<Eigen::Index>(j)));
      }
      ++row;
      ++out.widths[g];
    }
  }
  return out;
}

}  // namespace vattn::VATTN_ABI::sketch

#include "vattn/macros_pop.hpp"
