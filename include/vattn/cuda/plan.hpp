// Sizes of a verified decode step on a GPU, from shapes alone: launch configuration, workspace, codes, state. The run
// takes its memory through the same template that counts it. Compiles without CUDA.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "vattn/cuda/layout.hpp"
#include "vattn/stats/promise.hpp"
#include "vattn/stats/quantile.hpp"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace vattn::VATTN_ABI::cuda {

/// What a plan must know. Lengths may be less at run time, the rest is as said here.
struct shape {
  int n_batch = 1;
  int n_q_heads = 1, n_kv_heads = 1;  ///< groups of 1 to 16
  int d = 128;                        ///< of keys and values: 64 or 128
  int max_tokens = 0;                 ///< of the longest sequence, < 2^24
  element type = element::bf16;
};

/// Which rows a step reads: what the plan predicts to be faster, all, or a sample whatever it costs.
enum class reads : std::uint8_t { automatic, all, sample };

/// What is promised, and how.
struct settings {
  double epsilon = 0.05, delta = 0.1;
  error_scale scale_of_error = error_scale::output;
  float scale = 0;         ///< of the logits; 1/sqrt(d) for most models. Required
  float softcap = 0;       ///< > 0: cap·tanh(logit/cap); attended densely
  int sliding_window = 0;  ///< > 0: the latest so many tokens alone
  int sinks = 16;          ///< first visible tokens, read exactly
  int window = 128;        ///< latest tokens, read exactly: so many to 31 more
  int bits = 2;            ///< of a coordinate of a key's code: 1, 2 or 3 (d = 128), 2 (d = 64)
  cuda::reads reads = cuda::reads::automatic;
  std::uint64_t seed = 0;
};

/// What was found of one query head, in device memory. Zero `rounds`: read densely.
struct device_certificate {
  float epsilon_achieved;   ///< stated (1 − δ) quantile of the error, relative to what ε is
  float variance;           ///< V̂
  float goal;               ///< (εT)²
  float dimension, dof;     ///< ν₁, ν₂
  float log_denominator;    ///< log-sum-exp of the logits
  std::int32_t rows;        ///< read for this head's group in the last round, or all
  std::int32_t candidates;  ///< found by the scan
  std::int32_t n;           ///< tokens that the query sees
  std::int32_t breaches;    ///< rows whose logit was far above what their code stated
  std::int32_t rounds;      ///< 1 or 2: verified by that round's sample; 0: all rows were read
  float ratio;              ///< of the first round: stated error² over the goal
};

/// Quantiles of F(ν₁, ν₂) at 1 − δ for the device, from the host's own: one evaluation takes longer there than all the
/// rest of a judgement. ν₁ = 2^(i/2), ν₂ = 2^(1 + j/2), the last column for a known variance; linear in 1/ν between the
/// nodes and 0.5 % larger, so that it is nowhere too small (tests/cuda).
struct quantile_table {
  static constexpr int dimensions = 15, dofs = 24;
  float value[dimensions][dofs] = {};

  static quantile_table make(double delta) noexcept {
    quantile_table t;
    for (int i = 0; i < dimensions; ++i)
      for (int j = 0; j < dofs; ++j)
        t.value[i][j] =
            static_cast<float>(1.005 * stats::squared_error_quantile(delta, std::exp2(0.5 * i),
                                                                     j == dofs - 1 ? 1e9 : 2 * std::exp2(0.5 * j)));
    return t;
  }
  /// ν₁ >= 1, ν₂ >= 2.
  [[nodiscard]] VATTN_FN float operator()(float nu1, float nu2) const noexcept {
    const float x = 2 * std::log2(nu1), y = 2 * std::log2(nu2 / 2);
    const int i = x < 0 ? 0 : x > dimensions - 2 ? dimensions - 2 : static_cast<int>(x);
    const int j = y < 0 ? 0 : y > dofs - 2 ? dofs - 2 : static_cast<int>(y);
    // Of 1/ν between two nodes, whose 1/ν are 1 and 2^-½ of the first's; at the last column 0.
    const float a = share(std::exp2(0.5f * (static_cast<float>(i) - x)), 0.70710678f);
    const float b = share(std::exp2(0.5f * (static_cast<float>(j) - y)), j == dofs - 2 ? 0.0f : 0.70710678f);
    const float low = value[i][j] + b * (value[i][j + 1] - value[i][j]);
    const float high = value[i + 1][j] + b * (value[i + 1][j + 1] - value[i + 1][j]);
    return low + a * (high - low);
  }

