// Learned product codes: k-means and axes against definitions, scores, error statements, growth, saving.
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <vattn/vattn.hpp>
#include <vector>

#include "support/catch.hpp"

namespace {

using namespace vattn;

// Normal keys of uneven variances about a mean, mixed by a reflection: axes are to be found.
struct keys {
  index_t n, dim;
  std::vector<float> data, query;

  keys(index_t count, index_t width, unsigned seed, float size = 1) : n(count), dim(width) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto d = static_cast<std::size_t>(dim);
    std::vector<float> x(d), mirror(d);
    float norm2 = 0;
    for (float& m : mirror) {
      m = normal(random);
      norm2 += m * m;
    }
    for (index_t i = 0; i < n; ++i) {
      float along = 0;
      for (std::size_t j = 0; j < d; ++j) {
        x[j] = 4 * normal(random) / static_cast<float>(1 + j);
        along += x[j] * mirror[j];
      }
      for (std::size_t j = 0; j < d; ++j) data.push_back(size * (3 + x[j] - 2 * along / norm2 * mirror[j]));
    }
    for (std::size_t j = 0; j < d; ++j) query.push_back(normal(random));
  }
  [[nodiscard]] std::span<const float> row(index_t i) const {
    return std::span<const float>(data).subspan(static_cast<std::size_t>(i * dim), static_cast<std::size_t>(dim));
  }
  [[nodiscard]] double product(const float* q, index_t i) const {
    double s = 0;
    for (std::size_t j = 0; j < static_cast<std::size_t>(dim); ++j) s += double{q[j]} * double{row(i)[j]};
    return s;
  }
  [[nodiscard]] auto cache() const { return contiguous_kv(data.data(), data.data(), kv_shape{1, 1, n, dim, dim}); }
};

template <class Index>
std::vector<float> scores_of(const Index& index, const float* q, std::vector<float>* errors = nullptr,
                             index_t first = 0) {
  std::vector<float> scores(static_cast<std::size_t>(index.size() - first)), scratch(index.scratch_size());
  if (errors) errors->resize(scores.size());
  index.score(q, first, scores, errors ? std::span<float>(*errors) : std::span<float>(), scratch);
  return scores;
}

template <class Index>
Index filled(Index index, const keys& k, index_t n) {
  for (index_t i = index.size(); i < n; ++i) index.append(k.row(i));
  return index;
}

}  // namespace

TEST_CASE("k-means finds clusters that are apart, and takes duplicates", "[sketch][codebook]") {
  // Three clusters on a line, in coordinate 1 of points of stride 2; coordinate 0 is another group's.
  const std::vector<float> points{7, 0, 7, 1, 7, 10, 7, 11, 7, 12, 7, 100};
  std::vector<float> centroids(3);
  sketch::k_means(points.data() + 1, 6, 2, 1, 3, 8, random_stream({.seed = 1}, 0), centroids.data());
  CHECK(std::set<float>(centroids.begin(), centroids.end()) == std::set<float>{0.5f, 11, 100});
  const std::vector<float> same(10, 2.5f);
  std::vector<float> four(4);
  sketch::k_means(same.data(), 10, 1, 1, 4, 8, random_stream({.seed = 1}, 0), four.data());
  CHECK(four == std::vector<float>(4, 2.5f));
  sketch::k_means(same.data(), 0, 1, 1, 4, 8, random_stream({.seed = 1}, 0), four.data());
  CHECK(four == std::vector<float>(4, 0.0f));
}

