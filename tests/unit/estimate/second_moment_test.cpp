// The second moment of vectors: a bound of its largest eigenvalue against Eigen's.
#include "vattn/estimate/second_moment.hpp"

#include <Eigen/Eigenvalues>
#include <cmath>
#include <random>
#include <vector>

#include "support/catch.hpp"

using namespace vattn::test;

TEST_CASE("the largest eigenvalue is bounded from above, within dv^(1/32)", "[estimate][second_moment]") {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const int dv : {1, 2, 16, 65}) {
    for (const int rows : {1, 3, 200}) {
      CAPTURE(dv, rows);
      const auto width = static_cast<std::size_t>(dv);
      std::vector<float> storage(2 * width * width, -7.0f), y(width);
      vattn::second_moment moment(storage, dv);
      Eigen::MatrixXd want = Eigen::MatrixXd::Zero(dv, dv);
      for (int i = 0; i < rows; ++i) {
        for (float& x : y) x = normal(random);
        const float factor = 1e-3f * static_cast<float>(1 + i % 5);
        moment.add(factor, y);
        const Eigen::VectorXd v = Eigen::Map<const Eigen::VectorXf>(y.data(), dv).cast<double>();
        want += static_cast<double>(factor) * static_cast<double>(factor) * v * v.transpose();
      }
      const double largest = Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>(want).eigenvalues()[dv - 1];
      const double got = moment.largest_eigenvalue();
      CHECK(got >= largest);
      CHECK(got <= largest * std::pow(std::min(dv, rows), 1 / 32.0) * (1 + 2e-4));
      // Of equal eigenvalues, no less than what the power of the trace makes of them.
      if (rows == 200 && dv > 1) CHECK(got > largest * (1 + 1e-4));
    }
  }
  std::vector<float> nothing(2 * 9);
  CHECK(vattn::second_moment(nothing, 3).largest_eigenvalue() == 0);
}
