// Programs run as a user runs them: a folder of files, a command line, what comes out.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "support/catch.hpp"

namespace vattn::test {

/// A folder of this test's own, gone at its end.
struct folder {
  std::filesystem::path path;
  explicit folder(const std::string& name = "vattn-test") {
    static int count = 0;
    path = std::filesystem::temp_directory_path() /
           (name + "-" + std::to_string(getpid()) + "-" + std::to_string(count++));
    std::filesystem::create_directories(path);
  }
  ~folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  folder(const folder&) = delete;
  folder& operator=(const folder&) = delete;
  [[nodiscard]] std::string operator/(const std::string& name) const { return (path / name).string(); }
};

struct outcome {
  int code = -1;
  std::string text;  // stdout and stderr
};

inline outcome run_program(const std::string& program, const std::string& arguments, bool with_errors = true) {
  std::string command(1, '\'');  // += where GCC 12 warns of an overlap in +
  command += program + "' " + arguments + (with_errors ? " 2>&1" : " 2>/dev/null");
  std::FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  outcome o;
  char buffer[4096];
  while (const std::size_t got = std::fread(buffer, 1, sizeof buffer, pipe)) o.text.append(buffer, got);
  const int status = pclose(pipe);
  if (WIFEXITED(status)) o.code = WEXITSTATUS(status);
  return o;
}

/// Fails with a reason: an exit code of its own (not a signal's), one line, these words in it. `name` begins it.
inline void check_refused(const std::string& program, const std::string& name, const std::string& arguments,
                          const std::string& words) {
  const outcome o = run_program(program, arguments);
  CAPTURE(arguments, o.code, o.text, words);
  CHECK(o.code > 0);
  CHECK(o.code < 100);
  CHECK(contains(o.text, words));
  CHECK(o.text.substr(0, name.size() + 2) == name + ": ");
  CHECK(o.text.find('\n') == o.text.size() - 1);
}

inline void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  REQUIRE(file.good());
}

inline std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file.good());
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace vattn::test
