// The covering array of the product, run: each row a call whose outcome is known beforehand.
//   product_tests                     the array once
//   product_tests --arrays 10         ten of them, of other seeds: for an hour, not for a minute
//   product_tests --case SEED:LEVELS  one row, as a failure prints it
// --seed N: the first array's; --list: rows and no calls; --most N: the first N rows; --policy NAME: rows of that
// alone.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "product/check.hpp"
#include "product/policies.hpp"
#include "product/product.hpp"
#include "stat/binomial.hpp"

namespace {

using namespace vattn::product;

// Chance of a false alarm of each of the tests of a promise.
constexpr double false_alarm = 1e-4;

std::vector<family> families() {
  std::vector<family> f;
  for (const policy_entry& p : policies()) f.push_back(p.kind);
  return f;
}

std::string value(int a, int level) {
  if (a == policy_axis) return policies()[static_cast<std::size_t>(level)].name;
  return axes()[static_cast<std::size_t>(a)].values[static_cast<std::size_t>(level)];
}

std::string text(const scenario& s) {
  std::string line;
  for (int a = 0; a < n_axes; ++a) {
    line += (a ? "; " : "") + std::string(axes()[static_cast<std::size_t>(a)].name) + " " +
            value(a, s[static_cast<axis>(a)]);
  }
  return line;
}

bool valid(const scenario& s) {
  for (int a = 0; a < n_axes; ++a) {
    const std::size_t size = a == policy_axis ? policies().size() : axes()[static_cast<std::size_t>(a)].values.size();
    if (static_cast<std::size_t>(s[static_cast<axis>(a)]) >= size) return false;
  }
  const family f = policies()[static_cast<std::size_t>(s[policy_axis])].kind;
  for (const rule& r : rules()) {
    if (r.v == verdict::unwritten && r.applies(s, f)) {
      std::printf("there is no such call: %s\n", r.text);
      return false;
    }
  }
  return true;
}

/// Whether all is well.
bool run(const scenario& s, tally& all) {
  const policy_entry& policy = policies()[static_cast<std::size_t>(s[policy_axis])];
  call c(s);
  c.returned = vattn::status::error(vattn::errc::invalid_argument, "was not called");
  policy.run(c);
  const std::vector<std::string> wrong = check(c, policy, all);
  if (wrong.empty()) return true;
  std::printf("product_tests --case %s\n  %s\n", name(s).c_str(), text(s).c_str());
  for (const std::string& w : wrong) std::printf("  - %s\n", w.c_str());
  std::fflush(stdout);
  return false;
}

bool judge(const char* what, const std::map<double, tally::promise>& promises) {
  bool holds = true;
  for (const auto& [delta, p] : promises) {
    const double chance = vattn::stat::binomial_upper_tail(p.failures, p.draws, delta);
    std::printf("%s: %ld of %ld failed at delta %g, p = %.3g\n", what, p.failures, p.draws, delta, chance);
    holds = holds && chance > false_alarm;
  }
  return holds;
}

}  // namespace

int main(int argc, char** argv) {
  unsigned seed = 1, arrays = 1;
  long most = -1;
  bool list = false;
  std::string policy;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const char* argument = i + 1 < argc ? argv[i + 1] : nullptr;
    if (option == "--list") {
      list = true;
      continue;
    }
    if (argument == nullptr || (option != "--case" && option != "--seed" && option != "--arrays" &&
                                option != "--most" && option != "--policy")) {
      std::printf("product_tests [--arrays N] [--seed N] [--most N] [--policy NAME] [--list] | --case SEED:LEVELS\n");
      return 2;
    }
    ++i;
    if (option == "--case") {
      const std::optional<scenario> s = named(argument);
      if (!s || !valid(*s)) {
        std::printf("no such case: %s\n", argument);
        return 2;
      }
      tally all;
      std::printf("%s\n", text(*s).c_str());
      return run(*s, all) ? 0 : 1;
    }
    if (option == "--seed") seed = static_cast<unsigned>(std::strtoul(argument, nullptr, 10));
    if (option == "--arrays") arrays = static_cast<unsigned>(std::strtoul(argument, nullptr, 10));
    if (option == "--most") most = std::strtol(argument, nullptr, 10);
    if (option == "--policy") policy = argument;
  }

  tally all;
  long calls = 0, failures = 0;
  const auto start = std::chrono::steady_clock::now();
  for (unsigned round = 0; round < arrays; ++round) {
    const covering_problem problem = product_problem(families(), seed + round);
    std::vector<levels> rows = covering_array(problem).rows();
    const std::vector<levels> refused = refused_rows(families(), 12, seed + round);
    rows.insert(rows.end(), refused.begin(), refused.end());
    std::mt19937 random(seed + round);
    long of_array = 0;
    for (const levels& row : rows) {
      scenario s;
      for (std::size_t a = 0; a < n_axes; ++a) s.level[a] = row[a];
      s.seed = static_cast<std::uint32_t>(random() % 1000000);
      if (!policy.empty() && value(policy_axis, row[policy_axis]).find(policy) == std::string::npos) continue;
      if (most >= 0 && of_array == most) break;
      ++of_array, ++calls;
      if (list) {
        std::printf("%s %s\n", name(s).c_str(), text(s).c_str());
      } else {
        failures += !run(s, all);
      }
    }
  }
  if (list) return 0;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  bool holds = judge("target", all.outputs);
  holds = judge("denominator", all.denominators) && holds;
  // What is never sampled is not tested.
  for (int a = 0; a < n_axes && most < 0 && policy.empty(); ++a) {
    auto& by = all.sampled_by[a];
    by.resize(a == policy_axis ? policies().size() : axes()[static_cast<std::size_t>(a)].values.size());
    for (std::size_t level = 0; level < by.size(); ++level) {
      const bool never = (a == policy_axis && level == 0) || (a == length_axis && level < 3) ||
                         (a == window_axis && level == short_window) || (a == certificate_axis && level == 0);
      if (by[level][0] > 0 || never) continue;
      std::printf("no row was sampled with %s %s\n", axes()[static_cast<std::size_t>(a)].name,
                  value(a, static_cast<int>(level)).c_str());
      holds = false;
    }
  }
  std::printf("%ld calls, %ld wrong, largest error %.3g epsilon, %.1f s\n", calls, failures, all.largest, seconds);
  return failures == 0 && holds ? 0 : 1;
}
