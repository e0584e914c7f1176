// Errors of sketched logits on recorded queries and keys, and whether the sketches state them rightly. CSV.
//   sketch_error layer1_q.npy layer1_k.npy [more pairs] > sketch_error.csv
// q float32 [steps, query heads, d], k float16 [n, KV heads, d]; logits are q·k/sqrt(d) over all n keys.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vattn/vattn.hpp>
#include <vector>

#include "support/npy.hpp"

namespace {

using namespace vattn;

struct recording {
  std::string name;
  npy::array q, k;
  [[nodiscard]] index_t steps() const { return q.shape[0]; }
  [[nodiscard]] index_t heads() const { return q.shape[1]; }
  [[nodiscard]] index_t dim() const { return q.shape[2]; }
  [[nodiscard]] auto cache() const {
    const auto* keys = reinterpret_cast<const Eigen::half*>(k.bytes.data());
    return token_major_kv(keys, keys, kv_shape{1, k.shape[1], k.shape[0], dim(), dim()});
  }
};

recording load_recording(const std::string& q, const std::string& k) {
  const std::filesystem::path path(k);
  recording r{path.parent_path().filename().string() + "/" + path.stem().string(), npy::read(q), npy::read(k)};
  if (r.q.shape.size() != 3 || r.q.type != npy::dtype::float32)
    throw std::runtime_error(q + ": must be float32 [steps, query heads, d]");
  if (r.k.shape.size() != 3 || r.k.type != npy::dtype::float16 || r.k.shape[2] != r.dim())
    throw std::runtime_error(k + ": must be float16 [n, KV heads, d], d as in " + q);
  if (r.k.shape[0] < 1 || r.k.shape[1] < 1 || r.heads() < 1 || r.heads() % r.k.shape[1] != 0)
    throw std::runtime_error(k + ": its heads must divide those of " + q);
  return r;
}

struct summary {
  double rms = 0;               // nats, over tokens and queries, each query's mean error taken off
  double ratio = 0, tail = 0;   // |error|/σ as it is: root mean square, 99.9 % quantile
  double naive = 0, worst = 0;  // root mean square against ‖q‖ρ/sqrt(d); greatest error over its hard bound
};

template <class Index>
summary measure(const recording& r, index_t kv_head, const Index& index) {
  const auto head = r.cache().head(0, kv_head);
  const index_t n = head.size(), group = r.heads() / r.k.shape[1];
  const auto d = static_cast<std::size_t>(r.dim());
  std::vector<float> query(d), scores(static_cast<std::size_t>(n)), errors(scores.size()),
      scratch(index.scratch_size());
  std::vector<float> ratios;
  double square = 0, relative = 0, naive = 0;
  summary s;
  for (index_t row = 0; row < r.steps() * group; ++row) {
    const index_t at = (row / group * r.heads() + kv_head * group + row % group) * r.dim();
    double norm2 = 0;
    for (std::size_t j = 0; j < d; ++j) {
      query[j] = r.q.as<float>()[static_cast<std::size_t>(at) + j] / std::sqrt(static_cast<float>(d));
      norm2 += double{query[j]} * double{query[j]};
    }
    index.score(query.data(), 0, scores, errors, scratch);
    double sum = 0, sum2 = 0;
    for (index_t i = 0; i < n; ++i) {
      const auto t = static_cast<std::size_t>(i);
      const double e = double{scores[t]} - double{kernel::dot(query.data(), head.key(i))};
      sum += e, sum2 += e * e;
      const double z = std::abs(e) / std::max(double{errors[t]}, 1e-30);
      const double bound = std::sqrt(norm2) * double{index.residual(i)} + 1e-30;
      ratios.push_back(static_cast<float>(z));
      relative += z * z;
      naive += e * e / (bound * bound / static_cast<double>(d));
      s.worst = std::max(s.worst, std::abs(e) / bound);
    }
    square += sum2 - sum * sum / static_cast<double>(n);
  }
  const auto count = static_cast<double>(ratios.size());
  s.rms = std::sqrt(square / count);
  s.ratio = std::sqrt(relative / count);
  s.naive = std::sqrt(naive / count);
  const auto rank = static_cast<std::ptrdiff_t>(0.999 * count);
  std::nth_element(ratios.begin(), ratios.begin() + rank, ratios.end());
  s.tail = ratios[static_cast<std::size_t>(rank)];
  return s;
}

template <class Index>
void report(const recording& r, const char* name, Index index, bool whole = false) {
  for (index_t h = 0; h < r.k.shape[1]; ++h) {
    const auto head = r.cache().head(0, h);
    Index own = index;
    if constexpr (requires { own.train(head); }) {
      if (whole) own.train(head);
    }
    append_from(own, head);
    const summary s = measure(r, h, own);
    double drift = 1;
    if constexpr (requires { own.drift(); }) drift = own.drift();
    std::printf("%s,%lld,%s,%.2f,%.4f,%.3f,%.2f,%.3f,%.3f,%.2f\n", r.name.c_str(), static_cast<long long>(h), name,
                static_cast<double>(own.bytes()) / static_cast<double>(head.size()), s.rms, s.ratio, s.tail, s.naive,
                s.worst, drift);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3 || argc % 2 == 0) {
    std::fputs("usage: sketch_error Q.npy K.npy [Q.npy K.npy ...] > sketch_error.csv\n", stderr);
    return 2;
  }
  std::puts(
      "recording,kv_head,sketch,bytes_per_key,rms_nats,ratio_rms,ratio_q999,naive_ratio_rms,worst_over_bound,drift");
  for (int i = 1; i + 1 < argc; i += 2) {
    const recording r = load_recording(argv[i], argv[i + 1]);
    const index_t d = r.dim();
    report(r, "key_codes<1>", sketch::key_codes<1>(d, 1));
    report(r, "key_codes<2>", sketch::key_codes<2>(d, 1));
    report(r, "key_codes<4>", sketch::key_codes<4>(d, 1));
    for (const index_t groups : {10, 21}) {
      const std::string bits = "product_codes " + std::to_string(6 * groups);
      report(r, (bits + " first 1024").c_str(), sketch::product_codes(d, groups));
      report(r, (bits + " spread 1024").c_str(), sketch::product_codes(d, groups), true);
      report(r, (bits + " spread 4096").c_str(), sketch::product_codes(d, groups, {.train_size = 4096}), true);
    }
  }
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "sketch_error: %s\n", e.what());
  return 1;
}
