// llama from outside: made-up models against a slow double-precision forward, a trained one where it is there, and
// models, prompts and options that cannot be meant.
#include "reference/llama.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/npy.hpp"
#include "support/program.hpp"
#include "support/tiny_llama.hpp"

namespace {

namespace fs = std::filesystem;
using namespace vattn::test;
using nlohmann::json;

outcome llama(const std::string& arguments) { return run_program(VATTN_LLAMA_PROGRAM, arguments); }
void check_refused(const std::string& arguments, const std::string& words) {
  vattn::test::check_refused(VATTN_LLAMA_PROGRAM, "llama", arguments, words);
}
std::string option(const std::string& name, const std::string& value) {
  std::string text = "--" + name;
  text += " '" + value + "' ";
  return text;
}

std::string random_text(std::size_t n, unsigned seed = 7, int values = 256) {
  std::mt19937 random(seed);
  std::string text(n, '\0');
  for (char& c : text) c = static_cast<char>(random() % static_cast<unsigned>(values));
  return text;
}
std::vector<std::int32_t> bytes_of(const std::string& text) {
  std::vector<std::int32_t> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}
// [[question, answer], ...]: in braces alone two strings would be a key and its value.
json pairs(const std::vector<std::vector<json>>& all) {
  json list = json::array();
  for (const auto& one : all) list.push_back(json(one));
  return list;
}
std::int32_t argmax(const std::vector<double>& x) {
  return static_cast<std::int32_t>(std::max_element(x.begin(), x.end()) - x.begin());
}

// A model in a folder, with a text beside it.
struct files {
  folder f{"vattn-llama"};
  tiny_llama model;
  std::string text, inputs;

  template <class... Arguments>
  explicit files(std::size_t n, Arguments... arguments) : model(arguments...), text(random_text(n)) {
    model.write(f);
    write_bytes(f / "text", text);
    inputs = option("model", f.path.string());
  }
  // The report of a run that must go well.
  [[nodiscard]] json report(const std::string& options) const {
    const outcome o = llama(inputs + option("json", f / "r.json") + options);
    CAPTURE(options, o.text);
    REQUIRE(o.code == 0);
    return json::parse(read_bytes(f / "r.json"));
  }
  [[nodiscard]] double bits(const std::string& options) const {
    return report(option("text", f / "text") + options).at("rows").at(0).at("bits_per_byte").get<double>();
  }
  [[nodiscard]] double expected_bits(std::size_t context, std::size_t bytes) const {
    const auto logits = vattn::reference::logits(model.m, bytes_of(text.substr(0, context + bytes)));
    double bits = 0;
    for (std::size_t t = context; t < context + bytes; ++t) {
      double sum = 0;
      for (const double x : logits[t]) sum += std::exp(x);
      bits += std::log2(sum) - logits[t][static_cast<unsigned char>(text[t + 1])] / std::log(2.0);
    }
    return bits / static_cast<double>(bytes);
  }
};

double worst_logit(const files& f, std::size_t n) {
  const outcome o =
      llama(f.inputs + option("text", f.f / "text") + option("out", f.f / "l.npy") + "--logits " + std::to_string(n));
  CAPTURE(o.text);
  REQUIRE(o.code == 0);
  const auto got = vattn::npy::read(f.f / "l.npy");
  const auto want = vattn::reference::logits(f.model.m, bytes_of(f.text.substr(0, n)));
  REQUIRE(got.shape == std::vector<std::int64_t>{static_cast<std::int64_t>(n), 256});
  double worst = 0;
  for (std::size_t t = 0; t < n; ++t) {
    for (std::size_t i = 0; i < 256; ++i)
      worst = std::max(worst, std::abs(static_cast<double>(got.as<float>()[t * 256 + i]) - want[t][i]));
  }
  return worst;
}

}  // namespace

