// vattention<ranked_policy>: what depends on what, and the inputs at which sampling degenerates.
#include <algorithm>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"

using namespace vattn::test;
using vattn::errc;
using vattn::index_t;

namespace {

vattn::config small_config() {
  vattn::config c;
  c.sinks = c.window = 16;
  return c;
}

template <class T, class Policy = vattn::ranked_policy, class E = vattn::serial_executor>
results sparse(const problem<T>& p, const vattn::config& c = small_config(), const vattn::draw_key& key = {},
               E&& exec = E{}) {
  results r(p.s);
  vattn::workspace memory;
  const vattn::vattention<Policy> attend(c);
  const vattn::status s = attend(p.query(), p.cache(), p.options, r.view(), memory, key, exec);
  CAPTURE(s.message());
  REQUIRE(s.ok());
  return r;
}

struct sample_alone : vattn::default_policy {
  using selector = vattn::select::none;
};

struct unsure : vattn::select::top_k<> {
  template <class Row>
  vattn::score_result score(const Row& row, const vattn::population& tokens,
                            const vattn::score_buffers& out) const noexcept {
    const vattn::score_result r = top_k::score(row, tokens, out);
    out.scores[1234] = not_a_number;
    return r;
  }
};
struct one_score_unknown : vattn::default_policy {
  using selector = unsure;
};

bool same(const vattn::certificate& a, const vattn::certificate& b) {
  return a.n == b.n && a.rows_exact == b.rows_exact && a.rows_sampled == b.rows_sampled && a.budget == b.budget &&
         a.log_denominator == b.log_denominator && a.denominator_error == b.denominator_error &&
         a.epsilon == b.epsilon && a.delta == b.delta && a.epsilon_achieved == b.epsilon_achieved &&
         a.coherence == b.coherence && a.rounds == b.rounds && a.target == b.target && a.scale == b.scale &&
         a.promise == b.promise && a.bound == b.bound && a.assumptions == b.assumptions && a.saturated == b.saturated;
}

bool same(const results& a, const results& b) {
  return a.output == b.output && a.log_sum_exp == b.log_sum_exp &&
         std::equal(a.certificates.begin(), a.certificates.end(), b.certificates.begin(), b.certificates.end(),
                    [](const auto& x, const auto& y) { return same(x, y); });
}

int not_exact(const results& r) {
  int count = 0;
  for (const auto& c : r.certificates) count += !c.exact();
  return count;
}

// Counts, reads and promises that must hold of any certificate.
void check_certificates(const results& r, const vattn::config& c) {
  for (std::size_t i = 0; i < r.certificates.size(); ++i) {
    const vattn::certificate& cert = r.certificates[i];
    CHECK(cert.rows() <= cert.n);
    CHECK(cert.log_denominator == static_cast<double>(r.log_sum_exp[i]));
    CHECK(cert.epsilon == c.epsilon);
    CHECK(cert.delta == c.delta);
    CHECK_FALSE(cert.saturated);
    if (cert.exact()) {
      CHECK(cert.rows_exact == cert.n);
      CHECK(cert.epsilon_achieved == 0);
    } else {
      CHECK(static_cast<double>(cert.rows()) <= c.max_density * static_cast<double>(cert.n));
      CHECK(cert.epsilon_achieved <= c.epsilon);
      CHECK(cert.rounds >= 1);
      CHECK(cert.rounds <= c.max_rounds);
      CHECK(cert.coherence > 0);
      CHECK(cert.coherence <= 1.0001);
    }
  }
}

}  // namespace

