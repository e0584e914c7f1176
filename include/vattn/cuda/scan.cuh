// The scan: every code is read, every token that a head may need is picked, and the sum that fits the thresholds to this
// query is taken.
#pragma once

#include "vattn/cuda/encode.cuh"

namespace vattn::cuda::detail {

// In units of log2, for token i and head h of the group, with s the score of k − μ, r = max(‖v − c‖, K) over the typical
// distance and σ = ‖q‖ρ/sqrt(d):
//   level = max over h of s + log r − min(A_h, F_h − zσ)          +64 where the token is certain
//   candidate ⟺ log u < max(level, log p₀)
// A_h asks for picks in proportion to what a token weighs, F_h that none weighs more than κεT unseen, p₀ that all are
// looked at now and then. `gather.cuh` thins by a `shift` >= 0 that it learns from the masses Σ 2^(s + log r − A):
//   taken ⟺ log u < max(level − shift, log p₀),  so π = min(1, 2^max(level − shift, log p₀)) exactly.
// A candidate is written with its level as the low 8 bits cut off leave it, and that level decides.
inline constexpr float floor_z = 2.0f, floor_kappa = 0.5f, certain_level = 64.0f;
inline constexpr float reserve = 1.44f, first_reserve = 2.9f;  // of the thresholds under what is expected; log2

template <int Bits, int D>
struct scan_shared {
  static constexpr int stages = 4, stage_bytes = 2 * code_tile<Bits, D>::bytes;
  char ring[scan_warps][stages][stage_bytes];
  std::uint32_t q8[16][D / 4];
  float k1[16], k0[16], plain_of[16], floor_of[16], slope_of[16];
  float mass[scan_warps][16];
};

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

// A block scans a share of one KV head's tiles, a warp two tiles at a time. Sets = 0: up to 4 heads, both halves of a tile
// in the columns of one product; else Sets·8 heads. Lane 4g + t decides about key g + 8·(t mod 2) of half t/2 of each tile.
template <int Bits, int D, int Sets>
__global__ __launch_bounds__(scan_warps * 32, 1) void scan_kernel(const __grid_constant__ kernel_arguments k,
                                                                  const __grid_constant__ rotation_signs signs, bool first_round,
                                                                  bool half_query) {
  extern __shared__ __align__(128) char memory[];
  using tile_t = code_tile<Bits, D>;
  using shared = scan_shared<Bits, D>;
  auto& s = *reinterpret_cast<shared*>(memory);
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5, g = lane >> 2, t = lane & 3;
  const int group = static_cast<int>(blockIdx.y), split = static_cast<int>(blockIdx.x), b = group / k.n_kv;
  const int heads = k.group;
  after_last_kernel();
  if (!first_round) {
    bool wanted = false;
    for (int h = 0; h < heads; ++h) wanted |= __ldcg(k.w.open + group * heads + h) == 1 && __ldcg(k.w.fits + (group * heads + h) * 4 + 3) > 0;
    if (!wanted) return;
  }
  const int n = length_of(k.a.cache, b), first = first_token(k, n);
  const int tiles = closed_tiles(n, k.window), sink_end = first + k.sinks, coded_end = tiles * tile_keys;
  const int pair0 = first / 64, pairs = max(0, (tiles + 1) / 2 - pair0);
  const int from = pair0 + static_cast<int>(static_cast<std::int64_t>(pairs) * split / k.splits);
  const int to = pair0 + static_cast<int>(static_cast<std::int64_t>(pairs) * (split + 1) / k.splits);
  const int mine = to - from > warp ? (to - from - warp + scan_warps - 1) / scan_warps : 0;
  const char* codes = reinterpret_cast<const char*>(k.codes.tiles + group * k.code_stride) +
                      static_cast<std::int64_t>(from + warp) * shared::stage_bytes;
  const auto fetch = [&](int i) {
    if (i < mine) {
      const char* at = codes + static_cast<std::int64_t>(i) * scan_warps * shared::stage_bytes;
      char* into = s.ring[warp][i % shared::stages];
#pragma unroll
      for (int o = 0; o < shared::stage_bytes; o += 512)
        if (o + lane * 16 < shared::stage_bytes) copy16(into + o + lane * 16, at + o + lane * 16);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < shared::stages - 1; ++i) fetch(i);
  const float* head = k.codes.heads + static_cast<std::int64_t>(group) * (2 * D + 8);
  if (warp < heads) {  // a warp prepares a head's query and thresholds
    constexpr int own = D / 32;
    const int id = group * heads + warp;
    float x[own], along = 0, norm2 = 0, top = 0;
    const std::int64_t row = static_cast<std::int64_t>(id) * D;
    if (half_query)
      load_row<__half, D>(k.a.q, row, lane, x);
    else
      load_row<__nv_bfloat16, D>(k.a.q, row, lane, x);
#pragma unroll
    for (int j = 0; j < own; ++j) along += x[j] * head[lane * own + j], norm2 += x[j] * x[j];
    along = sum_warp(along), norm2 = sum_warp(norm2);
    rotate<D>(x, signs, lane);
#pragma unroll
    for (int j = 0; j < own; ++j) top = fmaxf(top, fabsf(x[j]));
#pragma unroll
    for (int o = 16; o; o /= 2) top = fmaxf(top, __shfl_xor_sync(full, top, o));
    const float unit = fmaxf(top, 1e-20f) / 127, inverse = 1 / unit;
    int sum = 0;
    std::uint32_t bytes = 0;
#pragma unroll
    for (int j = 0; j < own; ++j) {
      const int c = __float2int_rn(x[j] * inverse);
      sum += c, bytes |= static_cast<std::uint32_t>(c & 255) << (8 * ((lane * own + j) % 4));
    }
    if (own == 2) bytes |= __shfl_xor_sync(full, bytes, 1);
    if (own == 4 || lane % 2 == 0) s.q8[warp][lane * own / 4] = bytes;
    sum = __reduce_add_sync(full, sum);
    if (lane == 0) {
      const float nats = fabsf(k.scale) * sqrtf(norm2);
      const float per_code = k.scale * log2_e * head[2 * D + alpha_unit] * unit;
      s.k1[warp] = per_code * 2 / (1 << (8 - Bits));
      s.k0[warp] = -per_code * static_cast<float>(((1 << Bits) - 1) * sum) - 12582912.0f * s.k1[warp];
      const float deviation = nats * sqrtf(head[2 * D + key_variance]), log_n = logf(fmaxf(1.0f, static_cast<float>(coded_end)));
      const float edge = sqrtf(2 * log_n);
      const float expected = log2_e * (deviation < edge ? log_n + deviation * deviation / 2 : deviation * edge);
      const head_state old = static_cast<const head_state*>(k.a.state)[id];
      float* mark = k.w.thresholds + id * 8;
      const float sigma_of = nats * log2_e * head[2 * D + rho_unit] * rsqrtf(static_cast<float>(D));
      float A, F;
      if (first_round) {
        const float mass = expected + old.mass * log2_e, less = old.known ? reserve : first_reserve;
        A = mass - log2f(k.rows) - old.rows * log2_e - less;
        F = mass + log2f(floor_kappa * k.epsilon) - less + (old.known ? (old.denominator + old.scale) * log2_e : -1.0f);
      } else {
        const bool wanted = __ldcg(k.w.open + id) == 1;
        A = wanted ? __ldcg(k.w.fits + id * 4 + 1) : 1e30f, F = wanted ? __ldcg(k.w.fits + id * 4 + 2) : 1e30f;
      }
      s.plain_of[warp] = A, s.floor_of[warp] = F, s.slope_of[warp] = -floor_z * sigma_of;
      if (split == 0) {
        mark[plain] = A, mark[floor_] = F, mark[slope] = -floor_z * sigma_of, mark[sigma] = sigma_of;
        mark[guess] = expected, mark[offset] = k.scale * along;
      }
    }
  } else if (lane == 0) {
    s.k1[warp] = s.k0[warp] = 0, s.plain_of[warp] = s.floor_of[warp] = 1e30f, s.slope_of[warp] = 0;
  }
  if (warp >= heads)
    for (int i = lane; i < D / 4; i += 32) s.q8[warp][i] = 0;
  float least_reach = reach_least;
  for (int h = 0; h < heads; ++h) {
    const head_state& old = static_cast<const head_state*>(k.a.state)[group * heads + h];
    least_reach = fmaxf(least_reach, old.known ? fminf(old.away, 4.0f) : -1.0f);
  }
  __syncthreads();

  constexpr int columns = Sets == 0 ? 1 : Sets, halves = Sets == 0 ? 1 : 2;
  // Of the products' columns: the query for k-step ks, and of lane t the heads of its two columns.
  std::uint32_t q[columns][D / 32][2];
  float k1[columns][2], k0[columns][2], A[columns][2], F[columns][2], slopes[columns][2], mass[columns][2] = {};
#pragma unroll
  for (int c = 0; c < columns; ++c) {
    const int column = Sets == 0 ? g & 3 : c * 8 + g;
#pragma unroll
    for (int ks = 0; ks < D / 32; ++ks)
#pragma unroll
      for (int j = 0; j < 2; ++j) q[c][ks][j] = s.q8[column][ks * 8 + j * 4 + t];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int h = (Sets == 0 ? (t & 1) * 2 : c * 8 + t * 2) + i;
      k1[c][i] = s.k1[h], k0[c][i] = s.k0[h], A[c][i] = s.plain_of[h], F[c][i] = s.floor_of[h], slopes[c][i] = s.slope_of[h];
    }
  }
  std::uint32_t keys[2];
  const std::uint32_t sequence = k.a.sequences ? static_cast<std::uint32_t>(k.a.sequences[b]) : static_cast<std::uint32_t>(b);
  draw_words(k.seed, k.a.layer, k.a.step ? *k.a.step : 0u, sequence, static_cast<std::uint32_t>(group % k.n_kv), keys);
  const int segment = split * scan_warps + warp;
  candidate* found = k.w.candidates + (static_cast<std::int64_t>(group) * k.splits * scan_warps + segment) * k.segment;
  int count = 0;
  const int own_half = t >> 1, own_up = t & 1;
#pragma unroll 1
  for (int i = 0; i < mine; ++i) {
    fetch(i + shared::stages - 1);
    wait_copies<shared::stages - 1>();
    __syncwarp();
    const char* stage = s.ring[warp][i % shared::stages];
    const int base = (from + warp + i * scan_warps) * 64;
    const bool edge = base < sink_end || base + 64 > coded_end;
    float level[2];
    std::uint32_t meta[2];
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
            for (int e = 0; e < 4; ++e) acc[half][o][e] = 0x4b400000;  // sums are floats as they are, 1.5·2^23 too large
        }
#pragma unroll
        for (int ks = 0; ks < D / 32; ++ks) {
          const std::uint32_t a0 = f(0, 2 * ks), a1 = f(1, 2 * ks), a2 = f(0, 2 * ks + 1), a3 = f(1, 2 * ks + 1);
#pragma unroll
          for (int o = 0; o < columns; ++o) {
            // Columns 0 to 3 are for the first half, 4 to 7 for the second.
            const bool zero = Sets == 0 && (g >> 2) != half;
            mma_codes(acc[Sets == 0 ? 0 : half][o], a0, a1, a2, a3, zero ? 0 : q[o][ks][0], zero ? 0 : q[o][ks][1]);
          }
        }
      }
      float best[halves][2];
#pragma unroll
      for (int a = 0; a < halves; ++a) {
        const int half = Sets == 0 ? own_half : a;
        const uint2 both = *reinterpret_cast<const uint2*>(tile + tile_t::code_words * 4 + (half * 8 + g) * 8);
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // keys g and g + 8
          const std::uint32_t w = e ? both.y : both.x;
          const float alpha = __half2float(__ushort_as_half(static_cast<unsigned short>(w & 0xffff)));
          const float rho = __uint_as_float(__byte_perm(w, 0x4b000000, 0x7443)) - 8388608.0f;
          const float reach = fmaxf(fmaf(__uint_as_float(__byte_perm(w, 0x4b000000, 0x7442)), reach_unit, reach_least - 8388608.0f * reach_unit), least_reach);
          const int token = base + c * 32 + half * 16 + e * 8 + g;
          const bool hidden = edge && (token < sink_end || token >= coded_end);
          best[a][e] = -1e30f;
#pragma unroll
          for (int o = 0; o < columns; ++o)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float score = fmaf(alpha, fmaf(k1[o][h], __int_as_float(acc[a][o][2 * e + h]), k0[o][h]), reach);
              const float over = score - A[o][h];
              best[a][e] = fmaxf(best[a][e], fmaxf(over, score - fmaf(rho, slopes[o][h], F[o][h])));
              mass[o][h] += hidden ? 0.0f : exp2_of(over);
            }
          if (hidden) best[a][e] = token >= first && token < sink_end ? certain_level : -1e30f;
        }
        if (Sets == 0 || a == own_half) meta[c] = own_up ? both.y : both.x;
      }
      if constexpr (Sets == 0) {
        const float other = __shfl_xor_sync(full, own_up ? best[0][0] : best[0][1], 1);
        level[c] = fmaxf(own_up ? best[0][1] : best[0][0], other);
      } else {
#pragma unroll
        for (int a = 0; a < 2; ++a)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            best[a][e] = fmaxf(best[a][e], __shfl_xor_sync(full, best[a][e], 1));
            best[a][e] = fmaxf(best[a][e], __shfl_xor_sync(full, best[a][e], 2));
          }
        level[c] = own_half ? (own_up ? best[1][1] : best[1][0]) : (own_up ? best[0][1] : best[0][0]);
      }
    }
    __syncwarp();  // the stage may be overwritten
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const std::uint32_t token = static_cast<std::uint32_t>(base + c * 32 + own_half * 16 + own_up * 8 + g);
      const bool absent = edge && (static_cast<int>(token) >= coded_end || static_cast<int>(token) < first);
      if ((meta[c] & 0xff0000u) == 0xff0000u) level[c] = certain_level;
      const std::uint32_t word = (__float_as_uint(level[c]) & ~255u) | meta[c] >> 24;
      const bool pick = !absent && log2_uniform(draw(token, keys[0], keys[1])) < fmaxf(__uint_as_float(word & ~255u), k.least);
      const unsigned all = __ballot_sync(full, pick);
      if (all) {
        const int at = count + __popc(all & ((1u << lane) - 1));
        if (pick && at < k.segment) found[at] = {token, word};
        count += __popc(all);
      }
    }
  }
  if (lane == 0) k.w.counts[group * k.splits * scan_warps + segment] = count;
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
    for (int w = 0; w < scan_warps; ++w) m += s.mass[w][threadIdx.x];
    k.w.masses[(group * k.splits + split) * 16 + static_cast<int>(threadIdx.x)] = m;
  }
}

}  // namespace vattn::cuda::detail
