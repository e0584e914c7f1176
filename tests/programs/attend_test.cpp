// attend from outside: good files, files that lie, options that cannot be meant. Writes its own .npy.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>
#include <vattn/kernel/isa.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "support/program.hpp"

namespace {

namespace fs = std::filesystem;
using namespace vattn::test;
using vattn::index_t;
namespace kernel = vattn::kernel;

outcome attend(const std::string& arguments) { return run_program(VATTN_ATTEND_PROGRAM, arguments); }
void check_refused(const std::string& arguments, const std::string& words) {
  vattn::test::check_refused(VATTN_ATTEND_PROGRAM, "attend", arguments, words);
}

// A version 1.0 file with this dictionary, padded as NumPy pads.
std::string npy(std::string dictionary, const std::string& data) {
  while ((10 + dictionary.size() + 1) % 64 != 0) dictionary += ' ';
  dictionary += '\n';
  const auto length = static_cast<std::uint16_t>(dictionary.size());
  std::string bytes = "\x93NUMPY";
  bytes += std::string("\x01\x00", 2);
  bytes += static_cast<char>(length & 0xff);
  bytes += static_cast<char>(length >> 8);
  return bytes + dictionary + data;
}

std::string dictionary(const std::string& descr, const std::string& shape, bool fortran = false) {
  return "{'descr': '" + descr + "', 'fortran_order': " + (fortran ? "True" : "False") + ", 'shape': " + shape + ", }";
}

template <class T>
std::string raw(const std::vector<T>& numbers) {
  std::string bytes(numbers.size() * sizeof(T), '\0');
  if (!numbers.empty()) std::memcpy(bytes.data(), static_cast<const void*>(numbers.data()), bytes.size());
  return bytes;
}

std::string shape_text(const std::vector<index_t>& shape) {
  std::string text = "(";
  for (const index_t extent : shape) text += std::to_string(extent) + ", ";
  return text + ")";
}

template <class T>
void write_array(const std::string& path, const char* descr, const std::vector<index_t>& shape,
                 const std::vector<T>& numbers) {
  write_bytes(path, npy(dictionary(descr, shape_text(shape)), raw(numbers)));
}

struct loaded {
  std::string dictionary;
  std::string data;
  [[nodiscard]] std::vector<float> floats() const {
    std::vector<float> numbers(data.size() / 4);
    std::memcpy(numbers.data(), data.data(), numbers.size() * 4);
    return numbers;
  }
  [[nodiscard]] std::vector<Eigen::half> halves() const {
    std::vector<Eigen::half> numbers(data.size() / 2);
    std::memcpy(static_cast<void*>(numbers.data()), data.data(), numbers.size() * 2);
    return numbers;
  }
};

loaded read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file.good());
  const std::string all((std::istreambuf_iterator<char>(file)), {});
  REQUIRE(all.size() > 10);
  const std::size_t length = static_cast<unsigned char>(all[8]) + 256u * static_cast<unsigned char>(all[9]);
  return {all.substr(10, length), all.substr(10 + length)};
}

// A problem in token-major arrays, as files: [n, Hkv, D], q [T, Hq, Dk].
struct files {
  folder f;
  problem<float> p;
  std::string inputs;

  explicit files(const shape& s, unsigned seed = 1, float spread = 1) : p(s, seed, spread) { write<float>("<f4"); }

  // K and V as T; the problem then holds the rounded numbers.
  template <class T>
  void write(const char* descr) {
    const auto token_major = [&](std::vector<float>& from, index_t width) {
      std::vector<T> to(from.size());
      for (index_t h = 0; h < p.s.kv_heads; ++h) {
        for (index_t i = 0; i < p.s.n; ++i) {
          for (index_t j = 0; j < width; ++j) {
            float& x = from[static_cast<std::size_t>((h * p.s.n + i) * width + j)];
            const T element(x);
            x = static_cast<float>(element);
            to[static_cast<std::size_t>((i * p.s.kv_heads + h) * width + j)] = element;
          }
        }
      }
      return to;
    };
    write_array(f / "q.npy", "<f4", {p.s.queries, p.s.heads, p.s.dk}, p.q);
    write_array(f / "k.npy", descr, {p.s.n, p.s.kv_heads, p.s.dk}, token_major(p.k, p.s.dk));
    write_array(f / "v.npy", descr, {p.s.n, p.s.kv_heads, p.s.dv}, token_major(p.v, p.s.dv));
    inputs = "--q '" + f / "q.npy" + "' --k '" + f / "k.npy" + "' --v '" + f / "v.npy" + "' ";
  }

