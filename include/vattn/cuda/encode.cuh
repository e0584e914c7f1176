// Codes of keys on the device: what a scan reads instead of the keys.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/cuda/device.cuh"

namespace vattn::VATTN_ABI::cuda::detail {

// Format. A key k becomes y = R(k − μ), R the rotation of sketch/rotation.hpp with the plan's seed and μ fixed for the
// sequence; each coordinate becomes a level of {±1, ±3, …} by an optimal uniform quantiser of a normal variable with
// y's own mean square. s = α⟨c, Rq⟩ with α = ‖y‖²/⟨c, y⟩ is unbiased for ⟨q, k − μ⟩ over rotations, and its error has
// the standard deviation ‖q‖ρ/sqrt(d), ρ = ‖y − αc‖.
//
// A tile has 32 keys in two halves of 16, in the order of the fragments of mma.m16n8k32: lane 4g + t holds keys g and
// g + 8 of a half, coordinates 4t … 4t + 3 of every 16 (one a byte). "Part" p = coordinates 16p … 16p + 15. A plane of
// b bits has W = b·d/64 words a lane and half: words 0 … W/2 − 1 are key g's, then key g + 8's; part p is at the bits
// b·(p mod 8/b) … of each byte of word p/(8/b). Lanes' words lie together, four at a time, or both halves' two. 3 bits
// are a plane of 2 (the upper ones) and one of 1. Then 32 words of
//   α f16 in `alpha_unit` | reach u8, log2(‖v − c‖/typical) = reach/32 − 3 | ρ u8 in `rho_unit`, rounded up
// in the order half, g, 8 of the key. Reach 255: the key is read for certain, α = 0.
template <int Bits, int D>
struct code_tile {
  static constexpr int code_words = D * Bits, words = code_words + 32, bytes = words * 4;
  static constexpr int upper = Bits == 3 ? 2 : Bits;  // bits of the first plane
  static constexpr int first_words = D * upper;
  // Words a lane and half of a plane.
  __host__ __device__ static constexpr int lane_words(int bits) { return bits * D / 64; }
  __host__ __device__ static constexpr int place(int bits, int half, int w, int lane) {
    const int all = lane_words(bits);
    return all == 2 ? lane * 4 + half * 2 + w : half * all * 32 + w / 4 * 128 + lane * 4 + w % 4;
  }
  static_assert(lane_words(upper) >= 2, "codes have 1, 2 or 3 bits where d is 128, and 2 where it is 64");
};

// Signs of the rotation's two rounds, d bits each.
struct rotation_signs {
  std::uint32_t bits[2][4];
};

// R x, in place: lane l has coordinates l·D/32 …; the order of sketch/rotation.hpp's sums.
template <int D>
__device__ inline void rotate(float (&x)[D / 32], const rotation_signs& signs, int lane) {
  constexpr int own = D / 32;
#pragma unroll
  for (int round = 0; round < 2; ++round) {
    const std::uint32_t flips = signs.bits[round][lane * own / 32] >> (lane * own % 32);
#pragma unroll
    for (int j = 0; j < own; ++j) x[j] = flips >> j & 1 ? -x[j] : x[j];
#pragma unroll
    for (int half = 1; half < own; half *= 2)
#pragma unroll
      for (int j = 0; j < own; ++j)
        if ((j & half) == 0) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b, x[j + half] = a - b;
        }
#pragma unroll
    for (int o = 1; o < 32; o *= 2)
#pragma unroll
      for (int j = 0; j < own; ++j) {
        const float other = __shfl_xor_sync(full, x[j], o);
        x[j] = lane & o ? other - x[j] : x[j] + other;
      }
  }
#pragma unroll
  for (int j = 0; j < own; ++j) x[j] *= 1.0f / D;
}

