// Selectors of the literature against their papers' definitions: Quest, DoubleSparsity, HashAttention, random.
#include <cmath>
#include <cstring>
#include <set>
#include <vattn/vattn.hpp>
#include <vector>

#include "support/catch.hpp"
#include "unit/select/growth.hpp"

using namespace vattn;
using namespace vattn::test;

namespace {

template <class Index>
Index filled(Index index, const vectors& v) {
  for (index_t i = 0; i < v.n; ++i) index.append(v.key(i));
  return index;
}

// Weights of learned_map: for keys and queries the same layers, row-major.
std::vector<std::byte> weights_file(const std::vector<std::uint32_t>& sizes, const std::vector<float>& weights) {
  std::vector<std::byte> out;
  const auto put = [&](const void* data, std::size_t n) {
    const auto* bytes = static_cast<const std::byte*>(data);
    out.insert(out.end(), bytes, bytes + n);
  };
  put("vattnha1", 8);
  for (int net = 0; net < 2; ++net) {
    const auto layers = static_cast<std::uint32_t>(sizes.size() - 1);
    put(&layers, 4);
    put(sizes.data(), 4 * sizes.size());
    put(weights.data(), 4 * weights.size());
  }
  return out;
}

}  // namespace

TEST_CASE("Quest scores a page by hand", "[select][quest]") {
  select::quest index(2, 2);
  for (const std::vector<float>& key : {std::vector<float>{1, -2}, {3, 1}, {0, 5}})
    index.append(std::span<const float>(key));
  // Page 0: channel 0 in [1, 3], channel 1 in [-2, 1]; page 1: the point (0, 5).
  const std::vector<float> query{2, -1};
  std::vector<float> scores(3);
  index.score(query.data(), 0, scores, {}, {});
  CHECK(std::abs(scores[0] - 8) < 1e-4f);  // 2·3 + (−1)(−2)
  CHECK(scores[0] == scores[1]);
  CHECK(std::abs(scores[2] + 5) < 1e-4f);
  CHECK(index.bytes() == (2 * 4 + 2) * sizeof(float));
}

TEST_CASE("no logit exceeds its page's score, also after truncation", "[select][quest]") {
  for (const index_t dim : {1, 5, 64}) {
    const vectors v(203, dim, 11);
    select::quest index = filled(select::quest(dim), v);
    const auto check = [&](const vectors& of) {
      const std::vector<float> scores = scores_of(index, of);
      for (index_t i = 0; i < index.size(); ++i) {
        CHECK(kernel::dot(of.query.data(), of.key(i)) <= scores[static_cast<std::size_t>(i)]);
      }
    };
    check(v);
    index.truncate(150);  // into an earlier page
    check(v);
    vectors other = v;  // other keys from there on
    for (std::size_t i = static_cast<std::size_t>(150 * dim); i < other.keys.size(); ++i) other.keys[i] *= -3;
    for (index_t i = 150; i < v.n; ++i) index.append(other.key(i));
    check(other);
  }
}

TEST_CASE("Quest grows as it would have been built, and is saved", "[select][quest]") {
  const vectors v(96, 8, 3);
  const select::quest whole = filled(select::quest(8), v);
  select::quest grown(8);
  for (index_t i = 0; i < 83; ++i) grown.append(v.key(i));
  grown.append(v.key(0));
  grown.append(v.key(1));
  grown.truncate(83);  // a rejected draft inside the last page
  for (index_t i = 83; i < 96; ++i) grown.append(v.key(i));
  CHECK(scores_of(whole, v) == scores_of(grown, v));
  select::quest loaded;
  REQUIRE(load(save(whole), loaded).ok());
  CHECK(scores_of(loaded, v) == scores_of(whole, v));
  grown.truncate(64);  // a page boundary: nothing of it is left
  for (index_t i = 64; i < 96; ++i) grown.append(v.key(i));
  CHECK(scores_of(whole, v) == scores_of(grown, v));
  grown.clear();
  CHECK(grown.size() == 0);
  CHECK(grown.bytes() == 0);
}

TEST_CASE("Quest's bounds guard a verified output", "[select][quest]") {
  // Sorted keys, so that pages mean something; a heavy page is read, the others are bounded.
  vectors v(2048, 32, 5);
  const auto cache = contiguous_kv(v.keys.data(), v.keys.data(), kv_shape{1, 1, v.n, 32, 32});
  std::vector<select::quest> heads(1, select::quest(32));
  append_from(heads[0], cache.head(0, 0));
  struct policy : default_policy {
    using selector = select::top_k<select::contributions<select::indexed<select::quest>>>;
  };
  policy::selector selector;
  selector.heads = heads;
  std::vector<float> out(32);
  certificate c;
  workspace memory;
  const vattention<policy> attend({.epsilon = 0.3, .delta = 0.1, .sinks = 16, .window = 16}, selector);
  REQUIRE(attend(tensor_view<const float, 4>(v.query.data(), {1, 1, 1, 32}), cache, {.scale = 0.05f},
                 {.output = {out.data(), {1, 1, 1, 32}}, .certificates = {&c, {1, 1, 1}}}, memory)
              .ok());
  CHECK((c.exact() || c.epsilon_achieved <= 0.3));
}