TEMPLATE_TEST_CASE("near the truth and sparse, on every type and with every option", "[vattention]", float, Eigen::half,
                   Eigen::bfloat16) {
  // Bits: softcap, causal, window, mask, sinks, ALiBi.
  int sampled = 0;
  for (const unsigned options : {0u, 1u, 2u, 4u, 6u, 8u, 10u, 16u, 32u, 59u}) {
    constexpr index_t n = 5000;
    problem<TestType> p({.batch = 2, .queries = 2, .heads = 3, .kv_heads = 1, .n = n, .dk = 8, .dv = 6}, options + 40);
    if (options & 1) p.options.softcap = 4;
    p.options.causal = options & 2;
    if (options & 4) p.options.sliding_window = 3500;
    if (options & 8) {
      std::vector<float> mask(static_cast<std::size_t>(2 * 3 * 2 * n));
      for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = i % 7 == 0 ? -infinity : 0.1f * static_cast<float>(i % 5);
      p.set_mask(mask);
    }
    if (options & 16) p.set_sinks({2, -infinity, 8});
    if (options & 32) p.set_alibi({0.0001f, 0.0002f, 0});
    const results r = sparse(p);
    const disagreement worst = compare(p, r);
    CAPTURE(options, worst.output, worst.denominator);
    CHECK(worst.output < 0.15);  // 12 rows at epsilon = 0.05: three times that is beyond chance
    CHECK(worst.denominator < 0.15);
    check_certificates(r, small_config());
    sampled += not_exact(r);
  }
  CHECK(sampled >= 100);  // of 120
}

TEST_CASE("one object, one key, one result: threads, memory and history do not matter", "[vattention]") {
  const problem<Eigen::half> p({.batch = 2, .queries = 3, .heads = 6, .kv_heads = 2, .n = 3000, .dk = 16, .dv = 8}, 50,
                               1.5f);
  const vattn::draw_key key{.seed = 7, .layer = 2, .step = 9};
  const results want = sparse(p, small_config(), key);
  CHECK(not_exact(want) > 30);
  for (index_t threads = 1; threads <= 5; ++threads) {
    CAPTURE(threads);
    CHECK(same(sparse(p, small_config(), key, vattn::thread_executor(threads)), want));
  }
  // A used workspace, full of other numbers.
  vattn::workspace memory;
  const vattn::vattention<vattn::ranked_policy> attend(small_config());
  results other(p.s), again(p.s);
  REQUIRE(memory.reserve(1 << 22).ok());
  std::fill(memory.memory().begin(), memory.memory().end(), std::byte{0xa5});
  REQUIRE(attend(p.query(), p.cache(), p.options, other.view(), memory, {.seed = 1}).ok());
  REQUIRE(attend(p.query(), p.cache(), p.options, again.view(), memory, key).ok());
  CHECK(same(again, want));
  CHECK_FALSE(same(other, want));
}

TEST_CASE("seed, layer and step each give another draw", "[vattention]") {
  const problem<float> p({.heads = 2, .n = 3000, .dk = 8, .dv = 8}, 51);
  const results base = sparse(p);
  CHECK(not_exact(base) == 2);
  for (const vattn::draw_key& key :
       {vattn::draw_key{.seed = 1}, vattn::draw_key{.layer = 1}, vattn::draw_key{.step = 1}}) {
    const results r = sparse(p, small_config(), key);
    CHECK(r.output != base.output);
    CHECK(compare(p, r).output < 0.15);
  }
  CHECK(same(sparse(p, small_config(), {}), base));
}

TEST_CASE("heads with the same numbers draw apart", "[vattention]") {
  problem<float> p({.heads = 2, .n = 3000, .dk = 8, .dv = 8}, 52);
  std::copy_n(p.q.begin(), 8, p.q.begin() + 8);
  const results r = sparse(p);
  CHECK_FALSE(std::equal(r.row(0), r.row(0) + 8, r.row(1)));
}

