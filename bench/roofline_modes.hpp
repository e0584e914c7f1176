// What `roofline` times: the memory itself, dense attention, and verified sparse modes, behind one interface.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "roofline_cache.hpp"
#include "vattn/base/thread_pool.hpp"
#include "vattn/kernel/row.hpp"

namespace vattn::bench {

/// What a decode step is given, and where it leaves its results.
template <class T>
struct roofline_step {
  const roofline_cache<T>& cache;
  thread_pool& pool;
  double epsilon, delta;
  std::vector<float>& output;              // [heads, dim]
  std::vector<certificate>& certificates;  // [heads]

  [[nodiscard]] attention_result result() const {
    const cache_shape& s = cache.shape();
    return {.output = {output.data(), {1, 1, s.heads, s.dim}}, .certificates = {certificates.data(), {1, 1, s.heads}}};
  }
};

/// As sample::store_stage has them.
inline constexpr std::array<const char*, sample::store_stages> stage_names{"tables", "pilot", "plan",  "scan",
                                                                           "picks",  "slice", "judge", "exact"};

/// One row of the table. To add one: derive, and append it to `make_modes`.
template <class T>
class roofline_mode {
 public:
  explicit roofline_mode(std::string name) : name_(std::move(name)) {}
  virtual ~roofline_mode() = default;
  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  /// Builds stores, sketches and indices; not timed.
  virtual void prepare(const roofline_step<T>&) {}
  /// One step, timed. `number` counts steps: a seed.
  virtual status run(const roofline_step<T>&, std::uint32_t number) = 0;
  /// Tokens that a run appends, of which times are of one; else 1.
  [[nodiscard]] virtual index_t parts() const { return 1; }
  /// Bytes that a step reads; 0 if unknown.
  [[nodiscard]] virtual double bytes() const { return 0; }
  /// Milliseconds of a step in each of `stage_names` since the last call, which was `steps` ago, all threads together;
  /// empty if it has no stages.
  [[nodiscard]] virtual std::vector<double> take_stages(int /*steps*/) { return {}; }
  /// Whether outputs are attention's, to be compared with the truth, and whether ε is promised.
  [[nodiscard]] virtual bool attends() const { return true; }
  [[nodiscard]] virtual bool verifies() const { return false; }
  /// Whether it runs without being asked for: what copies the cache once more does not.
  [[nodiscard]] virtual bool by_default() const { return true; }
  /// The mode that speed-ups and errors are relative to: dense attention to the rows that it reads itself.
  [[nodiscard]] virtual std::string baseline() const { return "dense"; }
  /// Bytes kept beside the rows over those of the rows; 0 if none.
  [[nodiscard]] virtual double sketch_share() const { return 0; }

