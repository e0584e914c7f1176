// The covering array of the product: its rows, and each row's name.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "product/axes.hpp"
#include "product/covering.hpp"

namespace vattn::product {

/// Which rows are wanted of `policies` policies: every pair of levels, and every triple of policy, layout and what else
/// a call carries.
[[nodiscard]] covering_problem product_problem(const std::vector<family>& policies, unsigned seed);

/// Rows to each of which one rule of refusal applies and nothing else against it, `each` for a rule and family.
[[nodiscard]] std::vector<levels> refused_rows(const std::vector<family>& policies, int each, unsigned seed);

/// SEED:LEVELS, a character for each axis. Empty: no such case.
[[nodiscard]] std::string name(const scenario& s);
[[nodiscard]] std::optional<scenario> named(const std::string& text);

}  // namespace vattn::product
