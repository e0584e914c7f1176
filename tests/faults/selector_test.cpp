// Selectors and indices that return nonsense: a status, exact attention, or a promise that is kept. Never a wrong one.
#include <limits>
#include <string>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "vattn/vattn.hpp"

namespace {

using vattn::index_t;
using vattn::score_kind;
using namespace vattn::test;

constexpr index_t n = 3000, needle = 1700;

// What the scores and errors become. The needle, which holds most of the attention, is what a fault may hide.
enum class fault {
  nan_everywhere,
  nan_at_needle,
  nan_elsewhere,
  infinite,
  minus_infinite,
  all_equal,  // the same place again and again, as far as a ranking can tell
  reversed,
  too_low,
  nan_error,
  negative_error,
  infinite_error,
  no_error,  // as `too_low`, and sure of it
};
constexpr fault score_faults[] = {fault::nan_everywhere, fault::nan_at_needle, fault::nan_elsewhere, fault::infinite,
                                  fault::minus_infinite, fault::all_equal,     fault::reversed,      fault::too_low};
constexpr fault error_faults[] = {fault::nan_error, fault::negative_error, fault::infinite_error, fault::no_error};

void corrupt(fault f, std::span<float> scores, std::span<float> errors, index_t first) {
  const float score = f == fault::nan_everywhere   ? not_a_number
                      : f == fault::infinite       ? infinity
                      : f == fault::minus_infinite ? -infinity
                                                   : 0.0f;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const index_t token = first + static_cast<index_t>(i);
    float& s = scores[i];
    if (f <= fault::all_equal && f != fault::nan_at_needle && f != fault::nan_elsewhere) s = score;
    if ((f == fault::nan_at_needle && token == needle) || (f == fault::nan_elsewhere && token % 7 == 3))
      s = not_a_number;
    if (f == fault::reversed) s = -s;
    if (f == fault::too_low || f == fault::no_error) s -= 20;
    if (f == fault::no_error && token == needle) s = -40;
  }
  for (float& e : errors) {
    e = f == fault::nan_error        ? not_a_number
        : f == fault::negative_error ? -1.0f
        : f == fault::infinite_error ? infinity
                                     : 0.0f;
  }
}

problem<float> haystack() {
  problem<float> p({.n = n, .dk = 16, .dv = 16});
  for (std::size_t j = 0; j < 16; ++j) {
    p.k[needle * 16 + j] = 3 * p.q[j];
    p.v[needle * 16 + j] = -4;
  }
  return p;
}

const vattn::config settings{.epsilon = 0.1, .delta = 0.1, .sinks = 16, .window = 16};

// `claims` is what the selector says that its scores are.
struct faulty_selector : vattn::select::top_k<> {
  fault what = fault::nan_everywhere;
  score_kind claims = score_kind::ranking;
  index_t heavy = -2;  // -2: as top_k

  template <class Row>
  vattn::score_result score(const Row& row, const vattn::population& tokens,
                            const vattn::score_buffers& out) const noexcept {
    vattn::score_result r = vattn::select::exact_contributions{}.score(row, tokens, out);
    if (claims != score_kind::contribution)
      r = vattn::select::exact_logits{}.score(row, tokens, {out.scores, {}, out.centre, out.scratch});
    corrupt(what, out.scores, {}, tokens[0]);
    r.kind = claims;
    return r;
  }
  index_t heavy_count(vattn::ranking& r, index_t count, const vattn::config& c) const noexcept {
    return heavy == -2 ? top_k::heavy_count(r, count, c) : heavy;
  }
};

// Honest codes with faults on top.
struct faulty_index : vattn::sketch::key_codes<8> {
  fault what = fault::nan_everywhere;

  faulty_index() = default;
  explicit faulty_index(fault f) : key_codes(16), what(f) {}
  void score(const float* q, index_t first, std::span<float> scores, std::span<float> errors,
             std::span<float> scratch) const noexcept {
    key_codes::score(q, first, scores, errors, scratch);
    corrupt(what, scores, errors, first);
  }
};

struct without_offset : faulty_selector {
  float offset = 0;
  template <class Row>
  vattn::score_result score(const Row& row, const vattn::population& tokens,
                            const vattn::score_buffers& out) const noexcept {
    vattn::score_result r = vattn::select::exact_contributions{}.score(row, tokens, out);
    r.value_offset = offset;
    return r;
  }
};

template <class Bound>
struct uniform : vattn::default_policy {
  using selector = faulty_selector;
  using bound = Bound;
};