 private:
  std::string name_;
};

/// Sum of the words of a range, asked for 4 KB ahead.
[[nodiscard]] inline std::uint64_t sum_of_words(const std::byte* from, std::size_t bytes) noexcept {
  std::uint64_t sum[8] = {};
  for (std::size_t at = 0; at + 64 <= bytes; at += 64) {
#if defined(__GNUC__)
    __builtin_prefetch(from + at + 4096);
#endif
    std::uint64_t line[8];
    std::memcpy(line, from + at, 64);
    for (int j = 0; j < 8; ++j) sum[j] += line[j];
  }
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

/// All of K and V, once: the limit of what reads every row.
template <class T>
class read_mode : public roofline_mode<T> {
 public:
  read_mode() : roofline_mode<T>("read") {}
  void prepare(const roofline_step<T>& s) override { bytes_ = static_cast<double>(s.cache.bytes()); }
  status run(const roofline_step<T>& s, std::uint32_t) override {
    const index_t n = s.cache.shape().n, chunk = std::min<index_t>(n, 4096), chunks = (n + chunk - 1) / chunk;
    const index_t row = s.cache.row_bytes();
    s.pool.for_each(2 * s.cache.shape().kv_heads * chunks, [&](index_t task, index_t) {
      const index_t kv = task / chunks / 2, first = task % chunks * chunk;
      const std::byte* from = task / chunks % 2 == 0 ? s.cache.k(kv) : s.cache.v(kv);
      sink_.fetch_add(sum_of_words(from + first * row, static_cast<std::size_t>(std::min(chunk, n - first) * row)),
                      std::memory_order_relaxed);
    });
    return {};
  }
  [[nodiscard]] double bytes() const override { return bytes_; }
  [[nodiscard]] bool attends() const override { return false; }

 private:
  double bytes_ = 0;
  std::atomic<std::uint64_t> sink_{0};
};

/// Sums the words of a row while the row `ahead` is asked for.
[[nodiscard]] inline std::uint64_t sum_of_row(const std::byte* here, const std::byte* ahead, index_t bytes) noexcept {
  kernel::prefetch_row(ahead, static_cast<std::size_t>(bytes));
  std::uint64_t sum = 0;
  for (index_t byte = 0; byte + 8 <= bytes; byte += 8) {
    std::uint64_t word;
    std::memcpy(&word, here + byte, 8);
    sum += word;
  }
  return sum;
}

/// K and V rows of a random hundredth of the tokens: what gathering can reach. Apart as in the cache, or interleaved.
template <class T>
class random_rows_mode : public roofline_mode<T> {
 public:
  explicit random_rows_mode(bool interleaved)
      : roofline_mode<T>(interleaved ? "random_pairs" : "random_rows"), interleaved_(interleaved) {}
  void prepare(const roofline_step<T>& s) override {
    const cache_shape& c = s.cache.shape();
    rows_.resize(static_cast<std::size_t>(std::max<index_t>(16, c.n / 100)));
    bytes_ = static_cast<double>(2 * c.kv_heads * static_cast<index_t>(rows_.size()) * s.cache.row_bytes());
    if (!interleaved_) return;
    const auto row = static_cast<std::size_t>(s.cache.row_bytes());
    pairs_ = huge_pages(s.cache.bytes());
    for (index_t i = 0; i < c.kv_heads * c.n; ++i) {  // heads are one behind another
      std::byte* to = pairs_.data() + 2 * static_cast<std::size_t>(i) * row;
      std::memcpy(to, s.cache.k(0) + i * s.cache.row_bytes(), row);
      std::memcpy(to + row, s.cache.v(0) + i * s.cache.row_bytes(), row);
    }
  }
  status run(const roofline_step<T>& s, std::uint32_t number) override {
    std::mt19937_64 random(number);  // other rows each time: those of the last step are in the cache
    for (ordinal& r : rows_) r = static_cast<ordinal>(random() % static_cast<std::uint64_t>(s.cache.shape().n));
    const index_t row = s.cache.row_bytes(), parts = 8, count = static_cast<index_t>(rows_.size());
    s.pool.for_each(s.cache.shape().kv_heads * parts, [&](index_t task, index_t) {
      const index_t kv = task / parts, first = task % parts * count / parts, last = (task % parts + 1) * count / parts;
      const std::byte* pairs = interleaved_ ? pairs_.data() + 2 * kv * s.cache.shape().n * row : nullptr;
      constexpr index_t ahead = 8;
      std::uint64_t sum = 0;
      for (index_t j = first; j < last; ++j) {
        const index_t here = rows_[static_cast<std::size_t>(j)];
        const index_t next = rows_[static_cast<std::size_t>(std::min(j + ahead, last - 1))];
        if (interleaved_) {
          sum += sum_of_row(pairs + 2 * here * row, pairs + 2 * next * row, 2 * row);
        } else {
          for (const std::byte* from : {s.cache.k(kv), s.cache.v(kv)})
            sum += sum_of_row(from + here * row, from + next * row, row);
        }
      }
      sink_.fetch_add(sum, std::memory_order_relaxed);
    });
    return {};
  }
  [[nodiscard]] double bytes() const override { return bytes_; }
  [[nodiscard]] bool attends() const override { return false; }
  [[nodiscard]] bool by_default() const override { return !interleaved_; }

 private:
  bool interleaved_;
  page_buffer pairs_;
  std::vector<ordinal> rows_;
  double bytes_ = 0;
  std::atomic<std::uint64_t> sink_{0};
};

template <class T>
class dense_mode : public roofline_mode<T> {
 public:
  dense_mode() : roofline_mode<T>("dense") {}
  void prepare(const roofline_step<T>& s) override { bytes_ = static_cast<double>(s.cache.bytes()); }
  status run(const roofline_step<T>& s, std::uint32_t) override {
    return exact_attention(s.cache.query(), s.cache.view(), s.cache.options(), s.result(), memory_, s.pool);
  }
  [[nodiscard]] double bytes() const override { return bytes_; }

 private:
  double bytes_ = 0;
  workspace memory_;
};

/// vattention<Policy> whose selector needs no preparation.
template <class T, class Policy>
class functor_mode : public roofline_mode<T> {
 public:
  using roofline_mode<T>::roofline_mode;
  status run(const roofline_step<T>& s, std::uint32_t number) override {
    config c;
    c.epsilon = s.epsilon;
    c.delta = s.delta;
    return vattention<Policy>(c)(s.cache.query(), s.cache.view(), s.cache.options(), s.result(), memory_,
                                 {.seed = 1, .step = number}, s.pool);
  }
  [[nodiscard]] bool verifies() const override { return true; }
  [[nodiscard]] bool by_default() const override { return !std::same_as<Policy, default_policy>; }

 private:
  workspace memory_;
};

/// Sinks, window and a uniform sample: a verified mode that looks at nothing but what it reads.
struct uniform_policy : default_policy {
  using selector = select::none;
};

/// Where a call on a store spends its time: each thread tells its own clock.
class stage_clock {
 public:
  static void enter(sample::store_stage next) noexcept {
    clock& c = own();
    const auto now = std::chrono::steady_clock::now();
    if (c.at < sample::store_stages) c.ms[c.at] += std::chrono::duration<double, std::milli>(now - c.since).count();
    c.at = static_cast<std::size_t>(next), c.since = now;
  }
  /// The last stage of every thread ends with the step.
  static void stop() noexcept {
    const std::lock_guard guard(lock());
    for (clock* c : all()) c->at = sample::store_stages;
  }
  /// Sums over all threads since the last time.
  [[nodiscard]] static std::array<double, sample::store_stages> take() noexcept {
    const std::lock_guard guard(lock());
    std::array<double, sample::store_stages> sum{};
    for (clock* c : all()) {
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += c->ms[i];
      c->ms = {};
    }
    return sum;
  }

 private:
  struct clock {
    std::array<double, sample::store_stages> ms{};
    std::size_t at = sample::store_stages;
    std::chrono::steady_clock::time_point since{};
    clock() {
      const std::lock_guard guard(lock());
      all().push_back(this);
    }
    ~clock() {
      const std::lock_guard guard(lock());
      std::erase(all(), this);
    }
  };
  static clock& own() {
    thread_local clock c;
    return c;
  }
  static std::mutex& lock() {
    static std::mutex m;
    return m;
  }
  static std::vector<clock*>& all() {
    static std::vector<clock*> clocks;
    return clocks;
  }
};

/// The cache's tokens in a store of their own.
template <class T>
[[nodiscard]] shuffled_store<T> store_of(const roofline_cache<T>& cache) {
  const cache_shape& c = cache.shape();
  shuffled_store<T> store({.n_kv_heads = c.kv_heads, .dk = c.dim, .dv = c.dim, .seed = 1});
  if (const status made = store.assign(cache.view()); !made) throw std::runtime_error(made.message());
  return store;
}

/// The functor over a store: a scan of codes, picks and a slice, or all rows where it predicts that to be faster.
template <class T>
class store_mode : public roofline_mode<T> {
  struct timed_sampler : sample::from_store {
    static void enter(sample::store_stage s) noexcept { stage_clock::enter(s); }
  };
  struct timed_policy : store_policy {
    using sampler = timed_sampler;
  };

 public:
  store_mode() : roofline_mode<T>("store") {}
  void prepare(const roofline_step<T>& s) override { store_ = store_of(s.cache); }
  status run(const roofline_step<T>& s, std::uint32_t number) override {
    config c;
    c.epsilon = s.epsilon;
    c.delta = s.delta;
    const status done = vattention<timed_policy>(c)(s.cache.query(), store_, s.cache.options(), s.result(), memory_,
                                                    {.seed = 1, .step = number}, s.pool);
    stage_clock::stop();
    return done;
  }
  [[nodiscard]] bool verifies() const override { return true; }
  [[nodiscard]] std::vector<double> take_stages(int steps) override {
    std::vector<double> ms;
    for (const double all : stage_clock::take()) ms.push_back(all / steps);
    return ms;
  }
  [[nodiscard]] double sketch_share() const override {
    return static_cast<double>(store_.sketch_bytes()) / static_cast<double>(store_.row_bytes());
  }

 private:
  shuffled_store<T> store_;
  workspace memory_;
};

/// The functor by an index beside the cache as it lies, or beside pages of 16 tokens that hold the same rows; what the
/// last step found is remembered where it is `warm`.
template <class T, bool Paged>
class index_mode : public roofline_mode<T> {
  struct timed_sampler : sample::from_index {
    static void enter(sample::store_stage s) noexcept { stage_clock::enter(s); }
  };
  struct timed_policy : index_policy {
    using sampler = timed_sampler;
  };

 public:
  index_mode(std::string name, bool warm) : roofline_mode<T>(std::move(name)), warm_(warm) {}
  void prepare(const roofline_step<T>& s) override {
    const cache_shape& c = s.cache.shape();
    index_.clear();
    index_.emplace_back(index_shape{.n_kv_heads = c.kv_heads, .dk = c.dim, .dv = c.dim, .seed = 1});
    if (const status made = index_[0].build(s.cache.view()); !made) throw std::runtime_error(made.message());
    remembered_.assign(warm_ ? static_cast<std::size_t>(c.kv_heads) : 0, {});
    row_bytes_ = static_cast<double>(s.cache.bytes());
    if constexpr (Paged) make_pages(s.cache);
  }
  status run(const roofline_step<T>& s, std::uint32_t number) override {
    config c;
    c.epsilon = s.epsilon, c.delta = s.delta;
    c.sinks = c.window = 16;
    const vattention<timed_policy> attend(c, {index_, remembered_});
    const auto call = [&](const auto& view) {
      return attend(s.cache.query(), view, s.cache.options(), s.result(), memory_, {.seed = 1, .step = number}, s.pool);
    };
    status done;
    if constexpr (Paged) {
      done = call(pages(s.cache.shape()));
    } else {
      done = call(s.cache.view());
    }
    stage_clock::stop();
    return done;
  }
  [[nodiscard]] bool verifies() const override { return true; }
  [[nodiscard]] bool by_default() const override { return false; }
  [[nodiscard]] std::vector<double> take_stages(int steps) override {
    std::vector<double> ms;
    for (const double all : stage_clock::take()) ms.push_back(all / steps);
    return ms;
  }
  [[nodiscard]] double sketch_share() const override { return static_cast<double>(index_[0].bytes()) / row_bytes_; }

 private:
  static constexpr index_t page = 16;

  // FlashInfer's HND pages, in random order.
  void make_pages(const roofline_cache<T>& cache)
  requires kernel::element<T>
  {
    const cache_shape& c = cache.shape();
    const index_t count = (c.n + page - 1) / page;
    indices_.resize(static_cast<std::size_t>(count));
    for (index_t i = 0; i < count; ++i) indices_[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i);
    std::shuffle(indices_.begin(), indices_.end(), std::mt19937_64(3));
    indptr_ = {0, static_cast<std::int32_t>(count)};
    last_ = static_cast<std::int32_t>((c.n - 1) % page + 1);
    const auto row = static_cast<std::size_t>(cache.row_bytes());
    k_ = huge_pages(static_cast<std::size_t>(count * c.kv_heads * page) * row);
    v_ = huge_pages(k_.size());
    for (index_t token = 0; token < c.n; ++token) {
      for (index_t h = 0; h < c.kv_heads; ++h) {
        const index_t at = (indices_[static_cast<std::size_t>(token / page)] * c.kv_heads + h) * page + token % page;
        std::memcpy(k_.data() + static_cast<std::size_t>(at) * row, cache.k(h) + token * cache.row_bytes(), row);
        std::memcpy(v_.data() + static_cast<std::size_t>(at) * row, cache.v(h) + token * cache.row_bytes(), row);
      }
    }
  }
  [[nodiscard]] auto pages(const cache_shape& c) const
  requires kernel::element<T>
  {
    return flashinfer_paged_kv(reinterpret_cast<const T*>(k_.data()), reinterpret_cast<const T*>(v_.data()),
                               page_order::hnd,
                               flashinfer_pages{.n_pages = static_cast<index_t>(indices_.size()),
                                                .page_size = page,
                                                .n_kv_heads = c.kv_heads,
                                                .dk = c.dim,
                                                .dv = c.dim,
                                                .n_batch = 1,
                                                .indptr = indptr_.data(),
                                                .indices = indices_.data(),
                                                .last_page_len = &last_});
  }

  bool warm_;
  double row_bytes_ = 0;
  std::vector<kv_index> index_;
  std::vector<index_memory> remembered_;
  page_buffer k_, v_;  // [pages, kv_heads, page, dim]
  std::vector<std::int32_t> indices_, indptr_;
  std::int32_t last_ = 0;
  workspace memory_;
};

/// A mode over the same rows in q8_0, a copy that all such modes share.
template <class T, template <class> class Mode>
class q8_mode : public roofline_mode<T> {
  using cache_type = roofline_cache<kernel::q8_0_block>;
  using step_type = roofline_step<kernel::q8_0_block>;

 public:
  template <class... A>
  explicit q8_mode(std::string name, A&&... of) : roofline_mode<T>(std::move(name)), mode_(std::forward<A>(of)...) {}
  void prepare(const roofline_step<T>& s) override {
    static std::weak_ptr<cache_type> last;
    static const void* made_of = nullptr;
    cache_ = made_of == &s.cache ? last.lock() : nullptr;
    if (!cache_) last = cache_ = std::make_shared<cache_type>(s.cache);
    made_of = &s.cache;
    mode_.prepare(step(s));
  }
  status run(const roofline_step<T>& s, std::uint32_t number) override {
    cache_->ask(s.cache.asked());
    return mode_.run(step(s), number);
  }
  [[nodiscard]] double bytes() const override { return mode_.bytes(); }
  [[nodiscard]] std::vector<double> take_stages(int steps) override { return mode_.take_stages(steps); }
  [[nodiscard]] bool verifies() const override { return mode_.verifies(); }
  [[nodiscard]] bool by_default() const override { return false; }
  [[nodiscard]] std::string baseline() const override { return "dense_q8"; }
  [[nodiscard]] double sketch_share() const override { return mode_.sketch_share(); }

 private:
  [[nodiscard]] step_type step(const roofline_step<T>& s) const {
    return {*cache_, s.pool, s.epsilon, s.delta, s.output, s.certificates};
  }
  std::shared_ptr<cache_type> cache_;
  Mode<kernel::q8_0_block> mode_;
};
template <class T>
using contiguous_index_mode = index_mode<T, false>;

/// A token appended to a store: one after other data has been in the caches, as between two steps of a layer, or many.
template <class T>
class append_mode : public roofline_mode<T> {
 public:
  append_mode(std::string name, index_t tokens) : roofline_mode<T>(std::move(name)), tokens_(tokens) {}
  void prepare(const roofline_step<T>& s) override {
    const cache_shape& c = s.cache.shape();
    store_ = store_of(s.cache);
    const auto width = static_cast<std::size_t>(c.kv_heads * c.dim);
    k_.resize(width), v_.resize(width);
    for (index_t kv = 0; kv < c.kv_heads; ++kv) {
      const auto to = static_cast<std::size_t>(kv * c.dim);
      std::memcpy(k_.data() + to, s.cache.k(kv), static_cast<std::size_t>(c.dim) * sizeof(T));
      std::memcpy(v_.data() + to, s.cache.v(kv), static_cast<std::size_t>(c.dim) * sizeof(T));
    }
  }
  status run(const roofline_step<T>&, std::uint32_t) override {
    for (index_t i = 0; i < tokens_; ++i) {
      if (const status s = store_.append(k_.data(), v_.data()); !s) return s;
    }
    return {};
  }
  [[nodiscard]] index_t parts() const override { return tokens_; }
  [[nodiscard]] bool attends() const override { return false; }
  [[nodiscard]] bool by_default() const override { return false; }

 private:
  index_t tokens_;
  shuffled_store<T> store_;
  std::vector<T> k_, v_;  // [kv_heads, dim], of the token
};

/// Importance sampling by 4-bit codes of the keys, from K and V apart or from interleaved rows.
template <class T>
class importance_mode : public roofline_mode<T> {
  using codes = sketch::key_codes<4>;
  struct by_codes : default_policy {
    using selector = select::indexed<codes>;
    using sampler = sample::by_importance;
  };

 public:
  explicit importance_mode(bool interleaved)
      : roofline_mode<T>(interleaved ? "codes_pairs" : "codes"), interleaved_(interleaved) {}
  void prepare(const roofline_step<T>& s) override {
    const cache_shape& c = s.cache.shape();
    codes_.assign(static_cast<std::size_t>(c.kv_heads), codes(c.dim, 1));
    for (index_t h = 0; h < c.kv_heads; ++h)
      append_from(codes_[static_cast<std::size_t>(h)], s.cache.view().head(0, h));
    store_ = interleaved_store<T>({.n_kv_heads = c.kv_heads, .dk = c.dim, .dv = c.dim});
    if (const status made = store_.assign(s.cache.view()); !made) throw std::runtime_error(made.message());
    norms_.clear(), centres_.clear();
    for (index_t h = 0; h < c.kv_heads; ++h) {  // both have the same
      const auto head = store_.head(0, h);
      for (index_t i = 0; i < c.n; ++i) norms_.push_back(head.value_norm(i));
      centres_.insert(centres_.end(), head.value_centre(), head.value_centre() + c.dim);
    }
    if (!interleaved_) store_ = {};
  }
  status run(const roofline_step<T>& s, std::uint32_t number) override {
    config c;
    c.epsilon = s.epsilon, c.delta = s.delta, c.sinks = c.window = 16;
    const vattention<by_codes> attend(c, {.heads = codes_});
    const draw_key key{.seed = 1, .step = number};
    if (interleaved_) return attend(s.cache.query(), store_, s.cache.options(), s.result(), memory_, key, s.pool);
    const auto apart = s.cache.view().with_norms({.values = norms_.data(), .value_centres = centres_.data()});
    return attend(s.cache.query(), apart, s.cache.options(), s.result(), memory_, key, s.pool);
  }
  [[nodiscard]] bool verifies() const override { return true; }
  [[nodiscard]] bool by_default() const override { return false; }

 private:
  bool interleaved_;
  std::vector<codes> codes_;  // [kv_heads]
  interleaved_store<T> store_;
  std::vector<float> norms_, centres_;  // [kv_heads, n], [kv_heads, dim]
  workspace memory_;
};

template <class T>
[[nodiscard]] std::vector<std::unique_ptr<roofline_mode<T>>> make_modes() {
  std::vector<std::unique_ptr<roofline_mode<T>>> modes;
  modes.push_back(std::make_unique<read_mode<T>>());
  modes.push_back(std::make_unique<random_rows_mode<T>>(false));
  modes.push_back(std::make_unique<random_rows_mode<T>>(true));
  modes.push_back(std::make_unique<dense_mode<T>>());
  modes.push_back(std::make_unique<functor_mode<T, default_policy>>("default"));
  modes.push_back(std::make_unique<functor_mode<T, uniform_policy>>("uniform"));
  modes.push_back(std::make_unique<index_mode<T, false>>("index", false));
  modes.push_back(std::make_unique<index_mode<T, false>>("index_warm", true));
  if constexpr (kernel::element<T>) {
    modes.push_back(std::make_unique<index_mode<T, true>>("index_paged", false));
    modes.push_back(std::make_unique<index_mode<T, true>>("index_paged_warm", true));
    modes.push_back(std::make_unique<q8_mode<T, dense_mode>>("dense_q8"));
    modes.push_back(std::make_unique<q8_mode<T, contiguous_index_mode>>("index_q8", "index_q8", false));
    modes.push_back(std::make_unique<q8_mode<T, contiguous_index_mode>>("index_q8_warm", "index_q8_warm", true));
    modes.push_back(std::make_unique<store_mode<T>>());
    modes.push_back(std::make_unique<append_mode<T>>("append", 1));
    modes.push_back(std::make_unique<append_mode<T>>("append_many", 256));
    modes.push_back(std::make_unique<importance_mode<T>>(false));
    modes.push_back(std::make_unique<importance_mode<T>>(true));
  }
  return modes;
}

/// Names of the modes of caches of T.
template <class T>
[[nodiscard]] std::vector<std::string> mode_names() {
  std::vector<std::string> names;
  for (const auto& mode : make_modes<T>()) names.push_back(mode->name());
  return names;
}

}  // namespace vattn::bench
