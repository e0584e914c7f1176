// Exact attention of one query a head over all rows: split over the rows, for plans that do not sample and for heads
// that sampling left open.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/cuda/device.cuh"

namespace vattn::VATTN_ABI::cuda::detail {

// 16 rows of K and V in the registers of a warp, as the products want them: of lane 4g + t of keys g and g + 8 the
// coordinates 8t … 8t + 7 of every 32, of values 2t, 2t + 1, 2t + 8 and 2t + 9 the coordinates 8g … 8g + 7 of every 64.
// Every sector that is touched is used, so rows need not pass through shared memory.
template <int D>
struct row_registers {
  uint4 k[D / 32][2], v[D / 64][4];

  __device__ static uint4 load(const unsigned short* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
  }
  // `at`: where the lane's two keys begin, in elements.
  __device__ void load_keys(const void* keys, const std::int64_t (&at)[2], int lane) {
    const auto* from = static_cast<const unsigned short*>(keys) + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < D / 32; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) k[i][r] = load(from + at[r] + i * 32);
  }
  __device__ void load_values(const void* values, const std::int64_t (&at)[4], int lane) {
    const auto* from = static_cast<const unsigned short*>(values) + lane / 4 * 8;
#pragma unroll
    for (int half = 0; half < D / 64; ++half)
#pragma unroll
      for (int r = 0; r < 4; ++r) v[half][r] = load(from + at[r] + half * 64);
  }
};
// The lane's keys and values among them.
__device__ inline int key_of_lane(int lane, int r) { return lane / 4 + 8 * r; }
__device__ inline int value_of_lane(int lane, int r) { return lane % 4 * 2 + (r & 1) + (r >> 1) * 8; }

template <class T, int D>
struct dense_shared {
  float4 sums[gather_warps][D / 8][32];
  uint4 q[2][D / 32][32];  // by lane: heads g and g + 8, as the keys' coordinates lie
  float maximum[gather_warps][16], denominator[gather_warps][16];
  int last;
  group_list list;
};

// cap·tanh(x/cap), to some 1e-7 of the cap.
__device__ inline float capped(float x, float cap) {
  return cap - 2 * cap * __fdividef(1.0f, 1 + exp2_of(2 * log2_e / cap * x));
}

