// Selectors of the literature at their edges: truncations in any order, keys that are not finite, damaged files.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vattn/vattn.hpp>
#include <vector>

#include "support/catch.hpp"
#include "unit/select/growth.hpp"

using namespace vattn;
using namespace vattn::test;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

std::span<const float> row(const std::vector<float>& x) { return x; }

template <class Index>
std::vector<float> scores_for(const Index& index, const std::vector<float>& query) {
  std::vector<float> scores(static_cast<std::size_t>(index.size())), scratch(index.scratch_size());
  index.score(query.data(), 0, scores, {}, scratch);
  return scores;
}

double product(const std::vector<float>& q, std::span<const float> k) {
  double sum = 0;
  for (std::size_t j = 0; j < q.size(); ++j) sum += static_cast<double>(q[j]) * static_cast<double>(k[j]);
  return sum;
}

// A file of format Index with these members.
template <class Index, class... Members>
std::vector<std::byte> file_of(const Members&... members) {
  std::vector<std::byte> out;
  archive_writer a(out);
  const std::string_view format = Index::format();
  a(detail::archive_magic, std::vector<char>(format.begin(), format.end()));
  a(members...);
  return out;
}

template <class Index, class... Members>
bool loads(const Members&... members) {
  Index index;
  return load(file_of<Index>(members...), index).ok();
}

}  // namespace

TEST_CASE("Quest truncated twice within two pages still bounds", "[select][quest]") {
  // The second truncation is into a page that is the last again, but whose keys went when the next one began.
  select::quest index(1, 2);
  for (const float k : {-5.0f, -7.0f, 1.0f}) index.append(row({k}));
  index.truncate(2);
  index.truncate(1);
  const std::vector<float> scores = scores_for(index, {-1});
  REQUIRE(scores.size() == 1);
  CHECK(scores[0] >= 5);     // the logit
  CHECK(scores[0] < 7.01f);  // the page's old bound
}

TEST_CASE("Quest bounds every logit after any appends and truncations", "[select][quest]") {
  for (const index_t dim : {1, 7, 32}) {
    for (const index_t page : {1, 3, 16}) {
      CAPTURE(dim, page);
      const vectors v(400, dim, 21);
      std::mt19937 random(5);
      select::quest index(dim, page);
      std::vector<index_t> held;  // which of v's keys
      // Pages cut after the next one had begun: bounded, not rebuilt. `newest`: the page begun last.
      std::vector<bool> loose;
      index_t newest = -1;
      int below = 0, unlike = 0, compared = 0;
      for (int step = 0; step < 200; ++step) {
        if (random() % 3 != 0) {
          for (auto n = random() % static_cast<unsigned>(2 * page + 1); n > 0; --n) {
            const auto place = static_cast<index_t>(held.size());
            if (place % page == 0) newest = place / page, loose.push_back(false);
            held.push_back(static_cast<index_t>(random() % 400));
            index.append(v.key(held.back()));
          }
        } else {
          const auto back = static_cast<index_t>(random() % static_cast<unsigned>(3 * page + 1));
          const index_t to = std::max<index_t>(0, static_cast<index_t>(held.size()) - back);
          if (to < static_cast<index_t>(held.size()) && to % page != 0 && to / page != newest)
            loose[static_cast<std::size_t>(to / page)] = true;
          if (to < static_cast<index_t>(held.size()) && (to % page == 0 || to / page != newest)) newest = -1;
          held.resize(static_cast<std::size_t>(to));
          loose.resize(static_cast<std::size_t>((to + page - 1) / page));
          index.truncate(to);
        }
        if (step % 17 == 0) {
          select::quest loaded;
          REQUIRE(load(save(index), loaded).ok());
          index = loaded;
        }
        REQUIRE(index.size() == static_cast<index_t>(held.size()));
        select::quest rebuilt(dim, page);
        for (const index_t i : held) rebuilt.append(v.key(i));
        const std::vector<float> scores = scores_of(index, v), tight = scores_of(rebuilt, v);
        for (std::size_t i = 0; i < held.size(); ++i) {
          below += !(product(v.query, v.key(held[i])) <= static_cast<double>(scores[i]));
          below += !(kernel::dot(v.query.data(), v.key(held[i])) <= scores[i]);
          if (loose[i / static_cast<std::size_t>(page)]) continue;
          unlike += scores[i] != tight[i];
          ++compared;
        }
      }
      CHECK(below == 0);
      CHECK(unlike == 0);
      CHECK(compared > 100);
    }
  }
}

