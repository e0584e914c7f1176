#include "cuda/decoders.hpp"
#include "vattn/cuda/step.cuh"

namespace vattn::VATTN_ABI::cuda {
namespace {

template <class T, int D, int Bits>
constexpr any_decoder of{&decoder<T, D, Bits>::prepare,      &decoder<T, D, Bits>::encode,
                         &decoder<T, D, Bits>::encode_fresh, &decoder<T, D, Bits>::append,
                         &decoder<T, D, Bits>::run,          &decoder<T, D, Bits>::run_stages,
                         &decoder<T, D, Bits>::audit};

__device__ double element_at(const void* p, std::int64_t at, bool half) {
  return half ? static_cast<double>(__half2float(static_cast<const __half*>(p)[at]))
              : static_cast<double>(__bfloat162float(static_cast<const __nv_bfloat16*>(p)[at]));
}

__global__ void naive_kernel(arguments a, int n_kv, int group, int d, float scale, float softcap, int sliding,
                             bool half, double* output, double* lse) {
  __shared__ double m_of[8], d_of[8], o_of[8][128];
  const int id = static_cast<int>(blockIdx.x), b = id / (n_kv * group), kv = id / group % n_kv;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  const int n = detail::length_of(a.cache, b), first = sliding > 0 ? max(0, n - sliding) : 0;
  const detail::head_rows at(a.cache, b, kv);
  double m = -INFINITY, sum = 0, o[4] = {}, q[4];
  for (int j = 0; j < 4; ++j)
    q[j] = j * 32 + lane < d ? element_at(a.q, static_cast<std::int64_t>(id) * d + j * 32 + lane, half) : 0;
  for (int i = first + warp; i < n; i += 8) {
    double l = 0;
    for (int j = 0; j < 4; ++j)
      if (j * 32 + lane < d) l += q[j] * element_at(a.cache.k, at(i) + j * 32 + lane, half);
    for (int x = 16; x; x /= 2) l += __shfl_xor_sync(~0u, l, x);
    l *= static_cast<double>(scale);
    if (softcap > 0) l = static_cast<double>(softcap) * tanh(l / static_cast<double>(softcap));
    const double top = fmax(m, l), old = exp(m - top), x = exp(l - top);
    sum = sum * old + x, m = top;
    for (int j = 0; j < 4; ++j)
      if (j * 32 + lane < d) o[j] = o[j] * old + x * element_at(a.cache.v, at(i) + j * 32 + lane, half);
  }
  m_of[warp] = m, d_of[warp] = sum;
  for (int j = 0; j < 4; ++j) o_of[warp][j * 32 + lane] = o[j];
  __syncthreads();
  const int x = static_cast<int>(threadIdx.x);
  if (x >= d) return;
  double top = -INFINITY, all = 0, value = 0;
  for (int w = 0; w < 8; ++w) top = fmax(top, m_of[w]);
  for (int w = 0; w < 8; ++w)
    if (m_of[w] > -INFINITY) all += d_of[w] * exp(m_of[w] - top), value += o_of[w][x] * exp(m_of[w] - top);
  if (a.sink_logits) all += exp(static_cast<double>(a.sink_logits[id % (n_kv * group)]) - top);
  output[static_cast<std::int64_t>(id) * d + x] = n > 0 ? value / all : 0;
  if (x == 0) lse[id] = n > 0 ? top + log(all) : -INFINITY;
}

__device__ float gaussian(unsigned seed, unsigned long long i) {
  unsigned long long x = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull, x = (x ^ (x >> 27)) * 0x94D049BB133111EBull, x ^= x >> 31;
  const float u = (static_cast<float>(x >> 40) + 0.5f) * 0x1p-24f, w = static_cast<float>(x & 0xffffff) * 0x1p-24f;
  return sqrtf(-2 * logf(u)) * cospif(2 * w);
}
template <class T>
__global__ void gaussian_kernel(T* k, T* v, long long row_elements, long long all, int d, unsigned seed) {
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < all;
       i += static_cast<long long>(gridDim.x) * blockDim.x) {
    const unsigned long long head = static_cast<unsigned long long>(i / row_elements);
    k[i] = detail::element_of<T>::from(gaussian(seed, static_cast<unsigned long long>(i)));
    v[i] =
        detail::element_of<T>::from(gaussian(seed + 1, static_cast<unsigned long long>(i)) +
                                    gaussian(seed + 2, head * static_cast<unsigned>(d) + static_cast<unsigned>(i % d)));
  }
}

status said(cudaError_t e) noexcept {
  if (e == cudaSuccess) return {};
  return status::error(errc::executor_failed, "CUDA says %s: %s", cudaGetErrorName(e), cudaGetErrorString(e));
}

}  // namespace

