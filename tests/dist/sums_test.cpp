// A shard's sums as block kernels make them and as they come off the wire, against the plain ones of the statistics
// room.
#include "support/catch.hpp"
#include "support/shards.hpp"

namespace {
using namespace vattn;
using namespace vattn::test;
}  // namespace

TEST_CASE("shares of the variance add up, and give the slowest rank the rows that others have the time for", "[dist]") {
  using dist::shard_effort;
  std::array<double, max_group> goals;
  goals.fill(stats::infinity);
  goals[0] = 1;
  const auto shares = [&](std::vector<shard_effort> ranks) {
    std::vector<double> all;
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      std::array<double, max_group> to;
      to.fill(0.25);
      dist::share_variance(ranks, goals, 2, 0.1, 3, r, to);
      all.push_back(to[0]);
      CHECK(to[1] == 0.25);  // of a head that asks for nothing
    }
    return all;
  };
  const auto effort = [](double cells, double spread, bool samples = true) {
    shard_effort e{.samples = samples, .cells = cells};
    e.spread[0] = spread;
    return e;
  };
  // Equal ranks: equal shares.
  for (const double s : shares({effort(10000, 30), effort(10000, 30), effort(10000, 30), effort(10000, 30)}))
    CHECK(std::abs(s - 0.25) < 1e-9);
  // Twice the spread, as many rows: four times the variance (0.9 of it; a tenth is dealt evenly).
  const auto uneven = shares({effort(10000, 60), effort(10000, 30)});
  CHECK(std::abs(uneven[0] - (0.9 * 0.8 + 0.05)) < 1e-6);
  CHECK(std::abs(uneven[0] + uneven[1] - 1) < 1e-9);
  // 10000 cells fewer to scan are a time of 333 rows: S²/m for m and m + 333, m(m + 333)·1 = 900(2m + 333).
  const auto shorter = shares({effort(20000, 30), effort(10000, 30)});
  const double m = (1800 - 333.3333 + std::sqrt(1466.6667 * 1466.6667 + 4 * 300000.0)) / 2;
  CHECK(std::abs(shorter[0] - (0.9 * 900 / m + 0.05)) < 2e-3);
  // Who reads all rows has no variance; and who is seen to have nothing still gets a part of the even tenth.
  const auto alone = shares({effort(10000, 30), effort(500, 80, false), effort(10000, 0)});
  CHECK(std::abs(alone[0] - 0.95) < 1e-6);
  CHECK(std::abs(alone[2] - 0.05) < 1e-6);
}

