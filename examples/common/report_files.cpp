#include "common/report_files.hpp"

#include <filesystem>
#include <stdexcept>
#include <system_error>

namespace vattn::examples {

extern const std::string_view report_page;  // report.html, as a string that CMake makes

namespace {

constexpr std::string_view title_mark = "{{title}}", data_mark = "{{data}}";

// A path may hold anything.
std::string as_html(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else {
      out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
  }
  return out;
}

// In JSON a < can only stand in a string, where its escape means the same: nothing in the data ends the page's script.
void write_in_script(std::ostream& out, std::string_view json) {
  for (;;) {
    const std::size_t next = json.find('<');
    out << json.substr(0, next);
    if (next == std::string_view::npos) return;
    out << "\\u003c";
    json.remove_prefix(next + 1);
  }
}

}  // namespace

report_files::report_files(const std::string& json_path, const std::string& html_path, std::string_view title) {
  refuse_same_file({{"--json", json_path}, {"--html", html_path}});
  if (!json_path.empty()) json_ = std::make_unique<support::atomic_file>(json_path);
  if (html_path.empty()) return;
  html_ = std::make_unique<support::atomic_file>(html_path);
  const std::size_t title_at = report_page.find(title_mark), title_end = title_at + title_mark.size();
  html_->stream() << report_page.substr(0, title_at) << as_html(title)
                  << report_page.substr(title_end, report_page.find(data_mark) - title_end);
}

void report_files::write(std::string_view json) {
  if (json_) json_->stream() << json;
  if (html_) write_in_script(html_->stream(), json);
}

void report_files::commit() {
  if (html_) html_->stream() << report_page.substr(report_page.find(data_mark) + data_mark.size());
  if (json_) json_->commit();
  if (html_) html_->commit();
}

void refuse_same_file(std::initializer_list<std::pair<const char*, std::string>> outputs) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  for (const auto* a = outputs.begin(); a != outputs.end(); ++a) {
    for (const auto* b = a + 1; b != outputs.end(); ++b) {
      if (a->second.empty() || b->second.empty()) continue;
      if (fs::exists(a->second, ignored) && !fs::is_regular_file(a->second, ignored)) continue;
      if (fs::equivalent(a->second, b->second, ignored) ||
          fs::weakly_canonical(a->second, ignored) == fs::weakly_canonical(b->second, ignored))
        throw std::runtime_error(std::string(a->first) + " and " + b->first + " are the same file: give each its own");
    }
  }
}

}  // namespace vattn::examples
