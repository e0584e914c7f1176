// Logits and values that are made to hide from a sample: what a first look of m rows and k ranks tends not to see.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace vattn::synthetic {

/// Regimes that aim at the sizes of a first look.
inline const std::vector<std::string>& adversarial_regimes() {
  static const std::vector<std::string> names{"under_rank", "rare_level", "log_uniform", "pareto", "near_duplicates",
                                              "ramp",       "burst",      "lognormal",   "gauss4", "comb"};
  return names;
}

/// Values that aim at them: rare directions, norms against the weights, cancellation, tails, one dimension.
inline const std::vector<std::string>& adversarial_values() {
  static const std::vector<std::string> names{"rare_direction", "rare_far", "anti_norm", "alternating",
                                              "rank_one",       "cauchy",   "opposed"};
  return names;
}

/// Rows of a first look, and tokens so rare that it meets 2.5 of them in the mean, none in one of twelve.
[[nodiscard]] inline double first_look(std::int64_t n) {
  return std::clamp(static_cast<double>(n) / 256, 128.0, 256.0);
}
inline constexpr double rare = 2.5;

/// False: no regime of that name.
inline bool adversarial_logits(std::string_view regime, std::vector<float>& l, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  const auto n = static_cast<std::int64_t>(l.size());
  const double share = rare / first_look(n);
  for (std::int64_t i = 0; i < n; ++i) {
    const double z = normal(random), u = uniform(random), at = static_cast<double>(i) / static_cast<double>(n);
    double x;
    if (regime == "under_rank") {  // as many heavy tokens as are ranked, and rare ones just below them
      x = u < 1.0 / 256 ? 5 + 0.1 * z : u < 1.0 / 256 + share ? 3.0 : 0.1 * z;
    } else if (regime == "rare_level") {  // two levels, and the rarer holds half of the mass
      x = u < share ? -std::log(share) : 0.0;
    } else if (regime == "log_uniform") {  // every scale of weight alike
      x = 14 * (u - 1);
    } else if (regime == "pareto") {  // weights without a mean to speak of: tail index 1.1
      x = std::min(20.0, -std::log1p(-u) / 1.1);
    } else if (regime == "near_duplicates") {  // 64 keys, each n/64 times, a little apart (make_cache)
      x = i < 64 ? 2 * z : static_cast<double>(l[static_cast<std::size_t>(i % 64)]) + 0.02 * z;
    } else if (regime == "ramp") {  // heavier from the first to the last: a window sees only the top
      x = 8 * at;
    } else if (regime == "burst") {  // one passage in fifty matters
      x = z + (at > 1.0 / 3 && at < 1.0 / 3 + 0.02 ? 4 : 0);
    } else if (regime == "lognormal") {
      x = std::min(15.0, std::exp(z));
    } else if (regime == "gauss4") {
      x = 4 * z;
    } else if (regime == "comb") {  // every 61st token, of growing weight
      x = 0.3 * z + (i % 61 == 0 ? 2 + 3 * at : 0);
    } else {
      return false;
    }
    l[static_cast<std::size_t>(i)] = static_cast<float>(x);
  }
  return true;
}

/// v [n, d]. False: no kind of that name.
inline bool adversarial_value_rows(std::string_view kind, const std::vector<float>& l, std::size_t d,
                                   std::vector<float>& v, std::mt19937_64& random) {
  const auto& names = adversarial_values();
  if (std::find(names.begin(), names.end(), kind) == names.end()) return false;
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  std::cauchy_distribution<float> tail;
  std::vector<float> shared(d), direction(d), sorted(l);
  for (float& x : shared) x = normal(random);
  for (float& x : direction) x = normal(random);
  std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2), sorted.end());
  const float middle = sorted.empty() ? 0 : sorted[sorted.size() / 2];
  const double share = rare / first_look(static_cast<std::int64_t>(l.size()));
  for (std::size_t i = 0; i < l.size(); ++i) {
    const bool is_rare = uniform(random) < share;
    const float a = normal(random), sign = i % 2 ? -1.0f : 1.0f,
                factor = std::clamp(std::abs(tail(random)), 0.0f, 1e4f);
    const float against = std::exp(-0.5f * std::clamp(l[i] - middle, -20.0f, 20.0f));
    for (std::size_t j = 0; j < d; ++j) {
      float x = normal(random);
      if (kind == "rare_direction") x = shared[j] + 0.05f * x + (is_rare ? 6 * direction[j] : 0);
      if (kind == "rare_far") x = shared[j] + 0.05f * x + (is_rare ? 15 * direction[j] : 0);
      if (kind == "anti_norm") x = against * (x + shared[j]);
      if (kind == "alternating") x = sign * shared[j] + 0.3f * x;
      if (kind == "rank_one") x = (1 + a) * direction[j];
      if (kind == "cauchy") x = factor * x + shared[j];
      // The mean value lies far from the output: a distance from it says little of what a token moves.
      if (kind == "opposed")
        x = (l[i] < middle ? -3.0f : 1.0f) * shared[j] + 0.05f * x + (is_rare ? 4 * direction[j] : 0);
      v[i * d + j] = x;
    }
  }
  return true;
}

}  // namespace vattn::synthetic
