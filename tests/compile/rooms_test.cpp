// The rooms of the library stand in the order of docs/architecture.md: a header includes what is above it, nothing
// below.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "support/catch.hpp"

namespace {

namespace fs = std::filesystem;

// A room (a folder or a header of the top) -> its place in the table.
using order = std::map<std::string, int>;
// A header -> what it includes, both as paths from vattn/.
using includes = std::map<std::string, std::vector<std::string>>;

// The names in backticks in the first cell of each row of the first table.
order read_order(std::istream& page) {
  order rooms;
  int place = 0;
  for (std::string line; std::getline(page, line);) {
    if (line.rfind("| `", 0) != 0) {
      if (place > 0) break;
      continue;
    }
    const std::string cell = line.substr(1, line.find('|', 1) - 1);
    ++place;
    for (std::size_t at = cell.find('`'); at != std::string::npos; at = cell.find('`', at + 1)) {
      const std::size_t end = cell.find('`', at + 1);
      std::string name = cell.substr(at + 1, end - at - 1);
      if (!name.empty() && name.back() == '/') name.pop_back();
      rooms[name] = place;
      at = end;
    }
  }
  return rooms;
}

includes read_includes(const fs::path& root) {
  includes all;
  for (const auto& entry : fs::recursive_directory_iterator(root)) {
    if (!entry.is_regular_file()) continue;
    std::vector<std::string>& of = all[fs::relative(entry.path(), root).generic_string()];
    std::ifstream in(entry.path());
    const std::string start = "#include \"vattn/";
    for (std::string line; std::getline(in, line);) {
      if (line.rfind(start, 0) == 0) of.push_back(line.substr(start.size(), line.rfind('"') - start.size()));
    }
  }
  return all;
}

std::string room_of(const std::string& header) { return header.substr(0, header.find('/')); }

// Macros are set aside and restored around every header, whatever its room.
bool everywhere(const std::string& header) { return header.rfind("macros_", 0) == 0; }

std::vector<std::string> against(const includes& headers, const order& rooms) {
  std::vector<std::string> wrong;
  for (const auto& [header, included] : headers) {
    if (everywhere(header)) continue;
    const auto here = rooms.find(room_of(header));
    if (here == rooms.end()) {
      wrong.push_back(header + " stands in no room of docs/architecture.md");
      continue;
    }
    for (const std::string& other : included) {
      if (everywhere(other)) continue;
      if (headers.count(other) == 0) wrong.push_back(header + " includes " + other + ", which is not there");
      const auto there = rooms.find(room_of(other));
      if (there != rooms.end() && there->second > here->second)
        wrong.push_back(header + " includes " + other + ", of a room below its own");
    }
  }
  return wrong;
}

// A header that reaches itself, or "".
std::string cycle(const includes& headers) {
  std::map<std::string, int> state;  // 1: being walked, 2: done
  std::string found;
  const auto walk = [&](const auto& self, const std::string& header) -> void {
    if (state[header] == 2 || !found.empty()) return;
    if (state[header] == 1) {
      found = header;
      return;
    }
    state[header] = 1;
    const auto at = headers.find(header);
    if (at != headers.end()) {
      for (const std::string& other : at->second) self(self, other);
    }
    state[header] = 2;
  };
  for (const auto& [header, included] : headers) walk(walk, header);
  return found;
}

}  // namespace

TEST_CASE("no header includes one of a room below its own", "[compile][rooms]") {
  std::ifstream page(VATTN_SOURCE_DIR "/docs/architecture.md");
  REQUIRE(page);
  const order rooms = read_order(page);
  const includes headers = read_includes(VATTN_SOURCE_DIR "/include/vattn");
  REQUIRE(headers.size() > 100);
  for (const std::string& wrong : against(headers, rooms)) FAIL_CHECK(wrong);
  CHECK(cycle(headers).empty());
  // A room of the table that is gone.
  for (const auto& [room, place] : rooms) {
    CAPTURE(room);
    CHECK(std::any_of(headers.begin(), headers.end(), [&, r = room](const auto& h) { return room_of(h.first) == r; }));
  }
}

TEST_CASE("the check of the rooms sees what it is there for", "[compile][rooms]") {
  const order rooms{{"base", 1}, {"kernel", 2}, {"index", 3}};
  CHECK(against({{"base/a.hpp", {}}, {"kernel/b.hpp", {"base/a.hpp"}}}, rooms).empty());
  CHECK(against({{"index/c.hpp", {}}, {"kernel/b.hpp", {"index/c.hpp"}}}, rooms).size() == 1);
  CHECK(against({{"attic/a.hpp", {}}}, rooms).size() == 1);
  CHECK(against({{"kernel/b.hpp", {"base/gone.hpp"}}}, rooms).size() == 1);
  CHECK(!cycle({{"base/a.hpp", {"base/b.hpp"}}, {"base/b.hpp", {"base/a.hpp"}}}).empty());
}
