// Synthetic KV caches with known logits: the regimes that examples, tests and benchmarks share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "support/adversaries.hpp"

namespace vattn::synthetic {

/// One KV head, and queries whose logits scale·q·k_i, scale = 1/sqrt(dim), are those of the regime.
struct cache {
  std::int64_t n = 0, dim = 0, heads = 1;
  std::vector<float> q;       // [heads, dim]
  std::vector<float> k, v;    // [n, dim]
  std::vector<float> logits;  // [heads, n]
  [[nodiscard]] float scale() const { return 1 / std::sqrt(static_cast<float>(dim)); }
};

/// The eight regimes that results are quoted on.
inline const std::vector<std::string>& standard_regimes() {
  static const std::vector<std::string> names{"flat",    "gauss1", "gauss2",  "gauss3",
                                              "laplace", "needle", "student", "plateau"};
  return names;
}

/// Regimes that try to break a sampled guarantee.
inline const std::vector<std::string>& hostile_regimes() {
  static const std::vector<std::string> names{"spikes",  "ties",   "edge_cluster", "duplicates",
                                              "bimodal", "cauchy", "staircase",    "constant"};
  return names;
}

/// Kinds of values: `mean` and `zero` are those that results are quoted on.
inline const std::vector<std::string>& value_kinds() {
  static const std::vector<std::string> names{"mean", "zero", "follow", "heavy_tailed", "one_huge", "low_rank"};
  return names;
}

/// Names of all regimes, or of all kinds of values.
inline std::vector<std::string> all_of(std::initializer_list<std::vector<std::string>> lists) {
  std::vector<std::string> all;
  for (const auto& list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}
inline std::vector<std::string> all_regimes() {
  return all_of({standard_regimes(), hostile_regimes(), adversarial_regimes()});
}
inline std::vector<std::string> all_value_kinds() { return all_of({value_kinds(), adversarial_values()}); }

/// Throws, with what there is, where a name is none of `known`.
inline void check_name(const std::string& what, std::string_view name, const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), name) != known.end()) return;
  std::string all;
  for (const std::string& one : known) all += (all.empty() ? "" : ", ") + one;
  throw std::invalid_argument("unknown " + what + " '" + std::string(name) + "': use " + all);
}

inline std::vector<float> make_logits(std::string_view regime, std::int64_t n, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  std::vector<float> l(static_cast<std::size_t>(n));
  const auto fill = [&](auto&& draw) {
    for (float& x : l) x = static_cast<float>(draw());
  };
  // `count` distinct places, uniform.
  const auto places = [&](std::int64_t count) {
    std::vector<std::size_t> p;
    while (static_cast<std::int64_t>(p.size()) < std::min(count, n)) {
      const auto i = std::min(static_cast<std::size_t>(uniform(random) * static_cast<double>(n)), l.size() - 1);
      if (std::find(p.begin(), p.end(), i) == p.end()) p.push_back(i);
    }
    return p;
  };
  if (regime == "flat") {
    fill([&] { return 0.5 * normal(random); });
  } else if (regime == "gauss1" || regime == "gauss2" || regime == "gauss3") {
    const double sigma = regime.back() - '0';
    fill([&] { return sigma * normal(random); });
  } else if (regime == "laplace") {
    fill([&] {
      const double u = uniform(random) - 0.5;
      return (u < 0 ? 1.2 : -1.2) * std::log1p(-2 * std::min(std::abs(u), 0.5 - 1e-12));
    });
  } else if (regime == "needle") {
    fill([&] { return normal(random); });
    for (const std::size_t i : places(8)) l[i] += 12;
  } else if (regime == "student") {
    std::student_t_distribution<double> t3(3);
    fill([&] { return std::clamp(t3(random), -20.0, 20.0); });
  } else if (regime == "plateau") {
    fill([&] { return 0.05 * normal(random); });
    for (std::size_t i = 0; i < l.size(); i += 2) l[i] += 3;
  } else if (regime == "spikes") {  // n/1000 tokens of equal, large weight that a pilot sees none or few of
    fill([&] { return 0.1 * normal(random); });
    for (const std::size_t i : places(std::max<std::int64_t>(4, n / 1000))) l[i] = 6;
  } else if (regime == "ties") {  // a quarter of all tokens tie at the top: every k-th rank is a tie
    fill([&] { return normal(random); });
    for (std::size_t i = 0; i < l.size(); i += 4) l[i] = 4;
  } else if (regime == "edge_cluster") {  // heavy tokens just past a recent window of 128
    fill([&] { return normal(random); });
    for (std::int64_t i = std::max<std::int64_t>(0, n - 192); i < std::max<std::int64_t>(0, n - 128); ++i)
      l[static_cast<std::size_t>(i)] += 7;
  } else if (regime == "duplicates") {  // sixteen distinct logits, each shared by n/16 tokens
    fill([&] { return 3 * normal(random); });
    for (std::size_t i = 16; i < l.size(); ++i) l[i] = l[i % 16];
  } else if (regime == "bimodal") {  // one token in twenty holds most of the mass
    fill([&] { return uniform(random) < 0.05 ? 5 + normal(random) : 0.5 * normal(random); });
  } else if (regime == "cauchy") {
    std::cauchy_distribution<double> c(0, 1);
    fill([&] { return std::clamp(c(random), -15.0, 15.0); });
  } else if (regime == "staircase") {  // weight of each octave of ranks is equal: no k is right
    for (std::size_t i = 0; i < l.size(); ++i) l[i] = static_cast<float>(-std::log(static_cast<double>(i) + 1));
    std::shuffle(l.begin(), l.end(), random);
  } else if (regime == "constant") {
    fill([] { return 1.0; });
  } else if (!adversarial_logits(regime, l, random)) {
    check_name("regime", regime, all_regimes());
  }
  return l;
}