// One block's work is a piece of a sequence for one KV head, all of its query heads at once (rows of the products).
// Warps take batches of 16 rows in turn with a softmax of their own; the last piece to arrive merges. `rest`: only
// heads whose `open` is 2.
template <class T, int D>
__global__ __launch_bounds__(gather_warps * 32, 2) void dense_kernel(const __grid_constant__ kernel_arguments k,
                                                                     bool rest) {
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<dense_shared<T, D>*>(memory);
  using E = element_of<T>;
  constexpr int tiles = D / 8;  // of 8 columns of the output
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int heads = k.group;
  after_last_kernel();
  if (rest && k.a.state && __ldcg(k.w.counters + 2 * k.groups) == 0) return;
#pragma unroll 1
  for (int base = 0; base < k.groups; base += listed_groups) {
    list_groups<gather_warps * 32>(k, base, rest ? 2 : -1, s.list);
    const int items = s.list.size * k.pieces;
#pragma unroll 1
    for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
      const int group = base + s.list.group[item / k.pieces], piece = item % k.pieces;
      const int b = group / k.n_kv, kv = group % k.n_kv;
      const int n = length_of(k.a.cache, b), first = first_token(k, n);
      const int part = ((n - first + k.pieces - 1) / k.pieces + 127) / 128 * 128;
      const int begin = first + piece * part, end = min(n, begin + part);
      const head_rows at(k.a.cache, b, kv);
      const int batches = end > begin ? (end - begin + 15) / 16 : 0;
      const int mine = batches > warp ? (batches - warp + gather_warps - 1) / gather_warps : 0;
      std::int64_t keys[2], values[4];
      const auto place = [&](int i) {  // of batch i
        const int from = begin + (warp + i * gather_warps) * 16;
#pragma unroll
        for (int r = 0; r < 2; ++r) keys[r] = at(min(from + key_of_lane(lane, r), end - 1));
#pragma unroll
        for (int r = 0; r < 4; ++r) values[r] = at(min(from + value_of_lane(lane, r), end - 1));
      };
      row_registers<D> rows;
      if (mine > 0) {
        place(0);
        rows.load_keys(k.a.cache.k, keys, lane), rows.load_values(k.a.cache.v, values, lane);
        place(1);
      }
      {
        const auto* Q =
            static_cast<const unsigned short*>(k.a.q) + (static_cast<std::int64_t>(b) * k.n_kv + kv) * heads * D;
#pragma unroll 1
        for (int i = warp; i < 2 * (D / 32); i += gather_warps) {
          const int h = g + 8 * (i & 1);
          s.q[i & 1][i >> 1][lane] =
              h < heads ? *reinterpret_cast<const uint4*>(Q + h * D + (i >> 1) * 32 + t * 8) : make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
      }
      float c[tiles][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll 1
      for (int i = 0; i < mine; ++i) {
        const int from = begin + (warp + i * gather_warps) * 16;
        float l[2][4] = {};
#pragma unroll
        for (int j = 0; j < D / 32; ++j) {
          const uint4 q0 = s.q[0][j][lane], q1 = s.q[1][j][lane];
#pragma unroll
          for (int nt = 0; nt < 2; ++nt) {
            const uint4 x = rows.k[j][nt];
            E::mma(l[nt], q0.x, q1.x, q0.y, q1.y, x.x, x.y);
            E::mma(l[nt], q0.z, q1.z, q0.w, q1.w, x.z, x.w);
          }
        }
        if (i + 1 < mine) rows.load_keys(k.a.cache.k, keys, lane);
        float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float x = l[nt][e] * k.scale;
            if (k.softcap > 0) x = capped(x, k.softcap);
            x = from + nt * 8 + 2 * t + (e & 1) < end ? x * log2_e : -INFINITY;
            l[nt][e] = x;
            most[e >> 1] = fmaxf(most[e >> 1], x);
          }
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          most[u] = fmaxf(most[u], __shfl_xor_sync(full, most[u], 1));
          most[u] = fmaxf(most[u], __shfl_xor_sync(full, most[u], 2));
          most[u] = fmaxf(most[u], top[u]);
          const float shrink = top[u] == most[u] ? 1.0f : exp2_of(top[u] - most[u]);
          if (shrink != 1.0f) {
            sum[u] *= shrink;
#pragma unroll
            for (int j = 0; j < tiles; ++j) c[j][2 * u] *= shrink, c[j][2 * u + 1] *= shrink;
          }
          top[u] = most[u];
#pragma unroll
          for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              // A row of -inf alone, or a NaN, is one in the output too.
              float& x = l[nt][2 * u + e];
              x = x == -INFINITY ? 0.0f : exp2_of(x - top[u]);
              sum[u] += x;
            }
        }
        const std::uint32_t a0 = E::pack(l[0][0], l[0][1]), a1 = E::pack(l[0][2], l[0][3]),
                            a2 = E::pack(l[1][0], l[1][1]), a3 = E::pack(l[1][2], l[1][3]);
#pragma unroll
        for (int half = 0; half < D / 64; ++half)
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const unsigned how = j & 1 ? 0x7632 : 0x5410;
            const auto& v = rows.v[half];
            E::mma(c[half * 8 + j], a0, a1, a2, a3, __byte_perm(word(v[0], j >> 1), word(v[1], j >> 1), how),
                   __byte_perm(word(v[2], j >> 1), word(v[3], j >> 1), how));
          }
        if (i + 1 < mine) {
          rows.load_values(k.a.cache.v, values, lane);
          place(i + 2);
        }
      }
#pragma unroll
      for (int j = 0; j < tiles; ++j) s.sums[warp][j][lane] = make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        sum[u] += __shfl_xor_sync(full, sum[u], 1), sum[u] += __shfl_xor_sync(full, sum[u], 2);
        if (t == 0) s.maximum[warp][g + 8 * u] = top[u], s.denominator[warp][g + 8 * u] = sum[u];
      }
      __syncthreads();
      const std::int64_t slot = static_cast<std::int64_t>(group) * k.pieces + piece;