TEST_CASE("a cache that is too small is read exactly, every n from 0 to 600", "[vattention]") {
  vattn::config tiny;
  tiny.sinks = 3;
  tiny.window = 5;
  tiny.min_sample = 8;
  tiny.base = 0.05;
  tiny.heavy = 0.01;
  tiny.epsilon = tiny.delta = 0.3;
  int sampled = 0;
  for (index_t n = 0; n <= 600; ++n) {
    const problem<float> p({.n = n, .dk = 3, .dv = 2}, static_cast<unsigned>(n) + 1);
    const results defaults = sparse(p, vattn::config{});
    CAPTURE(n);
    CHECK(defaults.certificates[0].exact());
    CHECK(compare(p, defaults).output < 5e-6);
    const results r = sparse(p, tiny);
    CHECK(compare(p, r).output < (r.certificates[0].exact() ? 5e-6 : 0.6));
    check_certificates(r, tiny);
    sampled += not_exact(r);
  }
  CHECK(sampled > 10);
}

TEST_CASE("sinks and window longer than the cache", "[vattention]") {
  for (const index_t n : {0, 1, 100, 1000}) {
    const problem<float> p({.n = n}, 53);
    vattn::config c;
    c.sinks = 700;
    c.window = 700;
    const results r = sparse(p, c);
    CHECK(r.certificates[0].exact());
    CHECK(compare(p, r).output < 5e-6);
  }
}

TEST_CASE("max_density forces exact attention", "[vattention]") {
  const problem<Eigen::bfloat16> p({.queries = 2, .heads = 4, .kv_heads = 2, .n = 2000}, 54);
  vattn::config c = small_config();
  c.max_density = 1e-6;
  const results r = sparse(p, c);
  results exact(p.s);
  vattn::workspace memory;
  REQUIRE(vattn::exact_attention(p.query(), p.cache(), p.options, exact.view(), memory).ok());
  // Head by head instead of a group at a time: sums in another order.
  for (std::size_t i = 0; i < r.output.size(); ++i) CHECK_THAT(r.output[i], WithinAbs(exact.output[i], 5e-6));
  for (std::size_t i = 0; i < r.log_sum_exp.size(); ++i)
    CHECK_THAT(r.log_sum_exp[i], WithinAbs(exact.log_sum_exp[i], 5e-6));
  CHECK(not_exact(r) == 0);
}

TEST_CASE("an epsilon that sampling cannot reach ends exact", "[vattention]") {
  const problem<float> p({.n = 2000, .dk = 8, .dv = 8}, 55, 2);
  vattn::config c = small_config();
  c.epsilon = 1e-6;
  const results r = sparse(p, c);
  CHECK(r.certificates[0].exact());
  CHECK(compare(p, r).output < 5e-6);
}

TEST_CASE("a delta far below any of use reads more rows, and keeps epsilon", "[vattention]") {
  const problem<float> p({.n = 3000, .dk = 8, .dv = 4}, 60);
  vattn::config c = small_config();
  c.epsilon = 0.3;
  vattn::index_t last = 0;
  for (const double delta : {0.1, 1e-6, 1e-30, 1e-300}) {
    c.delta = delta;
    const results r = sparse(p, c);
    CAPTURE(delta);
    CHECK(r.certificates[0].rows() > last);  // up to all
    CHECK(compare(p, r).output < c.epsilon);
    last = r.certificates[0].rows();
  }
}

TEST_CASE("accept_last keeps the sample and says that epsilon was not reached", "[vattention]") {
  const problem<float> p({.n = 4000, .dk = 8, .dv = 8}, 56, 2);
  vattn::config c = small_config();
  c.epsilon = 0.001;
  c.max_rounds = 1;
  CHECK(sparse(p, c).certificates[0].exact());
  c.accept_last = true;
  const vattn::certificate kept = sparse(p, c).certificates[0];
  CHECK_FALSE(kept.exact());
  CHECK(kept.saturated);
  CHECK(kept.epsilon_achieved > c.epsilon);
  CHECK(kept.rounds == 1);
}

TEST_CASE("joint shares delta among all queries and heads of the call", "[vattention]") {
  const problem<float> p({.queries = 2, .heads = 5, .kv_heads = 1, .n = 6000, .dk = 8, .dv = 8}, 57);
  vattn::config c = small_config();
  const results each = sparse(p, c);
  c.joint = true;
  const results all = sparse(p, c);
  index_t rows_each = 0, rows_all = 0;
  for (std::size_t i = 0; i < 10; ++i) {
    CHECK_THAT(all.certificates[i].delta, WithinRel(0.01, 1e-12));
    rows_each += each.certificates[i].rows();
    rows_all += all.certificates[i].rows();
  }
  CHECK(rows_all > rows_each);
}

