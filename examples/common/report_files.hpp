// The files of a report: its JSON, and a page that shows it.
#pragma once

#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "support/atomic_file.hpp"

namespace vattn::examples {

/// The same JSON goes to `--json` and into the page of `--html`, as it is written: a report that is larger than memory
/// can be written in parts. The page is one file that asks for no other; its script draws from the JSON in it.
/// Either path may be empty. Both appear on `commit`, complete. Throws std::runtime_error with one line.
class report_files {
 public:
  /// Opens at once: a path that cannot be written is known before the work.
  report_files(const std::string& json_path, const std::string& html_path, std::string_view title);

  /// Is there anything to write?
  explicit operator bool() const { return json_ || html_; }
  /// The next part of the JSON, in UTF-8.
  void write(std::string_view json);
  void commit();

 private:
  std::unique_ptr<support::atomic_file> json_, html_;
};

/// Refuses two options, {"--json", path}, that name one file. Devices and empty paths may be named twice.
void refuse_same_file(std::initializer_list<std::pair<const char*, std::string>> outputs);

}  // namespace vattn::examples
