// What a consumer builds on, in one program that any compiler, standard library and set of flags must make the same of:
// exact attention against a loop, verified attention by two policies, threads, an index through bytes and back.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vattn/vattn.hpp>
#include <vector>

namespace {

using vattn::index_t;
constexpr index_t n = 4000, dk = 32, dv = 24;

// The same numbers everywhere: std::normal_distribution differs between standard libraries.
std::vector<float> numbers(index_t count, std::uint64_t seed, float shift) {
  vattn::random_stream random({.seed = seed}, 0);
  std::vector<float> out;
  for (index_t i = 0; i < count; ++i) {
    float sum = -2;
    for (int j = 0; j < 4; ++j) sum += static_cast<float>(random.next()) * 0x1p-32f;
    out.push_back(1.7f * sum + shift);
  }
  return out;
}

std::vector<double> by_hand(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v,
                            double scale) {
  std::vector<double> output(dv), logits(n);
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < dk; ++j)
      logits[i] += scale * static_cast<double>(q[j]) * static_cast<double>(k[i * dk + j]);
    const double x = std::exp(logits[i]);
    sum += x;
    for (std::size_t j = 0; j < dv; ++j) output[j] += x * static_cast<double>(v[i * dv + j]);
  }
  for (double& o : output) o /= sum;
  return output;
}

double distance(const std::vector<float>& a, const std::vector<double>& b) {
  double difference = 0, norm = 0;
  for (std::size_t j = 0; j < b.size(); ++j) {
    difference += (static_cast<double>(a[j]) - b[j]) * (static_cast<double>(a[j]) - b[j]);
    norm += b[j] * b[j];
  }
  return std::sqrt(difference / norm);
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

struct from_codes : vattn::default_policy {
  using selector = vattn::select::indexed<vattn::sketch::key_codes<4>>;
  using sampler = vattn::sample::by_importance;
};

}  // namespace

int main() {
  const std::vector<float> q = numbers(dk, 1, 0), k = numbers(n * dk, 2, 0), v = numbers(n * dv, 3, 1);
  const vattn::tensor_view<const float, 4> query(q.data(), {1, 1, 1, dk});
  const auto cache = vattn::contiguous_kv(k.data(), v.data(), {.n_tokens = n, .dk = dk, .dv = dv});
  vattn::attention_options options;
  options.scale = 1 / std::sqrt(static_cast<float>(dk));
  const std::vector<double> want = by_hand(q, k, v, static_cast<double>(options.scale));

  std::vector<float> o(dv);
  vattn::certificate c;
  const vattn::attention_result result{.output = {o.data(), {1, 1, 1, dv}}, .certificates = {&c, {1, 1, 1}}};
  vattn::workspace memory;
  require(vattn::exact_attention(query, cache, options, result, memory).ok(), "exact attention is ok");
  require(c.exact() && distance(o, want) < 1e-5, "exact attention is exact");

  const vattn::config settings{.epsilon = 0.1, .delta = 0.1, .sinks = 32, .window = 32};
  const vattn::vattention<vattn::ranked_policy> attend(settings);
  require(attend(query, cache, options, result, memory, {.step = 3}).ok(), "vattention is ok");
  require(!c.exact() && c.density() < 0.5 && distance(o, want) < 0.2, "vattention reads few rows and is near");
  const std::vector<float> serial = o;
  require(attend(query, cache, options, result, memory, {.step = 3}, vattn::thread_executor(2)).ok(), "threads are ok");
  require(o == serial, "threads change nothing");

  vattn::sketch::key_codes<4> codes(dk), loaded;
  vattn::append_from(codes, cache.head(0, 0));
  require(vattn::load(vattn::save(codes), loaded).ok(), "codes are loaded");
  require(vattn::save(loaded) == vattn::save(codes), "codes are what they were");
  const vattn::vattention<from_codes> from(settings, {{&loaded, 1}});
  require(from(query, cache, options, result, memory).ok(), "importance sampling is ok");
  require(!c.exact() && distance(o, want) < 0.2, "importance sampling is near");

  require(!attend(query, cache, {}, result, memory).ok(), "a missing scale is refused");
  std::printf("density %.4f\n", c.density());
}
