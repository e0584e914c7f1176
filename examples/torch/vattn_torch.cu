// A PyTorch operator over the headers: one verified decode step on tensors of a contiguous or paged cache.
//   torch.utils.cpp_extension.load("vattn_torch", ["vattn_torch.cu"], extra_include_paths=[".../include"])
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/extension.h>

#include <deque>

#include "vattn/cuda/step.cuh"

namespace {

using namespace vattn;
using namespace vattn::cuda;
using tensor = torch::Tensor;
using optional_tensor = std::optional<tensor>;

void require(const status& s) { TORCH_CHECK(s.ok(), "vattn: ", s.message()); }

struct planned {
  plan_t plan;
};
std::deque<planned>& plans() {
  static std::deque<planned> all;
  return all;
}
const plan_t& plan_of(int64_t handle) {
  TORCH_CHECK(handle >= 0 && handle < static_cast<int64_t>(plans().size()), "vattn: no plan has this number");
  return plans()[static_cast<std::size_t>(handle)].plan;
}

// Bytes of workspace, codes and state of a new plan, and its number.
std::vector<int64_t> make(int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t d, int64_t max_tokens, bool half,
                          double epsilon, double delta, double scale, int64_t reads, int64_t seed) {
  shape s;
  s.n_batch = static_cast<int>(batch), s.n_q_heads = static_cast<int>(q_heads),
  s.n_kv_heads = static_cast<int>(kv_heads);
  s.d = static_cast<int>(d), s.max_tokens = static_cast<int>(max_tokens), s.type = half ? element::f16 : element::bf16;
  settings o;
  o.epsilon = epsilon, o.delta = delta, o.scale = static_cast<float>(scale),
  o.reads = static_cast<vattn::cuda::reads>(reads);
  o.seed = static_cast<std::uint64_t>(seed);
  plan_t p;
  require(make_plan(s, o, p, at::cuda::getCurrentDeviceProperties()->multiProcessorCount));
  plans().push_back({p});
  return {static_cast<int64_t>(plans().size()) - 1, static_cast<int64_t>(workspace_bytes(p)),
          static_cast<int64_t>(code_bytes(p)), static_cast<int64_t>(state_bytes(p)), p.sparse ? 1 : 0};
}

// Contiguous: k and v [batch, kv_heads, tokens, d], of any strides whose last is 1. Paged: [pages, page, kv_heads, d]
// with a block table.
arguments pack(const plan_t& p, const tensor& q, const tensor& k, const tensor& v, const optional_tensor& table,
               const optional_tensor& lengths, const tensor& out, const tensor& codes, const tensor& state,
               const tensor& workspace, const tensor& certificates, const tensor& step, int64_t layer) {
  TORCH_CHECK(k.stride(3) == 1 && v.strides() == k.strides(),
              "vattn: k and v need the same strides, the last of them 1");
  arguments a;
  const auto ints = [](const optional_tensor& t) { return t ? t->data_ptr<int32_t>() : nullptr; };
  if (table) {
    a.cache = vllm_cache(k.data_ptr(), v.data_ptr(), k.size(1), p.shape.n_kv_heads, p.shape.d, ints(table),
                         static_cast<int32_t>(table->stride(0)), ints(lengths), p.shape.max_tokens);
    a.cache.page_stride = k.stride(0), a.cache.row_stride = k.stride(1), a.cache.head_stride = k.stride(2);
  } else {
    a.cache = contiguous_cache(k.data_ptr(), v.data_ptr(), p.shape.n_kv_heads, k.size(2), p.shape.d,
                               static_cast<int32_t>(k.size(2)), ints(lengths));
    a.cache.page_stride = k.stride(0), a.cache.head_stride = k.stride(1), a.cache.row_stride = k.stride(2);
  }
  TORCH_CHECK(q.is_contiguous() && out.is_contiguous(), "vattn: q and the output must be contiguous");
  a.q = q.data_ptr(), a.output = out.data_ptr(), a.output_float = out.scalar_type() == torch::kFloat;
  a.codes = codes.data_ptr(), a.state = state.data_ptr(), a.workspace = workspace.data_ptr();
  a.certificates = reinterpret_cast<device_certificate*>(certificates.data_ptr());
  a.step = reinterpret_cast<const std::uint32_t*>(step.data_ptr<int32_t>()),
  a.layer = static_cast<std::uint32_t>(layer);
  return a;
}

template <class T, int D>
void dispatch(int64_t what, const plan_t& p, const arguments& a, int64_t fresh, cudaStream_t stream) {
  using step = decoder<T, D, 2>;
  if (what == 0) require(step::prepare(p, a, stream));
  if (what == 1) require(step::encode(p, a, stream));
  if (what == 2) require(step::encode_fresh(p, a, static_cast<int>(fresh), stream));
  if (what == 3) require(step::run(p, a, stream));
}

// what: 0 prepare, 1 encode, 2 encode the tiles that the last `fresh` tokens closed, 3 run.
void step(int64_t what, int64_t handle, const tensor& q, const tensor& k, const tensor& v, const optional_tensor& table,
          const optional_tensor& lengths, const tensor& out, const tensor& codes, const tensor& state,
          const tensor& workspace, const tensor& certificates, const tensor& number, int64_t layer, int64_t fresh) {
  const c10::cuda::CUDAGuard guard(q.device());
  const plan_t& p = plan_of(handle);
  const arguments a = pack(p, q, k, v, table, lengths, out, codes, state, workspace, certificates, number, layer);
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream();
  if (p.shape.type == element::bf16)
    p.shape.d == 128 ? dispatch<__nv_bfloat16, 128>(what, p, a, fresh, stream)
                     : dispatch<__nv_bfloat16, 64>(what, p, a, fresh, stream);
  else
    p.shape.d == 128 ? dispatch<__half, 128>(what, p, a, fresh, stream)
                     : dispatch<__half, 64>(what, p, a, fresh, stream);
}

}  // namespace

TORCH_LIBRARY(vattn, m) {
  m.def(
      "make(int batch, int q_heads, int kv_heads, int d, int max_tokens, bool half, float epsilon, float delta, float "
      "scale, int reads, int seed) -> int[]",
      &make);
  m.def(
      "step(int what, int plan, Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? lengths, Tensor(a!) out, "
      "Tensor(b!) codes, Tensor(c!) state, "
      "Tensor(d!) workspace, Tensor(e!) certificates, Tensor number, int layer, int fresh) -> ()",
      &step);
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {}
