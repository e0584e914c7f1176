// One-pass moments against direct double-precision sums over explicit rows.
#include "vattn/estimate/moments.hpp"

#include <random>
#include <vector>

#include "reference/attention.hpp"
#include "support/catch.hpp"

using namespace vattn::test;
using vattn::residual_moments;

TEMPLATE_TEST_CASE("one-pass moments are the sums they stand for", "[estimate][moments]", float, Eigen::half) {
  constexpr std::size_t dv = 7;
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> storage(residual_moments::storage_size(dv)), centre(dv);
  for (float& c : centre) c = 1 + 0.1f * normal(random);
  residual_moments moments(storage, dv);
  // Logits that rise far above the reference force the sums to be rescaled half-way.
  for (const float rise : {0.0f, 30.0f}) {
    moments.clear(centre, 0.5f);
    std::vector<std::vector<TestType>> rows;
    std::vector<float> logits;
    for (int i = 0; i < 150; ++i) {
      rows.emplace_back();
      for (std::size_t j = 0; j < dv; ++j) rows.back().push_back(TestType(1 + normal(random)));
      logits.push_back(normal(random) + (i == 80 ? rise : 0));
      moments.add(logits.back(), std::span<const TestType>(rows.back()));
    }
    const residual_moments::sums s = moments.total();
    const double m = moments.reference_logit();
    double S = 0, A = 0, C = 0, Q = 0, P = 0;
    std::vector<double> N(dv), B(dv);
    std::vector<std::vector<double>> group_n(residual_moments::groups, N), group_b = group_n;  // dealt in turn
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const double x = std::exp(static_cast<double>(logits[i]) - m);
      double r2 = 0;
      for (std::size_t j = 0; j < dv; ++j) {
        const double r = static_cast<double>(static_cast<float>(rows[i][j])) - static_cast<double>(centre[j]);
        r2 += r * r;
        N[j] += x * r;
        B[j] += x * x * r;
        group_n[i % residual_moments::groups][j] += x * r;
        group_b[i % residual_moments::groups][j] += x * x * r;
      }
      S += x, A += x * x, C += x * x * r2, Q += x * x * r2 * x * x * r2, P += x * r2;
    }
    CHECK(s.rows == 150);
    CHECK_THAT(s.S, WithinRel(S, 1e-5));
    CHECK_THAT(s.A, WithinRel(A, 1e-5));
    CHECK_THAT(s.C, WithinRel(C, 1e-5));
    CHECK_THAT(s.Q, WithinRel(Q, 2e-5));
    CHECK_THAT(s.P, WithinRel(P, 1e-5));
    CHECK(vattn::reference::relative_error(moments.first().data(), N) < 1e-4);
    CHECK(vattn::reference::relative_error(moments.second().data(), B) < 1e-4);
    double rows_in_groups = 0;
    for (std::size_t g = 0; g < residual_moments::groups; ++g) {
      CHECK(moments.group(g).rows >= 9);
      CHECK(vattn::reference::relative_error(moments.group_first(g).data(), group_n[g]) < 1e-4);
      CHECK(vattn::reference::relative_error(moments.group_second(g).data(), group_b[g]) < 1e-4);
      rows_in_groups += moments.group(g).rows;
    }
    CHECK(rows_in_groups == 150);
  }
}
