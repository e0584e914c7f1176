#include "product/product.hpp"

#include <array>
#include <charconv>

namespace vattn::product {

namespace {

constexpr std::string_view digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

scenario of(const levels& row) {
  scenario s;
  for (std::size_t a = 0; a < row.size(); ++a) s.level[a] = row[a];
  return s;
}

bool served(const levels& row, const std::vector<family>& policies) {
  const scenario s = of(row);
  // Without a policy only what is so for all of them.
  const int p = row[policy_axis];
  for (const rule& r : rules()) {
    if (p != unset) {
      if (r.applies(s, policies[static_cast<std::size_t>(p)])) return false;
    } else if (r.applies(s, family::exact) && r.applies(s, family::uniform) && r.applies(s, family::store)) {
      return false;
    }
  }
  return true;
}

std::vector<int> sizes_of(const std::vector<family>& policies) {
  std::vector<int> sizes{static_cast<int>(policies.size())};
  for (std::size_t a = 1; a < n_axes; ++a) sizes.push_back(static_cast<int>(axes()[a].values.size()));
  return sizes;
}

// Short sequences and few heads, where nothing asks for others.
double weight(int a, int level) {
  if (a == length_axis) return std::array{0.3, 0.2, 0.3, 0.9, 1.0, 0.45, 0.05, 0.02}[static_cast<std::size_t>(level)];
  if (a == heads_axis) return std::array{1.0, 0.7, 1.0, 0.7, 0.9, 0.15}[static_cast<std::size_t>(level)];
  if (a == certificate_axis || a == lse_axis) return level == 1 ? 1.0 : 0.5;
  if (a == scale_axis) return level == 1 ? 1.0 : 0.7;
  if (a == regime_axis) return level == 0 ? 1.0 : 0.8;
  if (a == values_axis) return level == 0 ? 1.0 : 0.4;
  return 1;
}

}  // namespace

covering_problem product_problem(const std::vector<family>& policies, unsigned seed) {
  return {.sizes = sizes_of(policies),
          .corner = {policy_axis, layout_axis},
          .carried = {causal_axis, window_axis, mask_axis, positions_axis, alibi_axis, softcap_axis, sink_axis,
                      queries_axis, batch_axis, observer_axis, decisions_axis},
          .allowed = [policies](const levels& row) { return served(row, policies); },
          .weight = weight,
          .seed = seed};
}

std::vector<levels> refused_rows(const std::vector<family>& policies, int each, unsigned seed) {
  std::mt19937 random(seed);
  const std::vector<int> sizes = sizes_of(policies);
  std::vector<levels> rows;
  for (const rule& wanted : rules()) {
    if (wanted.v != verdict::refused) continue;
    std::vector<int> left(8, each);
    for (long tries = 0; tries < 400000; ++tries) {
      levels row;
      for (const int size : sizes) row.push_back(static_cast<int>(random() % static_cast<unsigned>(size)));
      row[layout_axis] = shuffled, row[page_axis] = row[norms_axis] = row[batch_axis] = 0;
      const family f = policies[static_cast<std::size_t>(row[policy_axis])];
      int& more = left[static_cast<std::size_t>(f)];
      if (more == 0) continue;
      const scenario s = of(row);
      bool alone = wanted.applies(s, f);
      for (const rule& r : rules()) alone = alone && (&r == &wanted || !r.applies(s, f));
      if (alone) rows.push_back(row), --more;
    }
  }
  return rows;
}

std::string name(const scenario& s) {
  std::string text = std::to_string(s.seed) + ":";
  for (const int level : s.level) text += digits[static_cast<std::size_t>(level)];
  return text;
}

std::optional<scenario> named(const std::string& text) {
  scenario s;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), s.seed);
  if (error != std::errc() || text.substr(static_cast<std::size_t>(end - text.data())).size() != n_axes + 1 ||
      *end != ':')
    return {};
  for (std::size_t a = 0; a < n_axes; ++a) {
    const std::size_t at = digits.find(end[a + 1]);
    if (at == std::string_view::npos) return {};
    s.level[a] = static_cast<int>(at);
  }
  return s;
}

}  // namespace vattn::product
