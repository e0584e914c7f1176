// Quantised keys: the rotation, the format's arithmetic, its error statement, and growth.
#include <cmath>
#include <random>
#include <vattn/vattn.hpp>
#include <vector>

#include "support/catch.hpp"

namespace {

using namespace vattn;

struct keys {
  index_t n, dim;
  std::vector<float> data, query;

  keys(index_t count, index_t width, unsigned seed, float shared) : n(count), dim(width) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> mean(static_cast<std::size_t>(dim));
    for (float& x : mean) x = shared * normal(random);
    for (index_t i = 0; i < n * dim; ++i) data.push_back(normal(random) + mean[static_cast<std::size_t>(i % dim)]);
    for (index_t j = 0; j < dim; ++j) query.push_back(normal(random));
  }
  [[nodiscard]] std::span<const float> row(index_t i) const {
    return std::span<const float>(data).subspan(static_cast<std::size_t>(i * dim), static_cast<std::size_t>(dim));
  }
  [[nodiscard]] double product(index_t i) const {
    double s = 0;
    for (std::size_t j = 0; j < static_cast<std::size_t>(dim); ++j) s += double{query[j]} * row(i)[j];
    return s;
  }
};

template <class Index>
std::vector<float> scores_of(const Index& index, const keys& k, std::vector<float>* errors = nullptr) {
  std::vector<float> scores(static_cast<std::size_t>(index.size())), scratch(index.scratch_size());
  if (errors) errors->resize(scores.size());
  index.score(k.query.data(), 0, scores, errors ? std::span<float>(*errors) : std::span<float>(), scratch);
  return scores;
}

template <int Bits>
void check_codes(index_t dim) {
  CAPTURE(Bits, dim);
  const keys k(2500, dim, 3, 2.0f);
  sketch::key_codes<Bits> codes(dim, 7);
  for (index_t i = 0; i < k.n; ++i) codes.append(k.row(i));
  std::vector<float> errors;
  const std::vector<float> scores = scores_of(codes, k, &errors);
  double square = 0, stated = 0, sum = 0;
  index_t beyond = 0;
  for (index_t i = 0; i < k.n; ++i) {
    const double e = k.product(i) - scores[static_cast<std::size_t>(i)];
    const double sigma = errors[static_cast<std::size_t>(i)];
    beyond += std::abs(e) > sigma * codes.bound_over_error() * (1 + 1e-5) + 1e-4;
    if (i < 64) continue;  // the first epoch is not centred
    sum += e;
    square += e * e;
    stated += sigma * sigma;
  }
  CHECK(beyond == 0);  // the hard bound
  const auto m = static_cast<double>(k.n - 64);
  // One query and one rotation: the errors' size must be the stated one, within what 2436 keys can tell.
  CHECK(std::sqrt(square / stated) > 0.8);
  CHECK(std::sqrt(square / stated) < 1.25);
  CHECK(std::abs(sum / m) < 5 * std::sqrt(square / m / m) + 0.02 * std::sqrt(square / m));

  // Growth: appended again after a truncation, the codes are the same ones.
  for (const index_t cut : {2499, 1024, 1000, 64, 63, 0}) {
    codes.truncate(cut);
    CHECK(codes.size() == cut);
    for (index_t i = cut; i < k.n; ++i) codes.append(k.row(i));
    const std::vector<float> again = scores_of(codes, k);
    double difference = 0;
    for (std::size_t i = 0; i < scores.size(); ++i)
      difference = std::max<double>(difference, std::abs(again[i] - scores[i]));
    CAPTURE(cut);
    CHECK(difference < 1e-4);
  }
  codes.clear();
  CHECK(codes.size() == 0);
}

}  // namespace

