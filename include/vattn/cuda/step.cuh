// Verified decode on a GPU: encode once, append each token, run each step. Plain pointers and a stream; nothing is
// allocated, nothing waits for the device, all of it may be captured in a graph.
#include "vattn/macros_push.hpp"
#pragma once

#include <span>

#include "vattn/cuda/audit.cuh"
#include "vattn/cuda/gather.cuh"
#include "vattn/base/philox.hpp"

namespace vattn::VATTN_ABI::cuda {

/// Kernels for caches of T (__nv_bfloat16 or __half), head size D and codes of Bits. Results are the same bits for the
/// same plan and arguments, whatever else is in the batch.
///
///   plan_t plan;  status s = make_plan(shape, settings, plan, processors);
///   using step = decoder<__nv_bfloat16, 128, 2>;
///   s = step::prepare(plan, a, stream);       // once: state and counters to zero
///   s = step::encode(plan, a, stream);        // after the prefill
///   … each token: s = step::append(plan, a, k, v, stream);  s = step::run(plan, a, stream);
template <class T, int D, int Bits>
class decoder {
 public:
  /// Zeroes what must begin at zero: the workspace's counters, the codes and the state.
  [[nodiscard]] static status prepare(const plan_t& p, const arguments& a, cudaStream_t stream) noexcept {
    if (status s = check(p, a); !s) return s;
    detail::pieces memory(a.workspace);
    const workspace_pieces w = workspace_pieces::take(memory, p);
    cudaError_t e = cudaMemsetAsync(w.counters, 0, 4 * workspace_pieces::counters_size(p), stream);
    if (e == cudaSuccess && p.sparse) e = cudaMemsetAsync(a.codes, 0, code_bytes(p), stream);
    if (e == cudaSuccess && p.sparse) e = cudaMemsetAsync(a.state, 0, state_bytes(p), stream);
    return said(e, "zeroing");
  }

  /// Codes of all tokens that are older than the window, and what they are measured from. Reads the cache once.
  [[nodiscard]] static status encode(const plan_t& p, const arguments& a, cudaStream_t stream) noexcept {
    if (status s = check(p, a); !s || !p.sparse) return s;
    const auto k = pack(p, a);
    if (status s = launch(detail::centre_kernel<T, Bits, D>, dim3(count(p.groups())), 256, 0, stream, k); !s) return s;
    const dim3 grid(count(std::clamp(8 * p.processors / p.groups(), 1, std::max(1, p.tiles()))), count(p.groups()));
    return launch(detail::encode_kernel<T, Bits, D>, grid, 256, 0, stream, k, signs(p), 0);
  }

  /// Codes of the tiles that the last `fresh` tokens of each sequence closed: where another kernel writes the cache.
  [[nodiscard]] static status encode_fresh(const plan_t& p, const arguments& a, int fresh,
                                           cudaStream_t stream) noexcept {
    if (status s = check(p, a); !s || !p.sparse) return s;
    if (fresh < 1)
      return status::error(errc::invalid_argument, "fresh is %d: give how many tokens were appended", fresh);
    const dim3 grid(count(fresh / detail::tile_keys + 1), count(p.groups()));
    return launch(detail::encode_kernel<T, Bits, D>, grid, 256, 0, stream, pack(p, a), signs(p), fresh);
  }

  /// Writes a token's `keys` and `values` [n_batch, n_kv_heads, D] as the last row of each sequence, whose length in
  /// the cache view counts it already, and the codes of a tile that this closes.
  [[nodiscard]] static status append(const plan_t& p, const arguments& a, const void* keys, const void* values,
                                     cudaStream_t stream) noexcept {
    if (status s = check(p, a); !s) return s;
    return launch(detail::append_kernel<T, Bits, D>, dim3(count(p.groups())), 256, 0, stream, pack(p, a), signs(p),
                  keys, values, p.sparse);
  }

  /// One query a head over all tokens of its sequence.
  [[nodiscard]] static status run(const plan_t& p, const arguments& a, cudaStream_t stream) noexcept {
    return run_stages(p, a, stream, 5);
  }

