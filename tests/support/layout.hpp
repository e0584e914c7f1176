// Known rows in an engine's layout, and what must then be read back: rows, exact attention and sparse attention.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "vattn/kv/ragged.hpp"

namespace vattn::test {

/// A problem whose sequences have lengths of their own; `p` is padded to the longest.
template <class T = float>
struct ragged {
  ragged(shape s, std::vector<std::int32_t> wanted, unsigned seed = 3)
      : lengths(std::move(wanted)), p(sized(s, lengths), seed) {}
  ragged(problem<T> known, std::vector<std::int32_t> wanted) : lengths(std::move(wanted)), p(std::move(known)) {}

  static shape sized(shape s, const std::vector<std::int32_t>& lengths) {
    s.batch = static_cast<index_t>(lengths.size());
    s.n = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
    return s;
  }
  [[nodiscard]] const T* key(index_t b, index_t h, index_t token) const {
    return p.k.data() + ((b * p.s.kv_heads + h) * p.s.n + token) * p.s.dk;
  }
  [[nodiscard]] const T* value(index_t b, index_t h, index_t token) const {
    return p.v.data() + ((b * p.s.kv_heads + h) * p.s.n + token) * p.s.dv;
  }
  [[nodiscard]] auto contiguous() const { return padded_kv(p.k.data(), p.v.data(), p.cache_shape(), lengths.data()); }
  /// visit(b, h, token) for every row.
  template <class Visit>
  void for_each_row(Visit&& visit) const {
    for (index_t b = 0; b < p.s.batch; ++b)
      for (index_t h = 0; h < p.s.kv_heads; ++h)
        for (index_t token = 0; token < lengths[static_cast<std::size_t>(b)]; ++token) visit(b, h, token);
  }

  std::vector<std::int32_t> lengths;
  problem<T> p;
};

template <kernel::row R>
[[nodiscard]] std::vector<float> loaded(const R& row, index_t width) {
  using kernel::load;
  std::vector<float> x(static_cast<std::size_t>(width));
  load(row, x.data());
  return x;
}

/// Every row of the view is the one that is known.
template <class T, kv_cache View>
void check_rows(const ragged<T>& want, const View& view) {
  const status valid = view.validate();
  INFO(valid.message());
  REQUIRE(valid.ok());
  REQUIRE(view.n_batch() == want.p.s.batch);
  REQUIRE(view.n_kv_heads() == want.p.s.kv_heads);
  REQUIRE(view.dk() == want.p.s.dk);
  REQUIRE(view.dv() == want.p.s.dv);
  for (index_t b = 0; b < want.p.s.batch; ++b)
    REQUIRE(view.head(b, 0).size() == want.lengths[static_cast<std::size_t>(b)]);
  const auto same = want.contiguous();
  index_t wrong = 0;
  want.for_each_row([&](index_t b, index_t h, index_t token) {
    const auto head = view.head(b, h);
    const auto known = same.head(b, h);
    wrong += loaded(head.key(token), want.p.s.dk) != loaded(known.key(token), want.p.s.dk);
    wrong += loaded(head.value(token), want.p.s.dv) != loaded(known.value(token), want.p.s.dv);
  });
  CHECK(wrong == 0);
}

/// Relative difference of two results, largest of their rows; infinite where one has an empty row and the other not.
[[nodiscard]] inline double difference(const results& a, const results& b) {
  double worst = 0;
  const auto width = static_cast<std::size_t>(a.extents[3]);
  for (std::size_t at = 0; at < a.log_sum_exp.size(); ++at) {
    std::vector<double> exact(b.row(at), b.row(at) + width);
    worst = std::max(worst, reference::relative_error(a.row(at), exact));
    if (a.log_sum_exp[at] != b.log_sum_exp[at])
      worst = std::max(worst, static_cast<double>(std::abs(a.log_sum_exp[at] - b.log_sum_exp[at])));
  }
  return worst;
}

/// Enough of the rows are sampled even in sequences of a few hundred tokens.
[[nodiscard]] inline config small_config() {
  config c;
  c.epsilon = c.delta = 0.3;
  c.sinks = 4, c.window = 8, c.min_sample = 16;
  c.scale = error_scale::rms;  // values that cancel are no reason to read all
  return c;
}

/// Exact and sparse attention over the view are those over the contiguous rows, which are read by blocks and summed in
/// another order: within `tolerance`.
template <class T, kv_cache View>
void check_attention(const ragged<T>& want, const View& view, double tolerance = 2e-6) {
  const auto same = want.contiguous();
  results a(want.p.s), b(want.p.s);
  workspace memory;
  const status exact = exact_attention(want.p.query(), view, want.p.options, a.view(), memory);
  INFO(exact.message());
  REQUIRE(exact.ok());
  REQUIRE(exact_attention(want.p.query(), same, want.p.options, b.view(), memory).ok());
  CHECK(difference(a, b) <= tolerance);

  const vattention<ranked_policy> attend(small_config());
  const status sparse = attend(want.p.query(), view, want.p.options, a.view(), memory, {.seed = 11});
  INFO(sparse.message());
  REQUIRE(sparse.ok());
  REQUIRE(attend(want.p.query(), same, want.p.options, b.view(), memory, {.seed = 11}).ok());
  CHECK(difference(a, b) <= tolerance);
  index_t sampled = 0, unlike = 0;
  for (std::size_t i = 0; i < a.certificates.size(); ++i) {
    sampled += !a.certificates[i].exact();
    unlike += a.certificates[i].rows() != b.certificates[i].rows();
  }
  CHECK(unlike == 0);
  if (want.p.s.n >= 600) CHECK(sampled > 0);
}

/// Ids of pages in an order that nothing suggests, without repetition.
[[nodiscard]] inline std::vector<std::int32_t> shuffled_pages(index_t count, unsigned seed = 1) {
  std::vector<std::int32_t> ids;
  for (index_t i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>(i));
  std::shuffle(ids.begin(), ids.end(), std::mt19937(seed));
  return ids;
}

/// Lengths that leave every fill of the last page, and an empty sequence first, in the middle, and last.
[[nodiscard]] inline std::vector<std::int32_t> every_fill(index_t page_size) {
  std::vector<std::int32_t> lengths{0};
  for (index_t fill = 1; fill <= page_size; ++fill) {
    lengths.push_back(static_cast<std::int32_t>((fill % 3) * page_size + fill));
    if (fill == page_size / 2) lengths.push_back(0);
  }
  lengths.push_back(0);
  return lengths;
}

}  // namespace vattn::test