TEST_CASE("logits of a prefill agree with the reference, whatever the model's form", "[llama]") {
  // 300 tokens: three blocks, the last one short.
  CHECK(worst_logit(files(300), 300) < 1e-4);
  CHECK(worst_logit(files(300, "BF16", false), 140) < 1e-4);
  CHECK(worst_logit(files(300, "F16", true, true), 140) < 1e-4);
  CHECK(worst_logit(files(300), 1) < 1e-4);

  files f(300, "F32", false, true);
  fs::remove(f.f / "model.safetensors");
  f.model.write(f.f, 3);
  CHECK(worst_logit(f, 130) < 1e-4);
  // The parts that the reference must not miss: another scaling, or none, gives other logits.
  f.model.m.scaled = false;
  CHECK(worst_logit(f, 130) > 1e-2);
}

TEST_CASE("rope_parameters and defaults of config.json", "[llama]") {
  files f(200);
  f.model.config.erase("rope_theta");
  f.model.config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 700.0}};
  f.model.config["rope_scaling"] = nullptr;
  f.model.m.rope_theta = 700;
  write_bytes(f.f / "config.json", f.model.config.dump());
  CHECK(worst_logit(f, 130) < 1e-4);
}

TEST_CASE("decoding dense agrees with the reference", "[llama]") {
  const files f(200);
  const double want = f.expected_bits(150, 40);
  const std::string options = "--context 150 --bytes 40 --method dense ";
  CHECK_THAT(f.bits(options + "--cache-type f32"), WithinAbs(want, 1e-4));
  const double half = f.bits(options), brain = f.bits(options + "--cache-type bf16");
  CHECK_THAT(half, WithinAbs(want, 0.02));
  CHECK_THAT(brain, WithinAbs(want, 0.1));
  CHECK(half != brain);  // the type is obeyed
  // A context of one token: nearly everything is decoded.
  CHECK_THAT(f.bits("--context 1 --bytes 100 --method dense --cache-type f32"),
             WithinAbs(f.expected_bits(1, 100), 1e-4));
}

TEST_CASE("every method on one prefill, audited", "[llama]") {
  const files f(2100);
  const json report =
      f.report(option("text", f.f / "text") + option("csv", f.f / "r.csv") +
               "--context 2000 --bytes 30 --method dense,vattention,top-k,sample,sinks-window,magic-pig,store "
               "--epsilon 0.05,0.3 --density 0.05,0.3 --audit --cache-type f32");
  const auto& rows = report.at("rows");
  REQUIRE(rows.size() == 12);
  const double dense = rows[0].at("bits_per_byte").get<double>();
  CHECK_THAT(dense, WithinAbs(f.expected_bits(2000, 30), 1e-4));
  CHECK(rows[0].at("density") == 1.0);
  CHECK(rows[0].at("error_mean").get<double>() < 1e-5);
  CHECK(rows[0].at("epsilon").is_null());
  double last = 2;
  for (const std::size_t i : {1u, 2u}) {
    const auto& r = rows[i];
    CAPTURE(r.dump());
    CHECK(r.at("method") == "vattention");
    CHECK(r.at("epsilon") == (i == 1 ? 0.05 : 0.3));
    CHECK(r.at("violations").get<double>() <= 0.1);
    CHECK(r.at("worst_layer_violations").get<double>() <= 0.15);
    CHECK(r.at("error_mean").get<double>() < r.at("epsilon").get<double>());
    CHECK_THAT(r.at("bits_per_byte").get<double>(), WithinAbs(dense, 0.3));
    CHECK(r.at("density").get<double>() < last);
    last = r.at("density").get<double>();
    CHECK(r.at("layers").size() == 2);
    CHECK(r.at("layers")[1].at("heads").size() == 4);
  }
  CHECK(last < 0.5);
  for (std::size_t i = 3; i < 9; ++i) {  // to the row, but for the tokens that decoding adds
    CAPTURE(rows[i].dump());
    CHECK_THAT(rows[i].at("density").get<double>(), WithinAbs(i % 2 == 1 ? 0.05 : 0.3, 0.004));
    CHECK(rows[i].at("violations").is_null());
    CHECK(rows[i].at("error_mean").get<double>() > 1e-3);
  }
  CHECK(rows[9].at("method") == "magic-pig");
  for (const std::size_t i : {10u, 11u}) {  // so short that it reads all rows, in an order of its own
    const auto& r = rows[i];
    CAPTURE(r.dump());
    CHECK(r.at("method") == "store");
    CHECK(r.at("epsilon") == (i == 10 ? 0.05 : 0.3));
    CHECK(r.at("density") == 1.0);
    CHECK(r.at("violations") == 0.0);
    CHECK(r.at("error_mean").get<double>() < 1e-5);
    CHECK_THAT(r.at("bits_per_byte").get<double>(), WithinAbs(dense, 1e-4));
  }
  const std::string csv = read_bytes(f.f / "r.csv");
  CHECK(std::count(csv.begin(), csv.end(), '\n') == 13);
  CHECK(contains(csv, "\ntext,2000,vattention,0.05,,0.1,"));
}

