// The scan: every code is read, every token that a head may need is picked, and the sum that fits the thresholds to
// this query is taken.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/cuda/encode.cuh"

namespace vattn::VATTN_ABI::cuda::detail {

// In units of log2, for token i and head h of the group, with s the score of k − μ, r = max(‖v − c‖, K) over the
// typical distance and σ = ‖q‖ρ/sqrt(d):
//   level_h = max(s + log r − A_h, s + log r + zσ − F_h)
//   candidate ⟺ certain, or log u < max(max over h of level_h, log p₀)
// A_h asks for picks in proportion to what a token weighs, F_h that none weighs more than κεT unseen, p₀ that all are
// looked at now and then. `gather.cuh` thins by shifts >= 0 that it learns from the masses Σ 2^(s + log r − A):
//   taken ⟺ certain, or log u < max(max over h of level_h − shift_h, log p₀) =: log π, so π is known exactly.
// Levels are those that half precision leaves: four of a candidate are kept, of one head each, or of more where a group
// has more than four; `level_slot` says which.
inline constexpr float floor_z = 2.0f, floor_kappa = 0.5f;
inline constexpr float reserve = 1.6f, first_reserve = 2.9f;  // of the thresholds under what is expected; log2
// Of the floors' under what the last step's output and mass say: they cost few picks, and what they miss another round.
inline constexpr float floor_reserve = 0.8f;
inline constexpr std::uint32_t certain_flag = 256;

__device__ inline int level_slot(int group, int head) { return group <= 4 ? head : head % 8 / 2; }
__device__ inline std::uint32_t pack_half(float x, float y) {
  const __half2 r = __floats2half2_rn(x, y);
  return *reinterpret_cast<const std::uint32_t*>(&r);
}
__device__ inline std::uint32_t larger_half(std::uint32_t x, std::uint32_t y) {
  const __half2 r = __hmax2(*reinterpret_cast<const __half2*>(&x), *reinterpret_cast<const __half2*>(&y));
  return *reinterpret_cast<const std::uint32_t*>(&r);
}
__device__ inline float half_of(std::uint32_t x, int upper) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(upper ? x >> 16 : x & 0xffff)));
}

template <int Bits, int D>
struct scan_shared {
  static constexpr int stages = 3, stage_bytes = 2 * code_tile<Bits, D>::bytes;
  char ring[scan_warps][stages][stage_bytes];
  std::uint32_t q8[16][D / 4];
  float k1[16], k0[16], plain_of[16], floor_of[16], slope_of[16];
  float mass[scan_warps][16];
  group_list list;
};

// Whether a group with an open head is scanned a second time.
__device__ inline bool scanned_again(const kernel_arguments& k, int group) {
  bool again = false;
#pragma unroll 1
  for (int h = 0; h < k.group; ++h)
    again |= __ldcg(k.w.open + group * k.group + h) == 1 && __ldcg(k.w.fits + (group * k.group + h) * 4 + 3) > 0;
  return again;
}

// A fragment's four words of 8-bit numbers: codes in the upper bits, 64·c of 2 bits and so on.
template <int Bits, int D>
struct code_fragments {
  static constexpr int upper = code_tile<Bits, D>::upper, W = code_tile<Bits, D>::lane_words(upper);
  static constexpr int V = Bits == 3 ? code_tile<Bits, D>::lane_words(1) : 1;
  std::uint32_t a[W], b[V];
  template <int N>
  __device__ static void load(std::uint32_t (&to)[N], const char* plane, int half, int lane) {
    if constexpr (N == 2) {
      const uint2 x = *reinterpret_cast<const uint2*>(plane + lane * 16 + half * 8);
      to[0] = x.x, to[1] = x.y;
    } else {
      const uint4 x = *reinterpret_cast<const uint4*>(plane + half * N * 128 + lane * 16);
      to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    }
  }
  __device__ void load(const char* tile, int half, int lane) {
    load(a, tile, half, lane);
    if constexpr (Bits == 3) load(b, tile + code_tile<Bits, D>::first_words * 4, half, lane);
  }
  template <int B>
  __device__ static std::uint32_t part(const std::uint32_t* words, int count, int up, int p) {
    const int shift = 8 - B - p % (8 / B) * B;
    constexpr std::uint32_t mask = 0x01010101u * (256u - (1u << (8 - B)));
    return (words[up * count / 2 + p / (8 / B)] << shift) & mask;
  }
  __device__ std::uint32_t operator()(int up, int p) const {
    std::uint32_t x = part<upper>(a, W, up, p);
    if constexpr (Bits == 3) x |= part<1>(b, V, up, p) >> 2;
    return x;
  }
};