TEST_CASE("a code names the nearest centroid of each group, bit by bit", "[sketch][codebook]") {
  for (const int bits : {1, 3, 5, 6, 8}) {
    sketch::codebook book(sketch::equal_widths(11, 4), bits);
    CHECK(book.code_bytes() == static_cast<std::size_t>(4 * bits + 7) / 8);
    std::mt19937 random(static_cast<unsigned>(bits));
    std::normal_distribution<float> normal;
    std::vector<float> points(11 * 500), q(11), table(book.table_size());
    for (float& x : points) x = normal(random);
    for (float& x : q) x = normal(random);
    book.train(points, 4, 9);
    book.tabulate(q.data(), table.data());
    // Any vector's code is as good as every other vector's in every group: that is what nearest means.
    std::vector<std::vector<float>> left;
    for (std::size_t i = 0; i < 50; ++i) {
      std::vector<float> x(points.begin() + static_cast<std::ptrdiff_t>(11 * i),
                           points.begin() + static_cast<std::ptrdiff_t>(11 * i + 11));
      const std::vector<float> before = x;
      std::vector<std::uint8_t> code(book.code_bytes());
      book.encode(x.data(), code.data());
      double stands_for = 0;
      for (std::size_t j = 0; j < 11; ++j) stands_for += double{q[j]} * (double{before[j]} - double{x[j]});
      CHECK(std::abs(stands_for - double{book.product(code.data(), table.data())}) < 1e-4);
      std::vector<float> decoded(11);
      for (std::size_t j = 0; j < 11; ++j) decoded[j] = before[j] - x[j];
      left.push_back(decoded);
      for (const auto& other : left) {
        std::size_t start = 0;
        for (const index_t w : sketch::equal_widths(11, 4)) {
          double own = 0, theirs = 0;
          for (std::size_t j = start; j < start + static_cast<std::size_t>(w); ++j) {
            own += std::pow(double{x[j]}, 2);
            theirs += std::pow(double{before[j]} - double{other[j]}, 2);
          }
          CHECK(own <= theirs + 1e-5);
          start += static_cast<std::size_t>(w);
        }
      }
    }
  }
}

TEST_CASE("variances are dealt to the group with the least product, at most an equal share each",
          "[sketch][codebook]") {
  // 16 -> 0, 8 -> 1, 4 -> 1 (8 < 16), 1.5 -> 0 (16 < 32), 1 -> 0 (24 < 32), which is then full.
  const std::vector<double> variances{16, 8, 4, 1.5, 1, 1};
  CHECK(sketch::deal_variances(variances, 2) == std::vector<index_t>{0, 1, 1, 0, 0, 1});
  // All below 1: the same, since only ratios count.
  const std::vector<double> small{16e-6, 8e-6, 4e-6, 1.5e-6, 1e-6, 1e-6};
  CHECK(sketch::deal_variances(small, 2) == std::vector<index_t>{0, 1, 1, 0, 0, 1});
  const std::vector<double> zero(5);
  const std::vector<index_t> to = sketch::deal_variances(zero, 2);
  CHECK(std::count(to.begin(), to.end(), 0) <= 3);
  CHECK(std::count(to.begin(), to.end(), 1) <= 3);
}

TEST_CASE("principal axes are orthogonal and uncorrelated", "[sketch][codebook]") {
  const keys k(700, 13, 4);
  const sketch::principal_axes p = sketch::balanced_principal_axes(k.data, 13, 4);
  CHECK(std::accumulate(p.widths.begin(), p.widths.end(), index_t{0}) == 13);
  std::vector<double> y(700 * 13);
  for (std::size_t i = 0; i < 700; ++i) {
    for (std::size_t a = 0; a < 13; ++a) {
      for (std::size_t j = 0; j < 13; ++j)
        y[i * 13 + a] += double{p.axes[a * 13 + j]} * (double{k.data[i * 13 + j]} - double{p.mean[j]});
    }
  }
  for (std::size_t a = 0; a < 13; ++a) {
    for (std::size_t b = 0; b < 13; ++b) {
      double dot = 0, cross = 0, aa = 0, bb = 0;
      for (std::size_t j = 0; j < 13; ++j) dot += double{p.axes[a * 13 + j]} * double{p.axes[b * 13 + j]};
      for (std::size_t i = 0; i < 700; ++i) {
        cross += y[i * 13 + a] * y[i * 13 + b];
        aa += y[i * 13 + a] * y[i * 13 + a];
        bb += y[i * 13 + b] * y[i * 13 + b];
      }
      CHECK(std::abs(dot - (a == b)) < 1e-5);
      if (a != b) CHECK(std::abs(cross) < 1e-4 * std::sqrt(aa * bb));
    }
  }
}