TEST_CASE("masked rows are never read, and the sample is of the others", "[vattention]") {
  constexpr std::size_t n = 6000;
  problem<float> p({.heads = 2, .n = n, .dk = 8, .dv = 4}, 58);
  problem<float> only({.heads = 2, .n = n / 3, .dk = 8, .dv = 4}, 58);
  only.q = p.q;
  std::vector<float> mask(2 * n, -infinity);
  for (std::size_t i = 0; i < n; ++i) {
    if (i % 3 == 1) {
      mask[i] = mask[n + i] = 0;
      std::copy_n(p.k.begin() + static_cast<std::ptrdiff_t>(8 * i), 8,
                  only.k.begin() + static_cast<std::ptrdiff_t>(8 * (i / 3)));
      std::copy_n(p.v.begin() + static_cast<std::ptrdiff_t>(4 * i), 4,
                  only.v.begin() + static_cast<std::ptrdiff_t>(4 * (i / 3)));
    } else {
      std::fill_n(p.k.begin() + static_cast<std::ptrdiff_t>(8 * i), 8, not_a_number);
      std::fill_n(p.v.begin() + static_cast<std::ptrdiff_t>(4 * i), 4, not_a_number);
    }
  }
  p.set_mask(mask);
  const results r = sparse(p);
  CHECK(not_exact(r) == 2);
  CHECK(r.certificates[0].n == static_cast<index_t>(n / 3));
  // The very result of a cache that holds the unmasked tokens alone: sinks, windows, ranks and draws are
  // of the tokens that are seen.
  CHECK(same(r, sparse(only)));

  std::fill(mask.begin(), mask.end(), -infinity);
  mask[n + 77] = 0;
  p.k[77 * 8] = 1, p.v[77 * 4] = 2;
  std::fill_n(p.k.begin() + 77 * 8, 8, 1.0f);
  std::fill_n(p.v.begin() + 77 * 4, 4, 2.0f);
  p.set_mask(mask);
  const results one = sparse(p);
  CHECK(one.log_sum_exp[0] == -infinity);
  CHECK(one.output[0] == 0.0f);
  CHECK_THAT(static_cast<double>(one.row(1)[3]), WithinRel(2.0, 1e-6));
}

TEST_CASE("NaN and infinity in what is read are reported, for every policy that reads it", "[vattention]") {
  for (const float bad : {not_a_number, infinity, -infinity}) {
    for (int where = 0; where < 6; ++where) {
      problem<float> p({.heads = 2, .kv_heads = 2, .n = 3000, .dk = 8, .dv = 4}, 59);
      if (where == 0) p.q[8 + 3] = bad;
      if (where == 1) p.k[(3000 + 1500) * 8] = bad;      // ranked by every selector but `none`
      if (where == 2) p.v[(3000 + 1500) * 4] = bad;      // read by the contribution ranking
      if (where == 3) p.k[(3000 + 2) * 8 + 7] = bad;     // a sink
      if (where == 4) p.v[(3000 + 2999) * 4 + 1] = bad;  // the window
      if (where == 5) p.set_sinks({0, bad});
      results r(p.s);
      vattn::workspace memory;
      const vattn::vattention<vattn::ranked_policy> attend(small_config());
      const vattn::status s = attend(p.query(), p.cache(), p.options, r.view(), memory);
      CAPTURE(bad, where, s.message());
      if (where == 5 && bad == -infinity) {
        CHECK(s.ok());
        continue;
      }
      CHECK(s.code() == errc::non_finite);
      CHECK(contains(s.message(), "batch 0, query 0, head 1"));
    }
  }
}

