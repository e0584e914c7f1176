// The scan of key codes: every instruction set against the words of its specification, and the draw against what is
// stated of it.
#include <algorithm>
#include <cmath>
#include <random>
#include <vattn/kernel/scan.hpp>
#include <vattn/sketch/block_codes.hpp>
#include <vector>

#include "stat/binomial.hpp"
#include "support/catch.hpp"

namespace {

using namespace vattn;
using kernel::isa, kernel::scan_keys, kernel::scan_pick, kernel::scan_query;

constexpr index_t dims[] = {16, 32, 64, 80, 128, 256};

std::vector<isa> available() {
  std::vector<isa> all;
  for (const isa i : kernel::isa_levels) {
    if (i <= kernel::widest_isa()) all.push_back(i);
  }
  return all;
}

// Blocks of random bytes in the format, and a query that asks anything of them.
struct random_scan {
  random_scan(index_t dim, int heads, unsigned seed, index_t count = 40) : blocks(count), random(seed) {
    const sketch::block_codes codes(dim, 1);
    view = codes.view();
    bytes.resize(static_cast<std::size_t>(blocks) * view.stride);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
    view.first = bytes.data();
    for (index_t b = 0; b < blocks; ++b) {
      std::byte* lanes =
          bytes.data() + static_cast<std::size_t>(b) * view.stride + static_cast<std::size_t>(view.planes) * scan_keys;
      auto* numbers = reinterpret_cast<std::int16_t*>(lanes);
      for (int i = 0; i < scan_keys; ++i) {
        numbers[i] = static_cast<std::int16_t>(whole(0, 32767));
        numbers[scan_keys + i] = static_cast<std::int16_t>(whole(-3000, 3000));
      }
      const float radius = b % 11 == 10 ? std::numeric_limits<float>::infinity() : real(0, 3);
      std::memcpy(lanes + 6 * scan_keys, &radius, sizeof radius);
    }
    const int most = std::min(scan_query::largest_entry, scan_query::largest_sum / view.groups);
    tables.resize(static_cast<std::size_t>(heads * view.groups * 64));
    for (std::uint8_t& t : tables) t = static_cast<std::uint8_t>(whole(0, most));
    q.tables = tables.data();
    q.heads = heads;
    for (std::size_t h = 0; h < static_cast<std::size_t>(heads); ++h) {
      q.bias[h] = static_cast<std::int16_t>(-8 * most * view.groups + whole(-2000, 2000));
      q.plain[h] = real(0, 4000);
      q.floor[h] = real(0, 6000);
      q.sure_floor[h] = q.floor[h] + 100 * static_cast<float>(h);
      q.slack[h] = real(0, 700);
      q.sure[h] = real(0, 2000);
    }
    q.sure_level = static_cast<std::int16_t>(whole(0, 300));
    q.noise_factor = static_cast<std::int16_t>(whole(1, 8192));
    q.reach_factor = static_cast<std::int16_t>(whole(1, 16384));
    q.least_reach = static_cast<std::int16_t>(whole(-2000, 200));
    q.cut = static_cast<std::int16_t>(-whole(0, 3000));
    q.numbers = random();
  }

  int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }
  float real(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random); }
  [[nodiscard]] std::vector<scan_pick> picks(isa how) const {
    std::vector<scan_pick> out(static_cast<std::size_t>(blocks * scan_keys));
    const index_t have = kernel::scan(how, q, view, 0, blocks, out.data(), 0, blocks * scan_keys);
    REQUIRE(have >= 0);
    out.resize(static_cast<std::size_t>(have));
    CHECK(std::is_sorted(out.begin(), out.end(),
                         [](const scan_pick& a, const scan_pick& b) { return a.row / scan_keys < b.row / scan_keys; }));
    std::sort(out.begin(), out.end(), [](const scan_pick& a, const scan_pick& b) { return a.row < b.row; });
    return out;
  }

  index_t blocks;
  std::mt19937_64 random;
  kernel::code_blocks view;
  std::vector<std::byte> bytes;
  std::vector<std::uint8_t> tables;
  scan_query q;
};