  [[nodiscard]] std::vector<float> output(const std::string& options) const {
    const outcome o = attend(inputs + "--out '" + f / "out.npy" + "' " + options);
    CAPTURE(options, o.text);
    REQUIRE(o.code == 0);
    return read(f / "out.npy").floats();
  }

  // Worst relative error of a trial's rows.
  [[nodiscard]] double worst(const std::vector<float>& out) const {
    const auto exact = p.exactly();
    double error = 0;
    for (index_t t = 0; t < p.s.queries; ++t) {
      for (index_t h = 0; h < p.s.heads; ++h) {
        const auto want = vattn::reference::attend(exact, 0, t, h);
        error =
            std::max(error, vattn::reference::relative_error(out.data() + (t * p.s.heads + h) * p.s.dv, want.output));
      }
    }
    return error;
  }
};

}  // namespace

TEST_CASE("dense agrees with the reference, whatever the type and the options", "[attend]") {
  files f({.queries = 3, .heads = 6, .kv_heads = 2, .n = 150, .dk = 12, .dv = 10});
  CHECK(f.worst(f.output("--method dense")) < 2e-6);
  CHECK(contains(read(f.f / "out.npy").dictionary, "'<f4'"));
  CHECK(contains(read(f.f / "out.npy").dictionary, "(1, 3, 6, 10)"));
  f.p.options.causal = true;
  f.p.options.sliding_window = 40;
  f.p.options.softcap = 2;
  f.p.options.scale = 0.7f;
  const std::string options = "--method dense --causal --sliding-window 40 --softcap 2 --scale 0.7 ";
  CHECK(f.worst(f.output(options)) < 3e-6);
  f.write<Eigen::half>("<f2");
  CHECK(f.worst(f.output(options)) < 3e-6);
  f.write<Eigen::bfloat16>("<u2");
  CHECK(f.worst(f.output(options + "--kv-dtype bf16")) < 3e-6);
  check_refused(f.inputs + options, "uint16");
}

TEST_CASE("every method and target, with trials, a report and certificates", "[attend]") {
  const files f({.queries = 2, .heads = 4, .kv_heads = 2, .n = 3000, .dk = 8, .dv = 6}, 2);
  for (const std::string method : {"dense", "top-k", "sample", "vattention"}) {
    for (const std::string target : {"denominator", "numerator", "sdpa", "output"}) {
      if (method != "vattention" && target != "output") continue;
      const auto out =
          f.output("--method " + method + " --target " + target +
                   " --sinks 16 --window 16 --epsilon 0.2 --trials 3 --causal --json '" + f.f / "r.json" + "'");
      CAPTURE(method, target);
      REQUIRE(out.size() == 3u * 2 * 4 * 6);
      CHECK(contains(read(f.f / "out.npy").dictionary, "(3, 2, 4, 6)"));
      std::ifstream file(f.f / "r.json");
      const auto report = nlohmann::json::parse(file);
      const auto& summary = report.at("summary");
      for (const char* key : {"density", "error_mean", "error_p90", "failures", "exact_share"})
        CHECK(summary.at(key).is_number());
      const auto& certificates = report.at("certificates");
      REQUIRE(certificates.size() == 24);
      double density = 0;
      for (std::size_t i = 0; i < 24; ++i) {  // trial, token, head
        const auto& c = certificates[i];
        CHECK(c.at("trial") == i / 8);
        CHECK(c.at("token") == i / 4 % 2);
        CHECK(c.at("head") == i % 4);
        CHECK(c.at("n") == 2999 + i / 4 % 2);
        CHECK(c.at("rows").get<index_t>() == c.at("rows_exact").get<index_t>() + c.at("rows_sampled").get<index_t>());
        CHECK(c.at("exact").is_boolean());
        CHECK(c.contains("epsilon_achieved"));
        density += c.at("density").get<double>() / 24;
      }
      CHECK_THAT(summary.at("density").get<double>(), WithinAbs(density, 1e-9));
      if (method == "dense") {
        CHECK_THAT(density, WithinAbs(1, 1e-9));
        CHECK(summary.at("exact_share") == 1);
        CHECK(summary.at("error_mean").get<double>() < 1e-5);
      } else {
        CHECK(density < 0.99);
        CHECK(summary.at("error_mean").get<double>() > 1e-6);
      }
      if (method == "vattention") CHECK(summary.at("error_p90").get<double>() < 0.5);
    }
  }
}