// Exact, an error status, or within the promise with room for the share δ of draws that may exceed it.
template <class Attend>
void check_promise(const Attend& attend, const problem<float>& p) {
  results r(p.s);
  vattn::workspace memory;
  int sampled = 0, broken = 0;
  for (std::uint32_t step = 0; step < 60; ++step) {
    const vattn::status s = attend(p.query(), p.cache(), p.options, r.view(), memory, {.step = step});
    if (!s.ok()) {
      CHECK(std::string(s.message()).size() > 20);
      continue;
    }
    const vattn::certificate& c = r.certificates[0];
    CHECK(c.rows() <= c.n + c.rows_sampled);
    const double error = compare(p, r).output;
    if (c.exact()) {
      CHECK(error < 1e-4);
    } else {
      ++sampled;
      broken += error > settings.epsilon;
    }
  }
  CAPTURE(sampled);
  CHECK(broken <= 15);  // of 60 at δ = 0.1: more have probability 3e-4; to miss the needle breaks all
}

}  // namespace

TEST_CASE("a ranking of nonsense: uniform sampling does not certify what it cannot see", "[faults]") {
  const problem<float> p = haystack();
  faulty_selector s;
  for (const fault f : score_faults) {
    // A ranking that says of itself no more than an order may put the needle last: its certificates assume otherwise,
    // and say so.
    for (const score_kind claims : {score_kind::ranking, score_kind::logit, score_kind::contribution}) {
      if (claims == score_kind::ranking && f >= fault::infinite) continue;
      CAPTURE(int(f), int(claims));
      s.what = f, s.claims = claims;
      check_promise(vattn::vattention<uniform<vattn::budget::clt>>(settings, s), p);
      check_promise(vattn::vattention<uniform<vattn::budget::bernstein>>(settings, s), p);
    }
  }
}

TEST_CASE("a heavy count out of range is cut to what there is", "[faults]") {
  const problem<float> p = haystack();
  faulty_selector s;
  s.what = fault::no_error;  // corrupts nothing where errors are not asked for, but the needle:
  for (const index_t heavy :
       {index_t{-1}, std::numeric_limits<index_t>::min(), index_t{1} << 40, std::numeric_limits<index_t>::max()}) {
    for (const score_kind claims : {score_kind::logit, score_kind::contribution}) {
      CAPTURE(heavy, int(claims));
      s.heavy = heavy, s.claims = claims;
      check_promise(vattn::vattention<uniform<vattn::budget::clt>>(settings, s), p);
    }
  }
}

TEST_CASE("a value offset that is none", "[faults]") {
  struct policy : vattn::default_policy {
    using selector = without_offset;
    using bound = vattn::budget::bernstein;
  };
  const problem<float> p = haystack();
  for (const float offset : {0.0f, -1.0f, not_a_number}) {
    without_offset s;
    s.offset = offset;
    check_promise(vattn::vattention<policy>(settings, s), p);
  }
}

TEST_CASE("an index of nonsense: importance sampling and certificates rest on nothing that is not so", "[faults]") {
  struct by_importance : vattn::default_policy {
    using selector = vattn::select::indexed<faulty_index>;
    using sampler = vattn::sample::by_importance;
  };
  struct two_phases : vattn::default_policy {
    using selector = vattn::select::two_phase<faulty_index, vattn::sketch::key_codes<8>>;
    using sampler = vattn::sample::in_two_phases;
  };
  const problem<float> p = haystack();
  vattn::sketch::key_codes<8> honest(16);
  vattn::append_from(honest, p.cache().head(0, 0));
  const auto check = [&](fault f) {
    CAPTURE(int(f));
    faulty_index index(f);
    vattn::append_from(index, p.cache().head(0, 0));
    const std::span<const faulty_index> heads(&index, 1);
    check_promise(vattn::vattention<by_importance>(settings, {heads}), p);
    check_promise(vattn::vattention<vattn::certified_policy<faulty_index>>(settings, {heads}), p);
    check_promise(vattn::vattention<two_phases>(settings, {{heads}, {{&honest, 1}}}), p);
  };
  for (const fault f : score_faults) check(f);
  for (const fault f : error_faults) check(f);
}

TEST_CASE("an index that lags, or is not there, is named", "[faults]") {
  struct policy : vattn::default_policy {
    using selector = vattn::select::indexed<vattn::sketch::key_codes<4>>;
    using sampler = vattn::sample::by_importance;
  };
  const problem<float> p = haystack();
  vattn::sketch::key_codes<4> index(16);
  vattn::append_from(index, p.cache().head(0, 0));
  index.truncate(n - 1);
  results r(p.s);
  vattn::workspace memory;
  const std::span<const vattn::sketch::key_codes<4>> lagging(&index, 1), missing;
  for (const auto& heads : {lagging, missing}) {
    const vattn::status s =
        vattn::vattention<policy>(settings, {heads})(p.query(), p.cache(), p.options, r.view(), memory);
    CHECK(s.code() == vattn::errc::invalid_argument);
    CHECK(contains(s.message(), "append the new keys before the call"));
  }
}
