// Runs a stock llama.cpp for the tests, with or without the library beside it:
//   driver load    --libs DIR --model FILE                     loads, decodes a little, prints the last logits' sum
//   driver logits  ... --text FILE --count N --batch B --out F all logits of the first N bytes, B at a time
//   driver greedy  ... --text FILE --prompt N --count M        M bytes after N, each the likeliest
//   driver prompts ... --prompts FILE --length N --limit L     questions of prompts.jsonl: which are answered
//   (answers.py) driver bench   ... --text FILE --fill N --steps M          decode speed at N tokens (--filled S: in S
//   sequences) driver events  ... --steps N --seed S                      random events in a cache, attention checked
//   in double
// Common: --type f16|f32|bf16|q8_0|q4_0|q8_0+q4_0, --context N, --threads N, --batch-threads N, --sequences N,
// --unified 0|1, --swa-full 0|1, --flash on|auto|off, --poll N
#include <malloc.h>

#include <array>
#include <chrono>
#include <cmath>
#include <ctime>
#include <fstream>
#include <iterator>
#include <optional>

#include "llama.hpp"
#include "watched.hpp"

namespace {

session_options options_of(const arguments& a) {
  session_options o;
  o.libraries = a.text("libs", ".");
  o.model = a.text("model", "model.gguf");
  o.type = a.text("type", "f16");
  o.flash = a.text("flash", "on");
  o.context = a.number("context", 8192);
  o.threads = a.number("threads", 1);
  o.batch_threads = a.number("batch-threads", o.threads);
  o.sequences = a.number("sequences", 1);
  o.unified = a.number("unified", 1) != 0;
  o.swa_full = a.number("swa-full", 1) != 0;
  o.poll = a.number("poll", 50);
  return o;
}

// Bytes of a file, again from its start where it ends; without one, numbers that look like nothing.
class text_source {
 public:
  explicit text_source(const std::string& path) {
    if (path.empty()) return;
    std::ifstream in(path, std::ios::binary);
    text_.assign(std::istreambuf_iterator<char>(in), {});
    if (text_.empty()) throw std::runtime_error(path + " cannot be read");
  }
  int operator()(int i) const {
    if (text_.empty()) return static_cast<int>((static_cast<std::uint32_t>(i) * 2654435761u) >> 24);
    return static_cast<unsigned char>(text_[static_cast<std::size_t>(i) % text_.size()]);
  }

