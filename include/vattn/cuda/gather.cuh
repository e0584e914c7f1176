// The gather: candidates are thinned to what this query needs, their keys and values are read, and the last block of a
// group judges.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/cuda/dense.cuh"
#include "vattn/cuda/judge.cuh"

namespace vattn::VATTN_ABI::cuda::detail {

inline constexpr int most_segments = 512;

// What a warp has on its way: batches of 16 rows of K and V. Rows are 16 bytes longer than they are, so that the 16
// bytes of rows 2t that the lanes of a quarter warp read lie in different banks. (Straight into registers, as
// dense_kernel has them, random rows came slower: docs/cuda.md.)
template <int D, int Stages>
struct row_ring {
  char rows[Stages][2][16][2 * D + 16];
};

// 16 rows: keys and values to a stage of the ring. `mine` is where the row of lane's number mod 16 begins, in units of
// 16 bytes; a row is copied by D/8 lanes.
template <int D>
__device__ inline void fetch_rows(const kernel_arguments& k, std::uint32_t mine, char (*to)[16][2 * D + 16], int lane) {
  constexpr int lanes = D / 8, together = 32 / lanes;
  const auto *K = static_cast<const uint4*>(k.a.cache.k) + lane % lanes,
             *V = static_cast<const uint4*>(k.a.cache.v) + lane % lanes;
  char* into = to[0][lane / lanes] + lane % lanes * 16;
#pragma unroll
  for (int r = 0; r < 16; r += together) {
    const std::uint32_t from = __shfl_sync(full, mine, r + lane / lanes);
    copy16(into + r * (2 * D + 16), K + from);
    copy16(into + (16 + r) * (2 * D + 16), V + from);
  }
  commit_copies();
}

template <class T, int D>
struct gather_shared {
  union {
    row_ring<D, 2> ring;
    float4 sums[D / 8][32];
  } warp[gather_warps];
  uint4 fifo[gather_warps][64], batch[gather_warps][2][16];
  float scalars[gather_warps][chunk_heads][slot_scalars];
  uint4 q[chunk_heads][D / 8];
  int prefix[most_segments + 1], warp_counts[gather_warps];
  float shift_of[16], shift[4], log2_mass[16];
  int overflow, last;
  judge_shared judge;
  group_list list;
};

// A share of one group's entries for a chunk of its heads. Rows of the products, 16: of 4 heads the weights w, u, t and
// z of judge.cuh.
template <class T, int D>
__device__ inline void gather_share(const kernel_arguments& k, gather_shared<T, D>& s, int group, int chunk, int split,
                                    bool first_round) {
  using E = element_of<T>;
  constexpr int tiles = D / 8;
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int b = group / k.n_kv, heads = min(chunk_heads, k.group - chunk * chunk_heads);
  const bool again = !first_round && scanned_again(k, group);
  const int segments = (first_round || again ? k.splits : k.first_splits) * scan_warps;
  const int segment = first_round || again ? k.segment : k.first_segment;
  const std::uint32_t step = k.a.step ? *k.a.step : 0u;
  {  // where each scanning warp's candidates begin: four of them a thread
    const int4 v = tid * 4 < segments ? __ldcg(reinterpret_cast<const int4*>(k.w.counts + group * k.group_counts) + tid)
                                      : make_int4(0, 0, 0, 0);
    const int a = min(v.x, segment), b2 = a + min(v.y, segment), c2 = b2 + min(v.z, segment),
              d2 = c2 + min(v.w, segment);
    int x = d2;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const int below = __shfl_up_sync(full, x, o);
      if (lane >= o) x += below;
    }
    if (lane == 31) s.warp_counts[warp] = x;
    const int over = __syncthreads_or(max(max(v.x, v.y), max(v.z, v.w)) > segment);
    int before = x - d2;
#pragma unroll
    for (int w = 0; w < gather_warps - 1; ++w) before += w < warp ? s.warp_counts[w] : 0;
    int* prefix = s.prefix + 1 + tid * 4;
    prefix[0] = before + a, prefix[1] = before + b2, prefix[2] = before + c2, prefix[3] = before + d2;
    if (tid == 0) s.prefix[0] = 0, s.overflow = over;
  }
#pragma unroll 1
  for (int h = warp; h < k.group; h += gather_warps) {
    const int id = group * k.group + h;
    const float* marks = k.w.thresholds + id * mark_size;
    const float A = __ldcg(marks + plain), F = __ldcg(marks + floor_);
    float log2_mass, shift;
    if (first_round) {
      const head_state old = static_cast<const head_state*>(k.a.state)[id];
      const float expected = __ldcg(marks + guess);
      const float m = sum_warp(lane < k.splits ? __ldcg(k.w.masses + (group * k.splits + lane) * 16 + h) : 0.0f);
      log2_mass = m == 0 ? expected : A + log2_of(m);
      const float picks = log2_mass - log2_of(k.rows) - old.rows * log2_e - A;
      const float floor = log2_mass + log2_of(floor_kappa * k.epsilon) - floor_reserve - F +
                          (old.known ? (old.denominator + old.scale) * log2_e : -1.0f);
      shift = fmaxf(0.0f, fminf(picks, floor));
    } else {
      log2_mass = __ldcg(k.w.fits + id * 4);
      shift = __ldcg(k.w.open + id) != 1 ? 1e30f : again ? 0.0f : __ldcg(marks + next_shift);
    }
    if (lane == 0) s.log2_mass[h] = log2_mass, s.shift_of[h] = shift;
  }
  if (tid < chunk_heads * D / 8) {
    const int h = min(tid / (D / 8), heads - 1);
    s.q[tid / (D / 8)][tid % (D / 8)] = reinterpret_cast<const uint4*>(
        static_cast<const unsigned short*>(k.a.q) +
        (static_cast<std::int64_t>(group) * k.group + chunk * chunk_heads + h) * D)[tid % (D / 8)];
  }
  std::uint32_t keys[2];
  const std::uint32_t sequence =
      k.a.sequences ? static_cast<std::uint32_t>(k.a.sequences[b]) : static_cast<std::uint32_t>(b);
  draw_words(k.seed, k.a.layer, step, sequence, static_cast<std::uint32_t>(group % k.n_kv), keys);
  const int n = length_of(k.a.cache, b), first = first_token(k, n);
  const int coded_end = max(first, closed_tiles(n, k.window) * tile_keys), fixed = n - coded_end;
  const head_rows at(k.a.cache, b, group % k.n_kv);
  __syncthreads();
  if (tid < 4) {
    float least = 1e30f;
#pragma unroll 1
    for (int h = 0; h < k.group; ++h)
      if (level_slot(k.group, h) == tid) least = fminf(least, s.shift_of[h]);
    s.shift[tid] = least;
  }
  __syncthreads();
  const float shift[4] = {s.shift[0], s.shift[1], s.shift[2], s.shift[3]};
  const int total = fixed + s.prefix[segments];
  const int e0 = share_of(total, split, k.gather_splits);
  const int e1 = share_of(total, split + 1, k.gather_splits);