TEST_CASE("draws follow the seed and nothing else", "[llama]") {
  const files f(2100);
  const std::string options = "--context 2000 --bytes 20 --epsilon 0.3 ";
  const double once = f.bits(options + "--threads 3");
  CHECK(f.bits(options + "--threads 1") == once);
  CHECK(f.bits(options + "--seed 5") != once);
  for (const std::string method : {"--selector quest", "--selector exact", "--share-group", "--two-phase --bits 4",
                                   "--sampler uniform", "--selector exact --sampler uniform --target denominator"}) {
    CAPTURE(method);
    CHECK_THAT(f.bits(options + method), WithinAbs(once, 0.5));
  }
}

TEST_CASE("answers count when every byte was the most likely one", "[llama]") {
  files f(400);
  const auto& m = f.model.m;
  // The model's own answers, and one byte of them changed.
  const std::string context = f.text.substr(0, 200);
  std::string fed = context;
  json qa = json::array();
  for (int q = 0; q < 4; ++q) {
    const std::string question = f.text.substr(static_cast<std::size_t>(210 + 10 * q), 3);
    fed += question;
    std::string answer;
    for (int i = 0; i < 3; ++i) {
      answer += static_cast<char>(argmax(vattn::reference::logits(m, bytes_of(fed + answer)).back()));
    }
    if (q == 1) answer[2] = static_cast<char>(answer[2] + 1);
    if (q == 2) answer[0] = static_cast<char>(answer[0] + 1);
    fed += answer;
    qa.push_back(json::array({question, answer}));
  }
  // Bytes above 127 do not survive JSON: as token ids.
  const auto ids = [](const std::string& text) {
    std::string out;
    for (const std::int32_t b : bytes_of(text)) out += std::to_string(b) + " ";
    return out;
  };
  for (auto& pair : qa) pair = json::array({ids(pair[0].get<std::string>()), ids(pair[1].get<std::string>())});
  json line = {{"task", "t"}, {"length", 200}, {"id", "one"}, {"context", ids(context)}, {"qa", qa}};
  std::string prompts = line.dump() + "\n\n";
  line["length"] = 100;
  prompts += line.dump() + "\n";
  line["task"] = "other";
  prompts += line.dump();
  write_bytes(f.f / "p.jsonl", prompts);
  const std::string options = option("prompts", f.f / "p.jsonl") + "--ids --method dense ";
  const json all = f.report(options);
  REQUIRE(all.at("rows").size() == 3);
  for (const auto& r : all.at("rows")) {
    CHECK(r.at("correct") == 2);
    CHECK(r.at("total") == 4);
    CHECK(r.at("accuracy") == 0.5);
  }
  CHECK(f.report(options + "--task other").at("rows").size() == 1);
  CHECK(f.report(options + "--length 100").at("rows").size() == 2);
  CHECK(f.report(options + "--task t --length 100").at("rows").size() == 1);
  check_refused(f.inputs + options + "--task nothing", "no prompt of the task and length");
}

