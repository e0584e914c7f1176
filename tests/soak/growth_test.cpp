// A cache that grows and is cut back, over a million appends: the sketch is at last what one is that saw the same keys
// once.
#include <cmath>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "support/index_changes.hpp"
#include "vattn/vattn.hpp"

namespace {

using vattn::index_t;
constexpr std::size_t dim = 8;

// Keys that drift, so that epochs' means and learned centroids matter.
std::vector<float> keys_of(std::size_t count) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  std::vector<float> keys(count * dim);
  for (std::size_t i = 0; i < keys.size(); ++i)
    keys[i] =
        normal(random) + static_cast<float>(i % dim) * (0.5f + static_cast<float>(i) / static_cast<float>(keys.size()));
  return keys;
}

template <class Index>
std::vector<float> scores_of(const Index& index, std::vector<float>& errors) {
  const std::vector<float> query{1, -0.5f, 0.25f, 2, -1, 0.75f, 0.1f, -0.3f};
  std::vector<float> scores(static_cast<std::size_t>(index.size())), scratch(index.scratch_size());
  errors.resize(scores.size());
  index.score(query.data(), 0, scores, errors, scratch);
  return scores;
}

// Decoding with rejected drafts, chunks of prefill, sequences that end. Sizes reach past several epochs of a sketch.
template <class Index>
void soak(const Index& empty, index_t appends) {
  constexpr std::size_t pool = 5000;
  const std::vector<float> keys = keys_of(pool);
  const auto key = [&](std::size_t i) { return std::span<const float>(keys).subspan(i * dim, dim); };
  std::mt19937 random(5);
  Index index = empty;
  std::vector<std::size_t> held;
  index_t left = appends, truncations = 0;
  while (left > 0) {
    const index_t most = random() % 10 == 0 ? 900 : 40;  // drawn first: operands are evaluated in any order
    const index_t add = static_cast<index_t>(random()) % most + 1;
    for (index_t i = 0; i < std::min(add, left); ++i) {
      held.push_back(random() % pool);
      index.append(key(held.back()));
    }
    left -= std::min(add, left);
    auto to = static_cast<index_t>(held.size()) - static_cast<index_t>(random() % 60);
    if (held.size() > 4000) to = static_cast<index_t>(random() % 4000);
    if (random() % 5000 == 0) to = 0;
    to = std::max<index_t>(to, 0);
    index.truncate(to);
    held.resize(static_cast<std::size_t>(std::min<index_t>(to, static_cast<index_t>(held.size()))));
    ++truncations;
    REQUIRE(index.size() == static_cast<index_t>(held.size()));
  }
  while (held.size() < 2500) {
    held.push_back(held.size());
    index.append(key(held.back()));
  }
  CHECK(truncations > appends / 200);

  Index rebuilt = empty;
  for (const std::size_t i : held) rebuilt.append(key(i));
  CHECK(index.bytes() == rebuilt.bytes());
  std::vector<float> errors, errors_rebuilt;
  const std::vector<float> scores = scores_of(index, errors), wanted = scores_of(rebuilt, errors_rebuilt);
  REQUIRE(scores.size() == wanted.size());
  std::size_t differ = 0, far = 0;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    differ += scores[i] != wanted[i] || errors[i] != errors_rebuilt[i];
    // Whatever it has been through, its errors are what it says.
    far += !(std::abs(scores[i] - wanted[i]) <= index.bound_over_error() * (errors[i] + errors_rebuilt[i]) + 1e-4f);
  }
  INFO("of " << scores.size() << " tokens " << differ << " differ");
  CHECK(far == 0);
  if constexpr (!std::same_as<Index, vattn::sketch::product_codes>) {
    CHECK(differ == 0);
    CHECK(vattn::save(index) == vattn::save(rebuilt));
  }
}

}  // namespace

TEST_CASE("a million appends to rotated codes leave what a rebuild gives", "[soak]") {
  soak(vattn::sketch::key_codes<4>(dim), 1'000'000);
}

TEST_CASE("a million changes to an index beside a cache leave what a rebuild gives", "[soak]") {
  vattn::test::check_index_changes(1'000'000);
}

TEST_CASE("a million appends to learned codes keep their errors true", "[soak]") {
  // What was learned stays through truncations above the first 1024 tokens: the rebuild learns from other keys.
  soak(vattn::sketch::product_codes(dim, 2, {.train_size = 256, .iterations = 2}), 1'000'000);
}