TEST_CASE("attend from a store, which is worth its codes for long caches alone", "[attend]") {
  const auto run = [](const files& f, const std::string& options) {
    const auto out = f.output("--method store --epsilon 0.2 --sinks 16 --window 16 --trials 2 --json '" +
                              f.f / "r.json" + "' " + options);
    std::ifstream json(f.f / "r.json");
    return nlohmann::json::parse(json).at("summary");
  };
  const auto brief = run(files({.queries = 1, .heads = 4, .kv_heads = 2, .n = 300, .dk = 8, .dv = 6}, 5), "");
  CHECK(brief.at("density") == 1);
  CHECK(brief.at("error_mean").get<double>() < 1e-5);
  CHECK(brief.at("target") == "output");

  const files f({.queries = 1, .heads = 4, .kv_heads = 2, .n = 60000, .dk = 16, .dv = 6}, 6);
  const auto summary = run(f, "");
  CAPTURE(summary.dump());
  CHECK(summary.at("density").get<double>() < 0.5);
  CHECK(summary.at("error_mean").get<double>() > 1e-6);
  CHECK(summary.at("error_mean").get<double>() < 0.2);
  for (const kernel::isa level : kernel::isa_levels) {  // the same sample with every instruction set, up to rounding
    if (level > kernel::widest_isa()) continue;
    setenv("VATTN_ISA", to_string(level), 1);
    const auto same = run(f, "");
    unsetenv("VATTN_ISA");
    CAPTURE(to_string(level), same.dump());
    for (const char* number : {"density", "error_mean"})
      CHECK_THAT(same.at(number).get<double>(), WithinRel(summary.at(number).get<double>(), 0.01));
  }
  check_refused(f.inputs + "--method store --sliding-window 50", "a store is attended whole");
  check_refused(f.inputs + "--method store --target sdpa", "--method store goes with --target output");
  check_refused(f.inputs + "--method store --bound bernstein", "--method store goes with --target output");
}

TEST_CASE("attend lists its selectors and runs each with either sampler", "[attend]") {
  const files f({.queries = 1, .heads = 2, .kv_heads = 1, .n = 2500, .dk = 12, .dv = 6}, 4);
  const outcome list = attend("--list");
  REQUIRE(list.code == 0);
  // One layer of the identity: its signatures are the keys' signs.
  std::string weights = "vattnha1";
  const auto put = [&](const auto& x) { weights.append(reinterpret_cast<const char*>(&x), sizeof x); };
  for (int net = 0; net < 2; ++net) {
    for (const std::uint32_t x : {1u, 12u, 12u}) put(x);
    for (int i = 0; i < 144; ++i) put(i % 13 == 0 ? 1.0f : 0.0f);
    for (int i = 0; i < 12; ++i) put(0.0f);
  }
  write_bytes(f.f / "weights.bin", weights);
  const std::string file = "--weights '" + f.f / "weights.bin" + "'";

  const auto run = [&](const std::string& options) {
    const auto out = f.output("--sinks 16 --window 16 --epsilon 0.2 --error-scale rms --trials 2 --json '" +
                              f.f / "r.json" + "' " + options);
    CAPTURE(options);
    CHECK(out.size() == 2u * 2 * 6);
    std::ifstream json(f.f / "r.json");
    return nlohmann::json::parse(json).at("summary");
  };
  std::istringstream lines(list.text);
  std::string line;
  int names = 0;
  while (std::getline(lines, line)) {
    const std::string name = line.substr(0, line.find(' '));
    ++names;
    for (const char* sampler : {"uniform", "importance"}) {
      const auto summary =
          run("--selector " + name + " --sampler " + sampler + (name == "hash-attention" ? " " + file : ""));
      CAPTURE(name, sampler);
      CHECK(summary.at("error_mean").get<double>() < 0.5);
    }
  }
  CHECK(names >= 12);
  for (const char* bits : {"1", "2", "4", "8"}) {
    const auto summary = run(std::string("--selector codes --sampler importance --bits ") + bits);
    CHECK(summary.at("density").get<double>() < 0.6);
    CHECK(summary.at("error_mean").get<double>() < 0.2);
  }
  CHECK(run("--selector codes --sampler importance --share-group").at("error_mean").get<double>() < 0.2);
  CHECK(run("--selector codes --sampler importance --two-phase").at("error_mean").get<double>() < 0.2);
  CHECK(run("--selector codes --bits 8 --sampler importance --bound bernstein").at("failures").get<double>() == 0);

  check_refused(f.inputs + "--selector nonsense", "nonsense");
  check_refused(f.inputs + "--selector codes --bits 3", "bits");
  check_refused(f.inputs + "--selector hash-attention", "--weights");
  check_refused(f.inputs + file, "--weights");
  check_refused(f.inputs + "--selector hash-attention --weights '" + f.f / "q.npy" + "'", "vattnha1");
  check_refused(f.inputs + "--selector hash-attention --weights /nonexistent", "/nonexistent");
  check_refused(f.inputs + "--selector hash-attention " + file + " '" + f.f / "weights.bin" + "'", "give one");
}

