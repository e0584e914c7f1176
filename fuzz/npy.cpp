// .npy files of any bytes: read, or refused with one line.
#include "support/npy.hpp"

#include <stdexcept>
#include <string_view>

#include "memory_file.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using vattn::fuzz::require;
  const vattn::fuzz::memory_file file({data, size});
  try {
    const vattn::npy::array a = vattn::npy::read(file.path());
    std::size_t elements = 1;
    for (const std::int64_t extent : a.shape) {
      require(extent >= 0, "extents are counts");
      elements *= static_cast<std::size_t>(extent);
    }
    require(elements == a.size() && a.bytes.size() <= size, "the array holds what its shape says and the file has");
  } catch (const std::runtime_error& e) {
    const std::string_view text = e.what();
    require(text.size() > 20 && text.find('\n') == text.npos, "an error is one line");
  }
  return 0;
}