TEST_CASE("prefilled caches are kept, checked and used", "[llama]") {
  const files f(400);
  fs::create_directory(f.f / "kept");
  const std::string options = option("cache-dir", f.f / "kept") + "--context 300 --bytes 50 --method dense ";
  const double fresh = f.bits(options);
  std::vector<fs::path> kept(fs::directory_iterator(f.f / "kept"), fs::directory_iterator{});
  REQUIRE(kept.size() == 1);
  const std::string bytes = read_bytes(kept[0].string());
  const auto outcome_of = [&] { return llama(f.inputs + option("text", f.f / "text") + options); };
  CHECK(f.bits(options) == fresh);
  CHECK(!contains(outcome_of().text, "made again"));

  // A damaged one is said to be, and replaced.
  const auto damage = [&](const std::string& with) {
    write_bytes(kept[0].string(), with);
    const outcome o = outcome_of();
    CAPTURE(o.text);
    CHECK(o.code == 0);
    CHECK(contains(o.text, "made again"));
    CHECK(read_bytes(kept[0].string()).size() == bytes.size());
    CHECK(f.bits(options) == fresh);
  };
  damage("");
  damage(bytes.substr(0, bytes.size() / 2));
  damage(bytes + "x");
  damage("something else");
  std::string flipped = bytes;
  flipped[bytes.size() / 2] = static_cast<char>(flipped[bytes.size() / 2] ^ 1);
  damage(flipped);
  std::string huge = bytes;  // a length that lies
  std::memset(huge.data() + 8, 0xff, 8);
  damage(huge);

  // Other types have files of their own.
  CHECK(f.bits(options + "--cache-type bf16") != fresh);
  kept.assign(fs::directory_iterator(f.f / "kept"), fs::directory_iterator{});
  CHECK(kept.size() == 2);
  check_refused(f.inputs + option("text", f.f / "text") + "--bytes 5 --cache-dir /nonexistent", "make it first");
}

TEST_CASE("free text, and token ids of another vocabulary", "[llama]") {
  const files f(100, "F32", true, false, std::size_t{100});
  std::vector<std::int32_t> tokens{5, 17, 99, 0, 42};
  const outcome o =
      run_program(VATTN_LLAMA_PROGRAM,
                  f.inputs + "--ids --prompt '5 17,99  0 42' --generate 6 --method dense --cache-type f32", false);
  REQUIRE(o.code == 0);
  std::string want;
  for (int i = 0; i < 6; ++i) {
    tokens.push_back(argmax(vattn::reference::logits(f.model.m, tokens).back()));
    want += std::to_string(tokens.back()) + " ";
  }
  CHECK(o.text == want + "\n");
  check_refused(f.inputs + "--prompt hello --generate 6", "vocabulary of 100");
  for (const std::string bad : {"100", "-1", "1 x", "99999999999999999999", "1.5"})
    check_refused(f.inputs + "--generate 2 --ids " + option("prompt", "3 " + bad), "is no token id");
  check_refused(f.inputs + "--generate 2 --ids --prompt ' , '", "--prompt is empty");
}

TEST_CASE("configurations that cannot be run are refused", "[llama]") {
  files f(20);
  const json good = f.model.config;
  const std::string options = f.inputs + option("text", f.f / "text") + "--context 5 --bytes 5";
  const auto refused = [&](const char* key, const json& value, const std::string& words) {
    json bad = good;
    bad[key] = value;
    write_bytes(f.f / "config.json", bad.dump());
    check_refused(options, words);
  };
  refused("model_type", "gpt2", "model_type is 'gpt2'");
  refused("hidden_act", "gelu", "hidden_act is 'gelu'");
  refused("attention_bias", true, "attention_bias is true");
  refused("mlp_bias", "yes", "not true or false");
  refused("quantization_config", json::object(), "the model is quantised");
  refused("rope_scaling", {{"rope_type", "yarn"}, {"factor", 2}}, "rope_scaling of type 'yarn' is not known");
  refused("rope_scaling", {{"type", "linear"}, {"factor", 2}}, "rope_scaling of type 'linear' is not known");
  refused("rope_scaling", {{"rope_type", "llama3"}, {"factor", 2}}, "lacks low_freq_factor");
  refused("rope_scaling", 3, "rope_scaling is no object");
  refused("num_attention_heads", 0, "a whole number from 1");
  refused("num_attention_heads", -4, "a whole number from 1");
  refused("num_attention_heads", 4.5, "a whole number from 1");
  refused("num_attention_heads", nullptr, "num_attention_heads is missing");
  refused("num_key_value_heads", 3, "no multiple of 3");
  refused("head_dim", 7, "head_dim 7 is odd");
  refused("rope_theta", -1, "a positive number");
  refused("hidden_size", 25, "but config.json asks for");
  refused("num_hidden_layers", 3, "'model.layers.2.mlp.down_proj.weight' is missing");
  refused("num_hidden_layers", 16000000, "is missing");
  refused("tie_word_embeddings", false, "'lm_head.weight' is missing");
  write_bytes(f.f / "config.json", "{\"vocab_size\": ");
  check_refused(options, "config.json: it is no JSON");
  write_bytes(f.f / "config.json", "[]");
  check_refused(options, "config.json: it is no JSON object");
  fs::remove(f.f / "config.json");
  check_refused(options, "config.json: no such file");
  check_refused("--model /nonexistent --prompt a --generate 1", "no such file");
}

