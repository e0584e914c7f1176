// Floating-point environments of callers: whatever they have set, results are the same bits.
#include <cfenv>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vattn/base/thread_pool.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/long_enough.hpp"
#include "support/problem.hpp"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace {

using namespace vattn;
using namespace vattn::test;

// Sets a mode of the calling thread, and the old one when it goes.
class mode {
 public:
  enum kind { as_it_is, flushing, upward, downward, towards_zero, flushing_upward };
  explicit mode(kind k) {
    std::fegetenv(&old_);
    if (k == upward || k == flushing_upward) std::fesetround(FE_UPWARD);
    if (k == downward) std::fesetround(FE_DOWNWARD);
    if (k == towards_zero) std::fesetround(FE_TOWARDZERO);
    if (k != flushing && k != flushing_upward) return;
#if defined(__SSE2__)
    _mm_setcsr(_mm_getcsr() | 0x8040);
#elif defined(__aarch64__)
    std::uint64_t word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word));
    __asm__ volatile("msr fpcr, %0" ::"r"(word | std::uint64_t{1} << 24));
#endif
  }
  ~mode() { std::fesetenv(&old_); }
  mode(const mode&) = delete;
  mode& operator=(const mode&) = delete;

 private:
  std::fenv_t old_;
};
constexpr mode::kind other_modes[] = {mode::flushing, mode::upward, mode::downward, mode::towards_zero,
                                      mode::flushing_upward};

// Does what `f` does in another mode, and gives its results as bytes.
using bytes = std::vector<unsigned char>;
template <class T>
void put(bytes& to, const std::vector<T>& values) {
  const auto* at = reinterpret_cast<const unsigned char*>(values.data());
  to.insert(to.end(), at, at + values.size() * sizeof(T));
}
void put(bytes& to, const results& r) {
  put(to, r.output);
  put(to, r.log_sum_exp);
  for (const certificate& c : r.certificates) {
    put(to, std::vector<index_t>{c.rows_exact, c.rows_sampled, c.budget, c.rounds, c.breaches});
    put(to, std::vector<double>{c.epsilon_achieved, c.denominator_error, c.coherence, c.log_denominator});
  }
}
void check_same_bits(const std::function<bytes()>& f) {
  const bytes want = f();
  for (const mode::kind k : other_modes) {
    bytes got;
    {
      const mode other(k);
      got = f();
    }
    INFO("mode " << k);
    CHECK(got == want);
  }
}

template <class Cache, class Policy = ranked_policy, class E = serial_executor>
results attend(const problem<>& p, const Cache& cache, const typename Policy::selector& selector = {}, E&& exec = E{}) {
  config c;
  c.sinks = c.window = 16;
  c.epsilon = 0.2;
  results r(p.s);
  workspace memory;
  // The size of the workspace is rounded as the call rounds it.
  const vattention<Policy> functor(c, selector);
  const std::size_t size =
      functor.workspace_bytes(longest(cache), p.s.dk, p.s.dv, static_cast<bool>(p.options.mask), exec.workers());
  const status s = functor(p.query(), cache, p.options, r.view(), memory, {.seed = 4}, exec);
  INFO(s.message());
  REQUIRE(s.ok());
  CHECK(memory.memory().size() <= size + workspace::alignment);
  return r;
}
template <class Cache>
results exactly(const problem<>& p, const Cache& cache) {
  results r(p.s);
  workspace memory;
  REQUIRE(exact_attention(p.query(), cache, p.options, r.view(), memory).ok());
  return r;
}

struct importance : default_policy {
  using selector = select::indexed<sketch::key_codes<4>>;
  using sampler = sample::by_importance;
};

// A head of n tokens, K and V of d elements in one buffer each.
struct one_head {
  index_t n, d;
  std::int32_t table = 0, length = static_cast<std::int32_t>(n);
  [[nodiscard]] vllm_blocks blocks() const {
    return {.n_blocks = 1,
            .block_size = n,
            .n_kv_heads = 1,
            .d = d,
            .n_batch = 1,
            .max_blocks = 1,
            .block_table = &table,
            .seq_lens = &length};
  }
};