 private:
  std::string text_;
};

// What this process's threads have run for: on a shared machine, with one thread, what wall time would be alone.
double ran() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int load(const arguments& a) {
  session s(options_of(a));
  const text_source text(a.text("text", ""));
  s.prefill(text, a.number("fill", 64), 0);
  for (int i = 0; i < 4; ++i) {
    s.add(text(s.next(0)), s.next(0), 0);
    s.decode();
  }
  double sum = 0;
  for (int i = 0; i < s.vocabulary(); ++i) sum += std::fabs(static_cast<double>(s.logits()[i]));
  std::printf("%.9g\n", sum);
  return 0;
}

int all_logits(const arguments& a) {
  session s(options_of(a));
  const text_source text(a.text("text", ""));
  const int count = a.number("count", 512), each = a.number("batch", 1), skip = a.number("skip", 0);
  const std::string state = a.text("state", "");
  if (std::ifstream in(state, std::ios::binary); !state.empty() && in) {
    s.load(std::vector<std::uint8_t>(std::istreambuf_iterator<char>(in), {}));
  } else if (skip > 0) {
    s.prefill(text, skip, 0);
    if (!state.empty()) {
      const std::vector<std::uint8_t> bytes = s.state();
      std::ofstream(state, std::ios::binary)
          .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    }
  }
  std::ofstream out(a.text("out", "logits.bin"), std::ios::binary);
  for (int i = skip; i < skip + count; i += each) {
    for (int j = i; j < std::min(skip + count, i + each); ++j) s.add(text(j), j, 0);
    s.decode();
    for (int j = 0; j < std::min(each, skip + count - i); ++j)
      out.write(reinterpret_cast<const char*>(s.logits(j)),
                static_cast<std::streamsize>(sizeof(float)) * s.vocabulary());
  }
  return 0;
}

int greedy(const arguments& a) {
  session s(options_of(a));
  const text_source text(a.text("text", ""));
  s.prefill(text, a.number("prompt", 4096), 0);
  std::string out;
  for (int i = 0, count = a.number("count", 64); i < count; ++i) {
    const int token = s.best();
    out += static_cast<char>(token);
    s.add(token, s.next(0), 0);
    s.decode();
  }
  for (const char c : out) std::printf("%02x", static_cast<unsigned>(static_cast<unsigned char>(c)));
  std::puts("");
  return 0;
}

// The JSON string whose first character is at `at`, without its escapes; `at` is then behind it.
std::string json_string(const std::string& line, std::size_t& at) {
  std::string out;
  for (; at < line.size() && line[at] != '"'; ++at) {
    if (line[at] != '\\') {
      out += line[at];
      continue;
    }
    const char c = line[++at];
    if (c == 'u') {
      const auto code = static_cast<unsigned>(std::stoul(line.substr(at + 1, 4), nullptr, 16));
      at += 4;
      if (code < 0x80) {
        out += static_cast<char>(code);
      } else if (code < 0x800) {
        out += static_cast<char>(0xC0 | code >> 6), out += static_cast<char>(0x80 | (code & 63));
      } else {
        out += static_cast<char>(0xE0 | code >> 12), out += static_cast<char>(0x80 | (code >> 6 & 63));
        out += static_cast<char>(0x80 | (code & 63));
      }
    } else {
      out += c == 'n' ? '\n' : c == 't' ? '\t' : c == 'r' ? '\r' : c == 'b' ? '\b' : c == 'f' ? '\f' : c;
    }
  }
  ++at;
  return out;
}
std::string field(const std::string& line, const std::string& name) {
  std::size_t at = line.find("\"" + name + "\": \"");
  if (at == std::string::npos) return {};
  at += name.size() + 5;
  return json_string(line, at);
}

// A context, then its questions, each followed by its true answer; an answer is right if each byte was the likeliest.
// With --states DIR contexts are prefilled once, and loaded by later runs.
int prompts(const arguments& a) {
  const int length = a.number("length", 4096), limit = a.number("limit", 1000);
  const std::string states = a.text("states", ""), task = a.text("task", "");
  session s(options_of(a));
  std::ifstream in(a.text("prompts", "prompts.jsonl"));
  std::map<std::string, std::string> right;  // of each task, a 1 or 0 a question
  std::map<std::string, int> seen;
  for (std::string line; std::getline(in, line);) {
    if (line.find("\"length\": " + std::to_string(length) + ",") == std::string::npos) continue;
    const std::string of = field(line, "task"), text = field(line, "context");
    if ((!task.empty() && of != task) || ++seen[of] > limit) continue;
    const auto byte = [](const std::string& t, int i) {
      return static_cast<int>(static_cast<unsigned char>(t[static_cast<std::size_t>(i)]));
    };
    llama_memory_clear(s.memory(), true);
    const std::string path = states + "/" + field(line, "id") + ".state";
    std::ifstream file(path, std::ios::binary);
    if (!states.empty() && file) {
      s.load(std::vector<std::uint8_t>(std::istreambuf_iterator<char>(file), {}));
    } else {
      s.prefill([&](int i) { return byte(text, i); }, static_cast<int>(text.size()), 0);
      if (!states.empty()) {
        const std::vector<std::uint8_t> bytes = s.state();
        std::ofstream(path, std::ios::binary)
            .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
      }
    }
    std::string& answered = right[of];
    std::size_t at = line.find("\"qa\": [[");
    if (at == std::string::npos) throw std::runtime_error("a prompt without \"qa\"");
    for (at = line.find('"', at + 7); at != std::string::npos; at = line.find('"', at)) {
      const std::string ask = json_string(line, ++at);
      at = line.find('"', at) + 1;
      const std::string answer = json_string(line, at);
      bool ok = true;
      const std::string both = ask + answer;
      for (int i = 0; i + 1 < static_cast<int>(both.size()); ++i) {
        s.add(byte(both, i), s.next(0), 0);
        s.decode();
        if (i + 1 >= static_cast<int>(ask.size())) ok = ok && s.best() == byte(both, i + 1);
      }
      s.add(byte(both, static_cast<int>(both.size()) - 1), s.next(0), 0);
      s.decode();
      answered += ok ? '1' : '0';
    }
  }
  for (const auto& [of, answered] : right)
    std::printf("%s %s %td of %zu\n", of.c_str(), answered.c_str(), std::count(answered.begin(), answered.end(), '1'),
                answered.size());
  return 0;
}

int bench(const arguments& a) {
  session s(options_of(a));
  const text_source text(a.text("text", ""));
  const int fill = a.number("fill", 4096), steps = a.number("steps", 32), filled = a.number("filled", 1);
  const int sequences = std::max(filled, a.number("copies", 1));
  const std::string state = a.text("state", "");
  std::vector<std::uint8_t> bytes;
  if (std::ifstream in(state, std::ios::binary); !state.empty() && in) {
    bytes.assign(std::istreambuf_iterator<char>(in), {});
    s.load(bytes);
  } else {
    for (int q = 0; q < filled; ++q) s.prefill([&](int i) { return text(i + 1000 * q); }, fill, q);
    if (!state.empty()) {
      bytes = s.state();
      std::ofstream(state, std::ios::binary)
          .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    }
  }
  // A context of --repeat times as many tokens whose keys and values are those of `fill` ones again and again, at
  // positions of their own: in minutes less than by a prefill of them.
  for (int r = 1; r < a.number("repeat", 1); ++r) {
    if (r == 1) bytes = s.state_of(0);
    s.load(bytes, 1);
    llama_memory_seq_add(s.memory(), 1, 0, -1, r * fill);
    llama_memory_seq_cp(s.memory(), 1, 0, -1, -1);
    llama_memory_seq_rm(s.memory(), 1, -1, -1);
  }
  for (int q = 1; q < a.number("copies", 1); ++q) {  // sequences of the same, each in cells of its own
    s.load(s.state_of(0), q);
  }
  if (a.number("cut", 0) > 0) llama_memory_seq_rm(s.memory(), -1, a.number("cut", 0), -1);
  // The first steps make what is made once.
  const int warm = a.number("warm", 40);
  std::vector<double> first, times, work;
  for (int i = -warm; i < steps; ++i) {
    const double start = now(), before = ran();
    for (int q = 0; q < sequences; ++q) s.add(text(s.next(q) + 1000 * q), s.next(q), q);
    s.decode();
    static_cast<void>(s.logits());
    if (i > -warm && i < 0) first.push_back(ran() - before);
    if (i >= 0) times.push_back(now() - start), work.push_back(ran() - before);
  }
  first.resize(std::min<std::size_t>(first.size(), 24));
  const auto print = [](const char* what, std::vector<double>& of) {
    std::sort(of.begin(), of.end());
    if (!of.empty())
      std::printf("%s: median %.3f ms, least %.3f, most %.3f\n", what, 1e3 * of[of.size() / 2], 1e3 * of.front(),
                  1e3 * of.back());
  };
  print("processor time of the first steps but one", first);
  print("a step", times);
  print("processor time of a step", work);
  return 0;
}

// P(X >= k), X binomial(n, p), for what is far out: by its largest term and the ratio of the following ones.
double tail(std::uint64_t k, std::uint64_t n, double p) {
  if (k == 0) return 1;
  const auto dk = static_cast<double>(k), dn = static_cast<double>(n);
  if (dk <= dn * p) return 1;
  const double term = std::exp(std::lgamma(dn + 1) - std::lgamma(dk + 1) - std::lgamma(dn - dk + 1) + dk * std::log(p) +
                               (dn - dk) * std::log1p(-p));
  const double ratio = (dn - dk) / (dk + 1) * p / (1 - p);
  return std::min(1.0, term / (1 - ratio));
}

// Memory of this process in KiB: what is resident, and what is allocated.
struct memory_use {
  long resident = 0, allocated = 0;
};
memory_use memory_now() {
  memory_use m;
  malloc_trim(0);  // else freed states stay resident
  const auto heap = mallinfo2();
  m.allocated = static_cast<long>((heap.uordblks + heap.hblkhd) / 1024);
  std::ifstream in("/proc/self/status");
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("VmRSS:")) m.resident = std::stol(line.substr(6));
  }
  return m;
}

