// What must hold, said and then aborted on: a fuzzer takes that for a finding.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace vattn::fuzz {

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz: does not hold: %s\n", what);
  std::abort();
}

}  // namespace vattn::fuzz
