// Verified decode on a GPU, on tensors from files, measured against attention in double precision: as attend, for one
// card. The cache is held as bf16 or f16; each query of the file decodes once a trial.
#include <cuda_runtime_api.h>

#include <CLI/CLI.hpp>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/decoders.hpp"
#include "support/atomic_file.hpp"
#include "support/npy.hpp"

namespace {

using namespace vattn;

void require(const status& s) {
  if (!s) throw std::runtime_error(s.message());
}
void require(cudaError_t e) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(e));
}

struct device_free {
  void operator()(void* p) const { static_cast<void>(cudaFree(p)); }
};
template <class T>
class buffer {
 public:
  explicit buffer(std::size_t size) : size_(size) {
    void* p = nullptr;
    require(cudaMalloc(&p, std::max<std::size_t>(size * sizeof(T), 16)));
    memory_.reset(p);
    require(cudaMemset(p, 0, size * sizeof(T)));
  }
  [[nodiscard]] T* data() const { return static_cast<T*>(memory_.get()); }
  void set(const T* from, std::size_t count) {
    require(cudaMemcpy(data(), from, count * sizeof(T), cudaMemcpyHostToDevice));
  }
  [[nodiscard]] std::vector<T> get() const {
    std::vector<T> to(size_);
    require(cudaMemcpy(to.data(), data(), size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
  }

 private:
  std::unique_ptr<void, device_free> memory_;
  std::size_t size_;
};

struct request {
  std::string q, k, v, json, method = "vattention", error_scale = "output", kv_dtype = "auto";
  cuda::settings settings;
  double scale = 0;
  bool causal = false;
  long long trials = 1;
};

// Element i as a float, and as the cache's 16 bits.
float element(const npy::array& a, bool bfloat16, std::size_t i) {
  switch (a.type) {
    case npy::dtype::float16:
      return static_cast<float>(a.as<Eigen::half>()[i]);
    case npy::dtype::float32:
      return a.as<float>()[i];
    case npy::dtype::uint16:
      if (bfloat16) return static_cast<float>(a.as<Eigen::bfloat16>()[i]);
      throw std::runtime_error("an array of uint16: give --kv-dtype bf16 if it holds bfloat16");
    default:
      throw std::runtime_error("arrays of float64: write them as float32");
  }
}
std::uint16_t rounded(float x, cuda::element type) {
  return type == cuda::element::f16 ? Eigen::numext::bit_cast<std::uint16_t>(Eigen::half(x))
                                    : Eigen::numext::bit_cast<std::uint16_t>(Eigen::bfloat16(x));
}

void run(request r) {
  const npy::array q = npy::read(r.q), k = npy::read(r.k), v = npy::read(r.v);
  if (q.shape.size() != 3 || k.shape.size() != 3 || k.shape != v.shape || q.shape[2] != k.shape[2] || k.shape[1] < 1 ||
      q.shape[1] % k.shape[1] != 0)
    throw std::runtime_error("give q [T, Hq, D] and k, v [n, Hkv, D] of one D, with Hq a multiple of Hkv: q is " +
                             npy::to_string(q.shape) + ", k " + npy::to_string(k.shape) + ", v " +
                             npy::to_string(v.shape));
  const bool bfloat16 = r.kv_dtype == "bf16";
  const auto type = k.type == npy::dtype::float16 ? cuda::element::f16 : cuda::element::bf16;
  const auto queries = static_cast<int>(q.shape[0]), hq = static_cast<int>(q.shape[1]),
             hk = static_cast<int>(k.shape[1]), d = static_cast<int>(k.shape[2]), n = static_cast<int>(k.shape[0]);
  r.settings.scale = static_cast<float>(r.scale != 0 ? r.scale : 1 / std::sqrt(static_cast<double>(d)));
  r.settings.reads = r.method == "dense"  ? cuda::reads::all
                     : r.method == "auto" ? cuda::reads::automatic
                                          : cuda::reads::sample;
  r.settings.scale_of_error = r.error_scale == "rms" ? error_scale::rms : error_scale::output;
  int device = 0, processors = 0;
  require(cudaGetDevice(&device));
  require(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  cuda::plan_t plan;
  require(cuda::make_plan({1, hq, hk, d, n, type}, r.settings, plan, processors));
  const cuda::any_decoder* decoder = cuda::find_decoder(type, d, r.settings.bits);
  if (decoder == nullptr) throw std::runtime_error("no kernel was compiled for these bits: give 2");

  const auto rows = static_cast<std::size_t>(hk) * static_cast<std::size_t>(n) * static_cast<std::size_t>(d),
             outputs = static_cast<std::size_t>(hq * d);
  std::vector<std::uint16_t> host_k(rows), host_v(rows);
  for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i)
    for (std::size_t h = 0; h < static_cast<std::size_t>(hk); ++h)
      for (std::size_t j = 0; j < static_cast<std::size_t>(d); ++j) {
        const std::size_t from = (i * static_cast<std::size_t>(hk) + h) * static_cast<std::size_t>(d) + j;
        const std::size_t to = (h * static_cast<std::size_t>(n) + i) * static_cast<std::size_t>(d) + j;
        host_k[to] = rounded(element(k, bfloat16, from), type), host_v[to] = rounded(element(v, bfloat16, from), type);
      }
  buffer<std::uint16_t> dk(rows), dv(rows), dq(outputs);
  dk.set(host_k.data(), rows), dv.set(host_v.data(), rows);
  buffer<std::byte> codes(cuda::code_bytes(plan)), state(cuda::state_bytes(plan)),
      workspace(cuda::workspace_bytes(plan));
  buffer<float> output(outputs);
  buffer<double> exact(outputs), exact_lse(static_cast<std::size_t>(hq));
  buffer<cuda::device_certificate> certificates(static_cast<std::size_t>(hq));
  buffer<std::uint32_t> step(1);
  buffer<std::int32_t> length(1);
  cuda::arguments a;
  a.cache = cuda::contiguous_cache(dk.data(), dv.data(), hk, n, d, n, length.data());
  a.q = dq.data(), a.output = output.data(), a.codes = codes.data(), a.state = state.data(),
  a.workspace = workspace.data();
  a.certificates = certificates.data(), a.step = step.data();
  require(decoder->prepare(plan, a, nullptr));
  const std::int32_t all = n;
  length.set(&all, 1);
  require(decoder->encode(plan, a, nullptr));

  nlohmann::ordered_json report;
  report["certificates"] = nlohmann::ordered_json::array();
  std::vector<float> errors;
  std::vector<long> head_failures(static_cast<std::size_t>(hq));
  double density = 0;
  long failures = 0, exact_heads = 0;
  std::uint32_t number = 0;
  for (long long trial = 0; trial < r.trials; ++trial)
    for (int t = 0; t < queries; ++t) {
      std::vector<std::uint16_t> row(outputs);
      for (std::size_t j = 0; j < outputs; ++j)
        row[j] = rounded(element(q, bfloat16, static_cast<std::size_t>(t) * outputs + j), type);
      dq.set(row.data(), outputs);
      const std::int32_t sees = r.causal ? n - queries + t + 1 : n;
      length.set(&sees, 1);
      step.set(&++number, 1);
      require(decoder->run(plan, a, nullptr));
      require(cuda::naive_attention(plan, a, exact.data(), exact_lse.data(), nullptr));
      const auto o = output.get();
      const auto truth = exact.get();
      const auto found = certificates.get();
      for (std::size_t h = 0; h < static_cast<std::size_t>(hq); ++h) {
        double off = 0, norm = 0;
        for (std::size_t j = h * static_cast<std::size_t>(d); j < (h + 1) * static_cast<std::size_t>(d); ++j)
          off += (static_cast<double>(o[j]) - truth[j]) * (static_cast<double>(o[j]) - truth[j]),
              norm += truth[j] * truth[j];
        const cuda::device_certificate& c = found[h];
        const double error = r.settings.scale_of_error == error_scale::rms && c.goal > 0
                                 ? std::sqrt(off / static_cast<double>(c.goal)) * r.settings.epsilon
                                 : std::sqrt(off / norm);
        const bool failed = !(error <= r.settings.epsilon);
        errors.push_back(static_cast<float>(error)), failures += failed, head_failures[h] += failed,
            exact_heads += c.rounds == 0;
        density += static_cast<double>(c.rows) / c.n;
        report["certificates"].push_back({{"trial", trial},
                                          {"token", t},
                                          {"head", h},
                                          {"n", c.n},
                                          {"rows", c.rows},
                                          {"density", static_cast<double>(c.rows) / c.n},
                                          {"log_denominator", c.log_denominator},
                                          {"epsilon", r.settings.epsilon},
                                          {"delta", r.settings.delta},
                                          {"epsilon_achieved", c.epsilon_achieved},
                                          {"error", error},
                                          {"failed", failed},
                                          {"exact", c.rounds == 0},
                                          {"guarantee", c.rounds == 0 ? "exact" : "asymptotic"},
                                          {"rounds", c.rounds},
                                          {"breaches", c.breaches},
                                          {"dimension", c.dimension},
                                          {"dof", c.dof}});
      }
    }
  std::sort(errors.begin(), errors.end());
  const auto count = static_cast<double>(errors.size());
  const double p90 = static_cast<double>(errors[std::min(errors.size() - 1, errors.size() * 9 / 10)]);
  nlohmann::ordered_json s{
      {"method", r.method},
      {"n", n},
      {"queries", queries},
      {"heads", hq},
      {"density", density / count},
      {"exact_share", static_cast<double>(exact_heads) / count},
      {"error_p90", p90},
      {"failures", static_cast<double>(failures) / count},
      {"worst_head_failures",
       static_cast<double>(*std::max_element(head_failures.begin(), head_failures.end())) / (count / hq)}};
  std::printf(
      "density      %.4f   (exact share %.3f)\nerror        90 %% %.3g\nfailures     %.4f of the draws, worst head "
      "%.4f   (delta %g)\n",
      s["density"].get<double>(), s["exact_share"].get<double>(), p90, s["failures"].get<double>(),
      s["worst_head_failures"].get<double>(), r.settings.delta);
  if (r.json.empty()) return;
  report["summary"] = s;
  support::atomic_file file(r.json);
  file.stream() << report.dump() << '\n';
  file.commit();
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Verified decode on a GPU, on tensors from files");
  request r;
  app.add_option("--q", r.q, "queries [T, Hq, D], the last T positions of the sequence")->required();
  app.add_option("--k", r.k, "keys [n, Hkv, D]")->required();
  app.add_option("--v", r.v, "values [n, Hkv, D]; .npy of float32, float16, or bfloat16 as uint16")->required();
  app.add_option("--kv-dtype", r.kv_dtype, "auto|bf16: arrays of uint16 hold bfloat16")
      ->check(CLI::IsMember({"auto", "bf16"}));
  app.add_option("--json", r.json, "write a summary and every certificate");
  app.add_option("--scale", r.scale, "logit = scale q.k; default 1/sqrt(D)");
  app.add_option("--softcap", r.settings.softcap, "cap of the logits, with --method dense or auto; 0 = none");
  app.add_option("--sliding-window", r.settings.sliding_window, "see the latest X tokens alone; 0 = all");
  app.add_flag("--causal", r.causal, "query t of T sees the tokens up to n - T + t");
  app.add_option("--method", r.method, "vattention|dense|auto: as the plan predicts")
      ->check(CLI::IsMember({"vattention", "dense", "auto"}));
  app.add_option("--epsilon", r.settings.epsilon, "error allowed, in (0, 1); default 0.05");
  app.add_option("--delta", r.settings.delta, "share of draws that may exceed it; default 0.1");
  app.add_option("--error-scale", r.error_scale, "output|rms")->check(CLI::IsMember({"output", "rms"}));
  app.add_option("--bits", r.settings.bits, "of a key's code: 1, 2 or 3; default 2");
  app.add_option("--sinks", r.settings.sinks, "first tokens, read exactly; default 16");
  app.add_option("--window", r.settings.window, "last tokens, read exactly; default 128");
  app.add_option("--seed", r.settings.seed, "names the draws; default 0");
  app.add_option("--trials", r.trials, "independent draws; default 1")->check(CLI::Range(1, 1000000));
  CLI11_PARSE(app, argc, argv);
  try {
    run(r);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "attend_cuda: %s\n", e.what());
    return 1;
  }
  return 0;
}
