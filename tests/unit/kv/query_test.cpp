// What one query sees, and what a logit is made of.
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

using namespace vattn::test;
using vattn::index_t;
using vattn::ordinal;
using vattn::population;

TEST_CASE("visible_range agrees with the definition, for every n, T, t and window", "[kv][query]") {
  index_t wrong = 0;
  for (const bool causal : {false, true}) {
    for (index_t n = 0; n <= 6; ++n) {
      for (index_t queries = 1; queries <= 8; ++queries) {  // more queries than tokens too
        for (index_t window = 0; window <= 8; ++window) {
          vattn::reference::problem p;
          p.n_tokens = n;
          p.n_queries = queries;
          p.causal = causal;
          p.sliding_window = window;
          vattn::attention_options options;
          options.causal = causal;
          options.sliding_window = window;
          for (index_t t = 0; t < queries; ++t) {
            const auto [first, last] = vattn::visible_range(n, queries, t, options);
            wrong += first < 0 || last > n;
            for (index_t i = 0; i < n; ++i) wrong += (first <= i && i < last) != vattn::reference::sees(p, 0, t, 0, i);
          }
        }
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("causality and windows leave the same by rows and by positions", "[kv][query]") {
  index_t wrong = 0;
  for (const bool causal : {false, true}) {
    for (index_t n = 0; n <= 6; ++n) {
      for (index_t queries = 1; queries <= 8; ++queries) {
        for (const index_t window :
             {index_t{0}, index_t{1}, index_t{3}, index_t{8}, std::numeric_limits<index_t>::max()}) {
          vattn::attention_options options;
          options.causal = causal;
          options.sliding_window = window;
          for (index_t t = 0; t < queries; ++t) {
            const auto [first, last] = vattn::visible_range(n, queries, t, options);
            const vattn::position_range range = vattn::visible_positions(n - queries + t, options);
            for (index_t i = 0; i < n; ++i) wrong += (first <= i && i < last) != (range.first <= i && i <= range.last);
            // A window holds what it says, less what the sequence lacks.
            if (window > 0) wrong += last - first != std::min(window, std::max<index_t>(0, n - queries + t + 1));
          }
        }
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("a population is a range, or the list that a mask leaves", "[kv][query]") {
  const std::vector<float> mask{0, -infinity, 1, -infinity, -3, 0, -infinity, 2};
  const vattn::mask_view view(vattn::tensor_view<const float, 4>(mask.data(), {1, 1, 1, 8}));
  std::vector<ordinal> storage(8);

  const population range(2, 5);
  CHECK(range.size() == 3);
  CHECK(range[0] == 2);
  CHECK(range[2] == 4);
  CHECK(population(5, 2).size() == 0);

  const population masked(1, 8, view.at(0, 0, 0), storage);
  REQUIRE(masked.size() == 4);
  CHECK(masked[0] == 2);
  CHECK(masked[1] == 4);
  CHECK(masked[2] == 5);
  CHECK(masked[3] == 7);

  CHECK(population(1, 2, view.at(0, 0, 0), storage).size() == 0);
  const population unaffected(4, 6, view.at(0, 0, 0), storage);
  CHECK(unaffected.size() == 2);
  CHECK(unaffected[1] == 5);
  CHECK(population(0, 8, vattn::mask_view().at(0, 0, 0), {}).size() == 8);

  // What a mask leaves may be a range all the same.
  CHECK_FALSE(masked.contiguous());
  const population run(3, 6, view.at(0, 0, 0), storage);
  CHECK(run.contiguous());
  CHECK(run.size() == 2);
  CHECK(run[0] == 4);
  CHECK(run[1] == 5);
}

TEST_CASE("masks of floats and of halves, with broadcast axes", "[kv][query]") {
  // [1, 1, 2, 3] read as [4, 5, 2, 3]: strides of 0 repeat batch and head.
  const std::vector<float> f{0, 1, 2, -infinity, 4, 0.5f};
  std::vector<Eigen::half> h;
  for (const float x : f) h.emplace_back(x);
  const vattn::mask_view floats(vattn::tensor_view<const float, 4>(f.data(), {4, 5, 2, 3}, {0, 0, 12, 4}));
  const vattn::mask_view halves(vattn::tensor_view<const Eigen::half, 4>(h.data(), {4, 5, 2, 3}, {0, 0, 6, 2}));
  for (index_t t = 0; t < 2; ++t) {
    for (index_t i = 0; i < 3; ++i) {
      CHECK(floats.at(3, 4, t)(i) == f[static_cast<std::size_t>(3 * t + i)]);
      CHECK(halves.at(2, 1, t)(i) == f[static_cast<std::size_t>(3 * t + i)]);
    }
  }
  CHECK_FALSE(vattn::mask_view());
  for (const vattn::mask_view& view : {floats, halves}) {
    CHECK(view.at(0, 0, 1).hides(0));
    CHECK_FALSE(view.at(0, 0, 0).hides(2));
    CHECK(view.at(0, 0, 0).adds());
    CHECK_FALSE(view.only_hiding().at(0, 0, 0).adds());
    CHECK(view.only_hiding().at(0, 0, 1).hides(0));
  }
  CHECK_FALSE(vattn::mask_view().at(0, 0, 0).adds());
}

TEST_CASE("a logit is cap·tanh(scale·qk/cap), then the mask, then ALiBi", "[kv][query]") {
  const std::vector<float> k{1, 2, 3, 4}, mask{0.25f, -1.5f};
  const auto cache = vattn::contiguous_kv(k.data(), k.data(), {.n_tokens = 2, .dk = 2, .dv = 2});
  const std::vector<float> scaled{0.5f, -1};
  const vattn::mask_view view(vattn::tensor_view<const float, 4>(mask.data(), {1, 1, 1, 2}));
  vattn::query_row<decltype(cache.head(0, 0))> row{.head = cache.head(0, 0), .scaled_query = scaled.data()};
  const double plain = 0.5 * 3 - 4;
  CHECK_THAT(static_cast<double>(row.logit(1)), WithinRel(plain, 1e-6));
  row.softcap = 2;
  CHECK_THAT(static_cast<double>(row.logit(1)), WithinRel(2 * std::tanh(plain / 2), 1e-6));
  row.mask = view.only_hiding().at(0, 0, 0);  // nothing is added, nor is it looked at
  CHECK_THAT(static_cast<double>(row.logit(1)), WithinRel(2 * std::tanh(plain / 2), 1e-6));
  row.softcap = 0;
  CHECK_FALSE(row.transforms());
  row.softcap = 2;
  row.mask = view.at(0, 0, 0);
  CHECK_THAT(static_cast<double>(row.logit(1)), WithinRel(2 * std::tanh(plain / 2) - 1.5, 1e-6));
  row.alibi_slope = 0.125f;
  row.position = 7;
  CHECK_THAT(static_cast<double>(row.logit(1)), WithinRel(2 * std::tanh(plain / 2) - 1.5 - 0.125 * 6, 1e-6));
}