TEST_CASE("a seed gives the same draws on any number of threads, another seed others", "[attend]") {
  const files f({.heads = 4, .kv_heads = 1, .n = 3000, .dk = 8, .dv = 4}, 3);
  const std::string options = "--sinks 16 --window 16 --trials 2 ";
  const auto base = f.output(options + "--seed 5");
  CHECK(f.output(options + "--seed 5 --threads 3") == base);
  CHECK(f.output(options + "--seed 7") != base);
  CHECK(std::vector<float>(base.begin(), base.begin() + 16) != std::vector<float>(base.begin() + 16, base.end()));
  // Trial i draws from seed + i.
  const auto next = f.output(options + "--seed 6");
  CHECK(std::equal(base.begin() + 16, base.end(), next.begin()));
}

TEST_CASE("caches at which sampling degenerates are read exactly", "[attend]") {
  SECTION("no tokens") {
    const files f({.heads = 2, .n = 0, .dk = 4, .dv = 3});
    for (const float x : f.output("")) CHECK(x == 0.0f);
  }
  SECTION("fewer tokens than sinks and window") {
    const files f({.n = 200, .dk = 4, .dv = 3});
    CHECK(f.worst(f.output("--sinks 128 --window 128")) < 2e-6);
    CHECK(f.worst(f.output("--sinks 2000000000 --window 2000000000")) < 2e-6);
  }
  SECTION("equal keys, equal values") {
    files f({.n = 3000, .dk = 4, .dv = 3});
    std::fill(f.p.k.begin(), f.p.k.end(), 0.5f);
    f.write<float>("<f4");
    CHECK(f.worst(f.output("--sinks 16 --window 16")) < 0.2);
    std::fill(f.p.v.begin(), f.p.v.end(), -2.0f);
    f.write<float>("<f4");
    CHECK(f.worst(f.output("--sinks 16 --window 16")) < 1e-5);
  }
}

