#include "vattn/base/archive.hpp"

#include <random>
#include <string>

#include "support/catch.hpp"
#include "vattn/sketch/codes.hpp"

namespace {

using vattn::index_t;

template <class Index>
void add_keys(Index& index, index_t n, index_t dim) {
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  std::vector<float> key(static_cast<std::size_t>(dim));
  for (index_t i = 0; i < n; ++i) {
    for (float& x : key) x = normal(rng);
    index.append(std::span<const float>(key));
  }
}

template <class Index>
std::vector<float> scores_of(const Index& index) {
  std::vector<float> query(32, 0.25f), scores(static_cast<std::size_t>(index.size())), scratch(index.scratch_size());
  query[3] = -2;
  index.score(query.data(), 0, scores, {}, scratch);
  return scores;
}

}  // namespace

TEST_CASE("a loaded index scores as the saved one and grows as it would have") {
  vattn::sketch::key_codes<4> a(32, 5), b;
  add_keys(a, 150, 32);
  const std::vector<std::byte> bytes = vattn::save(a);
  REQUIRE(vattn::load(bytes, b).ok());
  REQUIRE(b.size() == 150);
  CHECK(scores_of(a) == scores_of(b));
  add_keys(a, 200, 32);
  add_keys(b, 200, 32);
  CHECK(scores_of(a) == scores_of(b));
  CHECK(vattn::save(a) == vattn::save(b));
}

TEST_CASE("what was forgotten is not saved") {
  vattn::sketch::key_codes<4> a(32, 5), b(32, 5);
  add_keys(a, 100, 32);
  add_keys(b, 150, 32);
  b.truncate(100);
  CHECK(vattn::save(a) == vattn::save(b));
}

TEST_CASE("an empty index is saved and loaded") {
  vattn::sketch::key_codes<1> a(32, 5), b(32, 6);
  add_keys(b, 9, 32);
  REQUIRE(vattn::load(vattn::save(a), b).ok());
  CHECK(b.size() == 0);
}

TEST_CASE("bytes that are no saved index of the type are refused and change nothing") {
  vattn::sketch::key_codes<2> a(32, 5);
  add_keys(a, 70, 32);
  const std::vector<std::byte> bytes = vattn::save(a);
  const std::vector<float> before = scores_of(a);

  vattn::sketch::key_codes<4> other(32, 5);
  const vattn::status wrong = vattn::load(bytes, other);
  REQUIRE_FALSE(wrong.ok());
  CHECK(std::string(wrong.message()).find("key codes 2 v3") != std::string::npos);
  CHECK(std::string(vattn::load({}, a).message()).find("not a saved index") != std::string::npos);

  for (std::size_t cut = 0; cut < bytes.size(); ++cut) {
    REQUIRE_FALSE(vattn::load(std::span(bytes).first(cut), a).ok());
  }
  std::vector<std::byte> longer = bytes;
  longer.push_back(std::byte{0});
  CHECK_FALSE(vattn::load(longer, a).ok());
  CHECK(scores_of(a) == before);
}

TEST_CASE("no flipped byte of a saved index makes loading or scoring read where it may not") {
  vattn::sketch::key_codes<1> a(32, 5);
  add_keys(a, 70, 32);
  const std::vector<std::byte> bytes = vattn::save(a);
  std::size_t refused = 0;
  for (std::size_t i = 0; i < std::min<std::size_t>(bytes.size(), 600); ++i) {
    for (const auto flip : {std::byte{0xff}, std::byte{0x80}, std::byte{1}}) {
      std::vector<std::byte> bad = bytes;
      bad[i] ^= flip;
      vattn::sketch::key_codes<1> b(32, 5);
      if (!vattn::load(bad, b).ok()) {
        ++refused;
      } else if (b.dim() == 32) {
        static_cast<void>(scores_of(b));
      }
    }
  }
  CHECK(refused > 100);  // magic, name, extents and lengths
}