bool same(const scan_pick& a, const scan_pick& b) {
  return a.row == b.row && a.level == b.level && a.reach == b.reach && a.radius == b.radius && a.score == b.score &&
         a.margin == b.margin;
}

double saturated(double x) { return std::clamp(x, -32768.0, 32767.0); }
double product(double a, double b) { return std::floor((a * b + 16384) / 32768); }

// One key by the words of the header: `group` by group from the planes' bits, in double.
struct naive_key {
  double level = -32768, reach = 0, margin = 0;
  std::vector<double> score;
  bool taken = false;
};
naive_key naive(const random_scan& s, index_t block, int key) {
  const std::byte* at = s.bytes.data() + static_cast<std::size_t>(block) * s.view.stride;
  const auto byte = [&](int plane) { return std::to_integer<int>(at[plane * scan_keys + key]); };
  const auto lane = static_cast<int>(sketch::block_codes::lane(static_cast<std::size_t>(key)));
  const auto number = [&](int array) {
    std::int16_t x;
    std::memcpy(&x, at + s.view.planes * scan_keys + (array * scan_keys + lane) * 2, 2);
    return static_cast<double>(x);
  };
  float largest;
  std::memcpy(&largest, at + s.view.planes * scan_keys + 6 * scan_keys, 4);
  naive_key k;
  k.reach = std::max(product(number(1), s.q.reach_factor), static_cast<double>(s.q.least_reach));
  bool sure = false;
  for (int h = 0; h < s.q.heads; ++h) {
    const auto i = static_cast<std::size_t>(h);
    double sum = 0;
    for (int g = 0; g < s.view.groups; ++g) {
      int code = 0;
      if (g < s.view.planes) {
        code = byte(g) % 64;
      } else {
        for (int part = 0; part < 3; ++part) code += (byte(3 * (g - s.view.planes) + part) / 64) << (2 * part);
      }
      sum += s.tables[static_cast<std::size_t>((h * s.view.groups + g) * 64 + code)];
    }
    k.score.push_back(product(saturated(16 * sum + s.q.bias[i]), number(0)));
    const double rho = static_cast<double>(largest);
    const auto steps = [](double t) { return std::trunc(std::clamp(t, -32767.0, 32767.0)); };
    const double floor = s.q.floor[i] - s.q.slack[i] * rho, least = s.q.sure_floor[i] - s.q.sure[i] * rho;
    const double threshold = steps(std::min(static_cast<double>(s.q.plain[i]), floor)), certain = steps(least);
    k.level = std::max(k.level, saturated(k.score.back() - threshold));
    sure = sure || saturated(k.score.back() + k.reach) >= certain;
  }
  k.level = saturated(k.level + k.reach);
  if (sure) k.level = std::max(k.level, static_cast<double>(s.q.sure_level));
  const double u =
      kernel::detail::noise()[kernel::detail::noise_place(s.q.numbers, block) + static_cast<unsigned>(lane)];
  k.margin = saturated(k.level + product(u, s.q.noise_factor));
  k.taken = k.margin >= 0 && k.level >= s.q.cut;
  return k;
}

double inclusion_at(int level, int factor) {
  float p[kernel::block_rows];
  kernel::inclusion(kernel::widest_isa(), static_cast<std::int16_t>(factor), level, 1, p);
  return static_cast<double>(p[0]);
}

}  // namespace

TEST_CASE("all instruction sets scan to the same bits, for all group sizes and head sizes", "[kernel][scan]") {
  for (const index_t dim : dims) {
    for (int heads = 1; heads <= kernel::scan_heads; ++heads) {
      const random_scan s(dim, heads, static_cast<unsigned>(dim * 10 + heads), 200);
      const std::vector<scan_pick> want = s.picks(isa::portable);
      CAPTURE(dim, heads, want.size());
      CHECK(want.size() > 10);
      CHECK(want.size() < static_cast<std::size_t>(s.blocks * scan_keys));
      for (const isa how : available()) {
        const std::vector<scan_pick> got = s.picks(how);
        CAPTURE(to_string(how), got.size());
        CHECK(std::equal(got.begin(), got.end(), want.begin(), want.end(), same));
        index_t unlike = 0;
        kernel::scanned_keys a, b;
        for (index_t block = 0; block < s.blocks; ++block) {
          kernel::scan_all(how, s.q, s.view, block, a);
          kernel::scan_all(isa::portable, s.q, s.view, block, b);
          for (int i = 0; i < scan_keys; ++i) {
            unlike += a.level[i] != b.level[i] || a.reach[i] != b.reach[i] || a.radius[i] != b.radius[i];
            for (int h = 0; h < heads; ++h) unlike += a.score[h][i] != b.score[h][i];
          }
        }
        CHECK(unlike == 0);
      }
    }
  }
}