template <class T, int D>
__device__ inline void load_row(const void* rows, std::int64_t at, int lane, float (&x)[D / 32]) {
  const auto* from = static_cast<const unsigned short*>(rows) + at + lane * (D / 32);
#pragma unroll
  for (int j = 0; j < D / 32; j += 2) {
    const std::uint32_t w = *reinterpret_cast<const std::uint32_t*>(from + j);
    x[j] = element_of<T>::low(w), x[j + 1] = element_of<T>::high(w);
  }
}

// One key into its tile, by a warp.
template <class T, int Bits, int D>
__device__ inline void encode_key(const kernel_arguments& k, const rotation_signs& signs, const float* head,
                                  std::uint32_t* tile, std::int64_t row, int key, int lane) {
  using tile_t = code_tile<Bits, D>;
  constexpr int own = D / 32;
  float x[own], v[own], reach2 = 0, norm2 = 0;
  load_row<T, D>(k.a.cache.k, row, lane, x);
  load_row<T, D>(k.a.cache.v, row, lane, v);
#pragma unroll
  for (int j = 0; j < own; ++j) {
    x[j] -= head[lane * own + j], v[j] -= head[D + lane * own + j];
    reach2 += v[j] * v[j];
  }
  rotate<D>(x, signs, lane);
#pragma unroll
  for (int j = 0; j < own; ++j) norm2 += x[j] * x[j];
  norm2 = sum_warp(norm2), reach2 = sum_warp(reach2);
  // Half steps of optimal uniform quantisers of a normal variable, in standard deviations (Max 1960).
  constexpr float half_step = Bits == 1 ? 0.7979f : Bits == 2 ? 0.4979f : 0.2930f;
  constexpr int levels = 1 << Bits;
  const bool finite = norm2 < 1e34f && reach2 < 1e34f;
  const float inverse = finite && norm2 > 0 ? rsqrtf(norm2 / D) / (2 * half_step) : 0.0f;
  std::uint32_t code[own];
  float along = 0, square = 0;
#pragma unroll
  for (int j = 0; j < own; ++j) {
    const int c = min(levels - 1, max(0, __float2int_rd(x[j] * inverse) + levels / 2));
    const float level = static_cast<float>(2 * c - levels + 1);
    code[j] = static_cast<std::uint32_t>(c);
    along += level * x[j], square += level * level;
  }
  along = sum_warp(along), square = sum_warp(square);
  const int half = key >> 4, g = key & 7, up = key >> 3 & 1;
  const auto write_plane = [&](int bits, int shift, std::uint32_t* plane) {
    // Coordinates of a lane are in one part; a word has 8/bits parts, of lanes 16/own apart.
    constexpr int lanes = 16 / own;  // of a part
    const int part = lane / lanes, per = 8 / bits;
    std::uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < own; ++j)
      word |= (code[j] >> shift & ((1u << bits) - 1)) << (8 * ((lane * own + j) % 4) + part % per * bits);
    if (own == 2) word |= __shfl_xor_sync(full, word, 1);
    for (int o = lanes; o < lanes * per && o < 32; o *= 2) word |= __shfl_xor_sync(full, word, o);
    const int t = lane % lanes / (4 / own), w = up * tile_t::lane_words(bits) / 2 + part / per;
    if (part % per == 0 && lane % (4 / own) == 0) plane[tile_t::place(bits, half, w, g * 4 + t)] = word;
  };
  if constexpr (Bits == 3) {
    write_plane(2, 1, tile);
    write_plane(1, 0, tile + tile_t::first_words);
  } else {
    write_plane(Bits, 0, tile);
  }
  if (lane != 0) return;
  float alpha = finite && norm2 > 0 ? norm2 / along / head[2 * D + alpha_unit] : 0.0f;
  const float left = norm2 - 2 * (norm2 / along) * along + norm2 / along * (norm2 / along) * square;
  const float rho = finite && norm2 > 0 ? sqrtf(fmaxf(0.0f, left)) / head[2 * D + rho_unit] : 0.0f;
  const float reach = (log2f(sqrtf(reach2) / head[2 * D + typical_reach] + 1e-30f) - reach_least) / reach_unit;
  int reach_code = max(0, __float2int_rn(fminf(reach, 300.0f)));
  const int rho_code = __float2int_ru(fminf(rho, 300.0f));
  if (!finite || !(alpha < 6e4f) || reach_code > 254 || rho_code > 255) reach_code = 255, alpha = 0;
  tile[tile_t::code_words + (half * 8 + g) * 2 + up] = __half_as_ushort(__float2half_rn(alpha)) |
                                                       static_cast<std::uint32_t>(reach_code) << 16 |
                                                       static_cast<std::uint32_t>(min(rho_code, 255)) << 24;
}