TEST_CASE("product codes state their errors for every query, and bound them", "[sketch][product_codes]") {
  for (const index_t dim : {1, 7, 32, 64}) {
    for (const index_t groups : {10, 21}) {
      CAPTURE(dim, groups);
      const keys k(3000, dim, 3);
      const auto index = filled(sketch::product_codes(dim, groups), k, k.n);
      REQUIRE(index.trained());
      // Half of the queries lie along the keys' strong directions. Judged token by token, error over scale: a sum
      // of squared errors over all tokens would judge the few keys beyond the outermost centroids of a strong axis
      // (10 in 8000 held up to half of it), whose large ρ the scale does know.
      std::mt19937 random(8);
      std::normal_distribution<float> normal;
      double z2 = 0;
      std::vector<double> z;
      index_t beyond = 0, beyond_sigma = 0;
      for (int draw = 0; draw < 40; ++draw) {
        std::vector<float> q(static_cast<std::size_t>(dim)), errors;
        for (std::size_t j = 0; j < q.size(); ++j)
          q[j] = draw % 2 ? normal(random) : k.row(draw)[j] - k.row(draw + 1)[j];
        const std::vector<float> scores = scores_of(index, q.data(), &errors);
        std::vector<float> bounds(scores.size());
        index.hard_bounds(q.data(), 0, bounds);
        for (index_t i = 0; i < k.n; ++i) {
          const auto at = static_cast<std::size_t>(i);
          const double e = std::abs(k.product(q.data(), i) - double{scores[at]});
          beyond += e > double{bounds[at]} * (1 + 1e-5) + 2e-4;
          beyond_sigma += double{bounds[at]} > double{errors[at] * index.bound_over_error()} * (1 + 1e-4);
          if (i < 1024) continue;  // learned from
          z.push_back(e / double{errors[at]});
          z2 += z.back() * z.back();
        }
      }
      CHECK(beyond == 0);
      CHECK(beyond_sigma == 0);
      if (dim > 10) {
        const double rms = std::sqrt(z2 / static_cast<double>(z.size()));
        CHECK(rms > 0.65);
        CHECK(rms < 1.15);
        const auto rank = static_cast<std::ptrdiff_t>(0.999 * static_cast<double>(z.size()));
        std::nth_element(z.begin(), z.begin() + rank, z.end());
        CHECK(z[static_cast<std::size_t>(rank)] < 4.5);
      }
    }
  }
}

TEST_CASE("before training, product codes are the keys", "[sketch][product_codes]") {
  const keys k(1500, 9, 5);
  auto index = filled(sketch::product_codes(9, 3), k, 1023);
  CHECK_FALSE(index.trained());
  std::vector<float> errors;
  const std::vector<float> exact = scores_of(index, k.query.data(), &errors);
  for (index_t i = 0; i < 1023; ++i) {
    CHECK(std::abs(double{exact[static_cast<std::size_t>(i)]} - k.product(k.query.data(), i)) < 1e-4);
    CHECK(errors[static_cast<std::size_t>(i)] == 0);
  }
  CHECK(index.residual(5) == 0);
  CHECK(index.drift() == 1);
  index.append(k.row(1023));
  CHECK(index.trained());
  CHECK(index.size() == 1024);
  CHECK(index.residual(5) > 0);
  // 18 bits in 3 bytes, a float, and what was learned: 64·9 centroids, axes, moments, the mean, widths.
  CHECK(index.bytes() == 1024 * (3 + 4) + 4 * (64 * 9 + 81 + 81 + 9) + 3 * 8);
}

TEST_CASE("product codes depend on the keys, not on how they came", "[sketch][product_codes]") {
  const keys k(1400, 20, 6);
  const sketch::product_codes empty(20, 7, {.train_size = 600, .seed = 3});
  const auto whole = filled(empty, k, k.n);
  std::vector<float> errors;
  const std::vector<float> scores = scores_of(whole, k.query.data(), &errors);
  for (const index_t cut : {1399, 600, 599, 1, 0, -5}) {
    CAPTURE(cut);
    auto index = whole;
    index.truncate(cut);
    CHECK(index.size() == std::max<index_t>(cut, 0));
    CHECK(index.trained() == (cut > 0));  // what was learned stays while a token does
    index = filled(index, k, k.n);
    CHECK(save(index) == save(whole));
  }
  auto index = filled(empty, k, 300);  // truncation while waiting
  index.append(k.row(7));
  index.truncate(300);
  CHECK(save(filled(index, k, k.n)) == save(whole));
  index.truncate(5000);
  CHECK(index.size() == 300);
  // A run of tokens from the middle.
  std::vector<float> tail_errors;
  const std::vector<float> tail = scores_of(whole, k.query.data(), &tail_errors, 611);
  CHECK(std::vector<float>(scores.begin() + 611, scores.end()) == tail);
  CHECK(std::vector<float>(errors.begin() + 611, errors.end()) == tail_errors);
  auto cleared = whole;
  cleared.clear();
  CHECK(save(cleared) == save(empty));
}