  /// The first `stages` of a step: scan, gather and judge, scan again, gather again, dense. For benchmarks: outputs are
  /// complete after all five alone.
  [[nodiscard]] static status run_stages(const plan_t& p, const arguments& a, cudaStream_t stream,
                                         int stages) noexcept {
    if (status s = check(p, a); !s) return s;
    auto k = pack(p, a);
    if (!p.sparse) return dense(p, k, false, stream);
    if (status s = scan(p, k, true, stream); !s || stages < 2) return s;
    if (status s = gather(p, k, true, stream); !s || stages < 3) return s;
    k.first_splits = k.splits, k.first_segment = k.segment;
    k.splits = k.gather_splits = p.second_splits, k.segment = p.second_segment();
    if (p.rescan)
      if (status s = scan(p, k, false, stream); !s) return s;
    if (stages < 4) return {};
    if (status s = gather(p, k, false, stream); !s) return s;
    if (stages < 5) return {};
    k.pieces = p.rest_pieces;
    return dense(p, k, true, stream);
  }

  /// Compares what was served with exact attention on a `share` of the heads, drawn by the step's key, and counts in
  /// `audit`: see audit.cuh. After `run`, with the same arguments; `exact` [n_batch, n_q_heads, D] floats of scratch.
  [[nodiscard]] static status audit(const plan_t& p, const arguments& a, float share, device_audit* counts,
                                    float* exact, cudaStream_t stream) noexcept {
    if (status s = check(p, a); !s) return s;
    if (!p.sparse) return {};
    if (a.certificates == nullptr || counts == nullptr || exact == nullptr)
      return status::error(errc::invalid_argument,
                           "an audit needs certificates, counts and room for the exact outputs");
    auto k = pack(p, a);
    const dim3 grid(count((p.heads() + 255) / 256));
    if (status s = launch(detail::choose_audited_kernel<T>, grid, 256, 0, stream, k, p.heads(), share); !s) return s;
    auto exactly = k;
    exactly.a.output = exact, exactly.a.output_float = true, exactly.a.lse = nullptr, exactly.a.certificates = nullptr;
    exactly.a.state = nullptr, exactly.pieces = p.rest_pieces;
    if (status s = dense(p, exactly, true, stream); !s) return s;
    return launch(detail::count_audited_kernel<T, D>, dim3(count((p.heads() + 7) / 8)), 256, 0, stream, k, p.heads(),
                  static_cast<const float*>(exact), counts);
  }

 private:
  static unsigned count(int n) noexcept { return static_cast<unsigned>(n); }

  [[nodiscard]] static status check(const plan_t& p, const arguments& a) noexcept {
    if (p.shape.d != D || (p.sparse && p.settings.bits != Bits) || p.shape.type != detail::element_of<T>::value)
      return status::error(errc::invalid_argument, "the plan is for d %d, %d bits, %s: take the decoder of that",
                           p.shape.d, p.settings.bits, p.shape.type == element::bf16 ? "bf16" : "f16");
    if (a.cache.k == nullptr || a.cache.v == nullptr || a.q == nullptr || a.output == nullptr || a.workspace == nullptr)
      return status::error(errc::invalid_argument, "k, v, q, output and workspace must not be null");
    if (p.sparse && (a.codes == nullptr || a.state == nullptr))
      return status::error(errc::invalid_argument, "the plan samples: give codes of %zu and state of %zu bytes",
                           code_bytes(p), state_bytes(p));
    if (a.cache.max_tokens > p.shape.max_tokens)
      return status::error(errc::invalid_argument, "a sequence may have %d tokens, the plan at most %d: plan again",
                           a.cache.max_tokens, p.shape.max_tokens);
    return {};
  }