TEST_CASE("Quest's bound is rounded outward", "[select][quest]") {
  // A page of one key repeated: the bound has no room but its slack.
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  int below = 0;
  double most = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    const auto dim = static_cast<std::size_t>(1 + trial % 200);
    const float size = std::ldexp(1.0f, trial % 3 == 0 ? 0 : trial % 3 == 1 ? 60 : -74);  // products about 1e-45
    std::vector<float> q(dim), k(dim);
    for (float& x : q) x = size * normal(random);
    for (float& x : k) x = size * normal(random);
    select::quest index(static_cast<index_t>(dim));
    for (int i = 0; i < 3; ++i) index.append(row(k));
    const double bound = static_cast<double>(scores_for(index, q)[1]), exact = product(q, k);
    double reach = 0;
    for (std::size_t j = 0; j < dim; ++j) reach += std::abs(static_cast<double>(q[j]) * static_cast<double>(k[j]));
    below += !(exact <= bound);
    below += !(kernel::dot(q.data(), row(k)) <= static_cast<float>(bound));
    if (trial % 3 != 2) most = std::max(most, (bound - exact) / reach);
  }
  CHECK(below == 0);
  CHECK(most < 200 * 0x1p-21);  // and no further than it must be
}

TEST_CASE("keys that are not finite are read first, not lost", "[select][quest][double_sparsity]") {
  select::quest pages(2, 2);
  for (const std::vector<float>& key : {std::vector<float>{1, 2}, {not_a_number, 1}, {1, 1}, {3, 4}})
    pages.append(row(key));
  CHECK(scores_for(pages, {1, 1})[0] == inf);
  CHECK(scores_for(pages, {1, 1})[1] == inf);
  CHECK(scores_for(pages, {0, 1})[0] == inf);  // 0·NaN is NaN: no bound either
  CHECK(std::abs(scores_for(pages, {1, 1})[3] - 7) < 1e-4f);
  for (const float k : {inf, -inf, 3e38f, -3e38f}) {
    select::quest one(2);
    one.append(row({k, -k}));
    CHECK(scores_for(one, {10, 10})[0] == inf);
    CHECK(scores_for(one, {0, 0})[0] >= 0);
  }
  for (const float k : {not_a_number, inf, -inf}) {
    select::double_sparsity labels({0, 1});
    labels.append(row({k, 1}));
    labels.append(row({1, k}));
    labels.append(row({2, 3}));
    const std::vector<float> scores = scores_for(labels, {1, 1});
    CHECK(scores[0] == inf);
    CHECK(scores[1] == inf);
    CHECK(scores[2] == 5);
  }
}

TEST_CASE("DoubleSparsity's labels of huge keys", "[select][double_sparsity]") {
  // The range, 6e38, is no float: its step, 4e37, is.
  const std::vector<float> key{3e38f, -3e38f, 1e38f};
  select::double_sparsity index({0, 1, 2});
  index.append(row(key));
  for (std::size_t c = 0; c < 3; ++c) {
    std::vector<float> query(3);
    query[c] = 0.25f;
    CHECK(std::abs(scores_for(index, query)[0] - 0.25f * key[c]) < 1e33f);
  }
}