 private:
  [[nodiscard]] VATTN_FN static constexpr float share(float inverse, float last) noexcept {
    const float s = (1 - inverse) / (1 - last);
    return s < 0 ? 0.0f : s > 1 ? 1.0f : s;
  }
};

/// A head's memory from step to step; all zero: nothing is known yet.
struct head_state {
  float rows;         ///< log of the picks asked for over the default
  float mass;         ///< log Σ e^s r over its Gaussian guess
  float denominator;  ///< log D over log Σ e^s r
  float scale;        ///< log T, relative to the typical distance of a value from the centre; valid with `known`
  float away;         ///< log2 ‖ô − c‖ on the same scale
  std::int32_t known;
};

namespace detail {

inline constexpr int tile_keys = 32;
inline constexpr int scan_warps = 16;
inline constexpr int gather_warps = 4;
inline constexpr int listed_groups = 2048;  ///< that a block looks through at a time
inline constexpr int chunk_heads = 4;       ///< query heads that share a gather
inline constexpr int z_groups = 8;          ///< signed sums, for the error's dimension
inline constexpr int slot_scalars = 12;
inline constexpr int most_pieces = 64;

/// Bytes of a tile: 32 keys' codes, then α f16 | reach u8 | ρ u8 of each.
[[nodiscard]] VATTN_FN constexpr int tile_bytes(int bits, int d) noexcept {
  return tile_keys * d * bits / 8 + tile_keys * 4;
}

/// Whole tiles of a sequence that are older than the window.
[[nodiscard]] VATTN_FN constexpr int closed_tiles(int n, int window) noexcept {
  return n > window ? (n - window) / tile_keys : 0;
}

/// Scalars behind a KV head's means.
enum code_scalars : int { alpha_unit, rho_unit, typical_reach, key_variance };
/// Of a head's thresholds: log2 units; F is lowered by `slope` for each unit of ρ's code.
enum threshold_fields : int {
  plain,
  floor_,
  slope,
  sigma,
  guess,
  offset,
  next_shift,
  used_shift,
  least_reach,
  mark_size = 12
};

/// Partial sums that a block of a gather leaves, so that a KV head has eight at least.
[[nodiscard]] VATTN_FN constexpr int slots_of_block(int splits) noexcept {
  return splits >= 8 ? 1 : splits >= 4 ? 2 : gather_warps;
}

/// Into how many pieces sequences are split where `blocks` run at a time: the fewest that leave few of them idle.
[[nodiscard]] inline int best_pieces(int groups, int blocks, int tokens) noexcept {
  int best = 1;
  double least = 1e30;
  for (int p = 1; p <= most_pieces && (p == 1 || p * 256 <= tokens); ++p) {
    const double rounds = std::ceil(static_cast<double>(groups) * p / blocks);
    // Rows that one block reads, and what begins and ends each piece: some 100 rows' time.
    const double time = rounds * (static_cast<double>(tokens) / p + 100);
    if (time < 0.99 * least) least = time, best = p;
  }
  return best;
}

/// Hands out pieces of a buffer, or counts them where there is none.
class pieces {
 public:
  explicit pieces(void* memory = nullptr) noexcept : base_(static_cast<std::byte*>(memory)) {}
  template <class T>
  T* take(std::size_t count) noexcept {
    const std::size_t at = used_;
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  [[nodiscard]] std::size_t used() const noexcept { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

}  // namespace detail

/// A plain value: copy it, keep one for all layers of a shape.
struct plan_t {
  cuda::shape shape;
  cuda::settings settings;
  quantile_table quantiles;
  bool sparse = false;  ///< whether sampling is predicted to pay; else every step is dense
  int processors = 132;
  int splits = 1;          ///< blocks that scan one KV head
  int gather_splits = 1;   ///< blocks that gather for one KV head
  int chunks = 1;          ///< of a group's heads
  int segment = 0;         ///< candidates that one scanning warp may find
  int second_splits = 16;  ///< as `splits` and `gather_splits`, for the groups of which a head is open
  int pieces = 1;          ///< of a sequence in a dense step
  int rest_pieces = 1;     ///< of a sequence that is attended densely after all
  bool rescan = false;     ///< scan again for heads whose candidates do not suffice

  [[nodiscard]] int groups() const noexcept { return shape.n_batch * shape.n_kv_heads; }
  [[nodiscard]] int group() const noexcept { return shape.n_q_heads / shape.n_kv_heads; }
  [[nodiscard]] int heads() const noexcept { return shape.n_batch * shape.n_q_heads; }
  [[nodiscard]] int tiles() const noexcept { return detail::closed_tiles(shape.max_tokens, settings.window); }
  [[nodiscard]] int segments() const noexcept { return splits * detail::scan_warps; }
  /// A group's room for candidates, and what a scanning warp of the second round has of it.
  [[nodiscard]] long long group_candidates() const noexcept { return static_cast<long long>(segments()) * segment; }
  [[nodiscard]] int second_segment() const noexcept {
    return static_cast<int>(group_candidates() / (second_splits * detail::scan_warps));
  }
  [[nodiscard]] int most_slots() const noexcept {
    return std::max(gather_splits * detail::slots_of_block(gather_splits),
                    second_splits * detail::slots_of_block(second_splits));
  }
  /// Tokens that are expected to be read whatever their scores, in the longest sequence.
  [[nodiscard]] float looked_at() const noexcept { return 128; }
  /// Expected picks of a head without feedback.
  [[nodiscard]] float rows() const noexcept { return static_cast<float>(1.3 / (settings.epsilon * settings.epsilon)); }
};

/// A candidate: its token; the code of ρ, 256 where it is certain, and the code of its reach above; four levels of half
/// precision.
struct alignas(16) candidate {
  std::uint32_t token, flags, levels[2];
};

/// Pieces of the workspace. Only `counters` live from step to step; `prepare` zeroes them.
struct workspace_pieces {
  std::int32_t* counters;    ///< [2, groups], arrivals; then the heads that the first round left open
  std::int32_t* open;        ///< [heads] after the first round: 0 done, 1 open, 2 to be read densely
  std::int32_t* still_open;  ///< [heads] of the open ones after the second
  std::int32_t* counts;      ///< [groups, segments]
  candidate* candidates;     ///< [groups, segments, segment]
  float* masses;             ///< [groups, splits, 16], Σ e^s r over the threshold
  float* thresholds;         ///< [heads, 12], of the scan: detail::threshold_fields
  float* fits;               ///< [heads, 4], log2 of the mass; thresholds of the second round over the first's
  float* slots;              ///< [groups·chunks, slots, 16, d]
  float* scalars;            ///< [groups·chunks, slots, 4, 12]
  float* part;               ///< [groups, pieces, group, d]
  float* part_state;         ///< [groups, pieces, 16, 2], maximum and denominator

  static workspace_pieces take(detail::pieces& from, const plan_t& p) noexcept {
    const auto size = [](long long a, long long b = 1, long long c = 1, long long d = 1) {
      return static_cast<std::size_t>(a * b * c * d);
    };
    const int most = std::max(p.pieces, p.rest_pieces);
    workspace_pieces w{};
    w.counters = from.take<std::int32_t>(counters_size(p));
    w.open = from.take<std::int32_t>(size(p.heads()));
    w.still_open = from.take<std::int32_t>(size(p.heads()));
    w.part = from.take<float>(size(p.groups(), most, p.group(), p.shape.d));
    w.part_state = from.take<float>(size(p.groups(), most, 32));
    if (!p.sparse) return w;
    w.counts = from.take<std::int32_t>(size(p.groups(), std::max(p.splits, p.second_splits) * detail::scan_warps));
    w.candidates = from.take<candidate>(size(p.groups(), p.group_candidates()));
    w.masses = from.take<float>(size(p.groups(), p.splits, 16));
    w.thresholds = from.take<float>(size(p.heads(), detail::mark_size));
    w.fits = from.take<float>(size(p.heads(), 4));
    w.slots = from.take<float>(size(p.groups() * p.chunks, p.most_slots(), 16, p.shape.d));
    w.scalars =
        from.take<float>(size(p.groups() * p.chunks, p.most_slots(), detail::chunk_heads, detail::slot_scalars));
    return w;
  }
  static std::size_t counters_size(const plan_t& p) noexcept { return static_cast<std::size_t>(2 * p.groups() + 1); }
};

/// Bytes of the workspace, which layers may share if their steps follow each other.
[[nodiscard]] inline std::size_t workspace_bytes(const plan_t& p) noexcept {
  detail::pieces count;
  static_cast<void>(workspace_pieces::take(count, p));
  return count.used();
}

/// Pieces of what is kept beside one layer's cache.
struct code_pieces {
  float* heads;          ///< [groups, 2·d + 8]: keys' mean, values' centre, detail::code_scalars
  std::uint32_t* tiles;  ///< [groups, tiles rounded up to even, tile_bytes]

  static code_pieces take(detail::pieces& from, const plan_t& p) noexcept {
    code_pieces c{};
    c.heads = from.take<float>(static_cast<std::size_t>(p.groups()) * static_cast<std::size_t>(2 * p.shape.d + 8));
    c.tiles = from.take<std::uint32_t>(static_cast<std::size_t>(p.groups()) * stride(p));
    return c;
  }
  /// Words from one KV head's codes to the next one's.
  [[nodiscard]] static std::size_t stride(const plan_t& p) noexcept {
    return static_cast<std::size_t>((p.tiles() + 1) / 2 * 2) *
           static_cast<std::size_t>(detail::tile_bytes(p.settings.bits, p.shape.d) / 4);
  }
};

/// Bytes of one layer's codes: bits/16 + 1/64 of a bf16 cache of d = 128 for each coordinate of K and V together, 7 %
/// at 2.
[[nodiscard]] inline std::size_t code_bytes(const plan_t& p) noexcept {
  detail::pieces count;
  static_cast<void>(code_pieces::take(count, p));
  return count.used();
}
/// Bytes of one layer's memory of past steps, [heads] head_state; zero it where a sequence begins.
[[nodiscard]] inline std::size_t state_bytes(const plan_t& p) noexcept {
  return static_cast<std::size_t>(p.heads()) * sizeof(head_state);
}

/// `processors` of the card (132 of an H100). Allocates nothing, touches no card.
[[nodiscard]] inline status make_plan(const shape& s, const settings& o, plan_t& p, int processors = 132) noexcept {
  const auto bad = [](const char* what, double value, const char* rule) {
    return status::error(errc::invalid_argument, "%s is %g: %s", what, value, rule);
  };
  if (s.n_batch < 1) return bad("n_batch", s.n_batch, "give at least one sequence");
  if (s.n_kv_heads < 1 || s.n_q_heads < 1 || s.n_q_heads % s.n_kv_heads != 0 || s.n_q_heads / s.n_kv_heads > 16)
    return bad("n_q_heads", s.n_q_heads, "give 1 to 16 query heads for each KV head");
  if (s.d != 64 && s.d != 128) return bad("d", s.d, "heads of 64 and 128 have kernels");
  if (s.max_tokens < 1 || s.max_tokens >= 1 << 28) return bad("max_tokens", s.max_tokens, "give 1 to 2^28 - 1 tokens");
  if (!(o.epsilon > 0 && o.epsilon < 1)) return bad("epsilon", o.epsilon, "give a relative error in (0, 1)");
  if (!(o.delta > 0 && o.delta < 1)) return bad("delta", o.delta, "give a failure probability in (0, 1)");
  if (!(o.scale > 0 || o.scale < 0))
    return bad("scale", static_cast<double>(o.scale), "give 1/sqrt(d) for most models");
  if (o.sinks < 0 || o.window < 1) return bad("window", o.window, "give at least 1, and at least 0 sinks");
  if (o.bits < 1 || o.bits > 3 || (s.d == 64 && o.bits != 2))
    return bad("bits", o.bits, "codes have 1, 2 or 3 bits where d is 128, and 2 where it is 64");
  if (processors < 1) return bad("processors", processors, "give the card's multiprocessors");
  p.shape = s, p.settings = o, p.processors = processors;
  const int groups = p.groups();
  p.chunks = (p.group() + detail::chunk_heads - 1) / detail::chunk_heads;
  p.pieces = detail::best_pieces(groups, 2 * processors, s.max_tokens);
  p.rest_pieces = std::max(1, std::min(detail::most_pieces, (s.max_tokens + 511) / 512));
  // Below these a step of samples takes as long as reading all (docs/cuda.md): launches alone, where few blocks run.
  const double bytes = 4.0 * groups * s.d * s.max_tokens;
  p.sparse = o.reads == reads::sample || (o.reads == reads::automatic && bytes >= 256e6 && s.max_tokens >= 8192);
  if (o.softcap > 0) {
    if (o.reads == reads::sample)
      return bad("softcap", static_cast<double>(o.softcap), "codes know products alone: do not ask for samples");
    p.sparse = false;
  }
  p.quantiles = {};
  p.splits = 1, p.gather_splits = 2, p.segment = 0;
  if (!p.sparse) return {};
  p.quantiles = quantile_table::make(o.delta);
  p.splits = std::clamp(processors / groups, 1, 32);
  p.gather_splits = std::clamp(processors / (groups * p.chunks), 2, 32);
  p.gather_splits = p.gather_splits >= 8   ? p.gather_splits / 8 * 8
                    : p.gather_splits >= 4 ? 4
                                           : 2;  // eight slots at a time
  const int keys = ((p.tiles() + 1) / 2 * 64 + p.segments() - 1) / p.segments() + 64;
  p.segment = std::max(64, p.group() > 4 ? keys / 4 * 3 : keys / 2);
  p.rescan = true;
  return {};
}

/// Pointers of one layer's step, all to device memory.
struct arguments {
  cache_view cache;
  const void* q = nullptr;  ///< [n_batch, n_q_heads, d]
  void* output = nullptr;   ///< [n_batch, n_q_heads, d], float where `output_float`, else as q
  bool output_float = true;
  float* lse = nullptr;                        ///< [n_batch, n_q_heads], natural; may be null
  const float* sink_logits = nullptr;          ///< [n_q_heads], added to the denominator alone; may be null
  void* codes = nullptr;                       ///< code_bytes(plan), of `encode` and `append`
  void* state = nullptr;                       ///< state_bytes(plan)
  void* workspace = nullptr;                   ///< workspace_bytes(plan)
  device_certificate* certificates = nullptr;  ///< [n_batch, n_q_heads]; may be null
  const std::uint32_t* step = nullptr;         ///< number of the step, in device memory: graphs replay with fresh draws
  const std::int32_t* sequences = nullptr;     ///< [n_batch], names the draws of each; null: its place in the batch
  std::uint32_t layer = 0;
};

}  // namespace vattn::VATTN_ABI::cuda

#include "vattn/macros_pop.hpp"