  const int head = min(g & 3, heads - 1), slot = level_slot(k.group, chunk * chunk_heads + head),
            id = group * k.group + chunk * chunk_heads + head;
  const float* marks = k.w.thresholds + id * mark_size;
  const float offset2 = __ldcg(marks + offset) * log2_e, reference = s.log2_mass[chunk * chunk_heads + head] + offset2;
  const float A = __ldcg(marks + plain), F = __ldcg(marks + floor_), lower = __ldcg(marks + slope),
              deviation = __ldcg(marks + sigma);
  const float* centre_of = k.codes.heads + static_cast<std::int64_t>(group) * (2 * D + 8) + D;
  const float typical2 = centre_of[D + typical_reach] * centre_of[D + typical_reach];

  // Candidates in the order of their entries, 32 at a time in turn by warps; the next 32 are on their way.
  const auto entry = [&](int i) {
    uint4 e = make_uint4(static_cast<std::uint32_t>(coded_end + i), certain_flag, 0, 0);
    if (i >= fixed && i < e1) {
      const int place = i - fixed;
      int low = 0, high = segments;  // prefix[low] <= place < prefix[high]
#pragma unroll 1
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (s.prefix[middle] <= place)
          low = middle;
        else
          high = middle;
      }
      e = __ldcg(reinterpret_cast<const uint4*>(k.w.candidates) + group * k.group_candidates +
                 static_cast<std::int64_t>(low) * segment + (place - s.prefix[low]));
    }
    return e;
  };
  const auto log2_probability = [&](const uint4& e) {
    const float low = fmaxf(half_of(e.z, 0) - shift[0], half_of(e.z, 1) - shift[1]);
    const float high = fmaxf(half_of(e.w, 0) - shift[2], half_of(e.w, 1) - shift[3]);
    return e.y & certain_flag ? 0.0f : fminf(0.0f, fmaxf(fmaxf(low, high), k.least));
  };
  // Kept ones wait in a ring of 64; the next 32 entries are on their way when it is filled.
  int next = e0 + warp * 32, waiting = 0, oldest = 0, asked = -1;
  uint4 ahead = make_uint4(0, 0, 0, 0);
  uint4* fifo = s.fifo[warp];
  const auto refill = [&] {
#pragma unroll 1
    while (waiting < 16 && next < e1) {
      const uint4 e = ahead;
      const int i = asked;  // below 0: nothing was asked for yet
      if (i >= 0) next += gather_warps * 32;
      asked = next + lane;
      ahead = entry(asked);
      const bool keep = i >= 0 && i < e1 &&
                        ((e.y & certain_flag) != 0 || log2_uniform(draw(e.x, keys[0], keys[1])) < log2_probability(e));
      const unsigned all = __ballot_sync(full, keep);
      if (keep) fifo[(oldest + waiting + __popc(all & ((1u << lane) - 1))) & 63] = e;
      waiting += __popc(all);
      __syncwarp();
    }
  };
  float c[tiles][4] = {}, sum[slot_scalars] = {};
  auto& ring = s.warp[warp].ring;
  int pending = 0, stage = 0;
