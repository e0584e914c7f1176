#include <cmath>
#include <cstdio>
#include <vattn/vattn.hpp>
#include <vector>

float log_sum_exp_of_ones(vattn::index_t n);

int main() {
  const float got = log_sum_exp_of_ones(100), want = 1 + std::log(100.0f);
  if (std::abs(got - want) < 1e-5f) return 0;
  std::printf("log-sum-exp is %g, not %g\n", static_cast<double>(got), static_cast<double>(want));
  return 1;
}