const any_decoder* find_decoder(element type, int d, int bits) noexcept {
  using bf16 = __nv_bfloat16;
  if (type == element::bf16) {
    if (d == 128)
      return bits == 1 ? &of<bf16, 128, 1> : bits == 2 ? &of<bf16, 128, 2> : bits == 3 ? &of<bf16, 128, 3> : nullptr;
    return d == 64 && bits == 2 ? &of<bf16, 64, 2> : nullptr;
  }
  if (bits != 2) return nullptr;
  return d == 128 ? &of<__half, 128, 2> : d == 64 ? &of<__half, 64, 2> : nullptr;
}

status naive_attention(const plan_t& p, const arguments& a, double* output, double* lse, cudaStream_t stream) noexcept {
  naive_kernel<<<static_cast<unsigned>(p.heads()), 256, 0, stream>>>(
      a, p.shape.n_kv_heads, p.group(), p.shape.d, p.settings.scale, p.settings.softcap, p.settings.sliding_window,
      p.shape.type == element::f16, output, lse);
  return said(cudaGetLastError());
}

status fill_gaussian(element type, void* k, void* v, int heads, long long n, int d, unsigned seed,
                     cudaStream_t stream) noexcept {
  const long long all = heads * n * d;
  if (type == element::bf16)
    gaussian_kernel<<<2048, 256, 0, stream>>>(static_cast<__nv_bfloat16*>(k), static_cast<__nv_bfloat16*>(v), n * d,
                                              all, d, seed);
  else
    gaussian_kernel<<<2048, 256, 0, stream>>>(static_cast<__half*>(k), static_cast<__half*>(v), n * d, all, d, seed);
  return said(cudaGetLastError());
}

}  // namespace vattn::VATTN_ABI::cuda

// The same for foreign callers (bench/roofline_cuda, tests of a driver's): sizes and steps by one struct.
extern "C" {

struct vattn_cuda_call {
  vattn::cuda::shape shape;
  vattn::cuda::settings settings;
  vattn::cuda::arguments arguments;
  int processors;
  // Out:
  long long workspace_bytes, code_bytes, state_bytes;
  int sparse;
  char message[232];
};

int vattn_cuda_size_of_call() { return static_cast<int>(sizeof(vattn_cuda_call)); }

// what: 0 sizes, 1 prepare, 2 encode, 3 run, 4 encode_fresh(extra), 5 naive (keys, values: double output, lse), 6
// gaussian rows into k, v (extra: seed), 7 append (keys, values), 8 audit (keys: counts, values: exact; extra: share in
// 1/65536), 10 + s: the first s stages of a run.
int vattn_cuda_do(vattn_cuda_call* c, int what, int extra, void* keys, void* values, void* stream_of) {
  using namespace vattn;
  using namespace vattn::cuda;
  plan_t p;
  status s = make_plan(c->shape, c->settings, p, c->processors);
  const auto stream = static_cast<cudaStream_t>(stream_of);
  const any_decoder* d = find_decoder(c->shape.type, c->shape.d, c->settings.bits);
  if (s && d == nullptr)
    s = status::error(errc::invalid_argument, "no decoder was compiled for this element, head size and bits");
  if (s) {
    c->workspace_bytes = static_cast<long long>(workspace_bytes(p)),
    c->code_bytes = static_cast<long long>(code_bytes(p));
    c->state_bytes = static_cast<long long>(state_bytes(p)), c->sparse = p.sparse;
    switch (what) {
      case 0:
        break;
      case 1:
        s = d->prepare(p, c->arguments, stream);
        break;
      case 2:
        s = d->encode(p, c->arguments, stream);
        break;
      case 3:
        s = d->run(p, c->arguments, stream);
        break;
      case 4:
        s = d->encode_fresh(p, c->arguments, extra, stream);
        break;
      case 5:
        s = naive_attention(p, c->arguments, static_cast<double*>(keys), static_cast<double*>(values), stream);
        break;
      case 6:
        s = fill_gaussian(c->shape.type, const_cast<void*>(c->arguments.cache.k),
                          const_cast<void*>(c->arguments.cache.v), p.groups(), c->shape.max_tokens, c->shape.d,
                          static_cast<unsigned>(extra), stream);
        break;
      case 7:
        s = d->append(p, c->arguments, keys, values, stream);
        break;
      case 8:
        s = d->audit(p, c->arguments, static_cast<float>(extra) / 65536, static_cast<device_audit*>(keys),
                     static_cast<float*>(values), stream);
        break;
      default:
        s = d->run_stages(p, c->arguments, stream, what - 10);
    }
  }
  std::snprintf(c->message, sizeof(c->message), "%s", s.message());
  return s ? 0 : 1;
}

}  // extern "C"
