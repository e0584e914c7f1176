// What the steps of a run showed.
#pragma once

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/reference.hpp"
#include "ggml/tensors.hpp"

namespace vattn::examples {

/// ‖a − b‖ / ‖b‖ of each head; a and b [heads, dv].
[[nodiscard]] inline std::vector<double> relative_errors(std::span<const float> a, std::span<const float> b,
                                                         index_t heads) {
  std::vector<double> errors;
  const auto width = static_cast<index_t>(b.size()) / heads;
  for (index_t h = 0; h < heads; ++h) {
    const auto x = kernel::const_float_map(a.data() + h * width, width).template cast<double>();
    const auto y = kernel::const_float_map(b.data() + h * width, width).template cast<double>();
    errors.push_back((x - y).matrix().norm() / y.matrix().norm());
  }
  return errors;
}

/// One way to attend.
struct contender {
  std::string name;
  std::vector<double> ms;                           ///< of each step
  double reference_error = 0;                       ///< against double precision, the largest of the last step's heads
  double exact_error_max = 0, exact_error_sum = 0;  ///< against vattn's exact attention, all steps and heads
  index_t errors = 0;

  explicit contender(const char* called) : name(called) {}
  void add(const std::vector<double>& of_heads) {
    for (const double e : of_heads) exact_error_max = std::max(exact_error_max, e), exact_error_sum += e, ++errors;
  }
  [[nodiscard]] double min() const { return *std::min_element(ms.begin(), ms.end()); }
  [[nodiscard]] double median() const {
    std::vector<double> sorted = ms;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }
};

struct report {
  contender flash{"ggml_flash_attn_ext"}, exact{"vattn exact"}, sparse{"vattn store"};
  index_t rows = 0;      ///< certificates: steps x heads
  index_t failures = 0;  ///< of them with an error above epsilon
  index_t read_in_full = 0;
  double density = 0, stated = 0;  ///< sums
  double assign_seconds = 0;

  void add(const certificate& c, double error, double epsilon) {
    ++rows;
    failures += error > epsilon;
    read_in_full += c.exact();
    density += c.density(), stated += c.epsilon_achieved;
  }

  void print(const config& settings) const {
    std::printf("%-20s %10s %10s %9s %14s %14s\n", "", "median ms", "min ms", "speed-up", "error", "to exact, max");
    for (const contender* c : {&flash, &exact, &sparse}) {
      std::printf("%-20s %10.3f %10.3f %9.1f %14.2e %14.2e\n", c->name.c_str(), c->median(), c->min(),
                  flash.median() / c->median(), c->reference_error, c->exact_error_max);
    }
    const auto count = static_cast<double>(rows);
    std::printf(
        "vattn store: epsilon %g, delta %g: %lld of %lld above epsilon, mean error %.4f, stated %.4f, rows read %.4f, "
        "read in full %lld\n",
        settings.epsilon, settings.delta, static_cast<long long>(failures), static_cast<long long>(rows),
        sparse.exact_error_sum / count, stated / count, density / count, static_cast<long long>(read_in_full));
  }

  [[nodiscard]] nlohmann::ordered_json json() const {
    const auto count = static_cast<double>(rows);
    nlohmann::ordered_json j;
    for (const contender* c : {&flash, &exact, &sparse}) {
      j["rows"].push_back({{"method", c->name},
                           {"ms_median", c->median()},
                           {"ms_min", c->min()},
                           {"speed_up", flash.median() / c->median()},
                           {"error_to_double", c->reference_error},
                           {"error_to_exact_max", c->exact_error_max},
                           {"error_to_exact_mean", c->exact_error_sum / static_cast<double>(c->errors)},
                           {"ms", c->ms}});
    }
    j["certificates"] = {{"total", rows},
                         {"failures", failures},
                         {"read_in_full", read_in_full},
                         {"density", density / count},
                         {"stated_error", stated / count}};
    j["assign_seconds"] = assign_seconds;
    return j;
  }
};

}  // namespace vattn::examples
