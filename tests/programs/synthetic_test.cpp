// The main job: every method's rows, error, failures and time, as a table and as CSV.
#include <cmath>
#include <fstream>
#include <map>
#include <sstream>
#include <vector>

#include "support/program.hpp"

using vattn::test::contains;
using vattn::test::outcome;
using vattn::test::run_program;

TEST_CASE("synthetic tells rows, error, failures and time of each method", "[programs][synthetic]") {
  const vattn::test::folder here;
  const std::string file = here / "all.csv";
  const outcome o = run_program(VATTN_SYNTHETIC_PROGRAM,
                                "--n 8192 --trials 4 --repeats 2 --epsilon 0.1 --regimes gauss1 --csv " + file);
  CAPTURE(o.text);
  REQUIRE(o.code == 0);
  CHECK(contains(o.text, "speed-up"));
  std::ifstream csv(file);
  std::string line;
  REQUIRE(std::getline(csv, line));
  std::vector<std::string> columns;
  for (std::istringstream in(line); std::getline(in, line, ',');) columns.push_back(line);
  std::map<std::string, std::map<std::string, std::string>> methods;
  while (std::getline(csv, line)) {
    std::map<std::string, std::string> row;
    std::istringstream in(line);
    for (const std::string& column : columns) std::getline(in, row[column], ',');
    methods[row["method"]] = row;
    CHECK(row["regime"] == "gauss1");
    CHECK(row["values"] == "follow");
    CHECK(std::stod(row["ms"]) > 0);
  }
  CHECK(methods.size() == 7);
  const auto number = [&](const char* method, const char* column) { return std::stod(methods[method][column]); };
  CHECK(number("dense", "density") == 1);
  CHECK(number("dense", "error_p90") < 1e-5);
  CHECK(number("vattention", "density") < 0.2);
  CHECK(number("vattention", "error_mean") < 0.1);
  // As many rows as vattention took, to the row.
  CHECK(std::abs(number("top-k", "density") - number("vattention", "density")) < 1e-3);

  for (const char* wrong :
       {"--regimes nonsense", "--values nonsense", "--epsilon 2", "--repeats 0", "--csv /none/x.csv"})
    CHECK(run_program(VATTN_SYNTHETIC_PROGRAM, wrong).code > 0);
}