TEST_CASE("DoubleSparsity's channels from bad samples, and beyond the keys", "[select][double_sparsity]") {
  std::vector<float> keys;  // 40 channels, so that a sort with an inconsistent order would go astray
  for (int i = 0; i < 400; ++i)
    keys.push_back(i % 3 == 0 ? not_a_number : i % 7 == 0 ? inf : static_cast<float>(i % 40));
  std::vector<double> sum(40);  // of what is finite
  for (std::size_t i = 0; i < keys.size(); ++i)
    sum[i % 40] += std::isfinite(keys[i]) ? static_cast<double>(keys[i]) : 0;
  std::vector<ordinal> want;
  for (ordinal c = 0; c < 40; ++c) want.push_back(c);
  std::stable_sort(want.begin(), want.end(), [&](ordinal a, ordinal b) { return sum[a] > sum[b]; });
  CHECK(select::heavy_channels({}, keys, 40, 40) == want);
  CHECK(select::heavy_channels(keys, keys, 40, 40) == want);
  CHECK(select::heavy_channels({}, keys, 0, 4).empty());
  CHECK(select::heavy_channels({}, keys, 40, -1).empty());
  CHECK(select::heavy_channels({}, {}, 3, 2) == std::vector<ordinal>{0, 1});

  select::double_sparsity index({1, 7});
  index.append(row({4, -2}));
  CHECK(index.channels() == std::vector<ordinal>{1});
  CHECK(scores_for(index, {5, 3}) == std::vector<float>{-6});
  select::double_sparsity none;
  none.append(row({4, -2}));
  CHECK(scores_for(none, {5, 3}) == std::vector<float>{0});
}

TEST_CASE("files that address what they do not hold are refused", "[select]") {
  using floats = std::vector<float>;
  constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
  const auto size = [](std::size_t x) { return x; };
  CHECK(loads<select::quest>(size(1), size(2), size(3), floats(4), floats(1)));
  CHECK(loads<select::quest>(size(1), size(2), size(3), floats(4), floats()));  // the last page's keys are not kept
  CHECK_FALSE(loads<select::quest>(size(1), size(2), size(4), floats(4), floats(1)));
  CHECK_FALSE(loads<select::quest>(size(1), size(2), size(5), floats(4), floats(1)));
  CHECK_FALSE(loads<select::quest>(size(8), most, size(2), floats(), floats()));  // wraps to no pages
  CHECK_FALSE(loads<select::quest>(size(1), size(0), size(3), floats(4), floats(1)));
  CHECK_FALSE(loads<select::quest>(most, size(2), size(3), floats(4), floats(1)));

  using labels = std::vector<std::uint8_t>;
  using channels = std::vector<ordinal>;
  CHECK(loads<select::double_sparsity>(size(4), channels{0, 3}, labels(1), floats(1), floats(1)));
  CHECK_FALSE(loads<select::double_sparsity>(size(4), channels{0, 4}, labels(1), floats(1), floats(1)));
  CHECK_FALSE(loads<select::double_sparsity>(size(4), channels{0, 3}, labels(), floats(1), floats(1)));
  CHECK_FALSE(loads<select::double_sparsity>(size(4), channels{0, 3}, labels(1), floats(1), floats()));

  using random_hash = select::hash_attention<select::simhash_map>;
  using signatures = std::vector<std::uint64_t>;
  CHECK(loads<random_hash>(index_t{4}, index_t{32}, std::uint64_t{1}, signatures(2)));
  CHECK_FALSE(loads<random_hash>(index_t{4}, index_t{65}, std::uint64_t{1}, signatures(2)));
  CHECK_FALSE(loads<random_hash>(index_t{-4}, index_t{32}, std::uint64_t{1}, signatures()));

  using learned_hash = select::hash_attention<select::learned_map>;
  using sizes = std::vector<std::uint32_t>;
  CHECK(loads<learned_hash>(sizes{2, 1}, floats(3), sizes{2, 1}, floats(3), signatures(2)));
  CHECK_FALSE(loads<learned_hash>(sizes{2, 1}, floats(3), sizes{2, 2}, floats(6), signatures(2)));
  CHECK_FALSE(loads<learned_hash>(sizes{2, 1}, floats(3), sizes{}, floats(), signatures()));
  CHECK_FALSE(loads<learned_hash>(sizes{}, floats(), sizes{2, 1}, floats(3), signatures()));
  CHECK_FALSE(loads<learned_hash>(sizes{2, 1}, floats(2), sizes{2, 1}, floats(3), signatures()));
  CHECK_FALSE(loads<learned_hash>(sizes{2, 65}, floats(195), sizes{2, 65}, floats(195), signatures()));

  CHECK_FALSE(loads<select::random_ranking>(std::uint64_t{1}, index_t{-1}));
}