TEST_CASE("DoubleSparsity picks the channels and scores by hand", "[select][double_sparsity]") {
  const std::vector<float> keys{1, -8, 0.5f, 2, -1, 6, 0.25f, 2};  // two keys of four channels
  const std::vector<float> queries{1, 0.01f, 9, 1};
  CHECK(select::heavy_channels({}, keys, 4, 2) == std::vector<ordinal>{1, 3});
  CHECK(select::heavy_channels(queries, keys, 4, 2) == std::vector<ordinal>{2, 3});  // 6.75, 4 against 2, 0.14
  CHECK(select::heavy_channels(queries, keys, 4, 9).size() == 4);
  select::double_sparsity index({3, 0});
  const std::vector<float> key{-1, 100, 100, 14};  // labels: 15 and 0 of steps of 1 from −1
  index.append(std::span<const float>(key));
  const std::vector<float> query{2, 50, 50, 3};
  std::vector<float> score(1), scratch(index.scratch_size());
  index.score(query.data(), 0, score, {}, scratch);
  CHECK(score[0] == 3 * 14 - 2);
}

TEST_CASE("DoubleSparsity with all channels is the product to half a step", "[select][double_sparsity]") {
  const vectors v(60, 9, 7);
  std::vector<ordinal> all;
  for (ordinal j = 0; j < 9; ++j) all.push_back(j);
  const select::double_sparsity index = filled(select::double_sparsity(all), v);
  const std::vector<float> scores = scores_of(index, v);
  float reach = 0;
  for (const float q : v.query) reach += std::abs(q);
  for (index_t i = 0; i < v.n; ++i) {
    const auto key = v.key(i);
    const auto [low, high] = std::minmax_element(key.begin(), key.end());
    CHECK(std::abs(scores[static_cast<std::size_t>(i)] - kernel::dot(v.query.data(), key)) <=
          reach * (*high - *low) / 30 * 1.001f);
  }
  check_growth(select::double_sparsity({4, 0, 7}), v);
  check_growth(select::double_sparsity({2}), v);  // one channel: a step of 0
}

TEST_CASE("HashAttention counts the bits that differ", "[select][hash_attention]") {
  const vectors v(50, 12, 9);
  const auto index = filled(select::hash_attention(select::simhash_map(12, 32, 3)), v);
  const sketch::hyperplanes planes(12, 32, 3);
  std::vector<float> q(32), k(32);
  planes.project(v.query.data(), q.data());
  const std::vector<float> scores = scores_of(index, v);
  for (index_t i = 0; i < v.n; ++i) {
    planes.project(v.key(i).data(), k.data());
    int differ = 0;
    for (std::size_t b = 0; b < 32; ++b) differ += (q[b] >= 0) != (k[b] >= 0);
    CHECK(scores[static_cast<std::size_t>(i)] == -static_cast<float>(differ));
  }
  CHECK(index.bytes() == 50 * 8);
  check_growth(select::hash_attention(select::simhash_map(12)), v);
}

TEST_CASE("HashAttention's learned maps by hand, and from bad bytes", "[select][hash_attention]") {
  // Two channels, one hidden layer of two, two bits: bit 0 of silu(x) − silu(y), bit 1 of silu(y) − 1.
  const std::vector<std::uint32_t> sizes{2, 2, 2};
  const std::vector<float> weights{1, 0, 0, 1, 0, 0, 1, -1, 0, 1, 0, -1};
  const std::vector<std::byte> file = weights_file(sizes, weights);
  select::learned_map map;
  REQUIRE(map.load(file).ok());
  CHECK(map.dim() == 2);
  CHECK(map.bits() == 2);
  select::hash_attention index(map);
  for (const std::vector<float>& key : {std::vector<float>{2, 1}, {1, 3}, {-1, -1}})
    index.append(std::span<const float>(key));
  CHECK(index.signature(0) == 1u);  // 1.76 > 0.73, 0.73 < 1
  CHECK(index.signature(1) == 2u);  // 0.73 < 2.86, 2.86 > 1
  CHECK(index.signature(2) == 1u);  // equal counts as set
  const std::vector<float> query{1, 3};
  std::vector<float> scores(3), scratch(index.scratch_size());
  index.score(query.data(), 0, scores, {}, scratch);
  CHECK(scores == std::vector<float>{-2, 0, -2});

  for (std::size_t cut = 0; cut < file.size(); ++cut) CHECK_FALSE(map.load(std::span(file).first(cut)).ok());
  std::vector<std::byte> bad = file;
  bad.push_back(std::byte{0});
  CHECK(contains(map.load(bad).message(), "left after"));
  bad = file;
  bad[8] = std::byte{200};  // layers
  CHECK(contains(map.load(bad).message(), "number of layers"));
  bad = file;
  std::memset(bad.data() + 12, 0xff, 4);
  CHECK(contains(map.load(bad).message(), "layer's size"));
  bad = file;
  std::memset(bad.data() + 24, 0xff, 4);  // NaN
  CHECK(contains(map.load(bad).message(), "not finite"));
  CHECK(map.bits() == 2);  // as it was
}

TEST_CASE("random scores depend on the seed and the token alone", "[select][random]") {
  const vectors v(100, 4, 1);
  check_growth(select::random_ranking(5), v);
  const std::vector<float> a = scores_of(filled(select::random_ranking(5), v), v);
  const std::vector<float> b = scores_of(filled(select::random_ranking(6), v), v);
  CHECK(a != b);
  CHECK(std::set<float>(a.begin(), a.end()).size() == 100);
  double mean = 0;
  for (const float x : a) mean += static_cast<double>(x) / 100;
  CHECK(std::abs(mean - 0.5) < 0.15);
}
