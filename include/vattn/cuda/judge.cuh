// From the sums of a sample to a verdict, on the device: evidence and judgement are those of stats/, the quantiles
// those of the plan's table.
#include "vattn/macros_push.hpp"
#pragma once

#include "vattn/cuda/scan.cuh"
#include "vattn/stats/judge.hpp"

namespace vattn::VATTN_ABI::cuda::detail {

// The bound of stats::judge whose quantiles come from the table that this block was given.
struct tabulated_clt {
  static constexpr guarantee kind = guarantee::asymptotic;
  static constexpr const char* name = "clt";
  static constexpr const char* assumptions = stats::clt::assumptions;
  __device__ static const quantile_table*& table() {
    __shared__ const quantile_table* of_block;
    return of_block;
  }
  __device__ static double squared_quantile(const stats::error_shape& e, double) {
    if (!(e.dof >= 1.99)) return stats::infinity;
    const double q =
        static_cast<double>((*table())(static_cast<float>(e.dimension), static_cast<float>(fmin(e.dof, 1e9))));
    return !e.scalar && e.dimension <= 1 ? stats::larger(q, stats::least_vector_quantile) : q;
  }
};

// Sums over a slot's rows besides the vectors N = Σ w v, U = Σ u v, T = Σ t v and Z = Σ z v, with w = x/π relative to
// the reference, t = (1 − π)w², z = ±sqrt(1 − π)w, u = t r² (1 − π) w and r = ‖v − c‖ as its code
// has it.
enum slot_fields : int {
  sum_w,
  sum_u,
  sum_t,
  sum_z,
  sum_tt,
  sum_ttr2,
  sum_ttr4,
  sum_tr2,
  sum_wv2,
  rows_over,
  rows_read
};

// Sums of N values over the warp: lane L gets that of value L mod N. At a step lanes that differ in bit `Of` keep the
// values whose number does.
template <int N, int Of = 1, int Size>
__device__ inline float sum_each(float (&v)[Size], int lane) {
  if constexpr (N > 1) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const bool up = lane & Of;
      v[i] = (up ? v[2 * i + 1] : v[2 * i]) + __shfl_xor_sync(full, up ? v[2 * i] : v[2 * i + 1], Of);
    }
    return sum_each<N / 2, 2 * Of>(v, lane);
  } else {
    float r = v[0];
#pragma unroll
    for (int of = Of; of < 32; of *= 2) r += __shfl_xor_sync(full, r, of);
    return r;
  }
}

struct judge_shared {
  float scalars[chunk_heads][z_groups + slot_scalars];
};

struct group_context {
  const float *masses, *shifts;  // [group], log2; [4] by level_slot
  int n, fixed, candidates;
  bool overflow, first_round;
};

// Of the last block of a group to arrive, for each chunk of its heads: a warp a head.
template <class T, int D>
__device__ inline void judge_chunk(const kernel_arguments& k, judge_shared& s, int group, int chunk,
                                   const group_context& x) {
  constexpr int tiles = D / 8, parts = D / 64, own = 2 * parts;  // a lane's coordinates
  const int lane = static_cast<int>(threadIdx.x) & 31, h = static_cast<int>(threadIdx.x) >> 5, t = lane & 3;
  const int id = group * k.group + chunk * chunk_heads + h;
  // A head to be judged: not one that the group's count lacks, nor one that the first round is done with.
  if (chunk * chunk_heads + h >= k.group || (!x.first_round && __ldcg(k.w.open + id) != 1)) return;
  const std::int64_t section = (static_cast<std::int64_t>(group) * k.chunks + chunk) * k.group_slots;
  const int slots = k.gather_splits * slots_of_block(k.gather_splits);  // a multiple of 8
  const float4* from4 =
      reinterpret_cast<const float4*>(k.w.slots) + section * (tiles * 32) + (lane >> 2) * 32 + h * 4 + t;
  float nv[own] = {}, tv[own] = {}, uv[own] = {}, z[z_groups][own] = {};
#pragma unroll 1
  for (int first = 0; first < slots; first += 8) {
    float4 a[8][parts], b[8][parts];
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int p = 0; p < parts; ++p) {
        const float4* at = from4 + static_cast<std::int64_t>(first + i) * (tiles * 32) + p * 256;
        a[i][p] = __ldcg(at), b[i][p] = __ldcg(at + 16);
      }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int p = 0; p < parts; ++p) {
        nv[2 * p] += a[i][p].x, nv[2 * p + 1] += a[i][p].y, tv[2 * p] += a[i][p].z, tv[2 * p + 1] += a[i][p].w;
        uv[2 * p] += b[i][p].x, uv[2 * p + 1] += b[i][p].y, z[i][2 * p] += b[i][p].z, z[i][2 * p + 1] += b[i][p].w;
      }
  }
  // Scalars of all slots; Σ z by group.
  {
    const float* from = k.w.scalars + (section * chunk_heads + h) * slot_scalars;
    const bool z_lane = lane >= 16 && lane < 16 + z_groups;
    const int of = z_lane ? static_cast<int>(sum_z) : min(lane, slot_scalars - 1);
    float sum = 0;
#pragma unroll 1
    for (int first = 0; first < slots; first += 8) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = __ldcg(from + (first + i) * (chunk_heads * slot_scalars) + of);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += z_lane && i != lane - 16 ? 0.0f : v[i];
    }
    if (lane < slot_scalars) s.scalars[h][z_groups + lane] = sum;
    if (z_lane) s.scalars[h][lane - 16] = sum;
    __syncwarp();
  }
  const float* sc = s.scalars[h] + z_groups;
  const float log2_mass = x.masses[chunk * chunk_heads + h],
              shift = x.shifts[level_slot(k.group, chunk * chunk_heads + h)];
  const float offset2 = __ldcg(k.w.thresholds + id * mark_size + offset) * log2_e;
  float denominator = sc[sum_w];
  if (k.a.sink_logits)
    denominator +=
        exp2_of(k.a.sink_logits[(group % k.n_kv) * k.group + chunk * chunk_heads + h] * log2_e - log2_mass - offset2);
  const float inverse = __fdividef(1.0f, denominator);
  const float* centre = k.codes.heads + static_cast<std::int64_t>(group) * (2 * D + 8) + D;
  float out[own], v[32] = {}, v2[8] = {};
  const int dim = 2 * t * 8 + (lane >> 2);  // of the first; then 8 more, and 64