TEST_CASE("weights that cannot be run are refused", "[llama]") {
  files f(20);
  const std::string options = f.inputs + option("text", f.f / "text") + "--context 5 --bytes 5",
                    file = f.f / "model.safetensors";
  const safetensors_writer w = f.model.writer();
  const std::string good = w.bytes();
  write_bytes(file, good.substr(0, good.size() - 1));
  check_refused(options, "truncated");
  write_bytes(file, good.substr(0, 100));
  check_refused(options, "the file ends after");
  write_bytes(file, safetensors_writer::length(1ull << 62) + good.substr(8));
  check_refused(options, "the file ends after");
  const auto with = [&](auto&& change, const std::string& words) {
    safetensors_writer changed = f.model.writer();
    change(changed.header());
    write_bytes(file, changed.bytes());
    check_refused(options, words);
  };
  const std::string norm = "model.norm.weight";
  with([&](auto& h) { h[norm]["shape"] = {4, 6}; }, "is [4, 6], but config.json asks for [24]");
  with([&](auto& h) { h[norm]["dtype"] = "I32"; }, "'model.norm.weight' is I32: save the model as");
  with([&](auto& h) { h[norm]["dtype"] = "INT4"; }, "unknown dtype 'INT4'");
  with([&](auto& h) { h[norm]["data_offsets"] = {0, 96}; }, "overlaps");
  with([&](auto& h) { h[norm]["data_offsets"] = {-96, 0}; }, "not two whole numbers");
  with([&](auto& h) { h["other"] = h[norm], h.erase(norm); }, "'model.norm.weight' is missing");
  f.model.m.norm[3] = std::nan("");
  f.model.write(f.f);
  check_refused(options, "'model.norm.weight' holds a NaN or an infinity");
  fs::remove(file);
  check_refused(options, "neither model.safetensors nor");
}

TEST_CASE("prompts that cannot be asked are refused, by their line", "[llama]") {
  const files f(20);
  const json good = {{"task", "t"}, {"length", 5}, {"id", "x"}, {"context", "abc"}, {"qa", pairs({{"q", "a"}})}};
  const std::string options = f.inputs + option("prompts", f.f / "p.jsonl");
  const auto refused = [&](const std::string& line, const std::string& words) {
    write_bytes(f.f / "p.jsonl", good.dump() + "\n" + line + "\n");
    check_refused(options, words);
    check_refused(options, "p.jsonl, line 2");
  };
  const auto changed = [&](const char* key, const json& value) {
    json bad = good;
    bad[key] = value;
    return bad.dump();
  };
  refused("{\"task\": ", "no JSON");
  refused("3", "no JSON object");
  refused("{\"task\": \"t\"}", "it has no length");
  refused(changed("task", 3), "task is no string");
  refused(changed("length", -3), "length is no whole number");
  refused(changed("context", ""), "the context is empty");
  refused(changed("context", nullptr), "context is no string");
  refused(changed("qa", 3), "qa is no list");
  refused(changed("qa", json::array()), "qa is empty");
  refused(changed("qa", pairs({{"only"}})), "no [question, answer]");
  refused(changed("qa", pairs({{"q", 5}})), "an answer is no string");
  refused(changed("qa", pairs({{"q", ""}})), "a question or an answer is empty");
  refused("{\"task\": \"\xff\"}", "no JSON");
  write_bytes(f.f / "p.jsonl", "");
  check_refused(options, "no prompt");
  check_refused(f.inputs + "--prompts /nonexistent/p.jsonl", "no such file");
}

