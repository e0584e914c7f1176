// A stock libllama, driven as an application drives it.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama.h"

/// --name value of a command line; throws where an argument is neither.
class arguments {
 public:
  arguments(int count, char** values, int first) {
    for (int i = first; i < count; i += 2) {
      if (std::strncmp(values[i], "--", 2) != 0 || i + 1 == count)
        throw std::runtime_error(std::string(values[i]) + ": give --name value");
      pairs_.emplace_back(values[i] + 2, values[i + 1]);
    }
  }
  [[nodiscard]] std::string text(const char* name, const char* otherwise) const {
    for (const auto& [n, v] : pairs_) {
      if (n == name) return v;
    }
    return otherwise;
  }
  [[nodiscard]] int number(const char* name, int otherwise) const {
    const std::string t = text(name, "");
    return t.empty() ? otherwise : std::stoi(t);
  }

 private:
  std::vector<std::pair<std::string, std::string>> pairs_;
};

struct session_options {
  std::string libraries, model, type = "f16", flash = "on";
  int context = 8192, threads = 1, batch_threads = 1, sequences = 1, poll = 50;
  bool unified = true, swa_full = true;
  ggml_backend_sched_eval_callback watch = nullptr;
  void* watcher = nullptr;
};

/// A model and a context of it. Tokens are bytes.
class session {
 public:
  explicit session(const session_options& o) : batch_(llama_batch_init(2048, 0, 1)) {
    llama_log_set(
        [](ggml_log_level level, const char* text, void*) {
          if (level >= GGML_LOG_LEVEL_WARN) std::fputs(text, stderr);
        },
        nullptr);
    ggml_backend_load_all_from_path(o.libraries.c_str());
    llama_backend_init();
    model_ = llama_model_load_from_file(o.model.c_str(), llama_model_default_params());
    if (!model_) throw std::runtime_error(o.model + " cannot be loaded");
    llama_context_params p = llama_context_default_params();
    p.n_ctx = static_cast<std::uint32_t>(o.context);
    p.n_batch = 2048;
    p.n_ubatch = 512;
    p.n_threads = o.threads;
    p.n_threads_batch = o.batch_threads;
    p.n_seq_max = static_cast<std::uint32_t>(o.sequences);
    p.kv_unified = o.unified;
    p.swa_full = o.swa_full;
    p.flash_attn_type = o.flash == "on"    ? LLAMA_FLASH_ATTN_TYPE_ENABLED
                        : o.flash == "off" ? LLAMA_FLASH_ATTN_TYPE_DISABLED
                                           : LLAMA_FLASH_ATTN_TYPE_AUTO;
    p.type_k = p.type_v = type_of(o.type);
    if (o.type == "q8_0+q4_0") p.type_k = GGML_TYPE_Q8_0, p.type_v = GGML_TYPE_Q4_0;
    p.cb_eval = o.watch;
    p.cb_eval_user_data = o.watcher;
    context_ = llama_init_from_model(model_, p);
    if (!context_) throw std::runtime_error("no context of this model");
    memory_ = llama_get_memory(context_);
    vocabulary_ = llama_vocab_n_tokens(llama_model_get_vocab(model_));
    if (o.poll >= 0 &&
        std::max(o.threads, o.batch_threads) > 1) {  // threads that stay, as llama-cli and llama-server have them
      ggml_threadpool_params t = ggml_threadpool_params_default(std::max(o.threads, o.batch_threads));
      t.poll = static_cast<std::uint32_t>(o.poll);
      pool_ = reinterpret_cast<decltype(&ggml_threadpool_new)>(cpu_function("ggml_threadpool_new"))(&t);
      llama_attach_threadpool(context_, pool_, pool_);
    }
  }
  ~session() {
    llama_batch_free(batch_);
    llama_free(context_);
    llama_model_free(model_);
    if (pool_) reinterpret_cast<decltype(&ggml_threadpool_free)>(cpu_function("ggml_threadpool_free"))(pool_);
  }
  session(const session&) = delete;
  session& operator=(const session&) = delete;

  [[nodiscard]] llama_context* context() const { return context_; }
  [[nodiscard]] llama_memory_t memory() const { return memory_; }
  [[nodiscard]] int vocabulary() const { return vocabulary_; }
  [[nodiscard]] int next(int sequence) const { return llama_memory_seq_pos_max(memory_, sequence) + 1; }

  /// Tokens to decode together.
  void add(int token, int position, int sequence, bool logits = true) {
    const int i = batch_.n_tokens++;
    batch_.token[i] = token, batch_.pos[i] = position, batch_.n_seq_id[i] = 1;
    batch_.seq_id[i][0] = sequence, batch_.logits[i] = logits;
  }
  void decode() {
    const int result = llama_decode(context_, batch_);
    batch_.n_tokens = 0;
    if (result != 0) throw std::runtime_error("llama_decode says " + std::to_string(result));
  }
  /// Token after token from the sequence's end on, in batches of 512; logits of the last.
  template <class Text>
  void prefill(Text&& token, int count, int sequence) {
    for (int from = next(sequence), end = from + count; from < end;) {
      for (int i = 0; i < 512 && from < end; ++i, ++from) add(token(from), from, sequence, from + 1 == end);
      decode();
    }
  }
  [[nodiscard]] const float* logits(int i = -1) const { return llama_get_logits_ith(context_, i); }
  [[nodiscard]] int best(int i = -1) const {
    const float* l = logits(i);
    return static_cast<int>(std::max_element(l, l + vocabulary_) - l);
  }

  [[nodiscard]] std::vector<std::uint8_t> state() const {
    std::vector<std::uint8_t> bytes(llama_state_get_size(context_));
    bytes.resize(llama_state_get_data(context_, bytes.data(), bytes.size()));
    return bytes;
  }
  void load(const std::vector<std::uint8_t>& bytes) {
    if (llama_state_set_data(context_, bytes.data(), bytes.size()) == 0)
      throw std::runtime_error("the state does not load");
  }
  [[nodiscard]] std::vector<std::uint8_t> state_of(int sequence) const {
    std::vector<std::uint8_t> bytes(llama_state_seq_get_size(context_, sequence));
    bytes.resize(llama_state_seq_get_data(context_, bytes.data(), bytes.size(), sequence));
    return bytes;
  }
  void load(const std::vector<std::uint8_t>& bytes, int sequence) {
    if (llama_state_seq_set_data(context_, bytes.data(), bytes.size(), sequence) == 0)
      throw std::runtime_error("the sequence does not load");
  }

 private:
  static ggml_type type_of(const std::string& name) {
    if (name == "f32") return GGML_TYPE_F32;
    if (name == "bf16") return GGML_TYPE_BF16;
    if (name == "q8_0") return GGML_TYPE_Q8_0;
    if (name == "q4_0") return GGML_TYPE_Q4_0;
    return GGML_TYPE_F16;
  }
  static void* cpu_function(const char* name) {
    return ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)), name);
  }

  llama_batch batch_;
  llama_model* model_ = nullptr;
  llama_context* context_ = nullptr;
  llama_memory_t memory_ = nullptr;
  ggml_threadpool_t pool_ = nullptr;
  int vocabulary_ = 0;
};