#pragma unroll 1
      for (int o = tid; o < heads * D; o += gather_warps * 32) {
        const int row = o / D, x = o % D, column = x % 64 / 8;
        const int tile = x / 64 * 8 + x % 8, from = (row & 7) * 4 + (column >> 1), e = (column & 1) + 2 * (row >> 3);
        float most = s.maximum[0][row], value = 0;
        for (int w = 1; w < gather_warps; ++w) most = fmaxf(most, s.maximum[w][row]);
        for (int w = 0; w < gather_warps; ++w) {
          const float m = s.maximum[w][row];
          if (m == -INFINITY && !isnan(s.denominator[w][row])) continue;
          value += reinterpret_cast<const float*>(&s.sums[w][tile][from])[e] * exp2_of(m - most);
        }
        k.w.part[slot * heads * D + o] = value;
        if (x == 0) {
          float d = 0;
          for (int w = 0; w < gather_warps; ++w) {
            const float m = s.maximum[w][row];
            if (m == -INFINITY && !isnan(s.denominator[w][row])) continue;
            d += s.denominator[w][row] * exp2_of(m - most);
          }
          k.w.part_state[(slot * 16 + row) * 2] = most, k.w.part_state[(slot * 16 + row) * 2 + 1] = d;
        }
      }
      __threadfence();
      __syncthreads();
      if (tid == 0) {
        std::int32_t* count = k.w.counters + k.groups + group;
        s.last = atomicAdd(count, 1) == k.pieces - 1;
        if (s.last) *count = 0;
        __threadfence();
      }
      __syncthreads();
      if (s.last) {
#pragma unroll 1
        for (int h = warp; h < heads; h += gather_warps) {
          const int id = group * heads + h;
          if (rest && state_of_head(k, id, true) != 2) continue;
          constexpr int own = D / 32;
          float top_of[2], d_of[2], most = -INFINITY;
#pragma unroll
          for (int i = 0; i < 2; ++i) {  // at most 64 pieces
            const int p = lane + 32 * i;
            const std::int64_t from = ((static_cast<std::int64_t>(group) * k.pieces + p) * 16 + h) * 2;
            top_of[i] = p < k.pieces ? __ldcg(k.w.part_state + from) : -INFINITY;
            d_of[i] = p < k.pieces ? __ldcg(k.w.part_state + from + 1) : 0.0f;
            most = fmaxf(most, top_of[i]);
          }
#pragma unroll
          for (int o = 16; o; o /= 2) most = fmaxf(most, __shfl_xor_sync(full, most, o));
          float d = 0, weight[2], out[own] = {};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            weight[i] = top_of[i] == -INFINITY && !isnan(d_of[i]) ? 0.0f : exp2_of(top_of[i] - most);
            d += weight[i] * d_of[i];
          }
          d = sum_warp(d);
#pragma unroll 1
          for (int p0 = 0; p0 < k.pieces; p0 += 8) {  // eight loads on their way at a time
            float x[8][own];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const int p = min(p0 + i, k.pieces - 1);
              const float* from =
                  k.w.part + ((static_cast<std::int64_t>(group) * k.pieces + p) * heads + h) * D + lane * own;
#pragma unroll
              for (int j = 0; j < own; ++j) x[i][j] = __ldcg(from + j);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const float w = __shfl_sync(full, p0 + i < 32 ? weight[0] : weight[1], (p0 + i) & 31);
#pragma unroll
              for (int j = 0; j < own; ++j)
                if (w != 0 && p0 + i < k.pieces) out[j] += w * x[i][j];
            }
          }
          if (k.a.sink_logits && n > 0) {
            const float sink = k.a.sink_logits[kv * heads + h] * log2_e;
            d += exp2_of(sink - most);
          }
          const float inverse = n > 0 ? 1 / d : 0.0f, lse = n > 0 ? (most + log2f(d)) * ln_2 : -INFINITY;
          float norm2 = 0, away2 = 0;
          const float* centre =
              k.codes.heads ? k.codes.heads + static_cast<std::int64_t>(group) * (2 * D + 8) + D : nullptr;
#pragma unroll
          for (int j = 0; j < own; ++j) {
            const float x = out[j] * inverse;
            norm2 += x * x;
            if (rest) away2 += (x - centre[lane * own + j]) * (x - centre[lane * own + j]);
            const std::int64_t to = static_cast<std::int64_t>(id) * D + lane * own + j;
            if (k.a.output_float)
              static_cast<float*>(k.a.output)[to] = x;
            else
              static_cast<T*>(k.a.output)[to] = E::from(x);
          }
          if (rest) norm2 = sum_warp(norm2), away2 = sum_warp(away2);
          if (lane != 0) continue;
          if (k.a.lse) k.a.lse[id] = lse;
          if (k.a.certificates) {
            device_certificate& cert = k.a.certificates[id];
            if (!rest) cert = {};
            cert.epsilon_achieved = cert.variance = 0;
            cert.log_denominator = lse, cert.rows = cert.n = n - first, cert.rounds = 0;
          }
          if (!rest || k.a.state == nullptr) continue;
          // What sampling had guessed wrong is known now.
          head_state& state = static_cast<head_state*>(k.a.state)[id];
          const float typical = centre[D + typical_reach];
          const float mass = __ldcg(k.w.fits + id * 4) * ln_2,
                      s_lse = lse - __ldcg(k.w.thresholds + id * mark_size + offset);
          const float scale = 0.5f * logf(norm2) - logf(typical), away = 0.5f * log2f(away2 + 1e-30f) - log2f(typical);
          if (isfinite(mass) && isfinite(s_lse) && isfinite(scale) && isfinite(away))
            state.denominator = s_lse - mass, state.scale = scale, state.away = away, state.known = 1;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace vattn::VATTN_ABI::cuda::detail

#include "vattn/macros_pop.hpp"