TEST_CASE("options that cannot be meant are refused", "[llama]") {
  const files f(20);
  const std::string text = f.inputs + option("text", f.f / "text"), run = text + "--context 5 --bytes 5 ";
  check_refused("", "--model is required");
  check_refused(f.inputs, "nothing to do");
  check_refused(text, "nothing to do");
  check_refused(run + "--prompt a --generate 3", "give one");
  check_refused(f.inputs + "--bytes 5", "--text goes with");
  check_refused(f.inputs + "--generate 5", "--prompt and --generate go together");
  check_refused(text + "--logits 5", "--logits and --out go together");
  check_refused(run + "--task kv", "choose among --prompts");
  check_refused(text + "--context 15 --bytes 6", "20 tokens, but 22 are needed");
  check_refused(text + "--context 0 --bytes 6", "--context");
  check_refused(run + "--method everything", "'everything' is none of");
  check_refused(run + "--epsilon 0", "epsilon is 0");
  check_refused(run + "--epsilon 0.1,1.5", "epsilon is 1.5");
  check_refused(run + "--method top-k --density 0", "--density is 0");
  check_refused(run + "--method top-k --density 0.1,2", "--density is 2");
  check_refused(run + "--delta 2", "delta is 2");
  check_refused(run + "--sinks -1", "sinks is -1");
  check_refused(run + "--target denominator", "go with --target output");
  check_refused(run + "--cache-type f8", "'f8' is none of");
  check_refused(run + "--threads 0", "--threads");
  check_refused(run + "--seed -1", "negative");
  check_refused(run + "--json /nonexistent/r.json", "cannot write");
  check_refused(text + "--logits 5 --out /nonexistent/l.npy", "cannot write");
  const outcome help = llama("--help");
  CHECK(help.code == 0);
  CHECK(contains(help.text, "--prompts"));
}

TEST_CASE("a trained model: logits, and a needle that is found", "[llama]") {
  const fs::path model = VATTN_TINY_LLAMA;
  if (!fs::exists(model / "config.json")) {
    WARN("no trained model at " << model.string() << ": skipped");
    return;
  }
  const folder f;
  const std::string inputs = option("model", model.string());
  const outcome o =
      llama(inputs + option("text", (model / "text.txt").string()) + option("out", f / "l.npy") + "--logits 512");
  CAPTURE(o.text);
  REQUIRE(o.code == 0);
  const auto got = vattn::npy::read(f / "l.npy"), want = vattn::npy::read(model / "reference_logits.npy");
  REQUIRE(got.shape == want.shape);
  float worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i)
    worst = std::max(worst, std::abs(got.as<float>()[i] - want.as<float>()[i]));
  CHECK(worst < 1e-3f);  // 2e-2 is asked for

  // A needle in 1000 bytes of the text.
  std::string context = read_bytes((model / "text.txt").string()).substr(0, 1000);
  context.insert(300, "\nThe secret code for piano-island is 80942.\n");
  const json prompt = {{"task", "niah"},
                       {"length", 1000},
                       {"id", "short"},
                       {"context", context},
                       {"qa", pairs({{"\nQ: What is the secret code for piano-island? A: ", "80942"}})}};
  write_bytes(f / "p.jsonl", prompt.dump());
  const outcome asked = llama(inputs + option("prompts", f / "p.jsonl") + option("json", f / "r.json") +
                              "--method dense,vattention,sinks-window --audit");
  CAPTURE(asked.text);
  REQUIRE(asked.code == 0);
  const json report = json::parse(read_bytes(f / "r.json"));
  const auto& rows = report.at("rows");
  CHECK(rows[0].at("correct") == 1);
  CHECK(rows[1].at("correct") == 1);
  CHECK(rows[1].at("density").get<double>() < 0.5);
  CHECK(rows[1].at("worst_layer_violations").get<double>() <= 0.1);
  CHECK(rows[2].at("correct") == 0);  // what is not read is not known
}
