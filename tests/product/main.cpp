// The covering array of the product, run: each row a call whose outcome is known beforehand.
//   product_tests                     the array once
//   product_tests --arrays 10         ten of them, of other seeds: for an hour, not for a minute
//   product_tests --case SEED:LEVELS  one row, as a failure prints it
// --seed N: the first array's; --list: rows and no calls; --longest N: rows of no more tokens; --most N: the first N of
// the rows; --policy NAME: rows of that alone.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>
#include <random>

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

// Of the case that is run, for whoever kills the program.
char current[64];
extern "C" void say_which(int signal) {
  const char before[] = "crashed: product_tests --case ";
  static_cast<void>(!write(1, before, sizeof(before) - 1));
  static_cast<void>(!write(1, current, std::strlen(current)));
  static_cast<void>(!write(1, "\n", 1));
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

/// Whether all is well.
bool run(const scenario& s, tally& all) {
  std::snprintf(current, sizeof(current), "%s", name(s).c_str());
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

// What the command line asks for.
struct order {
  unsigned seed = 1, arrays = 1;
  long most = -1, longest = -1;
  bool list = false, first = false;
  std::string policy, one, file;

  /// False: it makes no sense.
  bool read(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string option = argv[i];
      if (option == "--list" || option == "--first") {
        (option == "--list" ? list : first) = true;
        continue;
      }
      if (++i == argc) return false;
      const std::string argument = argv[i];
      const auto number = [&] { return std::strtol(argument.c_str(), nullptr, 10); };
      if (option == "--case") {
        one = argument;
      } else if (option == "--cases") {
        file = argument;
      } else if (option == "--policy") {
        policy = argument;
      } else if (option == "--seed") {
        seed = static_cast<unsigned>(number());
      } else if (option == "--arrays") {
        arrays = static_cast<unsigned>(number());
      } else if (option == "--most") {
        most = number();
      } else if (option == "--longest") {
        longest = number();
      } else {
        return false;
      }
    }
    return true;
  }
};

// Calls that have every reason to sample, of each policy: long caches of logits that are nearly equal, one of values
// that are large, and one whose last look is accepted whatever it shows. Pairs alone leave it to chance whether a
// policy meets one.
std::vector<levels> plain_rows() {
  std::vector<levels> rows;
  const std::vector<family> all = families();
  for (std::size_t p = 0; p < all.size(); ++p) {
    levels row(static_cast<std::size_t>(n_axes), 0);
    row[policy_axis] = static_cast<int>(p);
    row[layout_axis] = all[p] == family::store ? shuffled : contiguous;
    row[size_axis] = 1;  // 64/64
    row[lse_axis] = row[certificate_axis] = 1;
    row[length_axis] = 6, row[heads_axis] = 2;         // 20000, 8/2
    row[rule_axis] = all[p] == family::exact ? 0 : 2;  // whatever share of the rows it takes
    rows.push_back(row);
    row[length_axis] = 7, row[heads_axis] = 0;  // 70000, 1/1
    rows.push_back(row);
    if (all[p] == family::exact) continue;
    row[length_axis] = 6, row[heads_axis] = 2, row[values_axis] = 2;             // 2^13
    row[batch_axis] = all[p] == family::store ? 0 : 2, row[decisions_axis] = 1;  // a store is of one sequence
    rows.push_back(row);
    row[batch_axis] = row[values_axis] = 0;
    if (all[p] == family::index) {  // queries that share a sample
      row[heads_axis] = 1, row[queries_axis] = 2, row[causal_axis] = 1;
      rows.push_back(row);
      row[queries_axis] = row[causal_axis] = 0;
    }
    row[decisions_axis] = 0;
    row[length_axis] = 4, row[heads_axis] = 2;  // 1200
    row[softcap_axis] = all[p] == family::store ? 0 : 1;
    row[promise_axis] = row[scale_axis] = row[rule_axis] = row[regime_axis] = 1;
    rows.push_back(row);
  }
  return rows;
}

// The cases of a file, or the arrays' rows.
std::optional<std::vector<scenario>> cases(const order& o) {
  std::vector<scenario> all;
  const auto add = [&](const std::string& text) {
    const std::optional<scenario> s = named(text);
    if (!s || !valid(*s)) {
      std::printf("no such case: %s\n", text.c_str());
      return false;
    }
    all.push_back(*s);
    return true;
  };
  if (!o.one.empty()) return add(o.one) ? std::optional(all) : std::nullopt;
  if (!o.file.empty()) {
    std::ifstream in(o.file);
    for (std::string word; in >> word;) {
      if (!add(word)) return std::nullopt;
    }
    return all;
  }
  for (unsigned round = 0; round < o.arrays; ++round) {
    std::vector<levels> rows = covering_array(product_problem(families(), o.seed + round)).rows();
    const std::vector<levels> refused = refused_rows(families(), 12, o.seed + round);
    rows.insert(rows.end(), refused.begin(), refused.end());
    const std::vector<levels> plain = plain_rows();
    rows.insert(rows.end(), plain.begin(), plain.end());
    std::mt19937 random(o.seed + round);
    for (const levels& row : rows) {
      scenario s;
      for (std::size_t a = 0; a < n_axes; ++a) s.level[a] = row[a];
      s.seed = static_cast<std::uint32_t>(random() % 1000000);
      const bool short_enough = o.longest < 0 || all_lengths[static_cast<std::size_t>(s[length_axis])] <= o.longest;
      if (short_enough && value(policy_axis, row[policy_axis]).find(o.policy) != std::string::npos) all.push_back(s);
    }
  }
  if (o.most >= 0 && all.size() > static_cast<std::size_t>(o.most)) all.resize(static_cast<std::size_t>(o.most));
  return all;
}

// What is never sampled is not tested.
bool all_sampled(tally& all) {
  bool holds = true;
  for (int a = 0; a < n_axes; ++a) {
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
  return holds;
}

}  // namespace

int main(int argc, char** argv) {
  order o;
  if (!o.read(argc, argv)) {
    std::printf(
        "product_tests [--arrays N] [--seed N] [--longest N] [--most N] [--policy PART OF A NAME] [--first] [--list]\n"
        "product_tests --case SEED:LEVELS | --cases FILE [--first]\n");
    return 2;
  }
  const auto all_cases = cases(o);
  if (!all_cases) return 2;
  if (o.list || !o.one.empty()) {
    for (const scenario& s : *all_cases) std::printf("%s %s\n", name(s).c_str(), text(s).c_str());
  }
  if (o.list) return 0;
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) std::signal(signal, say_which);
  tally all;
  long calls = 0, failures = 0;
  const auto start = std::chrono::steady_clock::now();
  for (const scenario& s : *all_cases) {
    ++calls, failures += !run(s, all);
    if (failures > 0 && o.first) return 1;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const bool whole = o.one.empty() && o.file.empty() && o.most < 0 && o.longest < 0 && o.policy.empty();
  bool holds = judge("target", all.outputs);
  holds = judge("denominator", all.denominators) && holds;
  holds = (!whole || all_sampled(all)) && holds;
  std::printf("%ld calls, %ld wrong, largest error %.3g epsilon, %.1f s\n", calls, failures, all.largest, seconds);
  return failures == 0 && holds ? 0 : 1;
}