TEST_CASE("a learned HashAttention survives a file", "[select][hash_attention]") {
  // 3 channels, one hidden layer of 4, 5 bits; the networks of keys and queries differ.
  const vectors v(30, 3, 4), w(1, 82, 8);
  std::vector<std::byte> bytes;
  archive_writer put(bytes);
  for (const char c : std::string_view("vattnha1")) put(c);
  for (std::size_t net = 0; net < 2; ++net) {
    for (const std::uint32_t x : {2u, 3u, 4u, 5u}) put(x);
    for (std::size_t i = 0; i < 41; ++i) put(w.keys[net * 41 + i]);
  }
  select::learned_map map;
  REQUIRE(map.load(bytes).ok());
  check_growth(select::hash_attention(map), v);

  // The definition, in double.
  const auto signs = [&](std::size_t net, std::span<const float> x) {
    const float* p = w.keys.data() + net * 41;
    std::vector<double> hidden(4);
    for (std::size_t i = 0; i < 4; ++i) {
      double z = static_cast<double>(p[12 + i]);
      for (std::size_t j = 0; j < 3; ++j) z += static_cast<double>(p[3 * i + j]) * static_cast<double>(x[j]);
      hidden[i] = z / (1 + std::exp(-z));
    }
    std::vector<bool> bits;
    for (std::size_t i = 0; i < 5; ++i) {
      double z = static_cast<double>(p[36 + i]);
      for (std::size_t j = 0; j < 4; ++j) z += static_cast<double>(p[16 + 4 * i + j]) * hidden[j];
      bits.push_back(z >= 0);
    }
    return bits;
  };
  select::hash_attention index(map);
  for (index_t i = 0; i < v.n; ++i) index.append(v.key(i));
  const std::vector<float> scores = scores_of(index, v);
  const std::vector<bool> q = signs(1, v.query);
  for (index_t i = 0; i < v.n; ++i) {
    const std::vector<bool> k = signs(0, v.key(i));
    int differ = 0;
    for (std::size_t b = 0; b < 5; ++b) differ += q[b] != k[b];
    CHECK(scores[static_cast<std::size_t>(i)] == -static_cast<float>(differ));
  }
}

TEST_CASE("SimHash takes at most 64 bits", "[select][hash_attention]") {
  CHECK(select::simhash_map(4, 100).bits() == 64);
  CHECK(select::simhash_map(4, -1).bits() == 0);
  const vectors v(20, 4, 2);
  check_growth(select::hash_attention(select::simhash_map(4, 64)), v);
}

TEST_CASE("a NaN key under Quest is reported, not skipped", "[select][quest]") {
  vectors v(2048, 16, 6);
  v.keys[static_cast<std::size_t>(1000 * 16 + 3)] = not_a_number;
  std::vector<float> values(v.keys.size(), 1.0f);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 13);
  const auto cache = contiguous_kv(v.keys.data(), values.data(), kv_shape{1, 1, v.n, 16, 16});
  std::vector<select::quest> heads(1, select::quest(16));
  append_from(heads[0], cache.head(0, 0));
  struct policy : default_policy {
    using selector = select::top_k<select::contributions<select::indexed<select::quest>>>;
  };
  policy::selector selector;
  selector.heads = heads;
  std::vector<float> out(16);
  workspace memory;
  const vattention<policy> attend({.epsilon = 0.3, .delta = 0.1, .sinks = 16, .window = 16}, selector);
  CHECK_FALSE(attend(tensor_view<const float, 4>(v.query.data(), {1, 1, 1, 16}), cache, {.scale = 0.05f},
                     {.output = {out.data(), {1, 1, 1, 16}}}, memory)
                  .ok());
}