TEST_CASE("sums of block kernels are those of the statistics room, to what the wire rounds", "[dist]") {
  const index_t n = 3000, dk = 32, dv = 40, heads = 3;
  const problem<float> p(shape{.heads = heads, .kv_heads = 1, .n = n, .dk = dk, .dv = dv}, 8u, 1.5f);
  kv_index index(index_shape{.dk = dk, .dv = dv});
  REQUIRE(index.build(p.cache()).ok());
  using head_type = std::remove_cvref_t<decltype(p.cache().head(0, 0))>;

  // The reader of an index, driven by hand: tables, a scan, picks, their values.
  workspace memory;
  REQUIRE(memory.reserve(std::size_t{1} << 24).ok());
  arena a(memory.memory());
  const index_scratch s = index_scratch::take(a, n, heads, dk, dv, 16);
  head_group<head_type> group;
  group.memory = a.take<std::byte>(index_piece::bytes(heads, dk, dv));
  const auto head = p.cache().head(0, 0);
  for (index_t h = 0; h < heads; ++h) {
    scratch own = scratch::take(a, n, dk, dv, false, {});
    head_task<head_type> one{.row = make_row(p.query(), head, p.options, 0, 0, h, 0, own.query),
                             .tokens = population(0, n),
                             .stream = random_stream({.seed = 4}, static_cast<std::uint32_t>(h)),
                             .s = own};
    one.state = softmax_state(own.state);
    group.push(std::move(one));
  }
  for (index_t h = 0; h < heads; ++h) std::copy_n(group[h].row.scaled_query, dk, s.queries.data() + h * dk);
  cell_tables tables;
  const cell_codes& codes = index.codes(0);
  tables.query.scan.numbers = 77;
  REQUIRE(tables.make(codes, s.queries.data(), heads, s.tables, s.table));
  index_reader<head_type> read(group, tables, s.queries.data(), codes.units().reach, index.value_centre(0), s.reader,
                               group[0].stream);
  const index_t blocks = n / kernel::scan_keys;
  std::fill(s.seen.begin(), s.seen.end(), ~std::uint64_t{0});
  cell_thresholds t;
  t.plain.fill(3), t.floor.fill(8), t.base = 0.02, t.z = 2, t.away = 0.5;
  tables.set(t);
  REQUIRE(kernel::scan_cells(kernel::active_isa(), tables.query, codes.view(), 0, blocks, s.seen.data(),
                             read.candidates()));
  read.forget();
  REQUIRE(read.pick(1));
  read.choose_values(nullptr);
  REQUIRE(read.picks() > 70);  // more than a block

  const dist::look_format f(heads, dv);
  std::vector<float> storage(dist::shard_sums::storage_size(heads, dv, f.groups)),
      centre(static_cast<std::size_t>(dv), 0.8f);
  dist::shard_sums sums(storage, heads, dv, f.groups);
  sums.clear();
  const std::uint64_t key = 5;
  sums.add_sample(kernel::active_isa(), head, read, centre.data(), key, 2);
  // Certain rows, as their reader sums them: about a centre of its own.
  const std::vector<ordinal> certain{2990, 2995, 2999};
  REQUIRE(read.read_certain(certain));
  for (index_t h = 0; h < heads; ++h) {
    const stratum_scalars& c = read.certain().of(h);
    // Reading may have raised the reference: the sums are relative to the one that they were made at.
    const double by = std::exp(double{read.reference(h)} - sums.of(h).reference);
    std::vector<float> numerator(read.certain().numerator(h), read.certain().numerator(h) + dv);
    for (float& x : numerator) x *= static_cast<float>(by);
    sums.add_certain(h, sums.of(h).reference, by * c.x, numerator.data(), by * c.power, index.value_centre(0),
                     centre.data(), 3);
  }
  std::vector<std::byte> wire(f.bytes());
  sums.write(f, {.away = 1.5, .certain = 3, .picks = read.picks(), .samples = 1}, wire);
  CHECK(dist::read_counts(wire.data()).picks == read.picks());
  CHECK(dist::read_counts(wire.data()).away == 1.5);

  for (index_t h = 0; h < heads; ++h) {
    CAPTURE(h);
    std::vector<float> got_vectors(static_cast<std::size_t>(stats::sample_sums::storage(dv, f.groups))),
        want_vectors(got_vectors.size());
    stats::sample_sums got{{}, got_vectors.data(), dv, f.groups}, want{{}, want_vectors.data(), dv, f.groups};
    got.clear();
    const double reached = dist::add_sums(f, wire.data(), h, got).more().reach;
    want.raise(got.s.reference);
    double reach = 0;
    index_t sampled = 0;
    const auto add = [&](index_t cell, double w) {
      const auto value = head.value(cell);
      const int g = static_cast<int>((2 + sampled / sign_rows) % f.groups);
      const stats::dealt to{g, stats::deal(key, static_cast<std::uint64_t>(cell), 1).negative};
      const double rho = want.add(double{group[h].row.logit(cell)}, value.data(), centre.data(),
                                  w > 1 ? stats::poisson_row(w) : stats::certain_row(), to);
      if (w > 1) reach += w * std::exp(double{group[h].row.logit(cell)} - got.s.reference) * std::sqrt(rho);
    };
    for (index_t i = 0; i < read.picks(); ++i) {
      if (read.weight(i) <= 0) continue;
      add(read.cell(i), double{read.weight(i)});
      ++sampled;
    }
    for (const ordinal c : certain) add(index_t{c}, 1);
    const auto near = [](double x, double y, double tolerance) {
      return std::abs(x - y) <= tolerance * (std::abs(x) + std::abs(y)) + 1e-12;
    };
    CHECK(got.s.reference == want.s.reference);
    CHECK((got.s.rows == want.s.rows && got.s.certain == want.s.certain));
    CHECK(near(got.s.x, want.s.x, 1e-5));
    CHECK(near(got.s.power, want.s.power, 1e-5));
    CHECK(near(got.s.square, want.s.square, 1e-5));
    CHECK(near(got.s.spread, want.s.spread, 1e-5));
    CHECK(near(got.s.f0, want.s.f0, 1e-4));
    CHECK(near(got.s.f2, want.s.f2, 1e-4));
    CHECK(near(got.s.f4, want.s.f4, 1e-4));
    CHECK(near(got.s.third0, want.s.third0, 1e-4));
    CHECK(near(got.s.third2, want.s.third2, 1e-4));
    CHECK(near(reached, reach, 1e-4));
    for (int g = 0; g < f.groups; ++g)
      CHECK(std::abs(got.s.signed_x[g] - want.s.signed_x[g]) < 1e-4 * std::sqrt(want.s.square));
    for (int i = 0; i < 3 + f.groups; ++i) {
      CAPTURE(i);
      double off = 0, all = 0;
      for (index_t j = 0; j < dv; ++j) {
        off += std::pow(double{got.vector(i)[j]} - double{want.vector(i)[j]}, 2);
        all += std::pow(double{want.vector(i)[j]}, 2);
      }
      CHECK(std::sqrt(off) <= (i == 0 ? 3e-6 : 2e-4) * std::sqrt(all) + 1e-12);
    }
  }

  // Two messages add up as the statistics room merges sums, and are judged as it judges them.
  const index_t h = 1;
  std::vector<float> twice_vectors(static_cast<std::size_t>(stats::sample_sums::storage(dv, f.groups))),
      once_vectors(twice_vectors), want_vectors(twice_vectors);
  stats::sample_sums twice{{}, twice_vectors.data(), dv, f.groups}, once{{}, once_vectors.data(), dv, f.groups},
      want{{}, want_vectors.data(), dv, f.groups};
  for (stats::sample_sums* one : {&twice, &once, &want}) one->clear();
  std::vector<std::byte> lower(wire);
  const double below = dist::read_scalars(f, wire.data(), h).reference() - 1.5;
  std::memcpy(lower.data() + f.offset(h), &below, sizeof below);
  dist::add_sums(f, lower.data(), h, once);
  want.merge(once);
  once.clear();
  dist::add_sums(f, wire.data(), h, once);
  want.merge(once);
  dist::add_sums(f, lower.data(), h, twice);
  dist::add_sums(f, wire.data(), h, twice);
  CHECK(twice.s.reference == want.s.reference);
  CHECK(std::abs(twice.s.f4 - want.s.f4) <= 1e-12 * want.s.f4);
  for (std::size_t j = 0; j < twice_vectors.size(); ++j)
    REQUIRE(std::abs(twice_vectors[j] - want_vectors[j]) <= 1e-5f * std::abs(want_vectors[j]) + 1e-6f);
  for (const double sink : {-stats::infinity, twice.s.reference + 3}) {
    std::vector<float> o(static_cast<std::size_t>(dv)), u(o), o2(o), u2(o);
    const stats::evidence got = dist::estimate_merged(twice, centre.data(), sink, o.data(), u.data());
    const stats::evidence all = stats::estimate(want, nullptr, {}, centre.data(), sink, o2.data(), u2.data());
    for (std::size_t j = 0; j < o.size(); ++j) CHECK(std::abs(o[j] - o2[j]) < 1e-5f);
    const auto near = [](double x, double y) { return std::abs(x - y) <= 1e-4 * std::abs(y); };
    CHECK(near(got.denominator, all.denominator));
    CHECK(near(got.power, all.power));
    CHECK(near(got.variance, all.variance));
    CHECK(near(got.dimension, all.dimension));
    CHECK(near(got.dof, all.dof));
    CHECK(near(got.skew, all.skew));
    CHECK(got.dimension > 1);
    CHECK(got.skew > 0);
  }

  // What overflowed is not judged.
  sums.vector(2, h)[3] = std::numeric_limits<float>::infinity();
  sums.write(f, {.samples = 1}, wire);
  dist::add_sums(f, wire.data(), h, twice);
  std::vector<float> o(static_cast<std::size_t>(dv)), u(o);
  CHECK_FALSE(dist::estimate_merged(twice, centre.data(), -stats::infinity, o.data(), u.data()).finite());
}