inline std::vector<float> make_values(std::string_view kind, const std::vector<float>& logits, std::int64_t dim,
                                      std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  const std::size_t n = logits.size(), d = static_cast<std::size_t>(dim);
  std::vector<float> v(n * d), shared(d), direction(d);
  if (adversarial_value_rows(kind, logits, d, v, random)) return v;
  for (float& x : shared) x = normal(random);
  for (float& x : direction) x = normal(random);
  std::student_t_distribution<float> t2(2);
  check_name("kind of values", kind, all_value_kinds());
  for (std::size_t i = 0; i < n; ++i) {
    const float tail = kind == "heavy_tailed" ? std::abs(t2(random)) : 1.0f;
    const float a = normal(random), b = normal(random);
    for (std::size_t j = 0; j < d; ++j) {
      float x = normal(random);
      if (kind == "follow") x = 0.3f * x + 0.5f * logits[i] * direction[j];
      if (kind == "low_rank") x = a * direction[j] + b * shared[j] + 0.05f * x;
      if (kind == "mean" || kind == "heavy_tailed" || kind == "one_huge" || kind == "follow") x += shared[j];
      v[i * d + j] = tail * x;
    }
  }
  if (kind == "one_huge" && n > 0) {
    const std::size_t i = std::uniform_int_distribution<std::size_t>(0, n - 1)(random);
    for (std::size_t j = 0; j < d; ++j) v[i * d + j] *= 1000;
  }
  return v;
}

/// What the heads of a group have in common.
enum class heads_are : std::uint8_t { independent, alike };  // alike: the first head's logits + 0.1·N(0, 1)

/// Keys whose components along the queries, which are orthogonal, are the logits and whose rest is noise
/// orthogonal to them. heads <= dim.
inline cache make_cache(std::string_view regime, std::string_view values, std::int64_t n, std::int64_t dim,
                        std::uint64_t seed, std::int64_t heads = 1, heads_are kind = heads_are::independent) {
  if (heads < 1 || heads > dim) throw std::invalid_argument("a cache of head size d has 1 to d orthogonal queries");
  std::mt19937_64 random(seed * 0x9E3779B97F4A7C15u + 1);
  std::normal_distribution<float> normal;
  cache c;
  c.n = n;
  c.dim = dim;
  c.heads = heads;
  c.logits = make_logits(regime, n, random);
  const auto d = static_cast<std::size_t>(dim), count = static_cast<std::size_t>(n);
  for (std::int64_t h = 1; h < heads; ++h) {
    std::vector<float> l(c.logits.begin(), c.logits.begin() + n);
    if (kind == heads_are::alike) {
      for (float& x : l) x += 0.1f * normal(random);
    } else {
      l = make_logits(regime, n, random);
    }
    c.logits.insert(c.logits.end(), l.begin(), l.end());
  }
  c.q.resize(static_cast<std::size_t>(heads) * d);
  std::vector<float> units(c.q.size());
  for (std::size_t h = 0; h < static_cast<std::size_t>(heads); ++h) {
    float* unit = units.data() + h * d;
    for (std::size_t j = 0; j < d; ++j) unit[j] = normal(random);
    for (std::size_t g = 0; g < h; ++g) {
      double along = 0;
      for (std::size_t j = 0; j < d; ++j) along += static_cast<double>(unit[j]) * units[g * d + j];
      for (std::size_t j = 0; j < d; ++j) unit[j] -= static_cast<float>(along) * units[g * d + j];
    }
    double norm2 = 0;
    for (std::size_t j = 0; j < d; ++j) norm2 += static_cast<double>(unit[j]) * unit[j];
    for (std::size_t j = 0; j < d; ++j) {
      unit[j] /= static_cast<float>(std::sqrt(norm2));
      c.q[h * d + j] = unit[j] * std::sqrt(static_cast<float>(dim));  // scale·q is then the unit vector
    }
  }
  c.k.resize(count * d);
  std::vector<double> along(static_cast<std::size_t>(heads));
  for (std::size_t i = 0; i < count; ++i) {
    float* row = c.k.data() + i * d;
    for (std::size_t j = 0; j < d; ++j) row[j] = normal(random);
    for (std::size_t h = 0; h < along.size(); ++h) {
      along[h] = 0;
      for (std::size_t j = 0; j < d; ++j) along[h] += static_cast<double>(row[j]) * units[h * d + j];
    }
    for (std::size_t h = 0; h < along.size(); ++h) {
      for (std::size_t j = 0; j < d; ++j)
        row[j] += static_cast<float>(c.logits[h * count + i] - along[h]) * units[h * d + j];
    }
    if (regime == "duplicates" && i >= 16) std::copy_n(c.k.data() + (i % 16) * d, d, row);
    if (regime == "near_duplicates" && i >= 64) {
      for (std::size_t j = 0; j < d; ++j) row[j] = c.k[(i % 64) * d + j] + 0.05f * row[j];
    }
  }
  c.v = make_values(values, std::vector<float>(c.logits.begin(), c.logits.begin() + n), dim, random);
  return c;
}

}  // namespace vattn::synthetic
