// The generator against its authors' known answers, and the streams made of it.
#include "vattn/base/philox.hpp"

#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "support/catch.hpp"

using vattn::draw_key;
using vattn::random_stream;

TEST_CASE("philox4x32-10 gives its authors' known answers", "[sample][philox]") {
  std::ifstream file(VATTN_PHILOX_VECTORS);
  REQUIRE(file);
  int vectors = 0;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream words(line);
    std::array<std::uint32_t, 4> counter{}, want{};
    std::array<std::uint32_t, 2> key{};
    words >> std::hex;
    for (auto& x : counter) words >> x;
    for (auto& x : key) words >> x;
    for (auto& x : want) words >> x;
    CAPTURE(line);
    REQUIRE_FALSE(words.fail());
    CHECK(vattn::philox4x32(counter, key) == want);
    ++vectors;
  }
  CHECK(vectors == 3);
}

TEST_CASE("a stream is the blocks of successive counters", "[sample][philox]") {
  constexpr draw_key key{.seed = 0x299f31d0a4093822u, .layer = 3, .step = 5};
  random_stream stream(key, 7);
  for (std::uint32_t block = 0; block < 3; ++block) {
    const auto want = vattn::philox4x32({block, 5, 7, 3}, {0xa4093822u, 0x299f31d0u});
    for (const std::uint32_t word : want) CHECK(stream.next() == word);
  }
  // Evaluated at compile time too.
  constexpr auto first = [] {
    random_stream s(draw_key{.seed = 1}, 0);
    return s.next();
  }();
  random_stream again(draw_key{.seed = 1}, 0);
  CHECK(again.next() == first);
}

TEST_CASE("seed, layer, step and stream each name another stream", "[sample][philox]") {
  std::set<std::uint64_t> seen;
  const auto note = [&](const draw_key& key, std::uint32_t stream) {
    random_stream s(key, stream);
    const std::uint64_t high = s.next();
    return seen.insert(high << 32 | s.next()).second;
  };
  CHECK(note({}, 0));
  CHECK(note({.seed = 1}, 0));
  CHECK(note({.seed = std::uint64_t{1} << 32}, 0));
  CHECK(note({.layer = 1}, 0));
  CHECK(note({.step = 1}, 0));
  CHECK(note({}, 1));
  CHECK_FALSE(note({}, 1));
}

TEST_CASE("every part of a draw's name has bits of its own", "[sample][philox]") {
  // Known answers: what a call draws with is block | step | purpose, head | layer under the seed, and changes with none
  // of n_batch, the slot, or the other sequences.
  const std::array<vattn::sequence_key, 2> sequences{{{0x299f31d0a4093822u, 5}, {77, 900}}};
  const draw_key call{.seed = 1, .layer = 0xABCDEF, .step = 2, .sequences = sequences};
  const auto check = [](random_stream s, std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
    for (int block = 0; block < 2; ++block, ++counter[0])
      for (const std::uint32_t word : vattn::philox4x32(counter, key)) CHECK(s.next() == word);
  };
  const random_stream first(call.at(0, 3), 0xFFFF), second(call.at(1, 0), 7);
  check(first, {0, 8, 0xFFFF, 0xABCDEF}, {0xa4093822u, 0x299f31d0u});
  check(second, {0, 900, 7, 0xABCDEF}, {77, 0});
  check(second.fork(0xFFFF), {0, 900, 0xFFFF0007, 0xABCDEF}, {77, 0});
  check(second.fork(3).fork(1), {0, 900, 0x10007, 0xABCDEF}, {77, 0});
  random_stream used = second;
  for (int i = 0; i < 7; ++i) static_cast<void>(used.next());
  check(used.fork(1), {0, 900, 0x10007, 0xABCDEF}, {77, 0});
  check(random_stream(draw_key{.seed = 1, .layer = 4, .step = 0xFFFFFFFF}.at(6, 1), 0), {0, 0, 0, 4}, {1, 0});
  random_stream pinned(call.at(0, 3), 2);
  CHECK(pinned.next() == 0x3d042cce);
  CHECK(pinned.fork(1).next() == 0x83c43652);
}

TEST_CASE("below() is uniform and stays below", "[sample][philox]") {
  random_stream s(draw_key{.seed = 9}, 0);
  CHECK(s.below(1) == 0);
  // 3·2^30 is the bound at which a plain multiply is most biased: without rejection the residues would
  // hit one quarter of the range twice as often.
  constexpr std::uint32_t bound = 3u << 30;
  std::array<double, 3> thirds{};
  std::array<double, 7> sevenths{};
  constexpr int draws = 70000;
  double residue = 0;
  for (int i = 0; i < draws; ++i) {
    const std::uint32_t x = s.below(bound);
    REQUIRE(x < bound);
    ++thirds[x / (1u << 30)];
    residue += x % 3 == 0;
    ++sevenths[s.below(7)];
  }
  const auto chi2 = [](const auto& counts) {
    double sum = 0;
    const double want = static_cast<double>(draws) / static_cast<double>(counts.size());
    for (const double c : counts) sum += (c - want) * (c - want) / want;
    return sum;
  };
  CHECK(chi2(thirds) < 18.4);    // the 1 - 1e-4 quantile of 2 degrees of freedom
  CHECK(chi2(sevenths) < 27.9);  // of 6
  // Lemire without the rejection gives floor(3x/4): multiples of 3 then have probability 1/2, not 1/3.
  CHECK(std::abs(residue / draws - 1.0 / 3) < 0.008);
}
