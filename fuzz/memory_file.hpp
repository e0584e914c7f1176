// Bytes as a file with a path, for readers that take paths. Linux.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <span>
#include <string>

#include "require.hpp"

namespace vattn::fuzz {

class memory_file {
 public:
  explicit memory_file(std::span<const std::uint8_t> content) : descriptor_(::memfd_create("fuzz", 0)) {
    require(descriptor_ >= 0, "there is memory for a file");
    require(::write(descriptor_, content.data(), content.size()) == static_cast<::ssize_t>(content.size()),
            "the file takes its bytes");
  }
  ~memory_file() { ::close(descriptor_); }
  memory_file(const memory_file&) = delete;
  memory_file& operator=(const memory_file&) = delete;
  [[nodiscard]] std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};

}  // namespace vattn::fuzz
