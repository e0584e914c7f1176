// Exact attention of one query a head over all rows: split over the rows, for plans that do not sample and for heads
// that sampling left open.
#pragma once

#include "vattn/cuda/device.cuh"

namespace vattn::cuda::detail {

// What a warp has on its way: batches of 16 rows of K and V. Rows are 16 bytes longer than they are, so that the 16
// bytes of rows 2t that the lanes of a quarter warp read lie in different banks.
template <int D, int Stages>
struct row_ring {
  static constexpr int pitch = 2 * D + 16, stages = Stages;
  char rows[Stages][2][16][pitch];
};

template <class T, int D>
struct dense_shared {
  union {
    row_ring<D, 3> ring;
    float4 sums[D / 8][32];
  } warp[gather_warps];
  float maximum[gather_warps][16], denominator[gather_warps][16];
  int last;
  group_list list;
};

// 16 rows: keys and values to a stage of the ring. `mine` is where the row of lane's number mod 16 begins, in elements; a
// row's 16 bytes are copied by D/8 lanes.
template <int D>
__device__ inline void fetch_rows(const kernel_arguments& k, std::int64_t mine, char (*to)[16][2 * D + 16], int lane) {
  constexpr int lanes = D / 8, together = 32 / lanes;
  const auto *K = static_cast<const unsigned short*>(k.a.cache.k) + lane % lanes * 8,
             *V = static_cast<const unsigned short*>(k.a.cache.v) + lane % lanes * 8;
  char* into = to[0][lane / lanes] + lane % lanes * 16;
#pragma unroll
  for (int r = 0; r < 16; r += together) {
    const std::int64_t from = __shfl_sync(full, static_cast<long long>(mine), r + lane / lanes);
    copy16(into + r * (2 * D + 16), K + from);
    copy16(into + (16 + r) * (2 * D + 16), V + from);
  }
  commit_copies();
}
// cap·tanh(x/cap), to some 1e-7 of the cap.
__device__ inline float capped(float x, float cap) {
  return cap - 2 * cap * __fdividef(1.0f, 1 + exp2_of(2 * log2_e / cap * x));
}

// One block's work is a piece of a sequence for one KV head, all of its query heads at once (rows of the products).
// Warps take batches of 16 rows in turn with a softmax of their own; the last piece to arrive merges. `rest`: only heads
// whose `open` is 2.
template <class T, int D>
__global__ __launch_bounds__(gather_warps * 32, 2) void dense_kernel(const __grid_constant__ kernel_arguments k, bool rest) {
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<dense_shared<T, D>*>(memory);
  using E = element_of<T>;
  constexpr int tiles = D / 8;  // of 8 columns of the output
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int heads = k.group;
  after_last_kernel();
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
      auto& ring = s.warp[warp].ring;
      const auto fetch = [&](int i) {
        if (i < mine) {
          const int from = begin + (warp + i * gather_warps) * 16;
          fetch_rows<D>(k, at(min(from + (lane & 15), end - 1)), ring.rows[i % 3], lane);
        } else {
          commit_copies();
        }
      };
      fetch(0), fetch(1);
      // The query's 16 heads, in the order of coordinates in which the keys' 16 bytes are read.
      uint4 q[D / 32][2];
      const auto* Q = static_cast<const unsigned short*>(k.a.q) + (static_cast<std::int64_t>(b) * k.n_kv + kv) * heads * D;
#pragma unroll
      for (int i = 0; i < D / 32; ++i)
#pragma unroll
        for (int u = 0; u < 2; ++u)
          q[i][u] = g + 8 * u < heads ? *reinterpret_cast<const uint4*>(Q + (g + 8 * u) * D + i * 32 + t * 8)
                                      : make_uint4(0, 0, 0, 0);
      float c[tiles][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll 1
      for (int i = 0; i < mine; ++i) {
        fetch(i + 2);
        wait_copies<2>();
        __syncwarp();
        const auto& rows = ring.rows[i % 3];
        const int from = begin + (warp + i * gather_warps) * 16;
        float l[2][4] = {};
#pragma unroll
        for (int j = 0; j < D / 32; ++j)
#pragma unroll
          for (int nt = 0; nt < 2; ++nt) {
            const uint4 x = *reinterpret_cast<const uint4*>(rows[0][nt * 8 + g] + t * 16 + j * 64);
            E::mma(l[nt], q[j][0].x, q[j][1].x, q[j][0].y, q[j][1].y, x.x, x.y);
            E::mma(l[nt], q[j][0].z, q[j][1].z, q[j][0].w, q[j][1].w, x.z, x.w);
          }
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
        const std::uint32_t a0 = E::pack(l[0][0], l[0][1]), a1 = E::pack(l[0][2], l[0][3]), a2 = E::pack(l[1][0], l[1][1]),
                            a3 = E::pack(l[1][2], l[1][3]);
#pragma unroll
        for (int half = 0; half < D / 64; ++half) {
          uint4 v[4];
#pragma unroll
          for (int r = 0; r < 4; ++r)
            v[r] = *reinterpret_cast<const uint4*>(rows[1][2 * t + (r & 1) + (r >> 1) * 8] + g * 16 + half * 128);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const unsigned how = j & 1 ? 0x7632 : 0x5410;
            E::mma(c[half * 8 + j], a0, a1, a2, a3, __byte_perm(word(v[0], j >> 1), word(v[1], j >> 1), how),
                   __byte_perm(word(v[2], j >> 1), word(v[3], j >> 1), how));
          }
        }
        __syncwarp();
      }
      wait_copies<0>();
      __syncwarp();
#pragma unroll
      for (int j = 0; j < tiles; ++j) s.warp[warp].sums[j][lane] = make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
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
          value += reinterpret_cast<const float*>(&s.warp[w].sums[tile][from])[e] * exp2_of(m - most);
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
              const float* from = k.w.part + ((static_cast<std::int64_t>(group) * k.pieces + p) * heads + h) * D + lane * own;
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
          const float* centre = k.codes.heads ? k.codes.heads + static_cast<std::int64_t>(group) * (2 * D + 8) + D : nullptr;
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
          const float mass = __ldcg(k.w.fits + id * 4) * ln_2, s_lse = lse - __ldcg(k.w.thresholds + id * 8 + offset);
          const float scale = 0.5f * logf(norm2) - logf(typical), away = 0.5f * log2f(away2 + 1e-30f) - log2f(typical);
          if (isfinite(mass) && isfinite(s_lse) && isfinite(scale) && isfinite(away))
            state.denominator = s_lse - mass, state.scale = scale, state.away = away, state.known = 1;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace vattn::cuda::detail