#pragma unroll 1
  for (bool more = true;;) {
    if (more) {  // another 16
      refill();
      const int count = min(waiting, 16);
      more = count > 0;
      if (more) {
        uint4 e = fifo[(oldest + min(lane & 15, count - 1)) & 63];
        if (lane >= count) e.y = 0xffffffffu;
        if (lane < 16) s.batch[warp][stage][lane] = e;
        fetch_rows<D>(k, static_cast<std::uint32_t>(at(static_cast<int>(e.x)) >> 3), ring.rows[stage], lane);
        oldest = (oldest + count) & 63, waiting -= count;
        stage ^= 1;
        if (++pending < 2) continue;
      }
    }
    if (pending == 0) break;
    if (pending == 2)
      wait_copies<1>();
    else
      wait_copies<0>();
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
    float v2[4] = {};  // ‖v‖² of the lane's four rows 2t, 2t + 1, 2t + 8, 2t + 9
    if (k.rms) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int half = 0; half < D / 64; ++half) {
          const uint4 v =
              *reinterpret_cast<const uint4*>(rows[1][2 * t + (r & 1) + (r >> 1) * 8] + g * 16 + half * 128);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            v2[r] += E::low(word(v, j)) * E::low(word(v, j)), v2[r] += E::high(word(v, j)) * E::high(word(v, j));
        }
        v2[r] += __shfl_xor_sync(full, v2[r], 4), v2[r] += __shfl_xor_sync(full, v2[r], 8),
            v2[r] += __shfl_xor_sync(full, v2[r], 16);
      }
    }
    std::uint32_t up[4], down[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint4 e = s.batch[warp][here][2 * t + (r & 1) + (r >> 1) * 8];
      const bool valid = e.y != 0xffffffffu, sure = (e.y & certain_flag) != 0;
      const float l2 = l[r >> 1][r & 1] * (k.scale * log2_e);
      const float lp = log2_probability(e), missed = 1 - exp2_of(lp);
      const float w = valid ? exp2_of(fminf(l2 - reference - lp, 100.0f)) : 0.0f;
      // What the score said at most: its level over the threshold.
      const float rho = static_cast<float>(e.y & 255u),
                  reach = fmaf(static_cast<float>(e.y >> 16 & 255u), reach_unit, reach_least);
      const float r2 = typical2 * exp2_of(2 * reach);
      const float level = half_of(slot & 2 ? e.w : e.z, slot & 1);
      const float most = level + fminf(A, fmaf(rho, lower, F)) - reach + 4 * deviation * rho + 0.1f;
      const std::uint32_t tw = to_tf32(w), tt = to_tf32(missed * w * w), coin = draw(e.x, keys[1], ~keys[0]);
      const float wr = __uint_as_float(tw), tr = __uint_as_float(tt);
      const std::uint32_t tu = to_tf32(tr * r2 * missed * w), tz = to_tf32((coin & 1 ? w : -w) * sqrt_of(missed));
      up[r] = g < 4 ? tw : tu, down[r] = g < 4 ? tt : tz;
      sum[sum_w] += wr, sum[sum_u] += __uint_as_float(tu), sum[sum_t] += tr, sum[sum_z] += __uint_as_float(tz);
      sum[sum_tt] += tr * tr, sum[sum_ttr2] += tr * tr * r2, sum[sum_ttr4] += tr * r2 * (tr * r2);
      sum[sum_tr2] += tr * r2, sum[sum_wv2] += wr * v2[r];
      sum[rows_over] += valid && !sure && l2 - offset2 > most + 1e-3f * (1 + fabsf(l2)) ? 1.0f : 0.0f;
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
  const int slots = slots_of_block(k.gather_splits), together = gather_warps / slots;  // powers of two
  const std::int64_t slot0 = (static_cast<std::int64_t>(group) * k.chunks + chunk) * k.group_slots + split * slots;
#pragma unroll 1
  for (int o = tid; o < slots * tiles * 32; o += gather_warps * 32) {
    const int w0 = o / (tiles * 32) * together, at_lane = o % (tiles * 32);
    float4 x = s.warp[w0].sums[at_lane / 32][at_lane % 32];
#pragma unroll
    for (int w = 1; w < gather_warps; ++w)
      if (w < together) {
        const float4 y = s.warp[w0 + w].sums[at_lane / 32][at_lane % 32];
        x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
      }
    reinterpret_cast<float4*>(k.w.slots)[slot0 * (tiles * 32) + o] = x;
  }
#pragma unroll 1
  for (int o = tid; o < slots * chunk_heads * slot_scalars; o += gather_warps * 32) {
    const int w0 = o / (chunk_heads * slot_scalars) * together, i = o % (chunk_heads * slot_scalars);
    float x = s.scalars[w0][0][i];
#pragma unroll
    for (int w = 1; w < gather_warps; ++w)
      if (w < together) x += s.scalars[w0 + w][0][i];
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
  const group_context context{s.log2_mass, s.shift, n - first, fixed, s.prefix[segments], s.overflow != 0, first_round};
#pragma unroll 1
  for (int of = 0; of < k.chunks; ++of) judge_chunk<T, D>(k, s.judge, group, of, context);
}

// First round: a block for each share. Second: blocks take shares of groups with an open head in turn.
template <class T, int D>
__global__ __launch_bounds__(gather_warps * 32, 2) void gather_kernel(const __grid_constant__ kernel_arguments k,
                                                                      bool first_round) {
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<gather_shared<T, D>*>(memory);
  after_last_kernel();
  if (!first_round && __ldcg(k.w.counters + 2 * k.groups) == 0) return;
  if (threadIdx.x == 0) tabulated_clt::table() = &k.quantiles;  // seen by all at the first of a share's barriers
  const int shares = k.gather_splits * k.chunks;
#pragma unroll 1
  for (int base = 0; base < k.groups; base += listed_groups) {
    if (!first_round) list_groups<gather_warps * 32>(k, base, 1, s.list);
    const int items = (first_round ? k.groups : s.list.size) * shares;
#pragma unroll 1
    for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
      const int of = item % shares, group = first_round ? item / shares : base + s.list.group[item / shares];
      gather_share<T, D>(k, s, group, of / k.gather_splits, of % k.gather_splits, first_round);
      __syncthreads();
    }
    if (first_round) return;
  }
}

}  // namespace vattn::VATTN_ABI::cuda::detail

#include "vattn/macros_pop.hpp"
