// The gather: candidates are thinned to what this query needs, their keys and values are read, and the last block of a
// group judges.
#pragma once

#include "vattn/cuda/dense.cuh"
#include "vattn/cuda/judge.cuh"

namespace vattn::cuda::detail {

inline constexpr int most_segments = 512;

template <class T, int D>
struct gather_shared {
  union {
    row_ring<D, 2> ring;
    float4 sums[D / 8][32];
  } warp[gather_warps];
  uint2 fifo[gather_warps][64], batch[gather_warps][2][16];
  float scalars[gather_warps][chunk_heads][slot_scalars];
  uint4 q[chunk_heads][D / 8];
  int prefix[most_segments + 1];
  float shift[16], log2_mass[16];
  int overflow, last;
  judge_shared judge;
};

// Rows of the products, 16: of 4 heads the weights w, u, t and z of judge.cuh.
template <class T, int D>
__global__ __launch_bounds__(gather_warps * 32, 1) void gather_kernel(const __grid_constant__ kernel_arguments k,
                                                                      bool first_round) {
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<gather_shared<T, D>*>(memory);
  using E = element_of<T>;
  constexpr int tiles = D / 8;
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int group = static_cast<int>(blockIdx.y) / k.chunks, chunk = static_cast<int>(blockIdx.y) % k.chunks;
  const int b = group / k.n_kv, heads = min(chunk_heads, k.group - chunk * chunk_heads);
  const int segments = k.splits * scan_warps;
  after_last_kernel();
  if (!first_round) {
    bool wanted = false;
    for (int h = 0; h < k.group; ++h) wanted |= __ldcg(k.w.open + group * k.group + h) == 1;
    if (!wanted) return;
  }
  if (warp == 0) {  // where each scanning warp's candidates begin
    int v[most_segments / 32], sum = 0, over = 0;
#pragma unroll
    for (int i = 0; i < most_segments / 32; ++i)
      v[i] = i * 32 + lane < segments ? __ldcg(k.w.counts + group * segments + i * 32 + lane) : 0;
#pragma unroll
    for (int i = 0; i < most_segments / 32; ++i) {
      if (i * 32 >= segments) break;
      over |= v[i] > k.segment;
      int x = min(v[i], k.segment);
#pragma unroll
      for (int o = 1; o < 32; o *= 2) {
        const int below = __shfl_up_sync(full, x, o);
        if (lane >= o) x += below;
      }
      s.prefix[i * 32 + lane + 1] = sum + x;
      sum += __shfl_sync(full, x, 31);
    }
    over = __any_sync(full, over);
    if (lane == 0) s.prefix[0] = 0, s.overflow = over;
  } else {
    for (int h = warp - 1; h < k.group; h += gather_warps - 1) {
      const int id = group * k.group + h;
      const float* marks = k.w.thresholds + id * 8;
      const float A = __ldcg(marks + plain), F = __ldcg(marks + floor_);
      float log2_mass, shift;
      if (first_round) {
        const float m = sum_warp(lane < k.splits ? __ldcg(k.w.masses + (group * k.splits + lane) * 16 + h) : 0.0f);
        const head_state& old = static_cast<const head_state*>(k.a.state)[id];
        log2_mass = m == 0 ? __ldcg(marks + guess) : A + log2f(m);
        const float picks = log2_mass - log2f(k.rows) - old.rows * log2_e - A;
        const float floor = log2_mass + log2f(floor_kappa * k.epsilon) - 0.15f - F +
                            (old.known ? (old.denominator + old.scale) * log2_e : -1.0f);
        shift = fmaxf(0.0f, fminf(picks, floor));
      } else {
        log2_mass = __ldcg(k.w.fits + id * 4);
        shift = __ldcg(k.w.open + id) != 1 ? 1e30f : __ldcg(k.w.fits + id * 4 + 3) > 0 ? 0.0f : __ldcg(marks + next_shift);
      }
      if (lane == 0) s.log2_mass[h] = log2_mass, s.shift[h] = shift;
    }
  }
  if (tid < chunk_heads * D / 8) {
    const int h = min(tid / (D / 8), heads - 1);
    s.q[tid / (D / 8)][tid % (D / 8)] = reinterpret_cast<const uint4*>(
        static_cast<const unsigned short*>(k.a.q) + (static_cast<std::int64_t>(group) * k.group + chunk * chunk_heads + h) * D)[tid % (D / 8)];
  }
  std::uint32_t keys[2];
  const std::uint32_t sequence = k.a.sequences ? static_cast<std::uint32_t>(k.a.sequences[b]) : static_cast<std::uint32_t>(b);
  draw_words(k.seed, k.a.layer, k.a.step ? *k.a.step : 0u, sequence, static_cast<std::uint32_t>(group % k.n_kv), keys);
  const int n = length_of(k.a.cache, b), first = first_token(k, n);
  const int coded_end = max(first, closed_tiles(n, k.window) * tile_keys), fixed = n - coded_end;
  const head_rows at(k.a.cache, b, group % k.n_kv);
  __syncthreads();
  float shift = 1e30f;
  for (int h = 0; h < k.group; ++h) shift = fminf(shift, s.shift[h]);
  const int total = fixed + s.prefix[segments];
  const int e0 = static_cast<int>(static_cast<std::int64_t>(total) * blockIdx.x / k.gather_splits);
  const int e1 = static_cast<int>(static_cast<std::int64_t>(total) * (blockIdx.x + 1) / k.gather_splits);

  const int head = min(g & 3, heads - 1), id = group * k.group + chunk * chunk_heads + head;
  const float* marks = k.w.thresholds + id * 8;
  const float offset2 = __ldcg(marks + offset) * log2_e, reference = s.log2_mass[chunk * chunk_heads + head] + offset2;
  const float A = __ldcg(marks + plain), F = __ldcg(marks + floor_), lower = __ldcg(marks + slope), deviation = __ldcg(marks + sigma);
  const float* centre_of = k.codes.heads + static_cast<std::int64_t>(group) * (2 * D + 8) + D;
  const float log2_typical = log2f(centre_of[D + typical_reach]);
  float centre[D / 8];  // of the coordinates whose columns this lane reads
#pragma unroll
  for (int j = 0; j < D / 8; ++j) centre[j] = centre_of[j / 8 * 64 + g * 8 + j % 8];

  // Candidates in the order of their entries, 32 at a time in turn by warps; the next 32 are on their way.
  const auto entry = [&](int i) {
    uint2 e = make_uint2(static_cast<std::uint32_t>(coded_end + i), __float_as_uint(certain_level));
    if (i >= fixed && i < e1) {
      const int place = i - fixed;
      int low = 0, high = segments;  // prefix[low] <= place < prefix[high]
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (s.prefix[middle] <= place) low = middle; else high = middle;
      }
      e = __ldcg(reinterpret_cast<const uint2*>(k.w.candidates) +
                 (static_cast<std::int64_t>(group) * segments + low) * k.segment + (place - s.prefix[low]));
    }
    return e;
  };
  const auto log2_probability = [&](std::uint32_t level) {
    return fmaxf(__uint_as_float(level & ~255u) - shift, k.least);
  };
  int next = e0 + warp * 32, waiting = 0, oldest = 0;
  uint2 ahead = entry(next + lane);
  uint2* fifo = s.fifo[warp];
  const auto refill = [&] {
    while (waiting < 16 && next < e1) {
      const uint2 e = ahead;
      const int i = next + lane;
      next += gather_warps * 32;
      ahead = entry(next + lane);
      const bool keep = i < e1 && (i < fixed || log2_uniform(draw(e.x, keys[0], keys[1])) < log2_probability(e.y));
      const unsigned all = __ballot_sync(full, keep);
      if (keep) fifo[(oldest + waiting + __popc(all & ((1u << lane) - 1))) & 63] = e;
      waiting += __popc(all);
      __syncwarp();
    }
  };
  float c[tiles][4] = {}, sum[slot_scalars] = {};
  auto& ring = s.warp[warp].ring;
  int pending = 0, stage = 0;
  const auto issue = [&]() -> bool {
    refill();
    if (waiting == 0) return false;
    const int count = min(waiting, 16);
    uint2 e = fifo[(oldest + min(lane & 15, count - 1)) & 63];
    if (lane < 16) s.batch[warp][stage][lane] = lane < count ? e : make_uint2(e.x, 0xffffffffu);
    __syncwarp();
    fetch_rows<D>(k, at, ring.rows[stage], lane, [&](int row) { return static_cast<int>(s.batch[warp][stage][row].x); });
    oldest = (oldest + count) & 63, waiting -= count;
    stage ^= 1;
    return true;
  };
  if (issue()) ++pending;
#pragma unroll 1
  while (pending > 0) {
    if (issue()) {
      ++pending;
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncwarp();
    const int here = pending == 2 ? stage : stage ^ 1;
    --pending;
    const auto& rows = ring.rows[here];
    float l[2][4] = {};
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      const uint4 q = s.q[g & 3][j * 4 + t];
#pragma unroll
      for (int nt = 0; nt < 2; ++nt) {
        const uint4 x = *reinterpret_cast<const uint4*>(rows[0][nt * 8 + g] + t * 16 + j * 64);
        E::mma(l[nt], q.x, q.x, q.y, q.y, x.x, x.y);
        E::mma(l[nt], q.z, q.z, q.w, q.w, x.z, x.w);
      }
    }
    // ‖v − c‖² of the lane's four rows 2t, 2t + 1, 2t + 8, 2t + 9.
    float r2[4] = {};
#pragma unroll
    for (int half = 0; half < D / 64; ++half)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint4 v = *reinterpret_cast<const uint4*>(rows[1][2 * t + (r & 1) + (r >> 1) * 8] + g * 16 + half * 128);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float x = E::low(word(v, j)) - centre[half * 8 + 2 * j], y = E::high(word(v, j)) - centre[half * 8 + 2 * j + 1];
          r2[r] += x * x, r2[r] += y * y;
        }
      }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      r2[r] += __shfl_xor_sync(full, r2[r], 4), r2[r] += __shfl_xor_sync(full, r2[r], 8), r2[r] += __shfl_xor_sync(full, r2[r], 16);
    }
    std::uint32_t up[4], down[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint2 e = s.batch[warp][here][2 * t + (r & 1) + (r >> 1) * 8];
      const bool valid = e.y != 0xffffffffu;
      const float l2 = l[r >> 1][r & 1] * (k.scale * log2_e), level = __uint_as_float(e.y & ~255u);
      const bool sure = level >= certain_level;
      const float lp = sure ? 0.0f : fminf(0.0f, log2_probability(e.y)), missed = 1 - exp2f(lp);
      const float w = valid ? exp2f(fminf(l2 - reference - lp, 100.0f)) : 0.0f;
      // What the score said at most: it was below the level over its threshold.
      const float rho = static_cast<float>(e.y & 255u), reach = 0.5f * log2f(r2[r] + 1e-30f) - log2_typical;
      const float most = level + fminf(A, fmaf(rho, lower, F)) - fminf(reach, 4.97f);
      const std::uint32_t tw = to_tf32(w), tt = to_tf32(missed * w * w), coin = draw(e.x, keys[1], ~keys[0]);
      const float wr = __uint_as_float(tw), tr = __uint_as_float(tt);
      const std::uint32_t tu = to_tf32(tr * r2[r] * missed * w), tz = to_tf32((coin & 1 ? w : -w) * sqrtf(missed));
      up[r] = g < 4 ? tw : tu, down[r] = g < 4 ? tt : tz;
      sum[sum_w] += wr, sum[sum_u] += __uint_as_float(tu), sum[sum_t] += tr, sum[sum_z] += __uint_as_float(tz);
      sum[sum_tt] += tr * tr, sum[sum_ttr2] += tr * tr * r2[r], sum[sum_ttr4] += tr * r2[r] * (tr * r2[r]);
      sum[sum_tr2] += tr * r2[r], sum[sum_wr2] += wr * r2[r];
      sum[rows_over] += valid && !sure && stats::breaches(static_cast<double>(l2 - offset2), static_cast<double>(most + 4 * deviation * rho + 0.1f)) ? 1.0f : 0.0f;
      sum[rows_read] += valid && static_cast<int>(e.x) < coded_end ? 1.0f : 0.0f;
    }
