// From the sums of a sample to a verdict, on the device: evidence and judgement are those of stats/, the quantiles those
// of the plan's table.
#pragma once

#include "vattn/cuda/scan.cuh"
#include "vattn/stats/judge.hpp"

namespace vattn::cuda::detail {

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
    if (!(e.dof >= 3)) return stats::infinity;
    const double q = static_cast<double>((*table())(static_cast<float>(e.dimension), static_cast<float>(fmin(e.dof, 1e9))));
    return !e.scalar && e.dimension <= 1 ? stats::larger(q, stats::least_vector_quantile) : q;
  }
};

// Sums over a slot's rows besides the vectors N = Σ w v, U = Σ u v, T = Σ t v and Z = Σ z v, with w = x/π relative to
// the reference, t = (1 − π)w², z = ±sqrt(1 − π)w, u = t r² (1 − π) w and r = ‖v − c‖.
enum slot_fields : int { sum_w, sum_u, sum_t, sum_z, sum_tt, sum_ttr2, sum_ttr4, sum_tr2, sum_wr2, rows_over, rows_read };

// Sums of N values over the warp: lane L gets that of value L mod N.
template <int N>
__device__ inline float sum_each(float (&v)[N], int lane) {
  static_assert(N == 8 || N == 32);
  int of = 1;
#pragma unroll
  for (int m = N / 2; m >= 1; m /= 2, of *= 2) {  // lanes that differ in bit `of` keep the values whose number does
    const bool up = lane & of;
#pragma unroll
    for (int i = 0; i < m; ++i) {
      const float keep = up ? v[2 * i + 1] : v[2 * i], give = up ? v[2 * i] : v[2 * i + 1];
      v[i] = keep + __shfl_xor_sync(full, give, of);
    }
  }
  float r = v[0];
  for (; of < 32; of *= 2) r += __shfl_xor_sync(full, r, of);
  return r;
}

struct judge_shared {
  float sums[8][40];        // of each warp: products
  float scalars[4][8 + 12]; // of each head
};

struct head_context {
  float shift;
  int n, fixed, candidates;
  bool overflow, first_round;
};

