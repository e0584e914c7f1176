// What the pages lead to is there, and their code is compiled.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "support/catch.hpp"

namespace {

namespace fs = std::filesystem;

struct block {
  std::string language, heading;  // that of two # above it, as links to it say it; or top
};
struct page {
  std::set<std::string> anchors;
  std::vector<std::string> links;
  std::vector<block> blocks;
};

// GitHub's rule: small letters, spaces become hyphens, of the rest of ASCII letters, digits, - and _ stay.
std::string anchor_of(const std::string& heading) {
  std::string anchor;
  for (const char c : heading) {
    if (c == ' ') anchor += '-';
    const bool ascii = static_cast<unsigned char>(c) < 0x80;
    if (!ascii || std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_')
      anchor += static_cast<char>(ascii ? std::tolower(c) : c);
  }
  return anchor;
}

// Without what stands between backticks.
std::string without_code(const std::string& line) {
  static const std::regex code("`[^`]*`");
  return std::regex_replace(line, code, "``");
}

page read(std::istream& in) {
  static const std::regex heading("^(#+) (.*)$"), link("\\]\\(([^)\\s]+)[^)]*\\)|(?:src|srcset|href)=\"([^\"]+)\"");
  page p;
  std::string above = "top";
  bool open = false;
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("```", 0) == 0) {
      if (!open) p.blocks.push_back({line.substr(3), above});
      open = !open;
      continue;
    }
    if (open) continue;
    if (std::smatch m; std::regex_match(line, m, heading)) {
      const std::string anchor = anchor_of(m[2]);
      if (m[1] == "##") above = anchor;
      std::string one = anchor;
      for (int i = 1; !p.anchors.insert(one).second; ++i) one = anchor + "-" + std::to_string(i);
    }
    line = without_code(line);
    for (auto m = std::sregex_iterator(line.begin(), line.end(), link); m != std::sregex_iterator(); ++m)
      p.links.push_back((*m)[1].matched ? (*m)[1] : (*m)[2]);
  }
  return p;
}

std::string text_of(const fs::path& file) {
  std::ifstream in(file);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

using pages = std::map<fs::path, page>;

pages read_all(const fs::path& root) {
  pages all;
  const auto folder = [&](const fs::path& in) {
    for (const auto& entry : fs::directory_iterator(in)) {
      if (entry.path().extension() != ".md") continue;
      std::ifstream file(entry.path());
      all[entry.path()] = read(file);
    }
  };
  for (const char* in : {"", "docs", "bench"}) folder(root / in);
  for (const auto& entry : fs::directory_iterator(root / "examples")) {
    if (entry.is_directory()) folder(entry.path());
  }
  return all;
}

// The folder of a page's snippets, by the rule of CMakeLists.txt.
std::string snippets_of(const fs::path& page, const fs::path& root) {
  std::string in = fs::relative(page.parent_path(), root).generic_string();
  if (page.stem() != "README" || in == ".") return page.stem().string();
  std::replace(in.begin(), in.end(), '/', '_');
  return in;
}

std::vector<std::string> dead_links(const pages& all, const fs::path& root) {
  std::vector<std::string> dead;
  for (const auto& [path, p] : all) {
    for (const std::string& link : p.links) {
      if (link.find("://") != std::string::npos) continue;
      const auto hash = std::min(link.find('#'), link.size());
      const fs::path to = hash == 0 ? path : (path.parent_path() / link.substr(0, hash)).lexically_normal();
      const auto known = all.find(to);
      const bool wrong_anchor =
          hash < link.size() && (known == all.end() || known->second.anchors.count(link.substr(hash + 1)) == 0);
      if (!fs::exists(to) || wrong_anchor) dead.push_back(fs::relative(path, root).generic_string() + ": " + link);
    }
  }
  return dead;
}

std::vector<std::string> uncompiled(const pages& all, const fs::path& root) {
  std::string host, device;
  for (const auto& entry : fs::directory_iterator(root / "tests/docs")) {
    if (entry.path().extension() == ".cpp") host += text_of(entry.path());
    if (entry.path().extension() == ".cu") device += text_of(entry.path());
  }
  static const std::set<std::string> others{"cmake", "ini", "python", "sh", "text"};
  std::vector<std::string> wrong;
  for (const auto& [path, p] : all) {
    const std::string name = fs::relative(path, root).generic_string();
    for (const block& b : p.blocks) {
      if (others.count(b.language) > 0) continue;
      if (b.language != "cpp" && b.language != "cuda") {
        wrong.push_back(name + ", " + b.heading + ": ```" + b.language +
                        ": say cpp, cuda, cmake, ini, python, sh or text");
        continue;
      }
      const std::string file = "#include \"snippets/" + snippets_of(path, root) + "/" + b.heading + ".hpp\"";
      if ((b.language == "cpp" ? host : device).find(file) == std::string::npos)
        wrong.push_back(name + ", " + b.heading + ": nothing in tests/docs has " + file);
    }
  }
  return wrong;
}

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

}  // namespace

TEST_CASE("links between the pages lead somewhere", "[docs]") {
  const fs::path root = VATTN_SOURCE_DIR;
  const pages all = read_all(root);
  REQUIRE(all.size() > 20);
  CHECK(joined(dead_links(all, root)) == "");
}

TEST_CASE("the pages' code is compiled", "[docs]") {
  const fs::path root = VATTN_SOURCE_DIR;
  CHECK(joined(uncompiled(read_all(root), root)) == "");
}

TEST_CASE("the version is the project's wherever it stands", "[docs]") {
  const fs::path root = VATTN_SOURCE_DIR;
  const std::string version = VATTN_PROJECT_VERSION;
  CHECK(vattn::test::contains(text_of(root / "CITATION.cff"), "\nversion: " + version + "\n"));
  CHECK(vattn::test::contains(text_of(root / "packaging/vcpkg/ports/vattn/vcpkg.json"),
                              "\"version\": \"" + version + "\""));
  CHECK(vattn::test::contains(text_of(root / "CHANGELOG.md"), "\n## " + version + " - "));
}

TEST_CASE("what is looked for in pages would be found", "[docs]") {
  std::istringstream text(
      "# A: `b` and C\n[x](#none) `[y](no.md)` <img src=\"gone.png\">\n## Two\n```cpp\n# no heading\n```\n## Two\n");
  const fs::path root = VATTN_SOURCE_DIR;
  const pages one{{root / "docs/made_up.md", read(text)}};
  const page& p = one.begin()->second;
  CHECK(p.anchors == std::set<std::string>{"a-b-and-c", "two", "two-1"});
  CHECK(dead_links(one, root) == std::vector<std::string>{"docs/made_up.md: #none", "docs/made_up.md: gone.png"});
  CHECK(uncompiled(one, root).size() == 1);
}
