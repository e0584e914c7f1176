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
  int listed, last;
  unsigned short list[2048];
};

// 16 rows from `token` on: keys and values to a stage of the ring. Lane l copies 16 bytes of row l/(D/8) of each 256/D.
template <int D, class Token>
__device__ inline void fetch_rows(const kernel_arguments& k, const head_rows& at, char (*to)[16][2 * D + 16], int lane,
                                  Token&& token) {
  constexpr int lanes = D / 8, together = 32 / lanes;
  const auto *K = static_cast<const unsigned short*>(k.a.cache.k), *V = static_cast<const unsigned short*>(k.a.cache.v);
#pragma unroll
  for (int r = 0; r < 16; r += together) {
    const int row = r + lane / lanes, column = lane % lanes;
    const std::int64_t from = at(token(row)) + column * 8;
    copy16(to[0][row] + column * 16, K + from);
    copy16(to[1][row] + column * 16, V + from);
  }
  commit_copies();
}

// One block's work is a piece of a sequence for one KV head, all of its query heads at once (rows of the products).
// Warps take batches of 16 rows in turn with a softmax of their own; the last piece to arrive merges. `rest`: only heads
// whose `open` is 2.
template <class T, int D>
__global__ __launch_bounds__(gather_warps * 32, 1) void dense_kernel(const __grid_constant__ kernel_arguments k,
                                                                     int groups, bool rest) {
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<dense_shared<T, D>*>(memory);
  using E = element_of<T>;
  constexpr int tiles = D / 8;  // of 8 columns of the output
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int heads = k.group;
  after_last_kernel();
  for (int base = 0; base < groups; base += 2048) {
    const int here = min(2048, groups - base);
    if (tid == 0) s.listed = 0;
    __syncthreads();
    for (int from = 0; from < here; from += gather_warps * 32) {  // in order, so that who does what does not vary
      bool wanted = from + tid < here;
      if (wanted && rest) {
        wanted = false;
        for (int h = 0; h < heads; ++h) wanted |= __ldcg(k.w.open + (base + from + tid) * heads + h) == 2;
      }
      for (int w = 0; w < gather_warps; ++w) {
        if (warp == w) {
          const unsigned all = __ballot_sync(full, wanted);
          if (wanted) s.list[s.listed + __popc(all & ((1u << lane) - 1))] = static_cast<unsigned short>(from + tid);
          __syncwarp();
          if (lane == 0) s.listed += __popc(all);
        }
        __syncthreads();
      }
    }
    const int items = s.listed * k.pieces;
    for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
      const int group = base + s.list[item / k.pieces], piece = item % k.pieces;
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
          fetch_rows<D>(k, at, ring.rows[i % 3], lane, [&](int row) { return min(from + row, end - 1); });
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
            if (k.softcap > 0) x = k.softcap * tanhf(x / k.softcap);
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
        std::int32_t* count = k.w.counters + groups + group;
        s.last = atomicAdd(count, 1) == k.pieces - 1;
        if (s.last) *count = 0;
        __threadfence();
      }
      __syncthreads();
      if (s.last) {
        for (int h = warp; h < heads; h += gather_warps) {
          const int id = group * heads + h;
          if (rest && __ldcg(k.w.open + id) != 2) continue;
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
          for (int p = 0; p < k.pieces; ++p) {
            const float w = __shfl_sync(full, p < 32 ? weight[0] : weight[1], p & 31);
            const float* from = k.w.part + ((static_cast<std::int64_t>(group) * k.pieces + p) * heads + h) * D + lane * own;
#pragma unroll
            for (int j = 0; j < own; ++j)
              if (w != 0) out[j] += w * __ldcg(from + j);
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
    __syncthreads();
  }
}

}  // namespace vattn::cuda::detail