// Of the last block of a group to arrive, for each chunk of its heads: 64 threads a head, of whom each has two
// coordinates. `masses` [group], log2.
template <class T, int D>
__device__ inline void judge_chunk(const kernel_arguments& k, judge_shared& s, int group, int chunk,
                                   const float* masses, const head_context& x) {
  constexpr int tiles = D / 8;
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5, h = tid >> 6, r = tid & 63;
  const int nt = r >> 2, t = r & 3, id = group * k.group + chunk * chunk_heads + h;
  const bool own = nt < tiles;
  // A head to be judged: not one that the group's count lacks, nor one that the first round is done with.
  const bool here = chunk * chunk_heads + h < k.group && (x.first_round || __ldcg(k.w.open + id) == 1);
  __syncthreads();
  const std::int64_t section = static_cast<std::int64_t>(group) * k.chunks + chunk;
  const float4* slots = reinterpret_cast<const float4*>(k.w.slots) + section * k.slots * (tiles * 32) + nt * 32 + h * 4 + t;
  float nv[2] = {}, tv[2] = {}, uv[2] = {}, z[z_groups][2] = {};
  if (own) {
#pragma unroll 1
    for (int first = 0; first < k.slots; first += 8) {
      float4 a[8], b[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool there = first + i < k.slots;
        a[i] = there ? __ldcg(slots + static_cast<std::int64_t>(first + i) * (tiles * 32)) : make_float4(0, 0, 0, 0);
        b[i] = there ? __ldcg(slots + static_cast<std::int64_t>(first + i) * (tiles * 32) + 16) : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        nv[0] += a[i].x, nv[1] += a[i].y, tv[0] += a[i].z, tv[1] += a[i].w;
        uv[0] += b[i].x, uv[1] += b[i].y, z[i][0] += b[i].z, z[i][1] += b[i].w;
      }
    }
  }
  // Scalars of all slots, Σ z apart by group: 8 + the others. Two warps a head: the first does it.
  if ((warp & 1) == 0) {
    const float* from = k.w.scalars + (section * k.slots * chunk_heads + h) * slot_scalars;
    if (lane < slot_scalars) {
      float sum = 0;
      for (int i = 0; i < k.slots; ++i) {
        const float x = __ldcg(from + i * chunk_heads * slot_scalars + lane);
        sum += x;
      }
      s.scalars[h][8 + lane] = sum;
    } else if (lane >= 16 && lane < 24) {
      float sum = 0;
      for (int i = lane - 16; i < k.slots; i += z_groups) sum += __ldcg(from + i * chunk_heads * slot_scalars + sum_z);
      s.scalars[h][lane - 16] = sum;
    }
  }
  __syncthreads();
  const float* sc = s.scalars[h] + 8;
  float log2_mass = 0, offset2 = 0, denominator = sc[sum_w];
  if (here) {
    log2_mass = masses[chunk * chunk_heads + h], offset2 = __ldcg(k.w.thresholds + id * 8 + offset) * log2_e;
    if (k.a.sink_logits)
      denominator += exp2f(k.a.sink_logits[(group % k.n_kv) * k.group + chunk * chunk_heads + h] * log2_e - log2_mass - offset2);
  }
  const float inverse = 1 / denominator;
  const float* centre = k.codes.heads + static_cast<std::int64_t>(group) * (2 * D + 8) + D;
  float out[2] = {}, v[32] = {}, v2[8] = {};
  const int dim = nt / 8 * 64 + 2 * t * 8 + nt % 8;  // and 8 more
  if (own) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      out[i] = nv[i] * inverse;
      const float c = centre[dim + 8 * i], away = out[i] - c, third = uv[i] - sc[sum_u] * out[i];
#pragma unroll
      for (int a = 0; a < z_groups; ++a) z[a][i] -= s.scalars[h][a] * out[i];
      int at = 0;
#pragma unroll
      for (int a = 1; a < z_groups; ++a)
#pragma unroll
        for (int b = 0; b < a; ++b) v[at++] += z[a][i] * z[b][i];
      v[28] += away * away, v[29] += away * (tv[i] - sc[sum_t] * c), v[30] += out[i] * out[i], v[31] += third * third;
#pragma unroll
      for (int a = 0; a < z_groups; ++a) v2[a] += z[a][i] * z[a][i];
    }
  }
  const float sum32 = sum_each<32>(v, lane), sum8 = sum_each<8>(v2, lane);
  s.sums[warp][lane] = sum32;
  if (lane < 8) s.sums[warp][32 + lane] = sum8;
  if (tid == 0) tabulated_clt::table() = &k.quantiles;
  __syncthreads();
  if ((warp & 1) == 0) {
    const float* pair[2] = {s.sums[warp], s.sums[warp + 1]};
    const auto both = [&](int i) { return pair[0][i] + pair[1][i]; };
    float aligned = 0, product = 0;
    if (lane < 28) {
      int a = 1, b = lane;
      while (b >= a) b -= a, ++a;
      const float dot = both(lane);
      aligned = dot * dot, product = both(32 + a) * both(32 + b);
    }
    aligned = sum_warp(aligned), product = sum_warp(product);
    if (lane == 0 && !here) s.scalars[h][0] = 0;
    if (lane == 0 && here) {
      const float away2 = both(28), cross = both(29), output2 = both(30), third = sqrtf(both(31));
      const float* marks = k.w.thresholds + id * 8;
      const float A = __ldcg(marks + plain), F = __ldcg(marks + floor_);
      const float typical = centre[D + typical_reach], c2 = centre[D + centre_norm2];
      const float spread = fmaxf(0.0f, sc[sum_tr2] - 2 * cross + sc[sum_t] * away2);
      const float fourth = sc[sum_ttr4] + 2 * away2 * sc[sum_ttr2] + away2 * away2 * sc[sum_tt];
      stats::evidence e;
      e.reference = static_cast<double>((log2_mass + offset2) * ln_2);
      e.denominator = static_cast<double>(denominator);
      e.output2 = static_cast<double>(output2);
      e.away2 = static_cast<double>(away2);
      e.power = static_cast<double>(
          fmaxf(0.0f, (sc[sum_wr2] - c2 * sc[sum_w]) * inverse + output2 + c2 - away2));
      e.variance = static_cast<double>(spread * inverse * inverse);
      e.dimension = aligned > 0 ? static_cast<double>(fminf(fmaxf(product / (1.1f * aligned), 1.0f), static_cast<float>(D))) : 1.0;
      e.dof = fourth > 0 ? static_cast<double>(2 * spread / fourth * spread) : 1e9;
      e.skew = spread > 0 ? static_cast<double>(third / spread * inverse) : 0.0;
      e.denominator_variance = static_cast<double>(sc[sum_t] * inverse * inverse);
      e.denominator_dof = sc[sum_tt] > 0 ? static_cast<double>(2 * sc[sum_t] / sc[sum_tt] * sc[sum_t]) : 1e9;
      e.rows = static_cast<index_t>(sc[rows_read]), e.certain = 0;
      const stats::promise p{static_cast<double>(k.epsilon), static_cast<double>(k.delta),
                             k.rms ? error_scale::rms : error_scale::output, static_cast<double>(floor_kappa)};
      const stats::verdict verdict = stats::judge<tabulated_clt>(e, p);
      const float goal = static_cast<float>(stats::squared_goal(e, p)), ratio = static_cast<float>(verdict.ratio);
      const float used = F + x.shift;
      const float want = log2f(static_cast<float>(stats::missable(e, p))) + log2_mass - log2f(typical);
      const float missing = used - want;
      const bool sane = isfinite(goal) && isfinite(want) && isfinite(missing) && isfinite(ratio) && isfinite(log2_mass) &&
                        !x.overflow && denominator < 1e30f;
      const int over = static_cast<int>(sc[rows_over]);
      const bool trusted = over <= static_cast<int>(stats::breaches_of_errors(e.rows));
      // A floor a third of a nat too high is what κ = ½ leaves room for.
      const bool covered = missing <= 0.5f, verified = sane && trusted && covered && verdict.met;
      s.scalars[h][0] = verified ? 1.0f : 0.0f;
      const float lse = log2f(denominator) * ln_2 + static_cast<float>(e.reference);
      if (verified && k.a.lse) k.a.lse[id] = lse;
      if (k.a.certificates) {
        device_certificate c{};
        c.epsilon_achieved = static_cast<float>(verdict.epsilon_achieved), c.variance = static_cast<float>(e.variance), c.goal = goal;
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
        // What the variance or a floor lacks; with more than the candidates, another scan finds it.
        float next = x.shift - fmaxf(0.3f, log2f(ratio / 0.7f));
        if (!covered) next = fminf(next, x.shift - missing - 0.2f);
        if (!verified && sane && trusted && ratio < 20.0f && missing < 4.0f) {
          if (next >= -0.2f) {
            open = 1, k.w.thresholds[id * 8 + next_shift] = fmaxf(next, 0.0f);
          } else if (k.rescan) {
            open = 1, fit[1] = A + next, fit[2] = fminf(used, want) - 0.2f, fit[3] = 1;
          }
        }
        head_state& state = static_cast<head_state*>(k.a.state)[id];
        state.mass = isfinite(log2_mass) ? (log2_mass - __ldcg(marks + guess)) * ln_2 : state.mass;
        if (sane) {
          state.denominator = log2f(denominator) * ln_2;
          state.scale = 0.5f * logf(goal) - logf(k.epsilon) - logf(typical);
          state.away = 0.5f * log2f(away2 + 1e-30f) - log2f(typical);
          state.known = 1;
          const float aim = 0.85f / (1 + 1.2f * sqrtf(2 / fmaxf(static_cast<float>(e.dof), 1.0f)));
          const float picks = (log2_mass - A - x.shift) * ln_2 - logf(k.rows);  // asked for by this head, over the default
          const float change = 0.6f * (picks + logf(fmaxf(ratio, 1e-4f) / aim) - state.rows);
          state.rows = fminf(fmaxf(state.rows + fminf(fmaxf(change, -0.7f), 0.7f), -2.5f), 4.0f);
        }
      }
      k.w.open[id] = open;
    }
  }
  __syncthreads();
  if (own && s.scalars[h][0] > 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::int64_t to = static_cast<std::int64_t>(id) * D + dim + 8 * i;
      if (k.a.output_float)
        static_cast<float*>(k.a.output)[to] = out[i];
      else
        static_cast<T*>(k.a.output)[to] = element_of<T>::from(out[i]);
    }
  }
}

}  // namespace vattn::cuda::detail
