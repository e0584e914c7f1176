// The functor and its dense fallback on small problems of any shape, stride, element type, mask, options, settings and
// values, against the reference.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "bytes.hpp"
#include "require.hpp"
#include "support/problem.hpp"
#include "vattn/vattn.hpp"

namespace {

using namespace vattn::test;
using vattn::index_t;
using vattn::fuzz::require;
using input = vattn::fuzz::bytes;

struct by_codes : vattn::default_policy {
  using selector = vattn::select::indexed<vattn::sketch::key_codes<1>>;
  using sampler = vattn::sample::by_importance;
};
struct finite_sample : vattn::ranked_policy {
  using bound = vattn::budget::bernstein;
};
struct with_replacement : vattn::ranked_policy {
  using sampler = vattn::sample::uniform_with_replacement;
  using bound = vattn::budget::student;
};

// [batch, heads, tokens, width] with any order of the axes, padding between them, and any direction.
template <class T>
struct strided {
  std::vector<T> memory;
  vattn::kv_strides strides;
  const T* first = nullptr;

  strided(input& in, const std::vector<T>& dense, index_t batch, index_t heads, index_t tokens, index_t width) {
    std::array<int, 3> order{0, 1, 2};  // batch, head, token: outermost first
    for (index_t turns = in.between(0, 5); turns > 0; --turns) std::next_permutation(order.begin(), order.end());
    const std::array<index_t, 3> extents{batch, heads, tokens};
    std::array<index_t, 3> step{};
    index_t unit = width + in.between(0, 3);
    for (int at = 3; at-- > 0;) {
      const auto axis = static_cast<std::size_t>(order[static_cast<std::size_t>(at)]);
      step[axis] = unit;
      unit = unit * std::max<index_t>(1, extents[axis]) + in.between(0, 2);
    }
    memory.assign(static_cast<std::size_t>(unit), T(1e30f));  // what lies between must not matter
    index_t start = 0;
    for (std::size_t axis = 0; axis < 3; ++axis) {
      if (!in.flag() || extents[axis] == 0) continue;
      start += (extents[axis] - 1) * step[axis];
      step[axis] = -step[axis];
    }
    for (index_t b = 0; b < batch; ++b)
      for (index_t h = 0; h < heads; ++h)
        for (index_t i = 0; i < tokens; ++i)
          std::copy_n(dense.begin() + ((b * heads + h) * tokens + i) * width, width,
                      memory.begin() + start + b * step[0] + h * step[1] + i * step[2]);
    constexpr auto size = static_cast<index_t>(sizeof(T));
    strides = {.token = step[2] * size, .head = step[1] * size, .batch = step[0] * size};
    first = memory.data() + start;
  }
};

bool all_finite(const std::vector<float>& values, float most) {
  return std::all_of(values.begin(), values.end(), [most](float x) { return std::abs(x) <= most; });
}

// What one call left: right, or an error that had a reason.
template <class T>
void check(const vattn::status& s, const problem<T>& p, const results& r, const vattn::config& settings, bool tame) {
  if (!s.ok()) {
    require(s.message()[0] != '\0' && std::strchr(s.message(), '\n') == nullptr, "an error is one line");
    require(!tame || s.code() != vattn::errc::non_finite, "finite inputs of moderate size give finite results");
    return;
  }
  const vattn::reference::problem exactly = p.exactly();
  for (index_t b = 0; b < p.s.batch; ++b) {
    for (index_t t = 0; t < p.s.queries; ++t) {
      for (index_t h = 0; h < p.s.heads; ++h) {
        const std::size_t at = r.at(b, t, h);
        const vattn::certificate& c = r.certificates[at];
        const vattn::reference::row want = vattn::reference::attend(exactly, b, t, h);
        double power = 0, off = 0;
        for (std::size_t j = 0; j < want.output.size(); ++j) {
          const double got = static_cast<double>(r.row(at)[j]);
          require(std::isfinite(got), "an output that is ok is finite");
          off += (got - want.output[j]) * (got - want.output[j]);
        }
        for (std::size_t i = 0; i < want.tokens.size(); ++i) {
          const double x = std::exp(want.logits[i] - want.max_logit) / want.denominator;
          for (index_t j = 0; j < p.s.dv; ++j) {
            const auto v = static_cast<std::size_t>(
                ((b * p.s.kv_heads + h / (p.s.heads / p.s.kv_heads)) * p.s.n + want.tokens[i]) * p.s.dv + j);
            power += x * exactly.v[v] * exactly.v[v];
          }
        }
        require(c.n == static_cast<index_t>(want.tokens.size()), "the certificate counts the tokens that are seen");
        require(c.rows_exact >= 0 && c.rows_exact <= c.n && c.rows_sampled >= 0, "rows are counts");
        // Sums of products in float: errors of logits of this size, and what they make of the weights.
        const double tolerance = 1e-4 * (1 + 50 * std::abs(static_cast<double>(p.options.scale)));
        if (c.exact()) {
          require(c.rows() == c.n && c.epsilon_achieved == 0, "exact is every row");
          require(!tame || off <= tolerance * tolerance * power + 1e-30, "exact attention is the reference");
        } else {
          require(c.promise != vattn::guarantee::none, "a sampled output comes with a promise");
          if (!(c.saturated || c.epsilon_achieved <= settings.epsilon * (1 + 1e-12)))
            std::fprintf(stderr, "%s: %.17g, asked %.17g\n", c.bound, c.epsilon_achieved, settings.epsilon);
          require(c.saturated || c.epsilon_achieved <= settings.epsilon * (1 + 1e-12),
                  "what is promised is what was asked for");
          require(!(c.saturated && !settings.accept_last), "nothing is left unfinished unasked");
        }
      }
    }
  }
}

template <class T>
void run(input& in) {
  shape s{.batch = in.between(1, 2), .queries = in.between(1, 2), .kv_heads = in.between(1, 2)};
  s.heads = s.kv_heads * in.between(1, 2);
  s.n = in.flag() ? in.between(0, 40) : in.between(60, 255);
  s.dk = in.between(1, 12), s.dv = in.between(1, 12);
  problem<T> p(s, in.take<std::uint16_t>(),
               std::array{1.0f, 0.01f, 8.0f, 0.0f}[static_cast<std::size_t>(in.between(0, 3))]);
  // A few values of any bits.
  bool tame = true;
  for (index_t k = in.between(0, 3); k > 0; --k) {
    const auto where = in.take<std::uint32_t>();
    const float x = in.take<float>();
    tame &= std::abs(x) <= 100;
    std::vector<T>& to = in.flag() ? p.k : p.v;
    if (in.flag()) {
      p.q[where % p.q.size()] = x;
    } else if (!to.empty()) {
      to[where % to.size()] = T(x);
    }
  }
  p.options.causal = in.flag();
  p.options.sliding_window = in.flag() ? in.between(0, 60) : 0;
  if (in.flag()) p.options.softcap = static_cast<float>(in.between(0, 50));
  if (in.flag()) p.options.scale = in.take<float>();
  tame &= std::abs(p.options.scale) <= 2;
  const auto floats = [&](index_t count, bool holes) {
    std::vector<float> values;
    for (index_t i = 0; i < count; ++i) {
      const auto pick = static_cast<float>(in.rest().empty() ? i % 5 : in.between(-8, 8));
      values.push_back(holes && pick > 5 ? -infinity : 0.25f * pick);
    }
    return values;
  };
  if (in.flag()) p.set_sinks(floats(s.heads, true));
  if (in.flag()) p.set_alibi(floats(s.heads, false));
  if (in.flag()) p.set_mask(floats(s.batch * s.heads * s.queries * s.n, true));
  tame &= p.alibi.empty() || s.n <= 40;  // 2·n is a logit of hundreds, which float exponentials know to 1e-4 of it

  vattn::config settings;
  settings.epsilon = in.flag() ? in.take<double>() : 0.2;
  settings.delta = in.flag() ? in.take<double>() : 0.1;
  settings.sinks = in.between(0, 20), settings.window = in.between(0, 20);
  if (in.flag()) settings.heavy = in.take<double>();
  if (in.flag()) settings.base = in.take<double>();
  if (in.flag()) settings.max_density = in.take<double>();
  settings.min_sample = in.flag() ? in.take<index_t>() : in.between(2, 70);
  settings.max_rounds = in.flag() ? in.take<index_t>() : in.between(1, 8);
  settings.accept_last = in.flag(), settings.joint = in.flag();
  if (in.flag()) settings.scale = vattn::error_scale::rms;

  const strided<T> k(in, p.k, s.batch, s.kv_heads, s.n, s.dk), v(in, p.v, s.batch, s.kv_heads, s.n, s.dv);
  const vattn::kv_view<T> cache(k.first, k.strides, v.first, v.strides, p.cache_shape());
  const auto which = in.between(0, 5);
  results r(s);
  vattn::workspace memory;
  const auto attend = [&](const auto& method) {
    return method(p.query(), cache, p.options, r.view(), memory, {.step = 1});
  };
  vattn::status status;
  std::vector<vattn::sketch::key_codes<1>> codes;
  std::vector<vattn::sketch::key_codes<8>> fine;
  const auto index = [&](auto& indices) {
    for (index_t b = 0; b < s.batch; ++b) {
      for (index_t h = 0; h < s.kv_heads; ++h) {
        indices.emplace_back(s.dk);
        vattn::append_from(indices.back(), cache.head(b, h));
      }
    }
    return std::span(std::as_const(indices));
  };
  switch (which) {
    case 0:
      status = vattn::exact_attention(p.query(), cache, p.options, r.view(), memory);
      break;
    case 1:
      status = attend(vattn::vattention<vattn::ranked_policy>(settings));
      break;
    case 2:
      status = attend(vattn::vattention<finite_sample>(settings));
      break;
    case 3:
      status = attend(vattn::vattention<with_replacement>(settings));
      break;
    case 4:
      status = attend(vattn::vattention<by_codes>(settings, {index(codes)}));
      break;
    default:
      status = attend(vattn::vattention<vattn::certified_policy<vattn::sketch::key_codes<8>>>(settings, {index(fine)}));
  }
  tame = tame && all_finite(p.q, 200);
  check(status, p, r, settings, tame);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  input in(data, size);
  if (in.flag()) {
    run<float>(in);
  } else {
    run<Eigen::half>(in);
  }
  return 0;
}
