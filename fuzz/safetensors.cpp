// Safetensors files of any bytes, and the JSON in them: read, or refused with one line.
#include "support/safetensors.hpp"

#include <stdexcept>
#include <string_view>
#include <vector>

#include "memory_file.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using vattn::fuzz::require;
  const vattn::fuzz::memory_file file({data, size});
  try {
    vattn::safetensors::file tensors(file.path());
    for (const auto& [name, tensor] : tensors.tensors()) {
      std::size_t elements = 1;
      for (const std::int64_t extent : tensor.shape) elements *= static_cast<std::size_t>(extent);
      require(tensor.begin <= tensor.end && tensor.end <= size, "tensors lie in the file");
      if (elements > size) continue;  // elements of less than a byte are no type that is read
      std::vector<float> values(elements);
      tensors.read(name, values);
    }
  } catch (const std::runtime_error& e) {
    const std::string_view text = e.what();
    require(text.size() > 10 && text.find('\n') == text.npos, "an error is one line");
  }
  return 0;
}