// Elements that are subnormal in their own type, and for bfloat16 and float in float too.
template <class T>
std::vector<T> subnormals(std::size_t count, std::uint32_t most) {
  std::mt19937 random(7);
  std::vector<T> x(count);
  for (T& e : x) {
    if constexpr (std::same_as<T, float>) {
      e = std::bit_cast<float>(static_cast<std::uint32_t>(random() % most) | static_cast<std::uint32_t>(random())
                                                                                 << 31);
    } else if constexpr (std::same_as<T, kernel::e4m3>) {
      e.bits = static_cast<std::uint8_t>(random() % most | random() % 2 << 7);
    } else {
      e = std::bit_cast<T>(static_cast<std::uint16_t>(random() % most | random() % 2 << 15));
    }
  }
  return x;
}

}  // namespace

TEMPLATE_TEST_CASE("environment: rows of subnormal elements", "", float, Eigen::half, Eigen::bfloat16, kernel::e4m3) {
  const one_head one{.n = 1500, .d = 40};
  constexpr std::uint32_t most = std::same_as<TestType, float>          ? 0x007fffff
                                 : std::same_as<TestType, Eigen::half>  ? 0x03ff
                                 : std::same_as<TestType, kernel::e4m3> ? 0x07
                                                                        : 0x007f;
  const auto kv = subnormals<TestType>(static_cast<std::size_t>(2 * one.n * one.d), most + 1);
  const problem<> p({.n = one.n, .dk = one.d, .dv = one.d}, 3);
  check_same_bits([&] {
    bytes out;
    put(out, exactly(p, vllm_kv(kv.data(), one.blocks())));
    put(out, attend(p, vllm_kv(kv.data(), one.blocks())));
    return out;
  });
  if constexpr (std::same_as<TestType, kernel::e4m3> || std::same_as<TestType, Eigen::half>) {
    // And they are no zeros: the values' mean is that of their numbers.
    const mode other(mode::flushing);
    const results r = exactly(p, vllm_kv(kv.data(), one.blocks()));
    const bool any = std::any_of(r.output.begin(), r.output.end(), [](float x) { return x != 0; });
    CHECK(any);
  }
}

TEMPLATE_TEST_CASE("environment: blocks whose scales are subnormal halves", "", kernel::q8_0_block,
                   kernel::q4_0_block) {
  const index_t n = 600, d = 64;
  std::vector<float> x(static_cast<std::size_t>(n * d));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = 1e-6f * static_cast<float>(i * 37 % 101) - 3e-5f;
  check_same_bits([&] {
    std::vector<TestType> blocks(x.size() / 32);
    kernel::quantise(x.data(), x.size(), blocks.data());
    const auto size = static_cast<std::size_t>(sizeof(TestType));
    const ggml_layout layout(blocks.data(), {d, n, 1, 1}, {size, 2 * size, 0, 0});
    const problem<> p({.n = n, .dk = d, .dv = d}, 3);
    const results r = exactly(p, ggml_kv<TestType>(layout, layout));
    const bool any = std::any_of(r.output.begin(), r.output.end(), [](float y) { return y != 0; });
    CHECK(any);
    bytes out;
    put(out, blocks);
    put(out, r);
    return out;
  });
}

TEST_CASE("environment: a mask of halves, and subnormal logits") {
  problem<> p({.n = 900, .dk = 16, .dv = 16}, 5);
  std::vector<Eigen::half> mask(900);
  for (std::size_t i = 0; i < mask.size(); ++i)
    mask[i] = std::bit_cast<Eigen::half>(static_cast<std::uint16_t>(i % 7 == 0 ? 0xfc00 : i));
  p.options.mask = mask_view(tensor_view<const Eigen::half, 4>(mask.data(), {1, 1, 1, 900}));
  check_same_bits([&] {
    bytes out;
    put(out, exactly(p, p.cache()));
    put(out, attend(p, p.cache()));
    return out;
  });
}

