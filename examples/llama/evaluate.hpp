// Methods measured on one prefill: questions with known answers, and the bits of a text.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "llama/runs.hpp"
#include "llama/session.hpp"
#include "llama/text.hpp"

namespace vattn::llama {

/// Results of one run on one task at one length.
struct score {
  std::string task;
  index_t length = 0;
  const method_runs* method = nullptr;
  const run* setting = nullptr;
  std::int64_t correct = 0, total = 0;
  double bits = 0;  // of the tokens of a text, summed
  double prefill_seconds = 0, index_seconds = 0;
  std::int64_t contexts = 0;
  decode_record decode;
};

struct evaluation_options {
  cache_type type = cache_type::f16;
  std::uint64_t seed = 0;
  bool audit = false;
  std::string cache_folder;
};

/// Feeds what `feed` feeds, by every run, from the same prefill. `record(score&)` finds where a run's results go.
template <class Feed, class Record>
void for_each_run(const model& m, context& c, const std::vector<method_runs>& methods, const evaluation_options& o,
                  thread_pool& pool, Feed&& feed, Record&& record) {
  for (const method_runs& method : methods) {
    std::vector<std::unique_ptr<layer_attention>> attention;
    const auto start = decode_clock::now();
    for (const layer_cache& cache : c.caches) {
      attention.push_back(make_attention(method.choice, o.type));
      attention.back()->append(cache);
    }
    const double index_seconds = seconds_since(start);
    for (const run& r : method.runs) {
      decoder decode(m, c.caches, attention, pool, {method.settings(r, c.n), o.seed, o.audit});
      score& s = record(method, r);
      feed(decode, s);
      s.decode.add(decode.record());
      s.prefill_seconds += c.prefill_seconds, s.index_seconds += index_seconds, ++s.contexts;
      decode.truncate(c.n);
    }
  }
}

[[nodiscard]] inline std::int32_t argmax(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

/// Questions and answers after the context, the true answer fed whatever was said; an answer counts if each of its
/// tokens was the most likely one.
inline void answer(decoder& decode, const prompt& p, score& s) {
  for (const prompt::question& q : p.questions) {
    std::vector<std::int32_t> tokens = q.ask;
    tokens.insert(tokens.end(), q.answer.begin(), q.answer.end());
    bool right = true;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const bool asked = i + 1 >= q.ask.size() && i + 1 < tokens.size();
      const std::span<const float> logits = decode.step(tokens[i], asked);
      if (asked) right = right && argmax(logits) == tokens[i + 1];
    }
    s.correct += right;
    ++s.total;
  }
}

/// −log2 of the probability that the logits give a token.
[[nodiscard]] inline double bits_of(std::span<const float> logits, std::int32_t token) {
  const double most = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - most);
  return (std::log(sum) + most - static_cast<double>(logits[static_cast<std::size_t>(token)])) / std::log(2.0);
}

/// All prompts by all runs. `said` hears of each prompt when it is done.
[[nodiscard]] inline std::vector<score> evaluate(const model& m, const std::vector<prompt>& prompts,
                                                 const std::vector<method_runs>& methods, const evaluation_options& o,
                                                 thread_pool& pool,
                                                 const std::function<void(const std::string&)>& said) {
  // By task and length in the order of the prompts, then by run.
  std::vector<score> scores;
  std::size_t done = 0;
  for (const prompt& p : prompts) {
    const std::string which = p.id + " (" + std::to_string(++done) + " of " + std::to_string(prompts.size()) + ")";
    context c = make_context(m, p.context, p.decoded(), o.type, pool, o.cache_folder, "prefill " + which);
    std::string line = which + ": prefill " + (c.loaded ? "loaded" : std::to_string(c.prefill_seconds) + " s");
    for_each_run(
        m, c, methods, o, pool,
        [&](decoder& decode, score& s) {
          const std::int64_t before = s.correct;
          answer(decode, p, s);
          line += ", " + std::to_string(s.correct - before) + "/" + std::to_string(p.questions.size());
        },
        [&](const method_runs& method, const run& r) -> score& {
          const auto found = std::find_if(scores.begin(), scores.end(), [&](const score& s) {
            return s.task == p.task && s.length == p.length && s.setting == &r;
          });
          if (found != scores.end()) return *found;
          return scores.emplace_back(
              score{.task = p.task, .length = p.length, .method = &method, .setting = &r, .decode = {}});
        });
    said(line);
  }
  return scores;
}

/// The bits of `tokens` after the first n, which are prefilled, by all runs.
[[nodiscard]] inline std::vector<score> evaluate_text(const model& m, std::span<const std::int32_t> tokens, index_t n,
                                                      const std::vector<method_runs>& methods,
                                                      const evaluation_options& o, thread_pool& pool) {
  std::vector<score> scores;
  const std::span<const std::int32_t> rest = tokens.subspan(static_cast<std::size_t>(n));
  context c = make_context(m, tokens.first(static_cast<std::size_t>(n)), static_cast<index_t>(rest.size()), o.type,
                           pool, o.cache_folder, "prefill");
  std::size_t runs = 0;
  for (const method_runs& method : methods) runs += method.runs.size();
  support::progress count("decode, tokens", static_cast<std::int64_t>(runs * (rest.size() - 1)));
  for_each_run(
      m, c, methods, o, pool,
      [&](decoder& decode, score& s) {
        for (std::size_t i = 0; i + 1 < rest.size(); ++i) {
          s.bits += bits_of(decode.step(rest[i], true), rest[i + 1]);
          ++s.total;
          count.step();
        }
      },
      [&](const method_runs& method, const run& r) -> score& {
        return scores.emplace_back(score{.task = "text", .length = n, .method = &method, .setting = &r, .decode = {}});
      });
  return scores;
}

}  // namespace vattn::llama
