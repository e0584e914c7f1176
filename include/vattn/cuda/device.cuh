// What the kernels share: words of PTX, rows of a cache, draws.
#include "vattn/macros_push.hpp"
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "vattn/cuda/plan.hpp"

namespace vattn::VATTN_ABI::cuda::detail {

inline constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;
inline constexpr unsigned full = 0xffffffffu;
// log2(reach/typical) = code/32 − 3; code 255: a key to be read for certain.
inline constexpr float reach_unit = 1.0f / 32, reach_least = -3.0f;

template <class T>
struct element_of;
template <>
struct element_of<__nv_bfloat16> {
  static constexpr element value = element::bf16;
  __device__ static float low(std::uint32_t x) { return __uint_as_float(x << 16); }
  __device__ static float high(std::uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
  __device__ static std::uint32_t pack(float x, float y) {
    const __nv_bfloat162 r = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const std::uint32_t*>(&r);
  }
  __device__ static __nv_bfloat16 from(float x) { return __float2bfloat16_rn(x); }
  // C += A·B, 16 × 8 × 16.
  __device__ static void mma(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                             std::uint32_t b0, std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};
template <>
struct element_of<__half> {
  static constexpr element value = element::f16;
  __device__ static float low(std::uint32_t x) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(x & 0xffff)));
  }
  __device__ static float high(std::uint32_t x) { return low(x >> 16); }
  __device__ static std::uint32_t pack(float x, float y) {
    const __half2 r = __floats2half2_rn(x, y);
    return *reinterpret_cast<const std::uint32_t*>(&r);
  }
  __device__ static __half from(float x) { return __float2half_rn(x); }
  __device__ static void mma(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                             std::uint32_t b0, std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

// C += A·B, 16 × 8 × 8, of float numbers whose low 13 bits are zero: holds any bf16 or f16, and weights of any size.
__device__ inline void mma_tf32(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                                float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ inline std::uint32_t to_tf32(float x) {
  std::uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
// C += A·B, 16 × 8 × 32, codes times a query of 8 bits.
__device__ inline void mma_codes(int (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                                 std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
__device__ inline void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ inline float exp2_of(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ inline float log2_of(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ inline float sqrt_of(float x) {
  float r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ inline float sum_warp(float x) {
#pragma unroll
  for (int o = 16; o; o /= 2) x += __shfl_xor_sync(full, x, o);
  return x;
}
// Waits for what the kernel before wrote; then lets the next one come.
__device__ inline void after_last_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline std::uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

__device__ inline int length_of(const cache_view& c, int b) {
  if (c.lengths) return min(c.lengths[b], c.max_tokens);
  if (c.last_page_len) {
    const int pages = c.table_start[b + 1] - c.table_start[b];
    return pages == 0 ? 0 : min(((pages - 1) << c.page_shift) + c.last_page_len[b], c.max_tokens);
  }
  return c.max_tokens;
}
// Rows of one KV head of one sequence.
struct head_rows {
  std::int64_t base, page_stride;
  const std::int32_t* table;
  int page_shift, row_stride;
  __device__ head_rows(const cache_view& c, int b, int h)
      : base(h * c.head_stride + (c.table ? 0 : b * c.page_stride)),
        page_stride(c.page_stride),
        table(c.table ? c.table + (c.table_start ? c.table_start[b] : b * c.table_stride) : nullptr),
        page_shift(c.page_shift),
        row_stride(static_cast<int>(c.row_stride)) {}
  __device__ std::int64_t operator()(int token) const {
    const int page = token >> page_shift;
    const std::int64_t first = table ? base + __ldg(table + page) * page_stride : base;
    return first + static_cast<std::int64_t>(token - (page << page_shift)) * row_stride;
  }
};

// Philox4x32-10, as base/philox.hpp has it: two words that name the draws of one KV head in one step.
__host__ __device__ inline void draw_words(std::uint64_t seed, std::uint32_t layer, std::uint32_t step,
                                           std::uint32_t sequence, std::uint32_t head, std::uint32_t (&out)[2]) {
  std::uint32_t c[4] = {head, step, sequence, layer},
                k[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c[0], b = std::uint64_t{0xCD9E8D57u} * c[2];
    const std::uint32_t next[4] = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<std::uint32_t>(b),
                                   static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<std::uint32_t>(a)};
    c[0] = next[0], c[1] = next[1], c[2] = next[2], c[3] = next[3];
    k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
  }
  out[0] = c[0], out[1] = c[1];
}
// The token's number of 32 bits: two rounds of multiplication with a key before each, so that calls are unrelated.
__host__ __device__ inline std::uint32_t draw(std::uint32_t token, std::uint32_t key0, std::uint32_t key1) {
  std::uint32_t x = token * 0x9E3779B9u + key0;
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x += key1, x *= 0x846ca68bu, x ^= x >> 16;
  return x;
}
// log2 of u in (0, 1).
__device__ inline float log2_uniform(std::uint32_t x) { return log2_of(static_cast<float>(x) + 0.5f) - 32; }

struct kernel_arguments {
  arguments a;
  workspace_pieces w;
  code_pieces codes;
  std::uint64_t seed;
  std::int64_t code_stride;  // words
  int groups, n_kv, group, chunks, splits, gather_splits, segment, pieces, window, sinks, sliding_window;
  int first_splits, first_segment;                           // of the first round, in the second
  std::int64_t group_counts, group_candidates, group_slots;  // from one group to the next
  float scale, softcap, epsilon, rows, least;                // least: log2 of the smallest probability
  bool rms, rescan;
  float delta;
  quantile_table quantiles;
};

// Where part i of n of `all` begins.
__device__ inline int share_of(int all, int i, int n) { return all / n * i + all % n * i / n; }

// The first token that a query of a sequence of n tokens sees.
__device__ inline int first_token(const kernel_arguments& k, int n) {
  return k.sliding_window > 0 ? max(0, n - k.sliding_window) : 0;
}

// 0 served, 1 open, 2 to be read densely: after the first round, or after the second.
__device__ inline int state_of_head(const kernel_arguments& k, int id, bool after_second) {
  const int open = __ldcg(k.w.open + id);
  return after_second && open == 1 ? 2 * __ldcg(k.w.still_open + id) : open;
}
// Groups with a head in `state` (below 0: all groups), in order: who does what does not vary. All threads of a block of
// `Threads`.
struct group_list {
  int size;
  unsigned short group[listed_groups];
};
template <int Threads>
__device__ inline void list_groups(const kernel_arguments& k, int base, int state, group_list& list) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5;
  __shared__ int counts[Threads / 32];
  __syncthreads();
  if (tid == 0) list.size = 0;
#pragma unroll 1
  for (int from = 0; from < min(listed_groups, k.groups - base); from += Threads) {
    const int group = base + from + tid;
    bool wanted = false;
    if (group < k.groups && from + tid < listed_groups)
#pragma unroll 1
      for (int h = 0; h < k.group; ++h)
        wanted |= state < 0 || state_of_head(k, group * k.group + h, state == 2) == state;
    const unsigned all = __ballot_sync(full, wanted);
    if (lane == 0) counts[warp] = __popc(all);
    __syncthreads();
    int at = list.size + __popc(all & ((1u << lane) - 1)), sum = 0;
#pragma unroll 1
    for (int w = 0; w < Threads / 32; ++w) at += w < warp ? counts[w] : 0, sum += counts[w];
    if (wanted) list.group[at] = static_cast<unsigned short>(from + tid);
    __syncthreads();
    if (tid == 0) list.size += sum;
  }
  __syncthreads();
}

}  // namespace vattn::VATTN_ABI::cuda::detail

#include "vattn/macros_pop.hpp"
