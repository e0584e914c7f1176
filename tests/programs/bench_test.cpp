// Benchmarks refuse a name that they do not know, before any work, with the names that they do.
#include "support/program.hpp"

using vattn::test::contains;
using vattn::test::outcome;
using vattn::test::run_program;

namespace {

void refuse(const char* program, const std::string& arguments, const std::vector<const char*>& known) {
  const outcome o = run_program(program, arguments);
  CAPTURE(program, arguments, o.code, o.text);
  CHECK(o.code > 0);
  CHECK(contains(o.text, "nonsense"));
  for (const char* name : known) CHECK(contains(o.text, name));
}

}  // namespace

TEST_CASE("benchmarks refuse names that they do not know, with those that they do", "[programs][bench]") {
  refuse(VATTN_ROOFLINE_PROGRAM, "--modes nonsense", {"random_rows", "store", "append_many", "codes_pairs", "none"});
  refuse(VATTN_ROOFLINE_PROGRAM, "--modes store,nonsense", {"uniform"});
  refuse(VATTN_ROOFLINE_PROGRAM, "--regime nonsense", {"gauss1", "plateau"});
  refuse(VATTN_ROOFLINE_PROGRAM, "--dtype nonsense", {"bf16", "q8_0"});
  const outcome o = run_program(VATTN_ROOFLINE_PROGRAM, "--dtype q8_0 --modes store");
  CHECK(o.code > 0);
  CHECK(contains(o.text, "mode store takes no q8_0: use read, random_rows"));
  CHECK(run_program(VATTN_ROOFLINE_PROGRAM, "--modes none,store").code > 0);

  refuse(VATTN_SWEEP_PROGRAM, "--methods nonsense", {"dense", "vattention"});
  refuse(VATTN_SWEEP_PROGRAM, "--regimes nonsense", {"gauss1", "staircase"});
  refuse(VATTN_SWEEP_PROGRAM, "--values nonsense", {"follow"});
  refuse(VATTN_COMPARE_PROGRAM, "--selectors nonsense", {"codes", "quest"});
  refuse(VATTN_COMPARE_PROGRAM, "--selectors codes --regimes gauss1,nonsense", {"gauss1", "staircase"});
  refuse(VATTN_COMPARE_PROGRAM, "--values nonsense", {"follow"});
}
