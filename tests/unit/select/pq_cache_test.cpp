// PQCache: the ranking against its definition, growth.
#include <cmath>
#include <random>
#include <vattn/vattn.hpp>
#include <vector>

#include "support/catch.hpp"
#include "unit/select/growth.hpp"

namespace {

using namespace vattn;

using test::scores_of;
using test::vectors;

static_assert(!select::pq_cache::estimates);

}  // namespace

TEST_CASE("PQCache by hand: two groups of two centroids", "[select][pq_cache]") {
  // Coordinates 0 and 1 form group 0, coordinate 2 group 1 (3 = 2 + 1). Clusters (0,0), (10,10) and 1, 5, in
  // all four combinations: the centroids are their means, and (9,10 | 1.2) stands for (10,10 | 1).
  select::pq_cache index(3, 2, 1, {.train_size = 4});
  for (const std::vector<float>& key :
       {std::vector<float>{0, 0, 1}, {0, 0, 5}, {10, 10, 1}, {10, 10, 5}, {9, 10, 1.2f}})
    index.append(std::span<const float>(key));
  const std::vector<float> q{1, 2, 3};
  std::vector<float> scores(5), scratch(index.scratch_size());
  index.score(q.data(), 0, scores, {}, scratch);
  CHECK(scores == std::vector<float>{3, 15, 33, 45, 33});
}

TEST_CASE("PQCache's scores are products with the nearest centroids", "[select][pq_cache]") {
  const vectors v(900, 10, 3);
  for (const index_t m : {1, 2, 3, 4}) {
    for (const int b : {2, 6, 8}) {
      CAPTURE(m, b);
      const sketch::learning how{.train_size = 700, .iterations = 5, .seed = 4};
      select::pq_cache index(10, m, b, how);
      for (index_t i = 0; i < v.n; ++i) index.append(v.key(i));
      const std::vector<float> scores = scores_of(index, v);
      std::vector<double> want(scores.size());
      index_t start = 0;
      for (std::size_t g = 0; g < static_cast<std::size_t>(m); ++g) {
        const index_t width = sketch::equal_widths(10, m)[g];
        const auto K = std::size_t{1} << b;
        std::vector<float> centroids(static_cast<std::size_t>(width) * K);
        sketch::k_means(v.keys.data() + start, 700, 10, static_cast<std::size_t>(width), K, 5,
                        random_stream({.seed = 4, .layer = 0x4b4d4e53}, static_cast<std::uint32_t>(g)),
                        centroids.data());
        for (index_t i = 0; i < v.n; ++i) {
          double best = INFINITY, product = 0;
          for (std::size_t c = 0; c < K; ++c) {
            double distance = 0, dot = 0;
            for (index_t j = 0; j < width; ++j) {
              const double x = double{centroids[static_cast<std::size_t>(j) * K + c]};
              distance += std::pow(double{v.key(i)[static_cast<std::size_t>(start + j)]} - x, 2);
              dot += double{v.query[static_cast<std::size_t>(start + j)]} * x;
            }
            if (distance < best) best = distance, product = dot;
          }
          want[static_cast<std::size_t>(i)] += product;
        }
        start += width;
      }
      index_t differ = 0;
      for (std::size_t i = 0; i < want.size(); ++i) differ += std::abs(want[i] - double{scores[i]}) > 1e-4;
      CHECK(differ == 0);
    }
  }
}

TEST_CASE("PQCache grows, forgets and is saved", "[select][pq_cache]") {
  const vectors v(500, 7, 5);
  const select::pq_cache empty(7, 2, 4, {.train_size = 200});
  select::pq_cache whole = empty;
  for (index_t i = 0; i < v.n; ++i) whole.append(v.key(i));
  CHECK(whole.bytes() == 500 + 16 * 7 * 4 + 2 * 8);  // 8 bits a key, 16 centroids, two widths
  for (const index_t cut : {499, 250, 200, 10, 0}) {
    CAPTURE(cut);
    select::pq_cache index = whole;
    index.truncate(cut);
    CHECK(index.size() == cut);
    for (index_t i = cut; i < v.n; ++i) index.append(v.key(i));
    CHECK(save(index) == save(whole));
  }
  test::check_growth(empty, v);
  sketch::product_codes other;
  CHECK_FALSE(load(save(whole), other).ok());  // another format
  whole.clear();
  CHECK(save(whole) == save(empty));
}

TEST_CASE("PQCache ranks the best tokens of clustered keys first", "[select][pq_cache]") {
  // 30 clusters in 2·6 bits: tokens of the query's cluster must all outrank the others.
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  vectors v(3000, 16, 6);
  std::vector<float> centres(30 * 16);
  for (float& x : centres) x = 4 * normal(random);
  for (std::size_t i = 0; i < v.keys.size(); ++i) v.keys[i] = centres[i / 16 % 30 * 16 + i % 16] + 0.05f * v.keys[i];
  for (std::size_t j = 0; j < 16; ++j) v.query[j] = centres[11 * 16 + j];
  const auto cache = contiguous_kv(v.keys.data(), v.keys.data(), kv_shape{1, 1, v.n, 16, 16});
  select::pq_cache index(16);
  index.train(cache.head(0, 0));
  append_from(index, cache.head(0, 0));
  const std::vector<float> scores = scores_of(index, v);
  float least = INFINITY, most = -INFINITY;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (i % 30 == 11) least = std::min(least, scores[i]);
    if (i % 30 != 11) most = std::max(most, scores[i]);
  }
  CHECK(least > most);
}
