// Selectors by hash tables, against their definitions: MagicPIG, SOCKET.
#include <cmath>
#include <random>
#include <vattn/vattn.hpp>
#include <vector>

#include "support/catch.hpp"
#include "unit/select/growth.hpp"

using namespace vattn;
using namespace vattn::test;

TEST_CASE("collision probability of MagicPIG by hand", "[select][magic_pig]") {
  CHECK(std::abs(select::collision_probability(0, 1, 2) - 0.25) < 1e-12);  // both of two fair coins
  CHECK(std::abs(select::collision_probability(0, 1, 3) - 0.5) < 1e-12);   // two or more of three
  CHECK(std::abs(select::collision_probability(0, 2, 2) - 0.0625) < 1e-12);
  CHECK(select::collision_probability(1, 10, 150) == 1);
  CHECK(select::collision_probability(1, 10, 1) == 0);
  CHECK(select::collision_probability(-1, 10, 150) == 0);
  CHECK(select::collision_probability(1.0000001, 4, 4) == 1);  // rounding of a cosine
}

TEST_CASE("MagicPIG's scores are the tables in which key and query share a bucket", "[select][magic_pig]") {
  const vectors v(40, 7, 3);
  std::vector<float> centre(7, 0.25f);
  select::magic_pig index(7, 3, 20, 11, centre);
  for (index_t i = 0; i < v.n; ++i) index.append(v.key(i));
  const sketch::hyperplanes planes(7, 60, 11);
  std::vector<float> of_query(60), of_key(60), moved(7);
  planes.project(v.query.data(), of_query.data());
  const std::vector<float> scores = scores_of(index, v);
  for (index_t i = 0; i < v.n; ++i) {
    for (std::size_t j = 0; j < 7; ++j) moved[j] = v.key(i)[j] - centre[j];
    planes.project(moved.data(), of_key.data());
    int shared = 0;
    for (std::size_t l = 0; l < 20; ++l) {
      bool same = true;
      for (std::size_t p = 0; p < 3; ++p) same = same && (of_query[3 * l + p] >= 0) == (of_key[3 * l + p] >= 0);
      shared += same;
    }
    CHECK(scores[static_cast<std::size_t>(i)] == static_cast<float>(shared));
  }
  check_growth(select::magic_pig(7, 3, 20, 11, centre), v);
}

TEST_CASE("keys collide twice as often as MagicPIG's probability says", "[select][magic_pig]") {
  const vectors v(30, 16, 5);
  std::vector<int> hits(30);
  constexpr int draws = 3000;
  std::vector<double> stated(30);
  for (int d = 0; d < draws; ++d) {
    select::magic_pig index(16, 4, 12, static_cast<std::uint64_t>(d));
    for (index_t i = 0; i < v.n; ++i) index.append(v.key(i));
    const std::vector<float> scores = scores_of(index, v);
    for (index_t i = 0; i < v.n; ++i) {
      const auto at = static_cast<std::size_t>(i);
      hits[at] += scores[at] >= 2;
      if (d == 0) stated[at] = index.probability(v.query.data(), i, kernel::dot(v.query.data(), v.key(i)));
    }
  }
  double chi2 = 0;
  for (std::size_t i = 0; i < 30; ++i)
    chi2 += std::pow(hits[i] - draws * stated[i], 2) / (draws * stated[i] * (1 - stated[i]));
  CHECK(std::abs(chi2 - 30) < 5 * std::sqrt(60.0));
}

TEST_CASE("SOCKET's scores are the query's soft probabilities of the keys' buckets", "[select][socket]") {
  const vectors v(25, 6, 7);
  constexpr index_t K = 5, L = 4;
  constexpr double tau = 0.4;
  select::socket index(6, K, L, tau, 13);
  for (index_t i = 0; i < v.n; ++i) index.append(v.key(i));
  const sketch::hyperplanes planes(6, K * L, 13);
  std::vector<float> of_query(K * L), of_key(K * L);
  planes.project(v.query.data(), of_query.data());
  const double root = std::sqrt(6.0);
  const std::vector<float> scores = scores_of(index, v);
  for (index_t i = 0; i < v.n; ++i) {
    planes.project(v.key(i).data(), of_key.data());
    double want = 0;
    for (std::size_t l = 0; l < L; ++l) {
      const auto weight = [&](unsigned corner) {
        double sum = 0;
        for (unsigned p = 0; p < K; ++p) {
          const double sign = corner >> p & 1 ? 1 : -1;
          sum += sign * std::tanh(static_cast<double>(of_query[l * K + p]) * root) / (root * tau);
        }
        return std::exp(sum);
      };
      double all = 0;
      for (unsigned corner = 0; corner < 1u << K; ++corner) all += weight(corner);
      unsigned mine = 0;
      for (unsigned p = 0; p < K; ++p) mine |= static_cast<unsigned>(of_key[l * K + p] >= 0) << p;
      want += weight(mine) / all;
    }
    CHECK(std::abs(static_cast<double>(scores[static_cast<std::size_t>(i)]) - want) < 1e-5);
  }
  check_growth(select::socket(6, K, L, tau, 13), v);
}

TEST_CASE("a ranking becomes estimates: fitted to the logits, with an error that covers them", "[select][calibrated]") {
  const index_t n = 4000, dim = 32;
  vectors v(n, dim, 9);
  const auto cache = contiguous_kv(v.keys.data(), v.keys.data(), kv_shape{1, 1, n, dim, dim});
  std::vector<select::magic_pig> heads(1, select::magic_pig(dim, 6, 60, 1));
  append_from(heads[0], cache.head(0, 0));
  const select::calibrated<select::indexed<select::magic_pig>> selector{{heads}};
  query_row<std::remove_cvref_t<decltype(cache.head(0, 0))>> row{.head = cache.head(0, 0),
                                                                 .scaled_query = v.query.data()};
  std::vector<float> scores(static_cast<std::size_t>(n)), errors(scores.size()), scratch(selector.scratch_size());
  const population tokens(0, n);
  const score_result r = selector.score(row, tokens, {scores, errors, {}, scratch});
  REQUIRE(r.ok);
  CHECK(r.rows_read == 256);
  double square = 0, spread = 0;
  int beyond = 0;
  for (index_t i = 0; i < n; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const double l = static_cast<double>(row.logit(i)), e = l - static_cast<double>(scores[at]);
    square += e * e;
    spread += l * l;
    beyond += e > 2.75 * static_cast<double>(errors[at]);
  }
  CHECK(square < 0.8 * spread);  // the score says something
  CHECK(beyond < 4);
  // A selector that ranks nothing: every score the mean, the error the spread.
  const select::calibrated<select::none> nothing;
  REQUIRE(nothing.score(row, tokens, {scores, errors, {}, scratch}).ok);
  CHECK(scores.front() == scores.back());
  CHECK(static_cast<double>(errors[0]) > std::sqrt(spread / static_cast<double>(n)) * 0.9);
}