TEST_CASE("files that lie are refused with the reason", "[attend]") {
  const files f({.queries = 1, .heads = 2, .kv_heads = 1, .n = 10, .dk = 4, .dv = 4});
  const std::string bad = f.f / "bad.npy";
  const std::string with_bad_k = "--q '" + f.f / "q.npy" + "' --k '" + bad + "' --v '" + f.f / "v.npy" + "' ";
  const std::string data = raw(std::vector<float>(40, 1.0f));
  const auto refuse = [&](const std::string& bytes, const std::string& words) {
    write_bytes(bad, bytes);
    check_refused(with_bad_k, words);
  };
  const std::string good = npy(dictionary("<f4", "(10, 1, 4)"), data);
  write_bytes(bad, good);
  REQUIRE(attend(with_bad_k).code == 0);  // so that what follows fails for its own reason

  SECTION("no file, an empty one, a folder") {
    check_refused("--q '" + f.f / "q.npy" + "' --k '" + f.f / "none.npy" + "' --v '" + f.f / "v.npy" + "'", "none.npy");
    refuse("", "bad.npy");
    check_refused("--q '" + f.f / "q.npy" + "' --k '" + f.f.path.string() + "' --v '" + f.f / "v.npy" + "'",
                  "attend: ");
  }
  SECTION("cut anywhere") {
    for (const std::size_t length : {std::size_t{1}, std::size_t{5}, std::size_t{7}, std::size_t{9}, std::size_t{10},
                                     std::size_t{40}, std::size_t{127}, good.size() - 1, good.size() - 160}) {
      refuse(good.substr(0, length), "bad.npy");
    }
  }
  SECTION("bytes too many") { refuse(good + "x", "bad.npy"); }
  SECTION("not .npy") {
    refuse("PK\x03\x04" + good, "bad.npy");
    refuse(std::string(1000, '\0'), "bad.npy");
    std::string version = good;
    version[6] = 9;
    refuse(version, "bad.npy");
  }
  SECTION("a header longer than the file") {
    std::string longer = good;
    longer[8] = longer[9] = '\xff';
    refuse(longer, "bad.npy");
    longer[6] = 2;  // four bytes of length
    longer[10] = longer[11] = '\xff';
    refuse(longer, "bad.npy");
  }
  SECTION("shapes that overflow, or are no shapes") {
    for (const char* shape : {"(4294967296, 4294967296, 4)", "(9223372036854775807, 1, 4)", "(-10, 1, 4)",
                              "(99999999999999999999999, 1, 4)", "(4611686018427387904, 1, 4)", "(10, 1, 'x')",
                              "(10, 1, 4", "10", "()", "(10, 1, 4.0)", "(2, 5, 4, 1)", "(40,)"}) {
      CAPTURE(shape);
      refuse(npy(dictionary("<f4", shape), data), "attend: ");
    }
  }
  SECTION("types that are not read") {
    for (const char* descr : {"<i4", "<i8", "|O", ">f4", "<c8", "|S4", "nonsense", ""}) {
      CAPTURE(descr);
      refuse(npy(dictionary(descr, "(10, 1, 4)"), data), "attend: ");
    }
    refuse(npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (10, 1, 4)}", data), "attend: ");
  }
  SECTION("Fortran order") { refuse(npy(dictionary("<f4", "(10, 1, 4)", true), data), "ortran"); }
  SECTION("headers that are no dictionary of the three keys") {
    refuse(npy("", data), "bad.npy");
    refuse(npy("{}", data), "bad.npy");
    refuse(npy("{'descr': '<f4', 'shape': (10, 1, 4)}", data), "bad.npy");
    refuse(npy("__import__('os').system('true')", data), "bad.npy");
    refuse(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10, 1, 4), 'more': 1}", data), "bad.npy");
  }
  SECTION("shapes that do not fit together") {
    refuse(npy(dictionary("<f4", "(5, 2, 4)"), data), "k is [5, 2, 4] but v is [10, 1, 4]");
    refuse(npy(dictionary("<f4", "(10, 1, 2)"), data.substr(0, 80)), "head sizes");
    refuse(npy(dictionary("<f4", "(10, 4)"), data), "three axes");
    write_array(f.f / "q3.npy", "<f4", {1, 3, 4}, std::vector<float>(12));
    write_array(f.f / "kv2.npy", "<f4", {10, 2, 4}, std::vector<float>(80));
    check_refused("--q '" + f.f / "q3.npy" + "' --k '" + f.f / "kv2.npy" + "' --v '" + f.f / "kv2.npy" + "'",
                  "multiple of KV heads");
  }
}

TEST_CASE("NaN and infinity are refused wherever they are", "[attend]") {
  for (const float value : {not_a_number, infinity, -infinity}) {
    for (int where = 0; where < 3; ++where) {
      files f({.heads = 2, .kv_heads = 2, .n = 2000, .dk = 4, .dv = 4});
      (where == 0 ? f.p.q[5] : where == 1 ? f.p.k[4 * 1234] : f.p.v[4 * 1234]) = value;
      f.write<float>("<f4");
      check_refused(f.inputs, where == 0 ? "q[0, 1, 1] is " : where == 1 ? "k[1234, 0, 0] is " : "v[1234, 0, 0] is ");
    }
  }
}