// Means of up to 2048 keys and values of each KV head, and typical distances from them. A block a head.
template <class T, int Bits, int D>
__global__ __launch_bounds__(256) void centre_kernel(const __grid_constant__ kernel_arguments k) {
  __shared__ float sums[2][8][D];
  __shared__ float squares[2][8];
  __shared__ int counts[8];
  const int group = static_cast<int>(blockIdx.x), b = group / k.n_kv, lane = static_cast<int>(threadIdx.x) & 31,
            warp = static_cast<int>(threadIdx.x) >> 5;
  constexpr int own = D / 32;
  after_last_kernel();
  const int n = length_of(k.a.cache, b), rows = min(n, 2048);
  const head_rows at(k.a.cache, b, group % k.n_kv);
  float* head = k.codes.heads + static_cast<std::int64_t>(group) * (2 * D + 8);
  const auto token = [&](int i) { return static_cast<int>(static_cast<std::int64_t>(i) * n / rows); };
  float key[own] = {}, value[own] = {};
  int count = 0;
  for (int i = warp; i < rows; i += 8) {
    float x[own], v[own], norm2 = 0;
    load_row<T, D>(k.a.cache.k, at(token(i)), lane, x);
    load_row<T, D>(k.a.cache.v, at(token(i)), lane, v);
#pragma unroll
    for (int j = 0; j < own; ++j) norm2 += x[j] * x[j] + v[j] * v[j];
    if (!(sum_warp(norm2) < 1e30f)) continue;
    ++count;
#pragma unroll
    for (int j = 0; j < own; ++j) key[j] += x[j], value[j] += v[j];
  }
#pragma unroll
  for (int j = 0; j < own; ++j) sums[0][warp][lane * own + j] = key[j], sums[1][warp][lane * own + j] = value[j];
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  int all = 0;
  for (int w = 0; w < 8; ++w) all += counts[w];
  for (int i = static_cast<int>(threadIdx.x); i < 2 * D; i += 256) {
    float sum = 0;
    for (int w = 0; w < 8; ++w) sum += sums[i / D][w][i % D];
    head[i] = sum / static_cast<float>(max(all, 1));
  }
  __syncthreads();
  float norm2 = 0, reach2 = 0;
  for (int i = warp; i < rows; i += 8) {
    float x[own], v[own], a = 0, r = 0;
    load_row<T, D>(k.a.cache.k, at(token(i)), lane, x);
    load_row<T, D>(k.a.cache.v, at(token(i)), lane, v);
#pragma unroll
    for (int j = 0; j < own; ++j) {
      x[j] -= head[lane * own + j], v[j] -= head[D + lane * own + j];
      a += x[j] * x[j], r += v[j] * v[j];
    }
    a = sum_warp(a), r = sum_warp(r);
    if (a + r < 1e30f) norm2 += a, reach2 += sqrtf(r);
  }
  if (lane == 0) squares[0][warp] = norm2, squares[1][warp] = reach2;
  __syncthreads();
  if (threadIdx.x != 0) return;
  norm2 = reach2 = 0;
  for (int w = 0; w < 8; ++w) norm2 += squares[0][w], reach2 += squares[1][w];
  const float rows_f = static_cast<float>(max(all, 1)), mean2 = fmaxf(norm2 / rows_f, 1e-30f);
  head[2 * D + alpha_unit] = sqrtf(mean2 / D);
  // Of a typical key ρ is 0.6, 0.34 or 0.19 of the norm: 85 steps of it, three times which is certain.
  head[2 * D + rho_unit] = sqrtf(mean2) * (Bits == 1 ? 0.6f : Bits == 2 ? 0.34f : 0.19f) / 85;
  head[2 * D + typical_reach] = fmaxf(reach2 / rows_f, 1e-30f);
  head[2 * D + key_variance] = mean2 / D;
  for (int i = 4; i < 8; ++i) head[2 * D + i] = 0;
}

