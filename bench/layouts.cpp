// What a row costs where it lies: key products and value sums of rows at random, for each layout of an engine.
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "vattn/vattn.hpp"

namespace {

using namespace vattn;

constexpr index_t n = 131072, d = 128, page = 16;

/// Bytes for n rows of 512 bytes, any of which is a valid number of every type, twice: K and V.
struct memory {
  memory() : k(n * d), v(n * d), pages(n), indptr{0, n / page}, last{page} {
    std::mt19937 random(1);
    for (auto* x : {&k, &v})
      for (std::uint32_t& word : *x) word = random() & 0x3b3b3b3bu;
    for (index_t i = 0; i < n; ++i) pages[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i);
    std::shuffle(pages.begin(), pages.begin() + n / page, random);
    for (int i = 0; i < 4096; ++i) tokens.push_back(static_cast<index_t>(random() % n));
  }
  template <class T>
  [[nodiscard]] const T* keys() const {
    return reinterpret_cast<const T*>(k.data());
  }
  template <class T>
  [[nodiscard]] const T* values() const {
    return reinterpret_cast<const T*>(v.data());
  }
  std::vector<std::uint32_t> k, v;
  std::vector<std::int32_t> pages;
  std::int32_t indptr[2], last[1];
  std::vector<index_t> tokens;
};
const memory& data() {
  static const memory m;
  return m;
}

template <class KV>
void gather(benchmark::State& state, const KV& cache) {
  using kernel::axpy, kernel::dot;
  if (const status s = cache.validate(); !s) return state.SkipWithError(s.message());
  const auto head = cache.head(0, 0);
  const std::vector<float> q(d, 0.01f);
  std::vector<float> sum(d);
  for (auto _ : state) {
    for (const index_t token : data().tokens) axpy(dot(q.data(), head.key(token)), head.value(token), sum.data());
    benchmark::DoNotOptimize(sum.data());
  }
  state.counters["per_row"] =
      benchmark::Counter(static_cast<double>(data().tokens.size()),
                         benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

template <class T>
void contiguous(benchmark::State& state) {
  gather(state, padded_kv(data().keys<T>(), data().values<T>(), {.n_tokens = n, .dk = d, .dv = d}, nullptr));
}
template <class T>
void paged(benchmark::State& state) {
  gather(state, flashinfer_paged_kv(data().keys<T>(), data().values<T>(), page_order::nhd,
                                    {.n_pages = n / page,
                                     .page_size = page,
                                     .dk = d,
                                     .dv = d,
                                     .indptr = data().indptr,
                                     .indices = data().pages.data(),
                                     .last_page_len = data().last}));
}
template <class T>
void transposed_values(benchmark::State& state) {
  constexpr index_t e = sizeof(T);
  gather(state, ggml_transposed_kv<T, T>({data().keys<T>(), {d, n, 1, 1}, {e, d * e, n * d * e, n * d * e}},
                                         {data().values<T>(), {n, d, 1, 1}, {e, n * e, n * d * e, n * d * e}}));
}
void x_packed(benchmark::State& state) {
  std::int32_t length = n;
  gather(state, vllm_x_packed_kv(data().keys<Eigen::half>(), data().values<Eigen::half>(),
                                 {.n_blocks = n / page,
                                  .block_size = page,
                                  .d = d,
                                  .max_blocks = n / page,
                                  .block_table = data().pages.data(),
                                  .seq_lens = &length}));
}

/// What a query sees of a cache whose cells have positions: in order, after a ring has wrapped, in runs of 256,
/// shuffled.
void visible_cells(benchmark::State& state) {
  std::vector<std::int32_t> positions(n);
  for (index_t i = 0; i < n; ++i) positions[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i);
  std::mt19937 random(1);
  if (state.range(0) == 1) std::rotate(positions.begin(), positions.begin() + n / 3, positions.end());
  if (state.range(0) == 2)
    for (index_t i = 0; i + 256 < n; i += 512)
      std::swap_ranges(positions.begin() + i, positions.begin() + i + 256,
                       positions.begin() + static_cast<index_t>(random() % (n / 256)) * 256);
  if (state.range(0) == 3) std::shuffle(positions.begin(), positions.end(), random);
  std::vector<ordinal> storage(n), ends(256);
  for (auto _ : state) {
    const population seen = visible_by_position(n, {}, {positions.data(), 4}, {}, 128, 128, storage, ends);
    benchmark::DoNotOptimize(seen[n / 2]);
  }
}

BENCHMARK(visible_cells)->DenseRange(0, 3)->Unit(benchmark::kMicrosecond);
BENCHMARK(contiguous<float>);
BENCHMARK(contiguous<Eigen::half>);
BENCHMARK(contiguous<Eigen::bfloat16>);
BENCHMARK(contiguous<kernel::e4m3>);
BENCHMARK(contiguous<kernel::q8_0_block>);
BENCHMARK(contiguous<kernel::q4_0_block>);
BENCHMARK(paged<float>);
BENCHMARK(paged<Eigen::half>);
BENCHMARK(transposed_values<float>);
BENCHMARK(transposed_values<Eigen::half>);
BENCHMARK(x_packed);

}  // namespace

BENCHMARK_MAIN();