// A block scans a share of one KV head's tiles, a warp two tiles at a time. Sets = 0: up to 4 heads, both halves of a
// tile in the columns of one product; else Sets·8 heads. Lane 4g + t decides about key g + 8·(t mod 2) of half t/2 of
// each tile.
template <int Bits, int D, int Sets>
__device__ inline void scan_share(const kernel_arguments& k, const rotation_signs& signs, scan_shared<Bits, D>& s,
                                  int group, int split, bool first_round, bool half_query) {
  using tile_t = code_tile<Bits, D>;
  using shared = scan_shared<Bits, D>;
  constexpr int own = D / 32;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5, g = lane >> 2,
            t = lane & 3;
  const int b = group / k.n_kv, heads = k.group;
  // All that the prologue needs is asked for at once.
  const float* head = k.codes.heads + static_cast<std::int64_t>(group) * (2 * D + 8);
  const int n = length_of(k.a.cache, b);
  const std::uint32_t step = k.a.step ? *k.a.step : 0u;
  const std::uint32_t sequence =
      k.a.sequences ? static_cast<std::uint32_t>(k.a.sequences[b]) : static_cast<std::uint32_t>(b);
  struct {
    float x[own], mean[own];
    head_state old;
  } of;
  const auto load = [&](int h) {
    const int id = group * heads + min(h, heads - 1);
    if (half_query)
      load_row<__half, D>(k.a.q, static_cast<std::int64_t>(id) * D, lane, of.x);
    else
      load_row<__nv_bfloat16, D>(k.a.q, static_cast<std::int64_t>(id) * D, lane, of.x);
#pragma unroll
    for (int j = 0; j < own; ++j) of.mean[j] = head[lane * own + j];
    of.old = static_cast<const head_state*>(k.a.state)[id];
  };
  load(warp);
  const head_state other_head = static_cast<const head_state*>(k.a.state)[group * heads + min(lane, heads - 1)];
  const float alpha_of = head[2 * D + alpha_unit], rho_of = head[2 * D + rho_unit],
              variance = head[2 * D + key_variance];

  const int first = first_token(k, n), tiles = closed_tiles(n, k.window), sink_end = first + k.sinks,
            coded_end = tiles * tile_keys;
  const int pair0 = first / 64, pairs = max(0, (tiles + 1) / 2 - pair0);
  const int from = pair0 + share_of(pairs, split, k.splits);
  const int to = pair0 + share_of(pairs, split + 1, k.splits);
  const int mine = to - from > warp ? (to - from - warp + scan_warps - 1) / scan_warps : 0;
  const char* codes = reinterpret_cast<const char*>(k.codes.tiles + group * k.code_stride) +
                      static_cast<std::int64_t>(from + warp) * shared::stage_bytes + lane * 16;
  const auto fetch = [&](int i, int stage) {
    if (i < mine) {
      const char* at = codes + static_cast<std::int64_t>(i) * (scan_warps * shared::stage_bytes);
      char* into = s.ring[warp][stage] + lane * 16;
#pragma unroll
      for (int o = 0; o < shared::stage_bytes; o += 512)
        if (o + 512 <= shared::stage_bytes || o + lane * 16 < shared::stage_bytes) copy16(into + o, at + o);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < shared::stages - 1; ++i) fetch(i, i);
  std::uint32_t keys[2];
  draw_words(k.seed, k.a.layer, step, sequence, static_cast<std::uint32_t>(group % k.n_kv), keys);
#pragma unroll 1
  for (int h = warp; h < heads; h += scan_warps) {  // a warp prepares a head's query and thresholds
    if (h != warp) load(h);
    const int id = group * heads + h;
    float(&x)[own] = of.x;
    const head_state& old = of.old;
    float along = 0, norm2 = 0, top = 0;
#pragma unroll
    for (int j = 0; j < own; ++j) along += x[j] * of.mean[j], norm2 += x[j] * x[j];
    rotate<D>(x, signs, lane);
#pragma unroll
    for (int j = 0; j < own; ++j) top = fmaxf(top, fabsf(x[j]));
#pragma unroll
    for (int o = 16; o; o /= 2) {
      along += __shfl_xor_sync(full, along, o), norm2 += __shfl_xor_sync(full, norm2, o);
      top = fmaxf(top, __shfl_xor_sync(full, top, o));
    }
    const float unit = fmaxf(top, 1e-20f) / 127, inverse = 1 / unit;
    int sum = 0;
    std::uint32_t bytes = 0;
#pragma unroll
    for (int j = 0; j < own; ++j) {
      const int c = __float2int_rn(x[j] * inverse);
      sum += c, bytes |= static_cast<std::uint32_t>(c & 255) << (8 * ((lane * own + j) % 4));
    }
    if (own == 2) bytes |= __shfl_xor_sync(full, bytes, 1);
    if (own == 4 || lane % 2 == 0) s.q8[h][lane * own / 4] = bytes;
    sum = __reduce_add_sync(full, sum);
    if (lane == 0) {
      const float nats = fabsf(k.scale) * sqrtf(norm2);
      const float per_code = k.scale * log2_e * alpha_of * unit;
      s.k1[h] = per_code * 2 / (1 << (8 - Bits));
      // Rounded step by step, as a host would.
      s.k0[h] = __fmaf_rn(-12582912.0f, s.k1[h], -__fmul_rn(per_code, static_cast<float>(((1 << Bits) - 1) * sum)));
      const float spread = nats * sqrtf(variance), log_n = __logf(fmaxf(1.0f, static_cast<float>(coded_end)));
      const float edge = sqrtf(2 * log_n);
      const float expected = log2_e * (spread < edge ? log_n + spread * spread / 2 : spread * edge);
      float* mark = k.w.thresholds + id * mark_size;
      const float sigma_of = nats * log2_e * rho_of * rsqrtf(static_cast<float>(D));
      float A, F;
      if (first_round) {
        const float mass = expected + old.mass * log2_e, less = old.known ? reserve : first_reserve;
        A = mass - log2_of(k.rows) - old.rows * log2_e - less;
        F = mass + log2_of(floor_kappa * k.epsilon) - less - floor_reserve +
            (old.known ? (old.denominator + old.scale) * log2_e : -1.0f);
      } else {
        const bool wanted = __ldcg(k.w.open + id) == 1;
        A = wanted ? __ldcg(k.w.fits + id * 4 + 1) : 1e30f, F = wanted ? __ldcg(k.w.fits + id * 4 + 2) : 1e30f;
      }
      s.plain_of[h] = A, s.floor_of[h] = F, s.slope_of[h] = -floor_z * sigma_of;
      if (split == 0) {
        mark[plain] = A, mark[floor_] = F, mark[slope] = -floor_z * sigma_of, mark[sigma] = sigma_of;
        mark[guess] = expected, mark[offset] = k.scale * along;
      }
    }
  }
#pragma unroll 1
  for (int h = heads + warp; h < 16; h += scan_warps) {
    if (lane == 0) s.k1[h] = s.k0[h] = 0, s.plain_of[h] = s.floor_of[h] = 1e30f, s.slope_of[h] = 0;
    for (int i = lane; i < D / 4; i += 32) s.q8[h][i] = 0;
  }
  float lowest = other_head.known ? fminf(other_head.away, 4.0f) : -1.0f;
#pragma unroll
  for (int o = 8; o; o /= 2) lowest = fmaxf(lowest, __shfl_xor_sync(full, lowest, o));
  lowest = fmaxf(lowest, reach_least);
  if (split == 0 && static_cast<int>(threadIdx.x) < heads)
    k.w.thresholds[(group * heads + static_cast<int>(threadIdx.x)) * mark_size + least_reach] = lowest;
  __syncthreads();

  constexpr int columns = Sets == 0 ? 1 : Sets, halves = Sets == 0 ? 1 : 2;
  // Of the products' columns the query, for k-step ks; where both halves of a tile share a product, columns 0 to 3 are
  // the first one's and 4 to 7 the second's. Of lane t the heads of its two columns.
  std::uint32_t q[Sets == 0 ? 2 : 1][columns][D / 32][2];
  float k1[columns][2], k0[columns][2], A[columns][2], F[columns][2], slopes[columns][2], mass[columns][2] = {};
#pragma unroll
  for (int c = 0; c < columns; ++c) {
#pragma unroll
    for (int ks = 0; ks < D / 32; ++ks)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const std::uint32_t w = s.q8[Sets == 0 ? g & 3 : c * 8 + g][ks * 8 + j * 4 + t];
        if constexpr (Sets == 0) {
          q[0][c][ks][j] = g < 4 ? w : 0, q[1][c][ks][j] = g < 4 ? 0 : w;
          asm volatile("" : "+r"(q[0][c][ks][j]), "+r"(q[1][c][ks][j]));  // not to be selected again for each product
        } else {
          q[0][c][ks][j] = w;
        }
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int h = (Sets == 0 ? (t & 1) * 2 : c * 8 + t * 2) + i;
      k1[c][i] = s.k1[h], k0[c][i] = s.k0[h], A[c][i] = s.plain_of[h], F[c][i] = s.floor_of[h],
      slopes[c][i] = s.slope_of[h];
    }
  }
  const int segment = split * scan_warps + warp;
  candidate* found = k.w.candidates + group * k.group_candidates + static_cast<std::int64_t>(segment) * k.segment;
  int count = 0, stage_at = 0;
  const int own_half = t >> 1, own_up = t & 1;
#pragma unroll 1
  for (int i = 0; i < mine; ++i) {
    fetch(i + shared::stages - 1, stage_at == 0 ? shared::stages - 1 : stage_at - 1);
    wait_copies<shared::stages - 1>();
    __syncwarp();
    const char* stage = s.ring[warp][stage_at];
    if (++stage_at == shared::stages) stage_at = 0;
    const int base = (from + warp + i * scan_warps) * 64;
    const bool edge = base < sink_end || base + 64 > coded_end;
    std::uint32_t meta[2], levels[2][2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const char* tile = stage + c * tile_t::bytes;
      int acc[halves][columns][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        code_fragments<Bits, D> f;
        f.load(tile, half, lane);
        if (half < halves) {
#pragma unroll
          for (int o = 0; o < columns; ++o)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              acc[half][o][e] = 0x4b400000;  // sums are floats as they are, 1.5·2^23 too large
        }
#pragma unroll
        for (int ks = 0; ks < D / 32; ++ks) {
          const std::uint32_t a0 = f(0, 2 * ks), a1 = f(1, 2 * ks), a2 = f(0, 2 * ks + 1), a3 = f(1, 2 * ks + 1);
#pragma unroll
          for (int o = 0; o < columns; ++o) {
            const auto& query = q[Sets == 0 ? half : 0][o][ks];
            mma_codes(acc[Sets == 0 ? 0 : half][o], a0, a1, a2, a3, query[0], query[1]);
          }
        }
      }
      std::uint32_t packed[halves][2];  // of two heads for each key, or of two keys the heads' largest
#pragma unroll
      for (int a = 0; a < halves; ++a) {
        const int half = Sets == 0 ? own_half : a;
        const uint2 both = *reinterpret_cast<const uint2*>(tile + tile_t::code_words * 4 + (half * 8 + g) * 8);
        float largest[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // keys g and g + 8
          const std::uint32_t w = e ? both.y : both.x;
          const float alpha = __half2float(__ushort_as_half(static_cast<unsigned short>(w & 0xffff)));
          const float rho = __uint_as_float(__byte_perm(w, 0x4b000000, 0x7443)) - 8388608.0f;
          float reach = fmaxf(fmaf(__uint_as_float(__byte_perm(w, 0x4b000000, 0x7442)), reach_unit,
                                   reach_least - 8388608.0f * reach_unit),
                              lowest);
          if (edge) {
            const int token = base + c * 32 + half * 16 + e * 8 + g;
            if (token < sink_end || token >= coded_end) reach = -1e30f;
          }
          float level[columns][2];
#pragma unroll
          for (int o = 0; o < columns; ++o)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float score = fmaf(alpha, fmaf(k1[o][h], __int_as_float(acc[a][o][2 * e + h]), k0[o][h]), reach);
              const float over = score - A[o][h];
              level[o][h] = fmaxf(over, score - fmaf(rho, slopes[o][h], F[o][h]));
              mass[o][h] += exp2_of(over);
            }
          if constexpr (Sets == 0) {
            packed[0][e] = pack_half(level[0][0], level[0][1]);
          } else {
            largest[e] = fmaxf(level[0][0], level[0][1]);
            if constexpr (Sets == 2) largest[e] = fmaxf(largest[e], fmaxf(level[1][0], level[1][1]));
          }
        }
        if constexpr (Sets > 0) packed[a][0] = pack_half(largest[0], largest[1]);
        if (Sets == 0 || a == own_half) meta[c] = own_up ? both.y : both.x;
      }
      if constexpr (Sets == 0) {  // the other lane of the pair has the other two heads of both keys
        const std::uint32_t got = __shfl_xor_sync(full, own_up ? packed[0][0] : packed[0][1], 1);
        levels[c][0] = own_up ? got : packed[0][0], levels[c][1] = own_up ? packed[0][1] : got;
      } else {
        std::uint32_t of[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const std::uint32_t low = __shfl_sync(full, packed[0][0], g * 4 + j),
                              high = __shfl_sync(full, packed[halves - 1][0], g * 4 + j);
          of[j] = own_half ? high : low;
        }
        const unsigned how = own_up ? 0x7632 : 0x5410;
        levels[c][0] = __byte_perm(of[0], of[1], how), levels[c][1] = __byte_perm(of[2], of[3], how);
      }
    }
    __syncwarp();  // the stage may be overwritten
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const std::uint32_t token = static_cast<std::uint32_t>(base + c * 32 + own_half * 16 + own_up * 8 + g);
      const std::uint32_t top = larger_half(levels[c][0], levels[c][1]);
      const float level = fmaxf(fmaxf(half_of(top, 0), half_of(top, 1)), k.least);
      bool certain = (meta[c] & 0xff0000u) == 0xff0000u, pick = log2_uniform(draw(token, keys[0], keys[1])) < level;
      if (edge) {
        certain |= static_cast<int>(token) < sink_end;
        if (static_cast<int>(token) < first || static_cast<int>(token) >= coded_end) certain = pick = false;
      }
      pick |= certain;
      const unsigned all = __ballot_sync(full, pick);
      if (all) {
        const int at = count + __popc(all & ((1u << lane) - 1));
        if (pick && at < k.segment)
          *reinterpret_cast<uint4*>(found + at) = make_uint4(
              token, meta[c] >> 24 | (meta[c] & 0xff0000u) | (certain ? certain_flag : 0u), levels[c][0], levels[c][1]);
        count += __popc(all);
      }
    }
  }
  if (lane == 0) k.w.counts[group * k.group_counts + segment] = count;
  if (!first_round) return;