TEST_CASE("what is read for certain is told where it is not finite, without a selector that sees it", "[vattention]") {
  for (const index_t token : {2, 2990}) {  // sink, window
    for (const bool in_key : {true, false}) {
      problem<float> p({.n = 3000, .dk = 8, .dv = 8}, 59);
      (in_key ? p.k : p.v)[static_cast<std::size_t>(8 * token + 3)] = not_a_number;
      results r(p.s);
      vattn::workspace memory;
      const vattn::status s =
          vattn::vattention<sample_alone>(small_config())(p.query(), p.cache(), p.options, r.view(), memory);
      CAPTURE(token, in_key, s.message());
      CHECK(s.code() == errc::non_finite);
    }
  }
}

TEST_CASE("one score that is no number: the selector does not know, and every row is read", "[vattention]") {
  const problem<float> p({.n = 3000, .dk = 8, .dv = 4}, 59);
  CHECK_FALSE(sparse(p).certificates[0].exact());
  const results r = sparse<float, one_score_unknown>(p);
  CHECK(r.certificates[0].exact());
  CHECK(compare(p, r).output < 5e-6);
}

TEST_CASE("values without variance: constant, zero, huge and tiny", "[vattention]") {
  for (const float value : {0.0f, 1.0f, -3.5f, 1e15f, 1e-15f}) {
    problem<float> p({.n = 3000, .dk = 8, .dv = 4}, 60, 2);
    std::fill(p.v.begin(), p.v.end(), value);
    const results r = sparse(p);
    CAPTURE(value);
    CHECK(compare(p, r).output < 1e-5);
  }
}

TEST_CASE("all keys equal: every weight is the same", "[vattention]") {
  problem<float> p({.n = 6000, .dk = 8, .dv = 4}, 61);
  for (std::size_t i = 8; i < p.k.size(); ++i) p.k[i] = p.k[i - 8];
  const results r = sparse(p);
  CHECK(compare(p, r).output < 0.15);
  CHECK(compare(p, r).denominator < 1e-5);  // the sample's mean of a constant is the constant
  check_certificates(r, small_config());
  std::fill(p.v.begin(), p.v.end(), 2.0f);
  CHECK(compare(p, sparse(p)).output < 1e-5);
}

TEST_CASE("values of one element, keys of one element", "[vattention]") {
  const problem<float> p({.n = 5000, .dk = 1, .dv = 1}, 62);
  const results r = sparse(p);
  CHECK(compare(p, r).output < 0.15);
  check_certificates(r, small_config());
}

TEST_CASE("no sinks, no window, no heavy set: the sample alone", "[vattention]") {
  const problem<float> p({.n = 8000, .dk = 8, .dv = 4}, 63);
  vattn::config c;
  c.sinks = c.window = 0;
  c.heavy = 0;
  const results r = sparse<float, sample_alone>(p, c);
  CHECK_FALSE(r.certificates[0].exact());
  CHECK(r.certificates[0].rows_exact == 0);
  CHECK(compare(p, r).output < 0.15);
}

TEST_CASE("scaling the values scales the output and reads the same rows", "[vattention]") {
  const problem<float> p({.heads = 2, .n = 4000, .dk = 8, .dv = 4}, 64);
  problem<float> scaled = p;
  for (float& x : scaled.v) x *= 1024;
  const results a = sparse(p), b = sparse(scaled);
  CHECK(not_exact(a) == 2);
  for (std::size_t i = 0; i < a.output.size(); ++i)
    CHECK_THAT(static_cast<double>(b.output[i]), WithinRel(1024 * static_cast<double>(a.output[i]), 1e-4));
  for (std::size_t i = 0; i < 2; ++i) CHECK(a.certificates[i].rows() == b.certificates[i].rows());
}

