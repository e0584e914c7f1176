// The safetensors reader on good files, and on files that lie.
#include "support/safetensors.hpp"

#include <array>

#include "support/catch.hpp"
#include "support/program.hpp"
#include "support/tiny_llama.hpp"

using namespace vattn::test;
namespace safetensors = vattn::safetensors;

namespace {

using shape = std::vector<std::int64_t>;

template <class T>
std::string raw(const std::vector<T>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(T)};
}

// One line with these words, whatever the file.
template <class Action>
void check_throws(Action&& action, const std::string& words) {
  std::string said;
  try {
    action();
  } catch (const std::runtime_error& e) {
    said = e.what();
  }
  CAPTURE(said, words);
  CHECK(!said.empty());
  CHECK(contains(said, words));
  CHECK(said.find('\n') == std::string::npos);
}

void check_file(const folder& f, const std::string& bytes, const std::string& words) {
  write_bytes(f / "bad.safetensors", bytes);
  check_throws([&] { safetensors::file file(f / "bad.safetensors"); }, words);
}

std::string with(const std::string& header, const std::string& data = "") {
  return safetensors_writer::file(header, data);
}

}  // namespace

TEST_CASE("tensors of the three float types are read as floats", "[safetensors]") {
  const folder f;
  safetensors_writer w;
  w.add("a", "F32", {2, 2}, raw<float>({1, -2, 3.5f, 1e-30f}));
  w.add("b", "F16", {3}, raw<Eigen::half>({Eigen::half(0.5f), Eigen::half(-3.0f), Eigen::half(65504.0f)}));
  w.add("c", "BF16", {1, 2}, raw<Eigen::bfloat16>({Eigen::bfloat16(1.5f), Eigen::bfloat16(-1e20f)}));
  w.add("empty", "F32", {0, 5}, "");
  w.add("ids", "I64", {1}, std::string(8, '\1'));
  write_bytes(f / "x.safetensors", w.bytes());
  safetensors::file file(f / "x.safetensors");
  CHECK(file.tensors().size() == 5);
  CHECK(file.tensors().at("c").shape == shape{1, 2});
  const auto floats = [&](const std::string& name, std::size_t n) {
    std::vector<float> out(n);
    file.read(name, out);
    return out;
  };
  // Not in the order of the file.
  CHECK(floats("c", 2) == std::vector<float>{1.5f, static_cast<float>(Eigen::bfloat16(-1e20f))});
  CHECK(floats("a", 4) == std::vector<float>{1, -2, 3.5f, 1e-30f});
  CHECK(floats("b", 3) == std::vector<float>{0.5f, -3, 65504});
  CHECK(floats("empty", 0).empty());
  check_throws([&] { floats("ids", 1); }, "'ids' is I64: save the model as BF16, F16 or F32");
}

TEST_CASE("files that are no safetensors files are refused", "[safetensors]") {
  const folder f;
  check_throws([&] { safetensors::file file(f / "missing"); }, "no such file");
  check_throws([&] { safetensors::file file(f.path); }, "not a regular file");
  check_file(f, "", "0 bytes are less than a header");
  check_file(f, "1234567", "7 bytes are less than a header");
  check_file(f, safetensors_writer::length(1), "should be 1 bytes, but the file ends after 0");
  check_file(f, safetensors_writer::length(~std::uint64_t{0}) + "{}", "truncated, or no safetensors file");
  check_file(f, safetensors_writer::length(0), "its header is no JSON");
  check_file(f, with("[1, 2]"), "its header is no JSON object");
  check_file(f, with("{\"a\": "), "its header is no JSON");
  check_file(f, with("{} trailing"), "its header is no JSON");
  check_file(f, with("{\"\xff\": 1}"), "its header is no JSON");
  check_file(f, with(std::string(100000, '[')), "its header is no JSON");
  check_file(f, with("{\"a\xe2\x80\xa8\\n\": 1}"), "has no dtype");
}