TEST_CASE("environment: policies, indices and stores") {
  const index_t n = 6000, d = 32;
  const problem<> p({.heads = 4, .kv_heads = 1, .n = n, .dk = d, .dv = d}, 11, 2);
  check_same_bits([&] {
    bytes out;
    put(out, attend(p, p.cache()));
    std::vector<sketch::key_codes<4>> codes{sketch::key_codes<4>(d, 1)};
    append_from(codes[0], p.cache().head(0, 0));
    codes[0].truncate(n - 100);
    append_from(codes[0], p.cache().head(0, 0));
    put(out, attend<kv_view<float>, importance>(p, p.cache(), {codes}));
    thread_pool pool(3);
    put(out, attend<kv_view<float>, importance>(p, p.cache(), {codes}, pool));
    put(out, save(codes[0]));
    sketch::product_codes learned(d, 8, {.train_size = 256, .iterations = 2});
    append_from(learned, p.cache().head(0, 0));
    put(out, save(learned));
    select::quest pages(d);
    append_from(pages, p.cache().head(0, 0));
    pages.truncate(n - 5);
    put(out, save(pages));
    select::magic_pig hashes(d, 8, 10);
    append_from(hashes, p.cache().head(0, 0));
    put(out, save(hashes));
    select::double_sparsity channels({0, 3, 5, 7});
    append_from(channels, p.cache().head(0, 0));
    put(out, save(channels));
    interleaved_store<float> rows({.n_kv_heads = 1, .dk = d, .dv = d});
    REQUIRE(rows.assign(p.cache()).ok());
    REQUIRE(rows.append(p.k.data(), p.v.data()).ok());
    put(out, attend(p, rows));
    return out;
  });
}

TEST_CASE("environment: decode from a store, and its codes") {
  const index_t n = long_enough(4), d = 32;
  const problem<> p({.heads = 4, .kv_heads = 1, .n = n, .dk = d, .dv = d}, 11);
  check_same_bits([&] {
    shuffled_store<Eigen::half> store({.n_kv_heads = 1, .dk = d, .dv = d, .seed = 3});
    REQUIRE(store.assign(p.cache()).ok());
    std::vector<Eigen::half> row(static_cast<std::size_t>(d), Eigen::half(0.25f));
    for (int i = 0; i < 40; ++i) REQUIRE(store.append(row.data(), row.data()).ok());
    const results r = attend<shuffled_store<Eigen::half>, store_policy>(p, store);
    CHECK(r.certificates[0].promise == guarantee::asymptotic);
    bytes out;
    put(out, r);
    return out;
  });
}

TEST_CASE("environment: states that are merged by others") {
  check_same_bits([] {
    std::vector<float> a{1e-38f, 1.0f / 3}, b{3e-39f, 7.1f}, out(2);
    softmax_state x(0.1f, 1.3, a);
    const softmax_state y(0.7f, 2.9, b);
    x.merge(y);
    const float lse = x.finish(out);
    bytes all;
    put(all, out);
    put(all, std::vector<float>{lse});
    return all;
  });
}

TEST_CASE("environment: the caller's own is as it was") {
  const problem<> p({.n = 700, .dk = 16, .dv = 16}, 5);
  for (const mode::kind k : other_modes) {
    const mode other(k);
    const int rounding = std::fegetround();
    static_cast<void>(attend(p, p.cache()));
    CHECK(std::fegetround() == rounding);
    if (k != mode::flushing) continue;
    volatile float least = 0x1p-126f;
    volatile float half = 0.5f;
    CHECK(least * half == 0);
  }
#if defined(__SSE2__)
  // Traps do not fire within, though inexact results are everywhere; exceptions that the caller will test stay as he
  // left them.
  const unsigned before = _mm_getcsr();
  _mm_setcsr((before & ~0x1000u) & ~0x3fu);
  static_cast<void>(exactly(p, p.cache()));
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  CHECK((after & 0x1000u) == 0);
  CHECK((after & 0x3fu) == 0);
#endif
}
