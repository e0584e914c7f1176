#include <vattn/vattn.hpp>

// An ignored status is an unverified output.
void call(vattn::workspace& memory) {
#if defined(VATTN_CORRECTED)
  static_cast<void>(memory.reserve(100));
#else
  memory.reserve(100);
#endif
}