TEST_CASE("headers that lie about their tensors are refused", "[safetensors]") {
  const folder f;
  const auto entry = [](const std::string& dtype, const std::string& dims, const std::string& offsets) {
    std::string header = R"({"w": {"dtype": ")";
    header += dtype + R"(", "shape": )" + dims + R"(, "data_offsets": )" + offsets + "}}";
    return with(header, std::string(16, 'x'));
  };
  // This one is good: what follows differs from it in one thing each.
  write_bytes(f / "good.safetensors", entry("F32", "[2, 2]", "[0, 16]"));
  safetensors::file good(f / "good.safetensors");
  CHECK(good.tensors().at("w").end == 16);

  check_file(f, entry("F33", "[2, 2]", "[0, 16]"), "unknown dtype 'F33'");
  check_file(f, entry("F32", "[2, 3]", "[0, 16]"), "is [2, 3] of F32, 24 bytes, but its data_offsets hold 16");
  check_file(f, entry("F32", "[2, -2]", "[0, 16]"), "no list of whole numbers");
  check_file(f, entry("F32", "[2.0, 2]", "[0, 16]"), "no list of whole numbers");
  check_file(f, entry("F32", "4", "[0, 16]"), "no list of whole numbers");
  check_file(f, entry("F32", "[4294967296, 4294967296]", "[0, 16]"), "more than 2^63 bytes");
  check_file(f, entry("F32", "[9223372036854775807]", "[0, 16]"), "more than 2^63 bytes");
  check_file(f, entry("F32", "[18446744073709551615, 0]", "[0, 16]"), "more than 2^63 bytes");
  check_file(f, entry("F32", "[2, 2]", "[16, 0]"), "ends before it begins");
  check_file(f, entry("F32", "[2, 2]", "[-16, 0]"), "not two whole numbers");
  check_file(f, entry("F32", "[2, 2]", "[0]"), "not two whole numbers");
  check_file(f, entry("F32", "[2, 2]", "[0, 16, 32]"), "not two whole numbers");
  check_file(f, entry("F32", "[2, 2]", "[16, 32]"), "ends at byte 32 of the data, which has 16");
  check_file(f, entry("F32", "[2, 2]", "[18446744073709551600, 18446744073709551615]"), "data_offsets hold 15");
  check_file(f, entry("F32", "[1, 2]", "[0, 8]"), "8 bytes after the last tensor");
  check_file(f, entry("F32", "[1, 2]", "[8, 16]"), "a hole before 'w'");
  check_file(f, with(R"({"w": 3})"), "'w' has no dtype");
  check_file(f, with(R"({"w": {"dtype": 3, "shape": [], "data_offsets": [0, 0]}})"), "dtype that is no string");
  check_file(f, with(R"({"w": {"dtype": "F32", "shape": [1]}})"), "has no data_offsets");
  const std::string part = R"({"dtype": "F32", "shape": [2], "data_offsets": )";
  check_file(f, with("{\"a\": " + part + "[0, 8]}, \"b\": " + part + "[4, 12]}}", std::string(12, 'x')), "overlaps");
  check_file(f, with("{\"a\": " + part + "[0, 8]}, \"a\": " + part + "[8, 16]}}", std::string(16, 'x')), "'a' twice");
}

TEST_CASE("folders: one file or shards, and what is wrong with them", "[safetensors]") {
  const folder f;
  check_throws([&] { safetensors::folder m(f.path); }, "neither model.safetensors nor");
  const tiny_llama model;
  model.write(f);
  {
    safetensors::folder m(f.path);
    CHECK(m.contains("model.norm.weight"));
    m.require("model.norm.weight", shape{24});
    check_throws([&] { m.require("model.norm.weight", shape{25}); }, "'model.norm.weight' is [24], but config.json");
    check_throws([&] { m.require("nothing", shape{25}); }, "the tensor 'nothing' is missing");
  }
  model.write(f, 3);
  {
    safetensors::folder m(f.path);
    m.require("model.layers.1.self_attn.k_proj.weight", shape{16, 24});
    std::vector<float> k(16 * 24);
    m.read("model.layers.1.self_attn.k_proj.weight", k);
    CHECK(k[5] == static_cast<float>(model.m.layers[1].k[5]));
  }
  const std::string index = f / "model.safetensors.index.json", good = read_bytes(index);
  const auto bad = [&](const std::string& text, const std::string& words) {
    write_bytes(index, text);
    check_throws([&] { safetensors::folder m(f.path); }, words);
  };
  bad("{}", "no weight_map");
  bad("{", "no JSON");
  bad(R"({"weight_map": {"a": 1}})", "is no file name");
  for (const char* name : {"../x.safetensors", "/etc/passwd", "", ".hidden", "a\\\\b"})
    bad(std::string(R"({"weight_map": {"a": ")") + name + "\"}}", "no plain file name");
  bad(R"({"weight_map": {"a": "model-9.safetensors"}})", "model-9.safetensors: no such file");
  bad(R"({"weight_map": {"a": "model-0.safetensors"}})", "'a' should be in it, says the index, and is not");
  std::filesystem::copy_file(f / "model-0.safetensors", f / "model-8.safetensors");
  bad(R"({"weight_map": {"model.embed_tokens.weight": "model-0.safetensors", "b": "model-8.safetensors"}})",
      "is in another shard too");
  write_bytes(index, good);
  safetensors::folder m(f.path);
}