TEST_CASE("product codes learn from a prefill, and say when keys have changed", "[sketch][product_codes]") {
  const keys k(4000, 16, 7);
  const auto cache = k.cache();
  sketch::product_codes index(16, 8);
  index.append(k.row(3));
  index.train(cache.head(0, 0));
  CHECK(index.trained());
  CHECK(index.size() == 0);  // append_from brings the tokens
  CHECK(append_from(index, cache.head(0, 0)) == 4000);
  CHECK(index.drift() > 0.7);
  CHECK(index.drift() < 2.5);
  const keys others(300, 16, 99, 5);  // other axes, five times as large
  std::vector<float> errors;
  for (index_t i = 0; i < others.n; ++i) index.append(others.row(i));
  CHECK(index.drift() > 4);
  const std::vector<float> scores = scores_of(index, k.query.data(), &errors);
  index_t beyond = 0;
  for (index_t i = 0; i < others.n; ++i) {
    const auto at = static_cast<std::size_t>(4000 + i);
    beyond += std::abs(double{scores[at]} - others.product(k.query.data(), i)) >
              double{errors[at] * index.bound_over_error()} * (1 + 1e-5);
  }
  CHECK(beyond == 0);  // far from what was learned, and still bounded
  index.train(contiguous_kv(k.data.data(), k.data.data(), kv_shape{1, 1, 0, 16, 16}).head(0, 0));
  CHECK_FALSE(index.trained());  // nothing to learn from
  CHECK(index.size() == 0);
}

TEST_CASE("product codes take keys that are alike, zero, huge or not numbers", "[sketch][product_codes]") {
  const sketch::product_codes empty(6, 10, {.train_size = 40});  // more groups than coordinates
  CHECK(empty.groups() == 6);
  const keys k(60, 6, 8);
  std::vector<float> errors;
  sketch::product_codes index = empty;
  const std::vector<float> zero(6);
  for (int i = 0; i < 50; ++i) index.append(std::span<const float>(zero));
  CHECK(index.trained());
  std::vector<float> scores = scores_of(index, k.query.data(), &errors);
  CHECK(scores == std::vector<float>(50));
  CHECK(errors == std::vector<float>(50));
  CHECK(index.drift() == 1);
  index.append(k.row(0));  // unlike all that was learned from
  CHECK(std::isinf(index.drift()));
  scores = scores_of(index, k.query.data(), &errors);
  CHECK(errors[50] > 0);
  CHECK(std::abs(double{scores[50]} - k.product(k.query.data(), 0)) <= double{errors[50] * index.bound_over_error()});

  index = empty;
  const std::vector<float> huge(6, 1e30f), nan(6, std::nanf("")), inf(6, std::numeric_limits<float>::infinity());
  for (index_t i = 0; i < 36; ++i) index.append(k.row(i));
  index.append(std::span<const float>(huge));
  index.append(std::span<const float>(nan));
  index.append(std::span<const float>(inf));
  for (index_t i = 36; i < 50; ++i) index.append(k.row(i));
  REQUIRE(index.trained());
  scores = scores_of(index, k.query.data(), &errors);
  for (index_t i = 0; i < index.size(); ++i) {
    const auto at = static_cast<std::size_t>(i);
    if (i < 36 || i > 38) CHECK(std::isfinite(errors[at]));
    if (i == 37 || i == 38) CHECK(std::isinf(errors[at]));
  }
  index = empty;
  for (int i = 0; i < 50; ++i) index.append(std::span<const float>(nan));  // nothing finite to learn from
  scores_of(index, k.query.data(), &errors);
  CHECK(std::isinf(errors[0]));
}

TEST_CASE("product codes are saved and loaded, and damage is refused", "[sketch][product_codes]") {
  const keys k(900, 12, 9);
  const sketch::product_codes empty(12, 5, {.train_size = 800});
  for (const index_t n : {0, 100, 900}) {
    CAPTURE(n);
    const auto index = filled(empty, k, n);
    const std::vector<std::byte> bytes = save(index);
    sketch::product_codes loaded;
    REQUIRE(load(bytes, loaded).ok());
    CHECK(scores_of(loaded, k.query.data()) == scores_of(index, k.query.data()));
    CHECK(save(filled(loaded, k, k.n)) == save(filled(index, k, k.n)));
    std::vector<std::byte> cut = bytes;
    cut.pop_back();
    CHECK_FALSE(load(cut, loaded).ok());
  }
  // No byte of a file may make an index that reads past its memory: each is either refused or scored.
  const std::vector<std::byte> good = save(filled(empty, k, 820));
  for (std::size_t at = 0; at < 200; ++at) {
    std::vector<std::byte> bad = good;
    bad[at] ^= std::byte{0x41};
    sketch::product_codes loaded;
    if (load(bad, loaded).ok() && loaded.dim() == 12) scores_of(loaded, k.query.data());
  }
}
