// Rows of a report: objects with the same keys, the same in JSON and as the columns of CSV.
#pragma once

#include <algorithm>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>

namespace vattn::examples {

using json = nlohmann::ordered_json;

/// One line, whatever the strings hold: what is no UTF-8 is replaced, numbers that are not finite become null.
[[nodiscard]] inline std::string dump(const json& j, int indent = -1) {
  return j.dump(indent, ' ', false, json::error_handler_t::replace);
}

/// A line of CSV: the row's keys, or its values. Lists and objects are left out; null is empty.
inline void write_csv_line(std::ostream& out, const json& row, bool header) {
  bool first = true;
  for (const auto& [key, value] : row.items()) {
    if (value.is_structured()) continue;
    std::string cell = header ? key : value.is_null() ? "" : value.is_string() ? value.get<std::string>() : dump(value);
    std::replace_if(
        cell.begin(), cell.end(), [](char c) { return c == ',' || c == '"' || c == '\n' || c == '\r'; }, ' ');
    out << (first ? "" : ",") << cell;
    first = false;
  }
  out << '\n';
}

}  // namespace vattn::examples