#pragma unroll
  for (int c = 0; c < columns; ++c)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = mass[c][h];
      m += __shfl_xor_sync(full, m, 4), m += __shfl_xor_sync(full, m, 8), m += __shfl_xor_sync(full, m, 16);
      if (Sets == 0) m += __shfl_xor_sync(full, m, 2);
      if (g == 0 && (Sets > 0 || t < 2)) s.mass[warp][(Sets == 0 ? t * 2 : c * 8 + t * 2) + h] = m;
    }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < heads) {
    float m = 0;
#pragma unroll
    for (int w = 0; w < scan_warps; ++w) m += s.mass[w][threadIdx.x];
    k.w.masses[(group * k.splits + split) * 16 + static_cast<int>(threadIdx.x)] = m;
  }
}

// First round: a block for each share. Second: blocks take shares in turn, of groups with a head for which the
// candidates did not suffice.
template <int Bits, int D, int Sets>
__global__ __launch_bounds__(scan_warps * 32, 1) void scan_kernel(const __grid_constant__ kernel_arguments k,
                                                                  const __grid_constant__ rotation_signs signs,
                                                                  bool first_round, bool half_query) {
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<scan_shared<Bits, D>*>(memory);
  after_last_kernel();
  if (first_round && blockIdx.x == 0 && threadIdx.x == 0) k.w.counters[2 * k.groups] = 0;
  if (!first_round && __ldcg(k.w.counters + 2 * k.groups) == 0) return;
#pragma unroll 1
  for (int base = 0; base < k.groups; base += listed_groups) {
    if (!first_round) list_groups<scan_warps * 32>(k, base, 1, s.list);
    const int items = (first_round ? k.groups : s.list.size) * k.splits;
#pragma unroll 1
    for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
      const int group = first_round ? item / k.splits : base + s.list.group[item / k.splits];
      if (!first_round && !scanned_again(k, group)) continue;
      scan_share<Bits, D, Sets>(k, signs, s, group, item % k.splits, first_round, half_query);
      wait_copies<0>();
      __syncthreads();
    }
    if (first_round) return;
  }
}

}  // namespace vattn::VATTN_ABI::cuda::detail

#include "vattn/macros_pop.hpp"