TEST_CASE("scores, levels and picks are those of the specification", "[kernel][scan]") {
  for (const index_t dim : dims) {
    for (const int heads : {1, 3, 8}) {
      random_scan s(dim, heads, static_cast<unsigned>(dim + heads));
      // Sums as large as they can be, for one of the heads.
      std::fill_n(s.tables.begin(), s.view.groups * 64, *std::max_element(s.tables.begin(), s.tables.end()));
      for (const isa how : available()) {
        CAPTURE(dim, heads, to_string(how));
        kernel::scanned_keys all;
        const std::vector<scan_pick> picks = s.picks(how);
        std::size_t next = 0;
        index_t wrong = 0;
        for (index_t block = 0; block < s.blocks; ++block) {
          kernel::scan_all(how, s.q, s.view, block, all);
          for (int key = 0; key < scan_keys; ++key) {
            const naive_key want = naive(s, block, key);
            wrong += all.level[key] != want.level;
            for (int h = 0; h < heads; ++h) wrong += all.score[h][key] != want.score[static_cast<std::size_t>(h)];
            const bool taken = next < picks.size() && picks[next].row == block * scan_keys + key;
            wrong += taken != want.taken;
            if (!taken) continue;
            const scan_pick& got = picks[next++];
            wrong += got.level != want.level || got.margin != want.margin;
            for (int h = 0; h < heads; ++h)
              wrong += got.score[static_cast<std::size_t>(h)] != want.score[static_cast<std::size_t>(h)];
          }
        }
        CHECK(wrong == 0);
        CHECK(next == picks.size());
      }
    }
  }
}

TEST_CASE("a block with a key that is not finite is taken whole", "[kernel][scan]") {
  random_scan s(128, 2, 5);
  for (std::size_t h = 0; h < 2; ++h)
    s.q.plain[h] = s.q.floor[h] = s.q.sure_floor[h] = 30000, s.q.slack[h] = s.q.sure[h] = 1;
  s.q.least_reach = -2000;
  for (const isa how : available()) {
    const std::vector<scan_pick> picks = s.picks(how);
    CHECK(picks.size() == static_cast<std::size_t>(s.blocks / 11 * scan_keys));
    for (const scan_pick& p : picks) {
      CHECK(p.row / scan_keys % 11 == 10);
      CHECK(p.level >= 0);
    }
  }
}

TEST_CASE("a full list is told, and a scan goes on where another ended", "[kernel][scan]") {
  const random_scan s(64, 4, 9);
  for (const isa how : available()) {
    const std::vector<scan_pick> want = s.picks(how);
    std::vector<scan_pick> out(static_cast<std::size_t>(s.blocks * scan_keys));
    CHECK(kernel::scan(how, s.q, s.view, 0, s.blocks, out.data(), 0, static_cast<index_t>(want.size()) - 1) == -1);
    index_t have = kernel::scan(how, s.q, s.view, 0, 7, out.data(), 0, s.blocks * scan_keys);
    have = kernel::scan(how, s.q, s.view, 7, s.blocks, out.data(), have, s.blocks * scan_keys);
    out.resize(static_cast<std::size_t>(have));
    std::sort(out.begin(), out.end(), [](const scan_pick& a, const scan_pick& b) { return a.row < b.row; });
    CHECK(std::equal(out.begin(), out.end(), want.begin(), want.end(), same));
  }
}

