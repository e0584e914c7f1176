// The command line of `attend`, one argument a line: taken, or refused with a message.
#include "attend/options.hpp"

#include <CLI/CLI.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "require.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using vattn::fuzz::require;
  std::vector<std::string> arguments(1);
  for (const char c : std::string_view(reinterpret_cast<const char*>(data), size)) {
    if (c == '\n') {
      arguments.emplace_back();
    } else if (c != '\0') {
      arguments.back() += c;
    }
  }
  std::reverse(arguments.begin(), arguments.end());  // as CLI11 takes a vector
  vattn::examples::request r;
  CLI::App app;
  try {
    vattn::examples::add_options(app, r);
    app.parse(std::move(arguments));
  } catch (const CLI::Error& e) {
    require(e.what()[0] != '\0', "a refusal says why");
    return 0;
  }
  const vattn::status s = r.settings.validate();
  require(s.ok() || s.message()[0] != '\0', "bad settings say what to do");
  return 0;
}
