// A batch of caches in device memory, whose logits are those of a regime, and what a step of it needs.
#pragma once

#include <cuda_runtime_api.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/decoders.hpp"
#include "support/catch.hpp"
#include "support/regimes.hpp"

namespace vattn::test {

// Says so where there is none: ctest counts the test as skipped by this line.
inline bool has_card() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return true;
  WARN("no CUDA device: skipped");
  return false;
}

inline void require(cudaError_t e) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(e));
}
inline void require(const status& s) {
  if (!s) throw std::runtime_error(s.message());
}

/// T [size] in device memory.
template <class T>
class device_array {
 public:
  device_array() = default;
  explicit device_array(std::size_t size, int byte = 0) : size_(size) {
    require(cudaMalloc(&data_, std::max<std::size_t>(bytes(), 16)));
    require(cudaMemset(data_, byte, bytes()));
  }
  explicit device_array(const std::vector<T>& from) : device_array(from.size()) { set(from); }
  device_array(device_array&& o) noexcept : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  device_array& operator=(device_array&& o) noexcept {
    std::swap(data_, o.data_), std::swap(size_, o.size_);
    return *this;
  }
  ~device_array() { static_cast<void>(cudaFree(data_)); }

  [[nodiscard]] T* data() const { return static_cast<T*>(data_); }
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] std::size_t bytes() const { return size_ * sizeof(T); }
  void set(const std::vector<T>& from) { require(cudaMemcpy(data_, from.data(), bytes(), cudaMemcpyHostToDevice)); }
  [[nodiscard]] std::vector<T> get() const {
    std::vector<T> to(size_);
    require(cudaMemcpy(to.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return to;
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

[[nodiscard]] inline std::uint16_t to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
[[nodiscard]] inline std::uint16_t to_half(float x) {
  const Eigen::half h(x);
  return h.x;
}
[[nodiscard]] inline float to_float(std::uint16_t x, cuda::element type) {
  if (type == cuda::element::f16) return static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(x));
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

enum class layout : std::uint8_t { contiguous, nhd, hnd, vllm };

struct shape_of_problem {
  int n_batch = 1, n_kv_heads = 2, group = 4, d = 128, n = 4096;
  cuda::element type = cuda::element::bf16;
  std::string regime = "gauss2", values = "mean";
  std::uint64_t seed = 1;
  layout lies = layout::contiguous;
  int page = 16;
  std::vector<std::int32_t> lengths{};  // of the sequences; all n where empty
  int spare = 0;                        // rows beyond n, for tokens to come
};

/// Owns all device memory of a step. Rows on the host as they were rounded.
class problem {
 public:
  problem(const shape_of_problem& shape, const cuda::settings& settings) : shape_(shape), settings_(settings) {
    make_rows();
    place_rows();
    settings_.scale = 1 / std::sqrt(static_cast<float>(shape.d));
    const cuda::shape s{shape.n_batch, shape.n_kv_heads * shape.group, shape.n_kv_heads, shape.d, capacity(),
                        shape.type};
    require(cuda::make_plan(s, settings_, plan));
    decoder = cuda::find_decoder(shape.type, shape.d, settings_.bits);
    if (decoder == nullptr) throw std::runtime_error("no decoder for this problem");
    take_memory();
  }

  /// Again with another plan, of the same shape.
  void take_memory() {
    const auto heads = static_cast<std::size_t>(plan.heads()), d = static_cast<std::size_t>(shape_.d);
    output = device_array<float>(heads * d, 0xff), lse = device_array<float>(heads, 0xff);
    certificates = device_array<cuda::device_certificate>(heads);
    codes = device_array<std::byte>(cuda::code_bytes(plan)), state = device_array<std::byte>(cuda::state_bytes(plan));
    workspace = device_array<std::byte>(cuda::workspace_bytes(plan), 0xff);
    step = device_array<std::uint32_t>(1);
    a.cache.max_tokens = capacity();
    a.q = q.data(), a.output = output.data(), a.lse = lse.data(), a.certificates = certificates.data();
    a.codes = codes.data(), a.state = state.data(), a.workspace = workspace.data(), a.step = step.data();
    require(decoder->prepare(plan, a, nullptr));
    require(decoder->encode(plan, a, nullptr));
  }

  void run(std::uint32_t number) {
    step.set({number});
    require(decoder->run(plan, a, nullptr));
    require(cudaDeviceSynchronize());
  }
  /// Relative errors of all heads against exact attention.
  [[nodiscard]] std::vector<double> errors() {
    if (exact.empty()) {
      const device_array<double> o(output.size()), l(lse.size());
      require(cuda::naive_attention(plan, a, o.data(), l.data(), nullptr));
      exact = o.get(), exact_lse = l.get();
    }
    const std::vector<float> ours = output.get();
    std::vector<double> e(lse.size());
    const auto d = static_cast<std::size_t>(shape_.d);
    for (std::size_t h = 0; h < e.size(); ++h) {
      double off = 0, norm = 0;
      for (std::size_t j = h * d; j < (h + 1) * d; ++j) {
        off += (static_cast<double>(ours[j]) - exact[j]) * (static_cast<double>(ours[j]) - exact[j]);
        norm += exact[j] * exact[j];
      }
      e[h] = off == 0 ? 0 : std::sqrt(off / norm);
    }
    return e;
  }
  [[nodiscard]] int capacity() const { return shape_.n + shape_.spare; }
  /// Key or value row of token i on the host.
  [[nodiscard]] std::vector<float> row(const std::vector<std::uint16_t>& rows, int b, int h, int i) const {
    std::vector<float> x(static_cast<std::size_t>(shape_.d));
    const std::size_t at =
        ((static_cast<std::size_t>(b) * static_cast<std::size_t>(shape_.n_kv_heads) + static_cast<std::size_t>(h)) *
             static_cast<std::size_t>(capacity()) +
         static_cast<std::size_t>(i)) *
        x.size();
    for (std::size_t j = 0; j < x.size(); ++j) x[j] = to_float(rows[at + j], shape_.type);
    return x;
  }

  cuda::plan_t plan;
  const cuda::any_decoder* decoder = nullptr;
  cuda::arguments a;
  device_array<std::uint16_t> k, v, q;
  device_array<std::int32_t> table, starts, lengths, last;
  device_array<float> output, lse;
  device_array<cuda::device_certificate> certificates;
  device_array<std::byte> codes, state, workspace;
  device_array<std::uint32_t> step;
  std::vector<std::uint16_t> host_k, host_v, host_q;  // [n_batch, n_kv_heads, capacity, d], [n_batch, n_q_heads, d]
  std::vector<double> exact, exact_lse;

 private:
  void make_rows() {
    const auto d = static_cast<std::size_t>(shape_.d), all = static_cast<std::size_t>(capacity());
    const auto round = [&](float x) { return shape_.type == cuda::element::bf16 ? to_bfloat16(x) : to_half(x); };
    for (int head = 0; head < shape_.n_batch * shape_.n_kv_heads; ++head) {
      const auto c = synthetic::make_cache(shape_.regime, shape_.values, capacity(), shape_.d,
                                           shape_.seed * 1000 + static_cast<std::uint64_t>(head), shape_.group);
      for (std::size_t i = 0; i < all * d; ++i) host_k.push_back(round(c.k[i])), host_v.push_back(round(c.v[i]));
      for (const float x : c.q) host_q.push_back(round(x));
    }
    q = device_array<std::uint16_t>(host_q);
  }
  // Pages in a shuffled order; pages that no sequence has hold NaNs.
  void place_rows() {
    const auto d = static_cast<std::size_t>(shape_.d), heads = static_cast<std::size_t>(shape_.n_kv_heads);
    if (!shape_.lengths.empty()) lengths = device_array<std::int32_t>(shape_.lengths);
    if (shape_.lies == layout::contiguous) {
      k = device_array<std::uint16_t>(host_k), v = device_array<std::uint16_t>(host_v);
      a.cache = cuda::contiguous_cache(k.data(), v.data(), shape_.n_kv_heads, capacity(), shape_.d, capacity(),
                                       shape_.lengths.empty() ? nullptr : lengths.data());
      return;
    }
    const int pages = (capacity() + shape_.page - 1) / shape_.page, all = pages * shape_.n_batch + 3;
    std::vector<std::int32_t> order(static_cast<std::size_t>(all));
    for (int i = 0; i < all; ++i) order[static_cast<std::size_t>(i)] = i;
    std::mt19937_64 random(shape_.seed);
    std::shuffle(order.begin(), order.end(), random);
    const auto page = static_cast<std::size_t>(shape_.page), size = page * heads * d;
    std::vector<std::uint16_t> to_k(static_cast<std::size_t>(all) * size, 0x7fff), to_v = to_k;
    for (int b = 0; b < shape_.n_batch; ++b)
      for (std::size_t h = 0; h < heads; ++h)
        for (int i = 0; i < capacity(); ++i) {
          const auto p = static_cast<std::size_t>(order[static_cast<std::size_t>(b * pages + i / shape_.page)]),
                     r = static_cast<std::size_t>(i) % page;
          const std::size_t to = p * size + (shape_.lies == layout::hnd ? (h * page + r) * d : (r * heads + h) * d);
          const std::size_t from = ((static_cast<std::size_t>(b) * heads + h) * static_cast<std::size_t>(capacity()) +
                                    static_cast<std::size_t>(i)) *
                                   d;
          std::copy_n(host_k.begin() + static_cast<std::ptrdiff_t>(from), d,
                      to_k.begin() + static_cast<std::ptrdiff_t>(to));
          std::copy_n(host_v.begin() + static_cast<std::ptrdiff_t>(from), d,
                      to_v.begin() + static_cast<std::ptrdiff_t>(to));
        }
    k = device_array<std::uint16_t>(to_k), v = device_array<std::uint16_t>(to_v),
    table = device_array<std::int32_t>(order);
    const auto used = [&](int b) {
      return shape_.lengths.empty() ? shape_.n : shape_.lengths[static_cast<std::size_t>(b)];
    };
    if (shape_.lies == layout::vllm) {
      if (shape_.lengths.empty())
        lengths =
            device_array<std::int32_t>(std::vector<std::int32_t>(static_cast<std::size_t>(shape_.n_batch), shape_.n));
      a.cache = cuda::vllm_cache(k.data(), v.data(), shape_.page, shape_.n_kv_heads, shape_.d, table.data(), pages,
                                 lengths.data(), capacity());
      return;
    }
    std::vector<std::int32_t> start{0}, rest, packed;
    for (int b = 0; b < shape_.n_batch; ++b) {
      const int count = (used(b) + shape_.page - 1) / shape_.page;
      for (int i = 0; i < count; ++i) packed.push_back(order[static_cast<std::size_t>(b * pages + i)]);
      start.push_back(start.back() + count), rest.push_back(used(b) - (count - 1) * shape_.page);
    }
    table = device_array<std::int32_t>(packed), starts = device_array<std::int32_t>(start),
    last = device_array<std::int32_t>(rest);
    a.cache = cuda::flashinfer_cache(k.data(), v.data(), shape_.lies == layout::nhd, shape_.page, shape_.n_kv_heads,
                                     shape_.d, starts.data(), table.data(), last.data(), capacity());
  }

  shape_of_problem shape_;
  cuda::settings settings_;
};

}  // namespace vattn::test
