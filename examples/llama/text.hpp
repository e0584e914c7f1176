// Text in and tokens out: bytes for a vocabulary of 256, else token ids that the user has made.
#pragma once

#include <cctype>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "support/safetensors.hpp"
#include "vattn/base/config.hpp"

namespace vattn::llama {

/// Of a model: raw bytes, or ids in decimal between blanks or commas.
class tokenizer {
 public:
  tokenizer(index_t vocabulary, bool ids) : vocabulary_(vocabulary), ids_(ids) {
    if (!ids && vocabulary != 256)
      throw std::runtime_error("the model has a vocabulary of " + std::to_string(vocabulary) +
                               ", not the 256 of raw bytes: tokenise elsewhere and give token ids, with --ids");
  }

  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text) const {
    std::vector<std::int32_t> tokens;
    if (!ids_) {
      for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
      return tokens;
    }
    const auto blank = [](char c) { return c == ',' || std::isspace(static_cast<unsigned char>(c)) != 0; };
    for (std::size_t at = 0; at < text.size();) {
      if (blank(text[at])) {
        ++at;
        continue;
      }
      std::size_t end = at;
      std::int64_t id = 0;
      for (; end < text.size() && !blank(text[end]); ++end) {
        const char c = text[end];
        id = c >= '0' && c <= '9' && id < vocabulary_ ? 10 * id + (c - '0') : vocabulary_;
      }
      if (id >= vocabulary_)
        throw std::runtime_error("'" + safetensors::detail::printable(text.substr(at, end - at), 24) +
                                 "' is no token id: whole numbers below " + std::to_string(vocabulary_) +
                                 " are expected with --ids");
      tokens.push_back(static_cast<std::int32_t>(id));
      at = end;
    }
    return tokens;
  }

  [[nodiscard]] std::string decode(std::int32_t token) const {
    return ids_ ? std::to_string(token) + " " : std::string(1, static_cast<char>(token));
  }

 private:
  index_t vocabulary_;
  bool ids_;
};

[[nodiscard]] inline std::string read_file(const std::filesystem::path& path) {
  try {
    const std::uint64_t size = safetensors::detail::file_size(path);
    if (size > std::uint64_t{1} << 32) throw std::runtime_error("larger than 4 GiB");
    std::ifstream in(path, std::ios::binary);
    if (!in) throw std::runtime_error("cannot be opened: check its permissions");
    return {std::istreambuf_iterator<char>(in), {}};
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(path.string() + ": " + e.what());
  }
}

struct prompt {
  struct question {
    std::vector<std::int32_t> ask, answer;
  };
  std::string task, id;
  index_t length = 0;
  std::vector<std::int32_t> context;
  std::vector<question> questions;

  [[nodiscard]] index_t decoded() const {
    std::size_t n = 0;
    for (const question& q : questions) n += q.ask.size() + q.answer.size();
    return static_cast<index_t>(n);
  }
};

/// Which of a file's prompts.
struct prompt_filter {
  std::string task;    ///< empty = all
  index_t length = 0;  ///< 0 = all
  index_t limit = 0;   ///< the first of each task and length; 0 = all
};

/// One JSON object a line: task, length, id, context, qa = [[question, answer], ...]. Every line is checked, also those
/// that are filtered out. Throws std::runtime_error that names file and line.
[[nodiscard]] inline std::vector<prompt> read_prompts(const std::filesystem::path& path, const prompt_filter& filter,
                                                      const tokenizer& tokens) {
  const std::string text = read_file(path);
  std::vector<prompt> prompts;
  std::map<std::pair<std::string, index_t>, index_t> seen;
  index_t line = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view one = std::string_view(text).substr(at, end - at);
    at = end + 1;
    ++line;
    if (one.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    try {
      const nlohmann::json j = safetensors::detail::parse_object(one, "the line");
      const auto string = [&](const nlohmann::json& x, const std::string& what) -> const std::string& {
        if (!x.is_string()) throw std::runtime_error(what + " is no string");
        return x.get_ref<const std::string&>();
      };
      for (const char* key : {"task", "length", "id", "context", "qa"}) {
        if (!j.contains(key)) throw std::runtime_error("it has no " + std::string(key));
      }
      prompt p;
      p.task = string(j["task"], "task"), p.id = string(j["id"], "id");
      if (!j["length"].is_number_unsigned()) throw std::runtime_error("length is no whole number");
      p.length = j["length"].get<index_t>();
      p.context = tokens.encode(string(j["context"], "context"));
      if (p.context.empty()) throw std::runtime_error("the context is empty");
      if (!j["qa"].is_array()) throw std::runtime_error("qa is no list");
      for (const auto& pair : j["qa"]) {
        if (!pair.is_array() || pair.size() != 2)
          throw std::runtime_error("qa holds something that is no [question, answer]");
        p.questions.push_back(
            {tokens.encode(string(pair[0], "a question")), tokens.encode(string(pair[1], "an answer"))});
        if (p.questions.back().ask.empty() || p.questions.back().answer.empty())
          throw std::runtime_error("a question or an answer is empty");
      }
      if (p.questions.empty()) throw std::runtime_error("qa is empty");
      if (!filter.task.empty() && p.task != filter.task) continue;
      if (filter.length > 0 && p.length != filter.length) continue;
      if (filter.limit > 0 && ++seen[{p.task, p.length}] > filter.limit) continue;
      prompts.push_back(std::move(p));
    } catch (const std::runtime_error& e) {
      throw std::runtime_error(path.string() + ", line " + std::to_string(line) + ": " + e.what());
    }
  }
  if (prompts.empty())
    throw std::runtime_error(path.string() + ": no prompt of the task and length that were asked for");
  return prompts;
}

}  // namespace vattn::llama