  [[nodiscard]] static detail::kernel_arguments pack(const plan_t& p, const arguments& a) noexcept {
    detail::kernel_arguments k{};
    k.a = a;
    detail::pieces memory(a.workspace), codes(a.codes);
    k.w = workspace_pieces::take(memory, p);
    if (p.sparse) k.codes = code_pieces::take(codes, p);
    k.seed = p.settings.seed, k.code_stride = static_cast<std::int64_t>(code_pieces::stride(p));
    k.n_kv = p.shape.n_kv_heads, k.group = p.group(), k.chunks = p.chunks, k.splits = p.splits;
    k.groups = p.groups(), k.gather_splits = p.gather_splits, k.segment = p.segment, k.pieces = p.pieces;
    k.first_splits = p.splits, k.first_segment = p.segment;
    k.group_counts = std::max(p.splits, p.second_splits) * detail::scan_warps,
    k.group_candidates = p.group_candidates();
    k.group_slots = p.most_slots();
    k.window = p.settings.window, k.sinks = p.settings.sinks, k.sliding_window = p.settings.sliding_window;
    k.scale = p.settings.scale, k.softcap = p.settings.softcap;
    k.epsilon = static_cast<float>(p.settings.epsilon), k.delta = static_cast<float>(p.settings.delta);
    k.rows = p.rows(),
    k.least = std::log2(std::min(1.0f, p.looked_at() / static_cast<float>(std::max(1, p.shape.max_tokens))));
    k.rms = p.settings.scale_of_error == error_scale::rms, k.rescan = p.rescan;
    k.quantiles = p.quantiles;
    return k;
  }
  // As sketch::random_rotation(D, seed) has them.
  [[nodiscard]] static detail::rotation_signs signs(const plan_t& p) noexcept {
    detail::rotation_signs r{};
    for (std::uint32_t round = 0; round < 2; ++round) {
      random_stream bits({.seed = p.settings.seed, .layer = 0x50524f54}, round);
      for (int i = 0; i < D / 32; ++i) r.bits[round][i] = bits.next();
    }
    return r;
  }

  [[nodiscard]] static status scan(const plan_t& p, const detail::kernel_arguments& k, bool first,
                                   cudaStream_t stream) noexcept {
    // The second round's blocks look for what is open.
    const dim3 grid(count(first ? p.splits * p.groups() : p.processors));
    const std::size_t bytes = sizeof(detail::scan_shared<Bits, D>);
    const auto go = [&](auto kernel) {
      return launch(kernel, grid, detail::scan_warps * 32, bytes, stream, k, signs(p), first,
                    p.shape.type == element::f16);
    };
    if (p.group() <= 4) return go(detail::scan_kernel<Bits, D, 0>);
    if (p.group() <= 8) return go(detail::scan_kernel<Bits, D, 1>);
    return go(detail::scan_kernel<Bits, D, 2>);
  }
  [[nodiscard]] static status gather(const plan_t& p, const detail::kernel_arguments& k, bool first,
                                     cudaStream_t stream) noexcept {
    const dim3 grid(count(first ? p.gather_splits * p.groups() * p.chunks : 2 * p.processors));
    return launch(detail::gather_kernel<T, D>, grid, detail::gather_warps * 32, sizeof(detail::gather_shared<T, D>),
                  stream, k, first);
  }
  [[nodiscard]] static status dense(const plan_t& p, const detail::kernel_arguments& k, bool rest,
                                    cudaStream_t stream) noexcept {
    const int blocks = std::min(2 * p.processors, p.groups() * k.pieces);
    return launch(detail::dense_kernel<T, D>, dim3(count(blocks)), detail::gather_warps * 32,
                  sizeof(detail::dense_shared<T, D>), stream, k, rest);
  }

  [[nodiscard]] static status said(cudaError_t e, const char* what) noexcept {
    if (e == cudaSuccess) return {};
    return status::error(errc::executor_failed, "%s: CUDA says %s: %s", what, cudaGetErrorName(e),
                         cudaGetErrorString(e));
  }
  template <class... Parameters, class... Arguments>
  [[nodiscard]] static status launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t bytes,
                                     cudaStream_t stream, const Arguments&... arguments) noexcept {
    if (bytes > 48 * 1024) {
      if (cudaError_t e =
              cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))
        return said(e, "a kernel's shared memory");
    }
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t c{};
    c.gridDim = grid, c.blockDim = dim3(static_cast<unsigned>(threads)), c.dynamicSmemBytes = bytes, c.stream = stream;
    c.attrs = &early, c.numAttrs = 1;
    return said(cudaLaunchKernelEx(&c, kernel, static_cast<Parameters>(arguments)...), "a launch");
  }
};

}  // namespace vattn::VATTN_ABI::cuda

#include "vattn/macros_pop.hpp"
