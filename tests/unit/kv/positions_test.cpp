// Caches whose cells are not in order of position: what a query sees, and that sinks, windows, causality and ALiBi go
// by position.
#include <algorithm>
#include <numeric>

#include "support/layout.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

// A sequence of n tokens in `cells` cells of a cache that others share: token t at position first + t in cell[t].
struct unified {
  unified(const problem<float>& p, index_t cells, std::int32_t first, unsigned seed)
      : n(p.s.n), size(cells), position(static_cast<std::size_t>(cells), -1), cell(static_cast<std::size_t>(cells)) {
    std::iota(cell.begin(), cell.end(), index_t{0});
    std::shuffle(cell.begin(), cell.end(), std::mt19937(seed));
    const auto width = static_cast<std::size_t>(p.s.kv_heads * cells);
    k.assign(width * static_cast<std::size_t>(p.s.dk), not_a_number);  // whoever reads another's cell shows it
    v.assign(width * static_cast<std::size_t>(p.s.dv), not_a_number);
    for (index_t t = 0; t < n; ++t) {
      const index_t c = cell[static_cast<std::size_t>(t)];
      position[static_cast<std::size_t>(c)] = first + static_cast<std::int32_t>(t);
      for (index_t h = 0; h < p.s.kv_heads; ++h) {
        std::copy_n(p.k.data() + (h * n + t) * p.s.dk, p.s.dk, k.data() + (h * cells + c) * p.s.dk);
        std::copy_n(p.v.data() + (h * n + t) * p.s.dv, p.s.dv, v.data() + (h * cells + c) * p.s.dv);
      }
    }
    for (index_t t = 0; t < p.s.queries; ++t) query.push_back(first + static_cast<std::int32_t>(n - p.s.queries + t));
    shape_ = p.cache_shape();
    shape_.n_tokens = cells;
  }
  [[nodiscard]] auto cache() const { return contiguous_kv(k.data(), v.data(), shape_); }
  [[nodiscard]] cell_positions positions() const {
    return {{position.data(), {1, size}}, {query.data(), {1, static_cast<index_t>(query.size())}}};
  }

  index_t n, size;
  std::vector<std::int32_t> position, query;
  std::vector<index_t> cell;
  std::vector<float> k, v;
  kv_shape shape_;
};

}  // namespace

TEST_CASE("visible cells: lowest positions first, highest last, the rest in order of cell", "[kv][positions]") {
  std::mt19937 random(4);
  for (int trial = 0; trial < 400; ++trial) {
    const auto n = static_cast<index_t>(random() % 200);
    const auto sinks = static_cast<index_t>(random() % 12), window = static_cast<index_t>(random() % 12);
    std::vector<std::int32_t> positions;
    std::vector<float> mask;
    for (index_t c = 0; c < n; ++c) {
      positions.push_back((trial % 4 == 0 ? static_cast<std::int32_t>(c) : static_cast<std::int32_t>(random() % 150)) -
                          10);  // ties, and empty cells
      mask.push_back(random() % 5 == 0 ? -infinity : 0.0f);
    }
    const position_range range{static_cast<std::int32_t>(random() % 20), 130};
    const bool masked = trial % 3 == 0 && n > 0;
    const mask_view::line line =
        masked ? mask_view(tensor_view<const float, 4>(mask.data(), {1, 1, 1, n})).at(0, 0, 0) : mask_view::line();
    std::vector<ordinal> storage(static_cast<std::size_t>(n)),
        ends(static_cast<std::size_t>(std::min(n, sinks + window)));
    const population seen = visible_by_position(n, line, {positions.data(), 4}, range, sinks, window, storage, ends);

    std::vector<index_t> want;
    for (index_t c = 0; c < n; ++c) {
      const std::int32_t at = positions[static_cast<std::size_t>(c)];
      if (at >= range.first && at <= range.last && (!masked || mask[static_cast<std::size_t>(c)] == 0))
        want.push_back(c);
    }
    if (static_cast<index_t>(want.size()) > sinks + window) {
      std::stable_sort(want.begin(), want.end(), [&](index_t a, index_t b) {
        return positions[static_cast<std::size_t>(a)] < positions[static_cast<std::size_t>(b)];
      });
      std::sort(want.begin() + sinks, want.end() - window);
    }
    std::vector<index_t> got;
    for (index_t j = 0; j < seen.size(); ++j) got.push_back(seen[j]);
    REQUIRE(got == want);
  }
}

TEST_CASE("cells in order of position need no list", "[kv][positions]") {
  const std::int32_t positions[] = {5, 6, 7, 7, 9};
  std::vector<ordinal> storage(5), ends(2);
  const population all = visible_by_position(5, {}, {positions, 4}, {}, 1, 1, storage, ends);
  CHECK(all.contiguous());
  CHECK(all.size() == 5);
}

TEST_CASE("exact attention over shuffled cells is that of the sequence in order", "[kv][positions]") {
  problem<float> p({.queries = 3, .heads = 4, .kv_heads = 2, .n = 300, .dk = 8, .dv = 6});
  const unified u(p, 700, 1000, 5);
  for (const bool causal : {false, true}) {
    for (const index_t window : {0, 90}) {
      p.options.causal = causal;
      p.options.sliding_window = window;
      p.set_alibi({0.001f, 0.02f, 0, 0.05f});
      attention_options options = p.options;
      options.positions = u.positions();
      results r(p.s);
      workspace memory;
      const status st = exact_attention(p.query(), u.cache(), options, r.view(), memory);
      INFO(st.message());
      REQUIRE(st.ok());
      // A window ends at the query's own position, causal or not.
      if (window > 0) {
        CHECK(r.certificates[0].n == 90);
        CHECK(r.certificates[8].n == 90);
      }
      const disagreement d = compare(p, r);
      CHECK(d.output < 2e-6);
      CHECK(d.denominator < 1e-5);
    }
  }
}