#pragma unroll
    for (int half = 0; half < D / 64; ++half) {
      uint4 v[4];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        v[r] = *reinterpret_cast<const uint4*>(rows[1][2 * t + (r & 1) + (r >> 1) * 8] + g * 16 + half * 128);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const auto element = [&](int r) { return j & 1 ? E::high(word(v[r], j >> 1)) : E::low(word(v[r], j >> 1)); };
        mma_tf32(c[half * 8 + j], up[0], down[0], up[1], down[1], element(0), element(1));
        mma_tf32(c[half * 8 + j], up[2], down[2], up[3], down[3], element(2), element(3));
      }
    }
    __syncwarp();
  }
#pragma unroll
  for (int j = 0; j < tiles; ++j) s.warp[warp].sums[j][lane] = make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
#pragma unroll
  for (int i = 0; i < slot_scalars; ++i) {
    sum[i] += __shfl_xor_sync(full, sum[i], 1), sum[i] += __shfl_xor_sync(full, sum[i], 2);
    if (t == 0 && g < 4) s.scalars[warp][g][i] = sum[i];
  }
  __syncthreads();
  const int slots = slots_of_block(k.gather_splits), together = gather_warps / slots;
  const std::int64_t section = static_cast<std::int64_t>(group) * k.chunks + chunk;
  const std::int64_t slot0 = section * k.slots + static_cast<std::int64_t>(blockIdx.x) * slots;
  for (int o = tid; o < slots * tiles * 32; o += gather_warps * 32) {
    const int w0 = o / (tiles * 32) * together, at_lane = o % (tiles * 32);
    float4 x = s.warp[w0].sums[at_lane / 32][at_lane % 32];
    for (int w = 1; w < together; ++w) {
      const float4 y = s.warp[w0 + w].sums[at_lane / 32][at_lane % 32];
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
    reinterpret_cast<float4*>(k.w.slots)[slot0 * (tiles * 32) + o] = x;
  }
  for (int o = tid; o < slots * chunk_heads * slot_scalars; o += gather_warps * 32) {
    const int w0 = o / (chunk_heads * slot_scalars) * together, i = o % (chunk_heads * slot_scalars);
    float x = 0;
    for (int w = 0; w < together; ++w) x += s.scalars[w0 + w][i / slot_scalars][i % slot_scalars];
    k.w.scalars[slot0 * chunk_heads * slot_scalars + o] = x;
  }
  __threadfence();
  __syncthreads();
  if (tid == 0) {
    std::int32_t* count = k.w.counters + group;
    s.last = atomicAdd(count, 1) == k.gather_splits * k.chunks - 1;
    if (s.last) *count = 0;
    __threadfence();
  }
  __syncthreads();
  if (!s.last) return;
  head_context context;
  context.shift = shift, context.n = n - first, context.fixed = fixed, context.candidates = s.prefix[segments];
  context.overflow = s.overflow != 0, context.first_round = first_round;
  for (int of = 0; of < k.chunks; ++of) judge_chunk<T, D>(k, s.judge, group, of, s.log2_mass, context);
}

}  // namespace vattn::cuda::detail