// Every event that a cache knows, in random order, between steps of decode. --beside 1: while another model's context
// in the same process decodes too.
int events(const arguments& a) {
  const double epsilon = std::stod(a.text("epsilon", "0.1")), delta = std::stod(a.text("delta", "0.1"));
  attention_watch watch(a.number("one-in", 4), epsilon, std::stod(a.text("rounding", "0.002")));
  session_options o = options_of(a);
  o.watch = attention_watch::callback, o.watcher = &watch;
  session s(o);
  const text_source text(a.text("text", ""));
  const int fill = a.number("fill", 5400), steps = a.number("steps", 200), sequences = o.sequences;
  const std::string only = a.text("only", "");
  std::uint64_t random = static_cast<std::uint64_t>(a.number("seed", 1));
  const auto below = [&](int n) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int>((random >> 33) % static_cast<std::uint64_t>(n));
  };
  int served = 0;
  const auto token = [&](int position) { return text(position * 7 + served); };
  const int room = o.context / (o.unified ? 1 : sequences);
  const auto used = [&](int q) {  // cells of the stream that sequence q is in
    int sum = 0;
    for (int other = 0; other < sequences; ++other) sum += o.unified || other == q ? s.next(other) : 0;
    return sum;
  };
  // Prefills would be most of a long run's time: all but a few of a sequence's beginnings are loaded.
  std::vector<std::uint8_t> beginning;
  const auto refill = [&](int q) {
    if (s.next(q) == 0 && !beginning.empty() && below(100) != 0) {
      s.load(beginning, q);
    } else {
      s.prefill(token, std::max(0, fill - s.next(q)), q);
    }
  };
  std::map<std::string, std::array<std::uint64_t, 3>> outcome;  // after each kind of event: checked, rough, violations
  std::vector<std::uint8_t> saved, saved_one;
  int saved_length = 0;
  const auto step = [&](int q) {
    s.add(token(s.next(q)), s.next(q), q);
    s.decode();
  };
  // Steps in which the codes of a context are made, which is then ready for an event; they are not checked.
  const int coding_steps = o.type.starts_with('q') ? 68 : 28;
  const auto settle = [&](int q) {
    watch.paused = true;
    for (int i = 0; i < coding_steps && used(q) + 300 < room; ++i) step(q);
    watch.paused = false;
  };
  llama_memory_clear(s.memory(), true);  // writes to all of it, so that what is resident does not grow with its use
  refill(0);
  beginning = s.state_of(0);
  settle(0);
  std::optional<session> beside;
  if (a.number("beside", 0) != 0) beside.emplace(o).load(beginning, 0);
  std::string last = "start";
  memory_use settled;  // early in the run, without the states that are kept
  const auto drop_states = [&] { saved = {}, saved_one = {}; };
  const std::vector<std::string> kinds{"step",          "steps",         "draft", "batch",  "remove_middle",
                                       "remove_tail",   "copy",          "shift", "save",   "load",
                                       "save_sequence", "load_sequence", "clear", "prefill"};
  for (; served < steps; ++served) {
    const std::string kind = !only.empty() && below(3) == 0 ? only
                             : below(2) == 0                ? "step"
                                             : kinds[static_cast<std::size_t>(below(static_cast<int>(kinds.size())))];
    if (served == std::min(1000, steps / 4)) drop_states(), settled = memory_now();
    if (served > 0 && served % 500 == 0)
      std::fprintf(stderr, "%d steps, %llu outputs checked\n", served, static_cast<unsigned long long>(watch.checked));
    const int q = below(sequences), n = s.next(q);
    const auto before = std::array{watch.checked, watch.rough, watch.violations};
    if (used(q) + 300 > room) {
      for (int other = 0; other < sequences; ++other) {
        if (o.unified || other == q) llama_memory_seq_rm(s.memory(), other, -1, -1);
      }
      refill(q);
      settle(q);
      last = "clear_full";
      continue;
    }
    if (kind == "steps") {
      for (int i = 0; i < 5; ++i) step(q);
    } else if (kind == "draft" && n > 8) {  // several tokens at once, of which some are taken back
      const int drafted = 2 + below(16);    // 17 are left to ggml
      for (int i = 0; i < drafted; ++i) s.add(token(n + i), n + i, q);
      s.decode();
      llama_memory_seq_rm(s.memory(), q, n + 1 + below(drafted), -1);
      last = kind;
    } else if (kind == "batch") {  // a token of each sequence that there is
      for (int other = 0; other < sequences; ++other) {
        if (s.next(other) > 0) s.add(token(s.next(other)), s.next(other), other);
      }
      s.decode();
    } else if (kind == "remove_middle" && n > 400) {
      const int from = 50 + below(n - 350);
      llama_memory_seq_rm(s.memory(), q, from, from + 1 + below(200));
      last = kind;
    } else if (kind == "remove_tail" && n > 400) {
      llama_memory_seq_rm(s.memory(), q, n - 1 - below(300), -1);
      last = kind;
    } else if (kind == "copy" && sequences > 1) {
      const int to = (q + 1 + below(sequences - 1)) % sequences;
      if (o.unified || n > 0) {
        llama_memory_seq_rm(s.memory(), to, -1, -1);
        llama_memory_seq_cp(s.memory(), q, to, -1, -1);
      }
      last = kind;
    } else if (kind == "shift" && n > 600 && llama_memory_can_shift(s.memory())) {
      const int cut = 16 + below(100);
      llama_memory_seq_rm(s.memory(), q, 4, 4 + cut);
      llama_memory_seq_add(s.memory(), q, 4 + cut, -1, -cut);
      last = kind;
    } else if (kind == "save") {
      saved = s.state();
    } else if (kind == "load" && !saved.empty()) {
      s.load(saved);
      last = kind;
    } else if (kind == "save_sequence" && n > 0) {
      saved_one = s.state_of(q), saved_length = n;
    } else if (kind == "load_sequence" && !saved_one.empty()) {
      llama_memory_seq_rm(s.memory(), q, -1, -1);
      if (used(q) + saved_length + 300 < room) {
        s.load(saved_one, q);
        last = kind;
      }
    } else if (kind == "clear") {
      llama_memory_clear(s.memory(), below(2) == 0);
      refill(q);
      last = kind;
    } else if (kind == "prefill" && used(q) + 700 < room) {
      s.prefill(token, 17 + below(16), q);
      last = kind;
    } else if (s.next(q) > 0) {
      step(q);
    }
    if (s.next(q) == 0) {
      if (used(q) + fill + 300 < room) refill(q);
    } else {
      step(q);  // after whatever happened
      if (below(8) == 0) settle(q);
    }
    if (beside && beside->next(0) + 1 < room) {
      beside->add(token(beside->next(0)), beside->next(0), 0);
      beside->decode();
    }
    auto& o3 = outcome[last];
    o3[0] += watch.checked - before[0], o3[1] += watch.rough - before[1], o3[2] += watch.violations - before[2];
  }
  bool ok = watch.checked > 0;
  for (const auto& [kind, x] : outcome) {
    const double p = tail(x[2], x[1] > 0 ? x[1] : 1, delta);
    std::printf("after %-14s checked %llu, sampled %llu, violations %llu (p %.2g)\n", kind.c_str(),
                static_cast<unsigned long long>(x[0]), static_cast<unsigned long long>(x[1]),
                static_cast<unsigned long long>(x[2]), p);
    ok = ok && p > 1e-6;
  }
  if (a.number("leak", 0) != 0) {
    drop_states();
    const memory_use end = memory_now();
    const long more = end.allocated - settled.allocated, larger = end.resident - settled.resident;
    std::printf("memory after %d steps: %ld KiB allocated, %ld resident; after %d: %+ld allocated, %+ld resident\n",
                std::min(1000, steps / 4), settled.allocated, settled.resident, steps, more, larger);
    ok = ok && more < 4096 && larger < 16384;
  }
  std::printf("checked %llu, sampled %llu, violations %llu, largest error %.4f: %s\n",
              static_cast<unsigned long long>(watch.checked), static_cast<unsigned long long>(watch.rough),
              static_cast<unsigned long long>(watch.violations), watch.largest, ok ? "as promised" : "NOT AS PROMISED");
  return ok ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) try {
  const std::string command = argc > 1 ? argv[1] : "";
  const arguments a(argc, argv, 2);
  if (command == "load") return load(a);
  if (command == "logits") return all_logits(a);
  if (command == "greedy") return greedy(a);
  if (command == "prompts") return prompts(a);
  if (command == "bench") return bench(a);
  if (command == "events") {
    int result = 0;
    for (int i = 0; i < a.number("times", 1); ++i) result |= events(a);
    return result;
  }
  std::fprintf(stderr, "driver: give load, logits, greedy, prompts, bench or events\n");
  return 2;
} catch (const std::exception& e) {
  std::fprintf(stderr, "driver: %s\n", e.what());
  return 1;
}
