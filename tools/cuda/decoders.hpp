// The decoders that our programs and tests use, compiled once: chosen by element, head size and bits at run time.
#pragma once

#include <cuda_runtime_api.h>

#include "vattn/cuda/plan.hpp"

namespace vattn::VATTN_ABI::cuda {

struct device_audit;

/// The functions of decoder<T, D, Bits> (vattn/cuda/step.cuh).
struct any_decoder {
  status (*prepare)(const plan_t&, const arguments&, cudaStream_t) noexcept;
  status (*encode)(const plan_t&, const arguments&, cudaStream_t) noexcept;
  status (*encode_fresh)(const plan_t&, const arguments&, int, cudaStream_t) noexcept;
  status (*append)(const plan_t&, const arguments&, const void*, const void*, cudaStream_t) noexcept;
  status (*run)(const plan_t&, const arguments&, cudaStream_t) noexcept;
  status (*run_stages)(const plan_t&, const arguments&, cudaStream_t, int) noexcept;
  status (*audit)(const plan_t&, const arguments&, float, device_audit*, float*, cudaStream_t) noexcept;
};

/// Null where none was compiled: bf16 and f16 with 2 bits at d = 64 and 128, bf16 also with 1 and 3 at 128.
[[nodiscard]] const any_decoder* find_decoder(element type, int d, int bits) noexcept;

/// Attention in double precision, row by row: what all kernels are compared with. `output` [heads, d] and `lse` [heads]
/// of doubles in device memory.
[[nodiscard]] status naive_attention(const plan_t& p, const arguments& a, double* output, double* lse,
                                     cudaStream_t) noexcept;

/// Keys N(0, 1), values N(0, 1) plus one N(0, 1) vector a head: rows [heads, n, d], from a hash of the seed.
[[nodiscard]] status fill_gaussian(element type, void* k, void* v, int heads, long long n, int d, unsigned seed,
                                   cudaStream_t) noexcept;

}  // namespace vattn::VATTN_ABI::cuda