TEST_CASE("lower thresholds take a superset with the same numbers", "[kernel][scan]") {
  for (const index_t dim : {64, 128}) {
    random_scan s(dim, 4, static_cast<unsigned>(dim));
    for (float& t : s.q.plain) t += 1500;
    for (float& t : s.q.floor) t += 6000;
    for (float& t : s.q.sure_floor) t += 6000;
    std::vector<std::uint32_t> before;
    for (int lower = 0; lower < 6; ++lower) {
      std::vector<std::uint32_t> now;
      for (const scan_pick& p : s.picks(kernel::widest_isa())) now.push_back(p.row);
      CHECK(std::includes(now.begin(), now.end(), before.begin(), before.end()));
      CHECK(now.size() > before.size());
      before = now;
      for (float& t : s.q.plain) t -= 300;
      for (float& t : s.q.floor) t -= 300;
      for (float& t : s.q.sure_floor) t -= 300;
    }
  }
}

TEST_CASE("the stated probability is that of the noise, for every level", "[kernel][scan]") {
  for (const int factor : {1, 37, 512, 4000, 8192}) {
    std::vector<index_t> steps(32768, 0);  // how many numbers have this noise
    for (std::uint32_t i = 0; i < kernel::detail::noise_table::size; ++i)
      ++steps[static_cast<std::size_t>(product(kernel::detail::noise()[i], factor))];
    index_t taken = 65536;
    double worst = 0;
    for (int level = 0; level > -4000; --level) {
      const double stated = inclusion_at(level, factor);
      worst =
          std::max(worst, std::abs(stated * 65536 - static_cast<double>(taken)) - 0.0005 * static_cast<double>(taken));
      taken -= steps[static_cast<std::size_t>(-level)];
    }
    CAPTURE(factor);
    CHECK(worst <= 1);  // float: one number more or less at most, or half a thousandth
  }
  CHECK(inclusion_at(5, 300) == 1);
}

TEST_CASE("keys are taken as often as is stated, over calls", "[kernel][scan]") {
  random_scan s(128, 1, 77, 1);
  s.q.noise_factor = 640;  // a step of 1/20 nat
  s.q.cut = -20 * 8;
  s.q.plain[0] = -40, s.q.floor[0] = s.q.sure_floor[0] = 32000, s.q.slack[0] = s.q.sure[0] = 0;
  s.q.bias[0] = 0;
  auto* lanes = reinterpret_cast<std::int16_t*>(s.bytes.data() + s.view.planes * scan_keys);
  for (int i = 0; i < scan_keys; ++i) {  // scores from 0 up by little, reaches that spread levels over the noise
    lanes[i] = static_cast<std::int16_t>(i);
    lanes[scan_keys + i] = static_cast<std::int16_t>(-4 * i);
  }
  s.q.reach_factor = 32767, s.q.least_reach = -32767;
  std::vector<scan_pick> out(scan_keys);
  kernel::scanned_keys all;
  kernel::scan_all(kernel::widest_isa(), s.q, s.view, 0, all);
  constexpr long calls = 20000;
  std::vector<long> taken(scan_keys, 0);
  for (long call = 0; call < calls; ++call) {
    s.q.numbers = s.random();
    const index_t have = kernel::scan(kernel::widest_isa(), s.q, s.view, 0, 1, out.data(), 0, scan_keys);
    for (index_t i = 0; i < have; ++i) ++taken[out[static_cast<std::size_t>(i)].row];
  }
  int uncertain = 0;
  for (std::size_t i = 0; i < scan_keys; ++i) {
    const double p = all.level[i] < s.q.cut ? 0 : inclusion_at(all.level[i], s.q.noise_factor);
    CAPTURE(i, p, taken[i]);
    if (p == 0 || p == 1) {
      CHECK(taken[i] == (p == 1 ? calls : 0));
      continue;
    }
    ++uncertain;
    CHECK(stat::binomial_upper_tail(taken[i], calls, p) > 1e-7);
    CHECK(1 - stat::binomial_upper_tail(taken[i] + 1, calls, p) > 1e-7);
  }
  CHECK(uncertain > 20);
}