#pragma unroll
  for (int i = 0; i < own; ++i) {
    out[i] = nv[i] * inverse;
    const float c = centre[dim + i % 2 * 8 + i / 2 * 64], away = out[i] - c, third = uv[i] - sc[sum_u] * out[i];
#pragma unroll
    for (int a = 0; a < z_groups; ++a) z[a][i] -= s.scalars[h][a] * out[i];
#pragma unroll
    for (int a = 1; a < z_groups; ++a)
#pragma unroll
      for (int b = 0; b < z_groups; ++b)
        if (b < a) v[a * (a - 1) / 2 + b] += z[a][i] * z[b][i];
    v[28] += away * away, v[29] += away * (tv[i] - sc[sum_t] * c), v[30] += out[i] * out[i], v[31] += third * third;
#pragma unroll
    for (int a = 0; a < z_groups; ++a) v2[a] += z[a][i] * z[a][i];
  }
  const float mine = sum_each<32>(v, lane), length2 = sum_each<8>(v2, lane);
  bool served = false;
  {
    int a = 1, b = min(lane, 27);
#pragma unroll 1
    while (b >= a) b -= a, ++a;
    const float la = __shfl_sync(full, length2, a), lb = __shfl_sync(full, length2, b);
    const float aligned = sum_warp(lane < 28 ? mine * mine : 0.0f), product = sum_warp(lane < 28 ? la * lb : 0.0f);
    const float away2 = __shfl_sync(full, mine, 28), cross = __shfl_sync(full, mine, 29),
                output2 = __shfl_sync(full, mine, 30), third = sqrt_of(__shfl_sync(full, mine, 31));
    if (lane == 0) {
      const float* marks = k.w.thresholds + id * mark_size;
      const float A = __ldcg(marks + plain), F = __ldcg(marks + floor_);
      const float typical = centre[D + typical_reach];
      const float spread = fmaxf(0.0f, sc[sum_tr2] - 2 * cross + sc[sum_t] * away2);
      const float fourth = sc[sum_ttr4] + 2 * away2 * sc[sum_ttr2] + away2 * away2 * sc[sum_tt];
      stats::evidence e;
      e.reference = static_cast<double>((log2_mass + offset2) * ln_2);
      e.denominator = static_cast<double>(denominator);
      e.output2 = static_cast<double>(output2);
      e.away2 = static_cast<double>(away2);
      e.power = static_cast<double>(sc[sum_wv2] * inverse);  // 0 where nobody asks
      e.variance = static_cast<double>(spread * inverse * inverse);
      e.dimension =
          aligned > 0
              ? static_cast<double>(fminf(fmaxf(__fdividef(product, 1.1f * aligned), 1.0f), static_cast<float>(D)))
              : 1.0;
      e.dof = fourth > 0 ? static_cast<double>(fmaxf(2.0f, 2 * __fdividef(spread, fourth) * spread))
                         : 1e9;  // 2 at least: Σt² <= (Σt)²
      e.skew = spread > 0 ? static_cast<double>(__fdividef(third, spread) * inverse) : 0.0;
      e.denominator_variance = static_cast<double>(sc[sum_t] * inverse * inverse);
      e.denominator_dof = sc[sum_tt] > 0 ? static_cast<double>(2 * __fdividef(sc[sum_t], sc[sum_tt]) * sc[sum_t]) : 1e9;
      e.rows = static_cast<index_t>(sc[rows_read]), e.certain = 0;
      const stats::promise p{static_cast<double>(k.epsilon), static_cast<double>(k.delta),
                             k.rms ? error_scale::rms : error_scale::output, static_cast<double>(floor_kappa)};
      const stats::verdict verdict = stats::judge<tabulated_clt>(e, p);
      const float goal = static_cast<float>(stats::squared_goal(e, p)), ratio = static_cast<float>(verdict.ratio);
      const float used = F + shift;
      const float want = log2_of(static_cast<float>(stats::missable(e, p))) + log2_mass - log2_of(typical);
      const float missing = used - want;
      const bool sane = isfinite(goal) && isfinite(want) && isfinite(missing) && isfinite(ratio) &&
                        isfinite(log2_mass) && !x.overflow && denominator < 1e30f;
      const int over = static_cast<int>(sc[rows_over]);
      const bool trusted = over <= static_cast<int>(stats::breaches_of_errors(e.rows));
      // A floor a third of a nat too high is what κ = ½ leaves room for.
      const bool covered = missing <= 0.5f, verified = sane && trusted && covered && verdict.met;
      served = verified;
      const float lse = log2_of(denominator) * ln_2 + static_cast<float>(e.reference);
      if (verified && k.a.lse) k.a.lse[id] = lse;
      if (k.a.certificates) {
        device_certificate c{};
        c.epsilon_achieved = static_cast<float>(verdict.epsilon_achieved), c.variance = static_cast<float>(e.variance),
        c.goal = goal;
        c.dimension = static_cast<float>(e.dimension), c.dof = static_cast<float>(e.dof);
        c.log_denominator = lse, c.rows = static_cast<int>(sc[rows_read]) + x.fixed, c.candidates = x.candidates;
        c.n = x.n, c.breaches = over, c.rounds = x.first_round ? 1 : 2;
        c.ratio = x.first_round ? ratio : k.a.certificates[id].ratio;
        k.a.certificates[id] = c;
      }
      std::int32_t open = verified ? 0 : 2;
      if (x.first_round) {
        float* fit = k.w.fits + id * 4;
        fit[0] = log2_mass, fit[3] = 0;
        k.w.thresholds[id * mark_size + used_shift] = shift;
        // What the variance or a floor lacks; with more than the candidates, another scan finds it.
        // A variance of few terms falls by more than the probabilities rise. At most a quarter of the rows.
        float more = fminf(fmaxf(0.3f, log2_of(ratio * 1.8f)), e.dof < 20 ? 1.6f : 5.0f);
        if (!covered) more = fmaxf(more, missing + 0.2f);
        more = fminf(more, log2_of(0.25f * static_cast<float>(x.n)) - log2_of(fmaxf(1.0f, sc[rows_read])));
        const float next = shift - more;
        if (!verified && sane && trusted && more > 0.2f) {
          if (next >= -0.2f || k.rescan) open = 1;
          // Also where another head of the group is why it is scanned again.
          k.w.thresholds[id * mark_size + next_shift] = fmaxf(next, 0.0f);
          fit[1] = A + next, fit[2] = fminf(used, want) - 0.2f, fit[3] = next < -0.2f ? 1.0f : 0.0f;
        }
        head_state& state = static_cast<head_state*>(k.a.state)[id];
        state.mass = isfinite(log2_mass) ? (log2_mass - __ldcg(marks + guess)) * ln_2 : state.mass;
        if (sane) {
          state.denominator = log2_of(denominator) * ln_2;
          state.scale = 0.5f * ln_2 * log2_of(goal) - ln_2 * log2_of(k.epsilon) - ln_2 * log2_of(typical);
          state.away = 0.5f * log2_of(away2 + 1e-30f) - log2_of(typical);
          state.known = 1;
          // Few effective terms make V̂ vary from draw to draw and from query to query: another round costs more.
          const float vague = __fdividef(2.0f, fmaxf(static_cast<float>(e.dof), 1.0f));
          const float aim = __fdividef(0.93f, 1 + sqrt_of(vague) + 30 * vague);
          const float picks =
              (log2_mass - A - shift) * ln_2 - ln_2 * log2_of(k.rows);  // asked for by this head, over the default
          const float change =
              0.6f * (picks + ln_2 * log2_of(fmaxf(ratio, 1e-4f) * __fdividef(1.0f, aim)) - state.rows);
          state.rows = fminf(fmaxf(state.rows + fminf(fmaxf(change, -0.7f), 0.7f), -2.5f), 4.0f);
        }
      }
      // What blocks of this kernel look at does not change while they run.
      if (x.first_round) {
        k.w.open[id] = open, k.w.still_open[id] = 1;
        if (open != 0)
          atomicAdd(k.w.counters + 2 * k.groups, 1);  // most often there is none, and the rest returns at once
      } else
        k.w.still_open[id] = !verified;
    }
  }
  if (!__shfl_sync(full, served, 0)) return;
#pragma unroll
  for (int i = 0; i < own; ++i) {
    const std::int64_t to = static_cast<std::int64_t>(id) * D + dim + i % 2 * 8 + i / 2 * 64;
    if (k.a.output_float)
      static_cast<float*>(k.a.output)[to] = out[i];
    else
      static_cast<T*>(k.a.output)[to] = element_of<T>::from(out[i]);
  }
}

}  // namespace vattn::VATTN_ABI::cuda::detail

#include "vattn/macros_pop.hpp"
