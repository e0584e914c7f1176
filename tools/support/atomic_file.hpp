// A file that appears under its name when it is complete, or not at all.
#pragma once

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <system_error>

namespace vattn::support {

/// Writes to "<path>.partial" and renames it on `commit`, so that neither a crash nor a full disk destroys
/// what was there before. Devices and pipes (/dev/stdout) are written in place. Links are followed.
/// Throws std::runtime_error with one line.
class atomic_file {
 public:
  /// Opens at once: a path that cannot be written fails here, not after hours of work.
  explicit atomic_file(const std::filesystem::path& path) : final_(path) {
    namespace fs = std::filesystem;
    std::error_code ignored;
    if (fs::is_directory(path, ignored)) throw std::runtime_error(path.string() + " is a directory: give a file name");
    if (fs::is_symlink(path, ignored)) final_ = fs::weakly_canonical(path, ignored);
    in_place_ = fs::exists(final_, ignored) && !fs::is_regular_file(final_, ignored);
    written_ = final_;
    if (!in_place_) written_ += ".partial";
    errno = 0;
    stream_.open(written_, std::ios::binary | std::ios::trunc);
    if (!stream_) {
      throw std::runtime_error("cannot write " + path.string() + ": " + reason() +
                               (fs::exists(final_.has_parent_path() ? final_.parent_path() : ".", ignored)
                                    ? ""
                                    : " (make its folder first)"));
    }
  }
  ~atomic_file() {
    if (committed_ || in_place_) return;
    stream_.close();
    std::error_code ignored;
    std::filesystem::remove(written_, ignored);
  }
  atomic_file(const atomic_file&) = delete;
  atomic_file& operator=(const atomic_file&) = delete;

  [[nodiscard]] std::ostream& stream() { return stream_; }

  void write(const void* data, std::size_t bytes) {
    errno = 0;
    if (!stream_.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes))) fail();
  }

  void commit() {
    errno = 0;
    stream_.close();
    if (!stream_) fail();
    if (!in_place_) {
      std::error_code error;
      std::filesystem::rename(written_, final_, error);
      if (error) throw std::runtime_error("cannot write " + final_.string() + ": " + error.message());
    }
    committed_ = true;
  }

 private:
  [[nodiscard]] static std::string reason() { return errno != 0 ? std::strerror(errno) : "the stream failed"; }
  [[noreturn]] void fail() const { throw std::runtime_error("cannot write " + final_.string() + ": " + reason()); }

  std::filesystem::path final_, written_;
  std::ofstream stream_;
  bool in_place_ = false, committed_ = false;
};

}  // namespace vattn::support