TEST_CASE("options that cannot be meant are refused, and leave no file behind", "[attend]") {
  const files f({.n = 50, .dk = 4, .dv = 4});
  const std::string out = "--out '" + f.f / "never.npy" + "' --json '" + f.f / "never.json" + "' ";
  const auto refuse = [&](const std::string& options, const std::string& words) {
    check_refused(f.inputs + out + options, words);
    CHECK_FALSE(fs::exists(f.f / "never.npy"));
    CHECK_FALSE(fs::exists(f.f / "never.json"));
  };
  for (const char* bad : {"0", "1", "-0.1", "1.5", "nan", "inf"}) {
    refuse(std::string("--epsilon ") + bad, "epsilon is ");
    refuse(std::string("--delta ") + bad, "delta is ");
  }
  refuse("--epsilon", "epsilon");
  refuse("--epsilon abc", "abc");
  refuse("--method magic", "magic");
  refuse("--target everything", "everything");
  refuse("--scale nan", "scale");
  refuse("--softcap -1", "softcap is -1");
  refuse("--sliding-window -2", "sliding_window is -2");
  refuse("--sinks -1", "sinks is -1");
  refuse("--window -1", "window is -1");
  refuse("--heavy 1.5", "heavy");
  refuse("--base -0.5", "base");
  refuse("--trials 0", "trials");
  refuse("--trials -3", "trials");
  refuse("--seed x", "seed");
  refuse("--frobnicate", "frobnicate");
  check_refused("--q '" + f.f / "q.npy" + "'", "--k");
  check_refused("", "--q");
  check_refused(f.inputs + "--out /nonexistent/folder/out.npy", "/nonexistent/folder/out.npy");
  check_refused(f.inputs + "--json /nonexistent/folder/r.json", "/nonexistent/folder/r.json");
  check_refused(f.inputs + "--out '" + f.f / "k.npy" + "'", "overwrite");
  CHECK(attend(f.inputs).code == 0);  // the input is still there
  const outcome help = attend("--help");
  CHECK(help.code == 0);
  for (const char* option : {"--q", "--k", "--v", "--scale", "--causal", "--method", "--target", "--sinks", "--window",
                             "--heavy", "--base", "--epsilon", "--delta", "--seed", "--trials", "--out", "--json"}) {
    CHECK(contains(help.text, option));
  }
}

TEST_CASE("dense on real caches agrees with double precision to 1e-3", "[attend][real]") {
  if (!fs::exists(VATTN_REAL_KV)) {
    WARN("skipped: no real caches at " VATTN_REAL_KV);
    return;
  }
  const folder f;
  for (const std::string task : {"kv", "fwe"}) {
    for (const std::string layer : {"1", "4"}) {
      const std::string base = std::string(VATTN_REAL_KV) + "/" + task + "/layer" + layer + "_";
      const auto q = read(base + "q.npy").floats();
      const auto k = read(base + "k.npy").halves(), v = read(base + "v.npy").halves();
      constexpr index_t n = 16384, heads = 8, kv_heads = 2, d = 64;
      const index_t queries = static_cast<index_t>(q.size()) / (heads * d);
      REQUIRE(k.size() == static_cast<std::size_t>(n * kv_heads * d));

      const outcome o =
          attend("--q '" + base + "q.npy' --k '" + base + "k.npy' --v '" + base +
                 "v.npy' --causal --scale 0.125 --method dense --threads 2 --out '" + f / "out.npy" + "'");
      CAPTURE(task, layer, o.text);
      REQUIRE(o.code == 0);
      const auto out = read(f / "out.npy").floats();
      REQUIRE(out.size() == q.size());
      double worst = 0;
      for (const auto& [t, h] :
           {std::pair<index_t, index_t>{0, 0}, {queries / 2, 3}, {queries - 1, 5}, {queries - 1, 7}}) {
        // One query of one head as a problem of its own; causal, so the last tokens are cut off.
        const index_t seen = n - queries + t + 1;
        vattn::reference::problem p;
        p.n_tokens = seen;
        p.dk = p.dv = d;
        p.scale = 0.125;
        for (index_t j = 0; j < d; ++j)
          p.q.push_back(static_cast<double>(q[static_cast<std::size_t>((t * heads + h) * d + j)]));
        for (index_t i = 0; i < seen; ++i) {
          for (index_t j = 0; j < d; ++j) {
            const auto at = static_cast<std::size_t>((i * kv_heads + h / 4) * d + j);
            p.k.push_back(static_cast<double>(static_cast<float>(k[at])));
            p.v.push_back(static_cast<double>(static_cast<float>(v[at])));
          }
        }
        const auto want = vattn::reference::attend(p, 0, 0, 0);
        worst = std::max(worst, vattn::reference::relative_error(out.data() + (t * heads + h) * d, want.output));
      }
      CAPTURE(worst);
      CHECK(worst < 1e-3);
      CHECK(worst < 1e-5);  // float accumulation does far better than it must
    }
  }
}