TEST_CASE("the rotation keeps inner products and spreads a single coordinate", "[sketch]") {
  for (const index_t dim : {1, 3, 64, 80, 96, 128, 256}) {
    const sketch::random_rotation rotation(dim, 5);
    std::vector<float> a(rotation.width()), b(rotation.width());
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    double before = 0;
    for (std::size_t j = 0; j < static_cast<std::size_t>(dim); ++j) {
      a[j] = normal(random);
      b[j] = normal(random);
      before += double{a[j]} * b[j];
    }
    rotation.apply(a);
    rotation.apply(b);
    double after = 0;
    for (std::size_t j = 0; j < a.size(); ++j) after += double{a[j]} * b[j];
    CAPTURE(dim);
    CHECK(std::abs(before - after) < 1e-4 * (1 + std::abs(before)));
  }
  const sketch::random_rotation rotation(128, 9);
  std::vector<float> e(128);
  e[5] = 1;
  rotation.apply(e);
  float most = 0;
  for (const float x : e) most = std::max(most, std::abs(x));
  CHECK(most < 0.6f);
}

TEST_CASE("codes state their error, hold their bound, and grow", "[sketch]") {
  for (const index_t dim : {64, 96, 128}) {
    check_codes<1>(dim);
    check_codes<2>(dim);
    check_codes<4>(dim);
    check_codes<8>(dim);
  }
}

TEST_CASE("keys that a code can represent are represented exactly", "[sketch]") {
  // A zero key decodes to the epoch's mean, here 0, with no residual.
  sketch::key_codes<4> codes(64, 1);
  const std::vector<float> zero(64);
  codes.append(std::span<const float>(zero));
  CHECK(codes.residual(0) == 0.0f);
  const keys k(1, 64, 1, 0);
  CHECK(std::abs(scores_of(codes, k)[0]) < 1e-6f);
  // Near-duplicates have near-equal scores.
  sketch::key_codes<1> pair(64, 1);
  std::vector<float> key(k.data);
  pair.append(std::span<const float>(key));
  key[0] += 1e-4f;
  pair.append(std::span<const float>(key));
  const std::vector<float> s = scores_of(pair, k);
  CHECK(std::abs(s[0] - s[1]) < 1e-2f);
}

TEST_CASE("a code costs what its format says", "[sketch]") {
  const keys k(4096, 128, 2, 1);
  sketch::key_codes<1> codes(128, 1);
  for (index_t i = 0; i < k.n; ++i) codes.append(k.row(i));
  const double per_token = static_cast<double>(codes.bytes()) / 4096;
  CHECK(per_token >= 24);
  CHECK(per_token < 26);  // 16 + 8, and the epochs' means
}

TEST_CASE("an index that lags behind its cache is an error, not a wrong output", "[sketch][index]") {
  const keys k(2000, 64, 4, 0);
  const auto cache = contiguous_kv(k.data.data(), k.data.data(), kv_shape{1, 1, k.n, 64, 64});
  std::vector<sketch::key_codes<4>> heads(1, sketch::key_codes<4>(64, 1));
  for (index_t i = 0; i < 1500; ++i) heads[0].append(k.row(i));
  struct policy : default_policy {
    using selector = select::indexed<sketch::key_codes<4>>;
    using sampler = sample::by_importance;
  };
  std::vector<float> out(64);
  certificate c;
  workspace memory;
  const attention_result result{.output = {out.data(), {1, 1, 1, 64}}, .certificates = {&c, {1, 1, 1}}};
  const tensor_view<const float, 4> q(k.query.data(), {1, 1, 1, 64});
  const vattention<policy> attend({.epsilon = 0.2, .delta = 0.1, .sinks = 16, .window = 16}, {.heads = heads});
  const status behind = attend(q, cache, {.scale = 0.125f}, result, memory);
  CHECK(behind.code() == errc::invalid_argument);
  CHECK(test::contains(behind.message(), "append the new keys"));
  CHECK(append_from(heads[0], cache.head(0, 0)) == 500);
  CHECK(attend(q, cache, {.scale = 0.125f}, result, memory).ok());
}