TEST_CASE("a constant added to all logits moves the log-sum-exp alone", "[vattention]") {
  const problem<float> p({.n = 4000, .dk = 8, .dv = 4}, 65);
  problem<float> moved = p;
  moved.set_mask(std::vector<float>(4000, 25.0f));
  const results a = sparse(p), b = sparse(moved);
  CHECK(not_exact(a) == 1);
  CHECK(a.certificates[0].rows() == b.certificates[0].rows());
  for (std::size_t i = 0; i < a.output.size(); ++i)
    CHECK_THAT(static_cast<double>(b.output[i]), WithinAbs(static_cast<double>(a.output[i]), 1e-4));
  CHECK_THAT(static_cast<double>(b.log_sum_exp[0]), WithinAbs(static_cast<double>(a.log_sum_exp[0]) + 25, 1e-4));
}

TEST_CASE("stored norms of values save reading them and promise the same", "[vattention]") {
  const problem<float> p({.n = 4000, .dk = 8, .dv = 4}, 66);
  std::vector<float> norms(4000), centre(4, 1.0f);
  for (std::size_t i = 0; i < 4000; ++i) {
    double away = 0;
    for (std::size_t j = 0; j < 4; ++j) away += std::pow(static_cast<double>(p.v[4 * i + j]) - 1, 2);
    norms[i] = static_cast<float>(std::sqrt(away));
  }
  for (const bool centred : {true, false}) {
    const auto cache =
        p.cache().with_norms({.values = norms.data(), .value_centres = centred ? centre.data() : nullptr});
    results r(p.s);
    vattn::workspace memory;
    const vattn::vattention<vattn::ranked_policy> attend(small_config());
    REQUIRE(attend(p.query(), cache, p.options, r.view(), memory).ok());
    CHECK(compare(p, r).output < 0.15);
    CHECK_FALSE(r.certificates[0].exact());
  }
}

TEST_CASE("sequences of a batch may be of different length", "[vattention]") {
  // A cache of our own: the concept is all that is asked for.
  struct ragged {
    vattn::kv_view<float> all;
    std::vector<index_t> lengths;
    [[nodiscard]] index_t n_batch() const { return all.n_batch(); }
    [[nodiscard]] index_t n_kv_heads() const { return all.n_kv_heads(); }
    [[nodiscard]] index_t dk() const { return all.dk(); }
    [[nodiscard]] index_t dv() const { return all.dv(); }
    [[nodiscard]] vattn::status validate() const { return all.validate(); }
    [[nodiscard]] auto head(index_t b, index_t h) const {
      const float* k = all.head(b, h).key(0).data();
      const float* v = all.head(b, h).value(0).data();
      return vattn::kv_head_view<float, float, vattn::dynamic, vattn::dynamic>(
          reinterpret_cast<const std::byte*>(k), reinterpret_cast<const std::byte*>(v), {}, 4 * dk(), 4 * dv(),
          lengths[static_cast<std::size_t>(b)], dk(), dv());
    }
  };
  static_assert(vattn::kv_cache<ragged>);
  const problem<float> p({.batch = 3, .n = 4000, .dk = 8, .dv = 4}, 67);
  const ragged cache{p.cache(), {3000, 0, 40}};
  results r(p.s);
  vattn::workspace memory;
  const vattn::vattention<vattn::ranked_policy> attend(small_config());
  REQUIRE(attend(p.query(), cache, p.options, r.view(), memory).ok());
  for (const index_t b : {0, 1, 2}) {
    problem<float> alone({.n = cache.lengths[static_cast<std::size_t>(b)], .dk = 8, .dv = 4});
    std::copy_n(p.q.begin() + 8 * b, 8, alone.q.begin());
    std::copy_n(p.k.begin() + 8 * 4000 * b, alone.k.size(), alone.k.begin());
    std::copy_n(p.v.begin() + 4 * 4000 * b, alone.v.size(), alone.v.begin());
    const auto want = vattn::reference::attend(alone.exactly(), 0, 0, 0);
    CHECK(vattn::reference::relative_error(r.row(static_cast<std::size_t>(b)), want.output) < (b == 0 ? 0.15 : 5e-6));
    CHECK(r.certificates[static_cast<std::size_t>(b)].n == alone.s.n);
  }
}
