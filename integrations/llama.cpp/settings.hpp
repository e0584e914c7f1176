// What the environment says: VATTN_MODE, VATTN_EPSILON, VATTN_DELTA, VATTN_AUDIT, VATTN_REPORT.
#pragma once

#include <string>

namespace vattn_ggml {

enum class run_mode { verified, exact, off };

struct settings {
  run_mode mode = run_mode::verified;
  double epsilon = 0.1;  ///< VATTN_EPSILON, in (0, 1)
  double delta = 0.1;    ///< VATTN_DELTA, in (0, 1)
  double audit = 0;      ///< VATTN_AUDIT: share of the outputs that is compared with exact attention, in [0, 1]
  std::string report;    ///< VATTN_REPORT: "stderr", a file, or empty for none
};

/// Reads them. A variable that is empty is as one that is not set. False: one has a value that cannot be meant, and
/// `problem` is a line that says which, and what to give.
[[nodiscard]] bool read_settings(settings& to, std::string& problem);

/// One line: what is promised.
[[nodiscard]] std::string promise_of(const settings& s);

}  // namespace vattn_ggml