// Tiles of a sequence that have closed: all of them, or, `fresh` > 0, those that the last `fresh` tokens closed.
template <class T, int Bits, int D>
__global__ __launch_bounds__(256) void encode_kernel(const __grid_constant__ kernel_arguments k,
                                                     const __grid_constant__ rotation_signs signs, int fresh) {
  const int group = static_cast<int>(blockIdx.y), b = group / k.n_kv, lane = static_cast<int>(threadIdx.x) & 31,
            warp = static_cast<int>(threadIdx.x) >> 5;
  after_last_kernel();
  const int n = length_of(k.a.cache, b), tiles = closed_tiles(n, k.window);
  const int first = fresh > 0 ? closed_tiles(n - fresh, k.window) : 0;
  const head_rows at(k.a.cache, b, group % k.n_kv);
  const float* head = k.codes.heads + static_cast<std::int64_t>(group) * (2 * D + 8);
  for (int tile = first + static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    std::uint32_t* to =
        k.codes.tiles + group * k.code_stride + static_cast<std::int64_t>(tile) * code_tile<Bits, D>::words;
    for (int key = warp; key < tile_keys; key += 8)
      encode_key<T, Bits, D>(k, signs, head, to, at(tile * tile_keys + key), key, lane);
  }
}

// Writes a token's K and V [n_batch, n_kv_heads, D] as the last of each sequence, whose length counts it already, and
// the codes of the tile that this closes, if any. A block a KV head.
template <class T, int Bits, int D>
__global__ __launch_bounds__(256) void append_kernel(const __grid_constant__ kernel_arguments k,
                                                     const __grid_constant__ rotation_signs signs, const void* keys,
                                                     const void* values, bool codes) {
  const int group = static_cast<int>(blockIdx.x), b = group / k.n_kv, tid = static_cast<int>(threadIdx.x);
  after_last_kernel();
  const int n = length_of(k.a.cache, b);
  if (n < 1) return;
  const head_rows at(k.a.cache, b, group % k.n_kv);
  if (tid < D / 4) {
    const bool value = tid >= D / 8;
    const int column = tid % (D / 8) * 8;
    const auto* from = static_cast<const unsigned short*>(value ? values : keys) + static_cast<std::int64_t>(group) * D;
    auto* to = static_cast<unsigned short*>(const_cast<void*>(value ? k.a.cache.v : k.a.cache.k)) + at(n - 1);
    *reinterpret_cast<uint4*>(to + column) = *reinterpret_cast<const uint4*>(from + column);
  }
  const int tiles = closed_tiles(n, k.window);
  if (!codes || tiles == closed_tiles(n - 1, k.window)) return;
  const float* head = k.codes.heads + static_cast<std::int64_t>(group) * (2 * D + 8);
  std::uint32_t* to =
      k.codes.tiles + group * k.code_stride + static_cast<std::int64_t>(tiles - 1) * code_tile<Bits, D>::words;
  for (int key = tid >> 5; key < tile_keys; key += 8)
    encode_key<T, Bits, D>(k, signs, head, to, at((tiles - 1) * tile_keys + key), key, tid & 31);
}

}  // namespace vattn::VATTN_ABI::cuda::detail

#include "vattn/macros_pop.hpp"