TEST_CASE("sinks and window of the config are the lowest and highest visible positions", "[kv][positions]") {
  problem<float> p({.queries = 1, .heads = 2, .kv_heads = 1, .n = 4000, .dk = 16, .dv = 16});
  const unified u(p, 6000, 50, 6);
  p.options.positions = u.positions();
  p.options.causal = true;
  results r(p.s);
  workspace memory;
  std::vector<std::int32_t> tokens(2 * 6000), counts(2);
  std::vector<float> weights(2 * 6000);
  attention_result result = r.view();
  result.decisions = {{tokens.data(), {1, 1, 2, 6000}}, {weights.data(), {1, 1, 2, 6000}}, {counts.data(), {1, 1, 2}}};
  config c = small_config();
  c.sinks = 20, c.window = 30;
  const status st = vattention<ranked_policy>(c)(p.query(), u.cache(), p.options, result, memory, {.seed = 4});
  INFO(st.message());
  REQUIRE(st.ok());
  for (std::size_t h = 0; h < 2; ++h) {
    REQUIRE_FALSE(r.certificates[h].exact());
    REQUIRE(r.certificates[h].n == 4000);
    std::vector<float> weight(6000, 0.0f);
    for (std::size_t i = 0; i < static_cast<std::size_t>(counts[h]); ++i)
      weight[static_cast<std::size_t>(tokens[h * 6000 + i])] += weights[h * 6000 + i];
    index_t missing = 0, foreign = 0;
    for (index_t t = 0; t < 4000; ++t)
      missing += (t < 20 || t >= 3970) && weight[static_cast<std::size_t>(u.cell[static_cast<std::size_t>(t)])] != 1;
    for (std::size_t i = 4000; i < 6000; ++i) foreign += weight[static_cast<std::size_t>(u.cell[i])] != 0;
    CHECK(missing == 0);
    CHECK(foreign == 0);
  }
  // And the promise holds: of 80 outputs 24 may be off by more.
  p.options.positions = {};
  p.options.causal = false;
  attention_options options = p.options;
  options.positions = u.positions();
  c.scale = error_scale::output;
  const reference::problem exact = p.exactly();
  int violations = 0;
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    REQUIRE(vattention<ranked_policy>(c)(p.query(), u.cache(), options, r.view(), memory, {.seed = seed}).ok());
    for (index_t h = 0; h < 2; ++h) {
      const reference::row want = reference::attend(exact, 0, 0, h);
      violations += reference::relative_error(r.row(r.at(0, 0, h)), want.output) > c.epsilon;
    }
  }
  CHECK(violations <= 40);
}

TEST_CASE("an index scores cells in whatever order the positions put them", "[kv][positions]") {
  using codes = sketch::key_codes<4>;
  const problem<float> p({.n = 3000, .dk = 16, .dv = 16});
  std::vector<codes> heads(1, codes(16, 1));
  append_from(heads[0], p.cache().head(0, 0));
  std::vector<ordinal> list(3000);
  std::iota(list.begin(), list.end(), ordinal{0});
  std::shuffle(list.begin(), list.begin() + 1000, std::mt19937(3));
  std::swap(list[999], list[2999]);  // first and last of it 2999 apart, as if it were a range
  std::swap(list[0], *std::find(list.begin(), list.end(), ordinal{0}));
  std::vector<float> q = p.q, ordered(3000), permuted(3000), errors(3000), centre(16), scratch(heads[0].scratch_size());
  const query_row<decltype(p.cache().head(0, 0))> row{.head = p.cache().head(0, 0), .scaled_query = q.data()};
  const select::indexed<codes> selector{heads};
  REQUIRE(selector.score(row, population(0, 3000), {ordered, errors, centre, scratch}).ok);
  REQUIRE(selector.score(row, population(list), {permuted, errors, centre, scratch}).ok);
  index_t wrong = 0;
  for (std::size_t j = 0; j < 3000; ++j) wrong += permuted[j] != ordered[list[j]];
  CHECK(wrong == 0);
  heads[0].truncate(2999);
  CHECK(selector.score(row, population(list), {permuted, errors, centre, scratch}).lagging);
}

TEST_CASE("positions that cannot be meant say why", "[kv][positions]") {
  problem<float> p({.queries = 2, .heads = 2, .kv_heads = 1, .n = 20, .dk = 4, .dv = 4});
  const unified u(p, 30, 0, 7);
  results r(p.s);
  workspace memory;
  const auto why = [&](const attention_options& o) {
    return std::string(exact_attention(p.query(), u.cache(), o, r.view(), memory).message());
  };
  attention_options o = p.options;
  o.positions = u.positions();
  CHECK(why(o).empty());
  o.positions.cells.extents[1] = 29;
  CHECK(contains(why(o), "positions.cells is [1, 29], less than [1, 30]"));
  o.positions = u.positions();
  o.positions.queries = {};
  CHECK(why(o).empty());
  o.causal = true;
  CHECK(contains(why(o), "need positions.queries [1, 2]"));
}