TEST_CASE("codes follow a mean that drifts for as long as a cache grows, one token at a time", "[sketch][soak]") {
  constexpr index_t n = 60000, dim = 16;
  std::mt19937 random(17);
  std::normal_distribution<float> normal;
  sketch::key_codes<2> codes(dim, 3), rebuilt(dim, 3);
  std::vector<float> all;
  std::vector<float> key(dim), query(dim, 0.5f), error(1), score(1), scratch(codes.scratch_size());
  query[0] = 3;  // along the drift
  double early = 0, late = 0, off = 0, stated = 0;
  for (index_t i = 0; i < n; ++i) {
    for (float& x : key) x = normal(random);
    key[0] += 20 * std::sin(static_cast<float>(i) / 15000.0f);  // far more than a key's own spread
    codes.append(std::span<const float>(key));
    all.insert(all.end(), key.begin(), key.end());
    if (i % 997 == 0 && i > 2000) {  // a draft of a few tokens is rejected
      for (int draft = 0; draft < 5; ++draft) codes.append(std::span<const float>(key));
      codes.truncate(i + 1);
    }
    if (i < 4096 || (i >= 8192 && i < n - 4096)) continue;
    codes.score(query.data(), i, score, error, scratch);
    double product = 0;
    for (std::size_t j = 0; j < dim; ++j) product += double{query[j]} * key[j];
    const double e = product - static_cast<double>(score[0]);
    off += e * e;
    stated += std::pow(static_cast<double>(error[0]), 2);
    (i < 8192 ? early : late) += e * e / 4096;
  }
  CHECK(codes.size() == n);
  CHECK(off < 1.5 * stated);
  CHECK(late < 4 * early);
  // All of it again, at once.
  for (index_t i = 0; i < n; ++i)
    rebuilt.append(std::span<const float>(all).subspan(static_cast<std::size_t>(i * dim), dim));
  std::vector<float> a(n), b(n);
  codes.score(query.data(), 0, a, {}, scratch);
  rebuilt.score(query.data(), 0, b, {}, scratch);
  index_t differ = 0;
  for (std::size_t i = 0; i < n; ++i) differ += std::abs(a[i] - b[i]) > 1e-4f * (1 + std::abs(b[i]));
  CHECK(differ == 0);
}

TEST_CASE("codes of the smallest heads", "[sketch]") {
  for (const index_t dim : {1, 2, 3, 5}) {
    const keys k(700, dim, 5, 1);
    sketch::key_codes<1> one(dim, 2);
    sketch::key_codes<4> four(dim, 2);
    for (index_t i = 0; i < k.n; ++i) one.append(k.row(i)), four.append(k.row(i));
    std::vector<float> error_one, error_four;
    const std::vector<float> s1 = scores_of(one, k, &error_one), s4 = scores_of(four, k, &error_four);
    for (index_t i = 0; i < k.n; ++i) {
      const auto at = static_cast<std::size_t>(i);
      CHECK(std::abs(k.product(i) - s1[at]) <= one.bound_over_error() * error_one[at] * (1 + 1e-5f) + 1e-4);
      CHECK(std::abs(k.product(i) - s4[at]) <= four.bound_over_error() * error_four[at] * (1 + 1e-5f) + 1e-4);
    }
  }
}

namespace {

template <int Bits>
void check_bad_keys() {
  constexpr float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {std::nanf(""), inf, -inf}) {
    CAPTURE(Bits, bad);
    keys k(20, 16, 5, 1);
    k.data[19 * 16 + 7] = bad;
    sketch::key_codes<Bits> codes(16, 2);
    for (index_t i = 0; i < k.n; ++i) codes.append(k.row(i));
    std::vector<float> errors;
    const std::vector<float> scores = scores_of(codes, k, &errors);
    for (std::size_t i = 0; i < 19; ++i) {
      CHECK(std::isfinite(errors[i]));
      CHECK(std::abs(k.product(static_cast<index_t>(i)) - scores[i]) <=
            codes.bound_over_error() * errors[i] * (1 + 1e-5f) + 1e-4);
    }
    CHECK_FALSE(errors[19] < inf);
  }
}

}  // namespace

TEST_CASE("a key that is not finite has no error that is a number, and harms no other", "[sketch]") {
  check_bad_keys<1>();
  check_bad_keys<2>();
  check_bad_keys<4>();
  check_bad_keys<8>();
}
