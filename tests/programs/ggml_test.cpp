// The example in a ggml graph, run as a user runs it. Built where ggml is found.
#include <fstream>
#include <nlohmann/json.hpp>

#include "support/program.hpp"

namespace {

using namespace vattn::test;

nlohmann::json measured(const std::string& arguments) {
  const folder f;
  const outcome o = run_program(VATTN_GGML_PROGRAM, arguments + " --json '" + f / "report.json" + "'");
  CAPTURE(arguments, o.text);
  REQUIRE(o.code == 0);
  return nlohmann::json::parse(read_bytes(f / "report.json"));
}

}  // namespace

TEST_CASE("a ggml graph with our ops gives ggml's result", "[programs][ggml]") {
  for (const char* type : {"f32", "f16", "bf16"}) {
    const auto j =
        measured("--n 4096 --heads 8/2 --dim 64 --epsilon 0.2 --steps 5 --threads 2 --type " + std::string(type));
    CAPTURE(type);
    const auto& flash = j["rows"][0];
    const auto& exact = j["rows"][1];
    CHECK(flash["method"] == "ggml_flash_attn_ext");
    // ggml adds up values of half precision in half precision.
    CHECK(flash["error_to_double"].get<double>() < (std::string(type) == "f32" ? 1e-4 : 0.1));
    CHECK(exact["error_to_double"].get<double>() < 1e-5);
    // So few rows are read in full, or the promise is kept.
    CHECK(j["rows"][2]["error_to_double"].get<double>() < 0.4);
    CHECK(j["certificates"]["total"] == 40);
  }
}

TEST_CASE("a long cache is attended from its store, within the certificate", "[programs][ggml]") {
  const auto j = measured("--n 32768 --heads 8/2 --dim 64 --epsilon 0.2 --steps 20");
  const auto& c = j["certificates"];
  CHECK(c["read_in_full"] == 0);
  CHECK(c["density"].get<double>() < 0.1);
  CHECK(c["total"] == 160);
  CHECK(c["failures"].get<int>() < 32);  // at δ = 0.1: more with probability 1e-4
  CHECK(j["rows"][2]["error_to_exact_mean"].get<double>() > 1e-3);
  CHECK(j["rows"][1]["error_to_double"].get<double>() < 1e-5);
}

TEST_CASE("the number of ggml's threads does not change our result", "[programs][ggml]") {
  const std::string what = "--n 16384 --heads 6/3 --dim 32 --epsilon 0.2 --steps 3 --threads ";
  const auto one = measured(what + "1"), three = measured(what + "3");
  for (const std::size_t row : {std::size_t{1}, std::size_t{2}})
    CHECK(one["rows"][row]["error_to_double"] == three["rows"][row]["error_to_double"]);
  CHECK(one["certificates"]["density"] == three["certificates"]["density"]);
}

TEST_CASE("wrong options of ggml_attention are refused", "[programs][ggml]") {
  const auto refused = [](const std::string& arguments, const std::string& words) {
    check_refused(VATTN_GGML_PROGRAM, "ggml_attention", arguments, words);
  };
  refused("--heads 7/2", "a multiple of the second");
  refused("--heads 8", "such as 32/8");
  refused("--heads 8/0", "such as 32/8");
  refused("--type q8_0", "'q8_0' is none of bf16, f16, f32");
  refused("--regime none", "'none' is none of");
  refused("--n 0", "--n");
  refused("--epsilon 2 --n 100", "epsilon is 2");
  refused("--json /nowhere/at/all --n 100", "cannot write");
  refused("--threads 0", "--threads");
}
