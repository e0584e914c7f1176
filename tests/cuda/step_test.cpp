// A verified step on the device: its codes, its picks and its evidence against the host's, and what it must never do.
#include <map>

#include "cuda/problem.hpp"
#include "vattn/base/philox.hpp"
#include "vattn/cuda/plan.hpp"
#include "vattn/sketch/rotation.hpp"
#include "vattn/stats/judge.hpp"

using namespace vattn;
using namespace vattn::test;

namespace {

cuda::settings samples(double epsilon = 0.1) {
  cuda::settings s;
  s.reads = cuda::reads::sample;
  s.epsilon = epsilon;
  return s;
}

// Of a problem whose step has run: pieces of its memory on the host.
struct seen {
  explicit seen(const problem& p) : plan(p.plan) {
    const auto bytes_w = p.workspace.get(), bytes_c = p.codes.get();
    workspace = bytes_w, codes = bytes_c;
    cuda::detail::pieces w(workspace.data()), c(codes.data());
    at = cuda::workspace_pieces::take(w, plan), coded = cuda::code_pieces::take(c, plan);
  }
  cuda::plan_t plan;
  std::vector<std::byte> workspace, codes;
  cuda::workspace_pieces at{};
  cuda::code_pieces coded{};
};

// Level and fields of one key by the format of encode.cuh, whose integer arithmetic this repeats.
struct decoded_key {
  int level[128];
  float alpha, rho, reach;
  bool certain;
  std::uint32_t meta;
};
decoded_key decode(const seen& s, int group, int token, int bits, int d) {
  const std::uint32_t* tile =
      s.coded.tiles + static_cast<std::size_t>(group) * cuda::code_pieces::stride(s.plan) +
      static_cast<std::size_t>(token / 32) * static_cast<std::size_t>(cuda::detail::tile_bytes(bits, d) / 4);
  const int key = token % 32, half = key / 16, g = key % 8, up = key / 8 % 2;
  decoded_key k{};
  const auto plane = [&](int b, const std::uint32_t* words, int j) {
    const int all = b * d / 64, part = j / 16, t = j % 16 / 4, w = up * all / 2 + part / (8 / b), lane = g * 4 + t;
    const int at = all == 2 ? lane * 4 + half * 2 + w : half * all * 32 + w / 4 * 128 + lane * 4 + w % 4;
    return static_cast<int>(words[at] >> (8 * (j % 4) + part % (8 / b) * b) & ((1u << b) - 1));
  };
  for (int j = 0; j < d; ++j) {
    const int c = bits == 3 ? 2 * plane(2, tile, j) + plane(1, tile + 2 * d, j) : plane(bits, tile, j);
    k.level[j] = 2 * c - (1 << bits) + 1;
  }
  k.meta = tile[d * bits + (half * 8 + g) * 2 + up];
  k.alpha = static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(k.meta & 0xffff)));
  k.rho = static_cast<float>(k.meta >> 24);
  k.certain = (k.meta >> 16 & 255) == 255;
  k.reach = static_cast<float>(k.meta >> 16 & 255) / 32 - 3;
  return k;
}

std::uint32_t draw(std::uint32_t token, std::uint32_t key0, std::uint32_t key1) {
  std::uint32_t x = token * 0x9E3779B9u + key0;
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x += key1, x *= 0x846ca68bu, x ^= x >> 16;
  return x;
}
std::array<std::uint32_t, 4> draw_key_of(std::uint64_t seed, std::uint32_t step, std::uint32_t b, std::uint32_t head) {
  return philox4x32({head, step, b, 0}, {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
}
float half_value(std::uint32_t bits) {
  return static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(static_cast<std::uint16_t>(bits & 0xffff)));
}

}  // namespace

TEST_CASE("quantiles from the device's table are those of stats, and never too small", "[cuda]") {
  for (const double delta : {0.01, 0.05, 0.1, 0.3}) {
    const auto table = cuda::quantile_table::make(delta);
    for (double nu1 = 1; nu1 <= 128; nu1 *= 1.13)
      for (double nu2 = 2; nu2 < 3e4; nu2 *= 1.21) {
        const double exact = stats::squared_error_quantile(delta, nu1, nu2);
        const auto ours = static_cast<double>(table(static_cast<float>(nu1), static_cast<float>(nu2)));
        INFO("delta " << delta << " nu1 " << nu1 << " nu2 " << nu2);
        REQUIRE(ours >= exact * (1 - 1e-4));
        REQUIRE(ours <= exact * (nu2 < 4 ? 1.25 : 1.06));
      }
  }
}

TEST_CASE("codes made on a GPU are those of the host's rotation, with their stated errors", "[cuda]") {
  if (!has_card()) return;
  for (const int bits : {1, 2, 3}) {
    cuda::settings s = samples();
    s.bits = bits;
    problem p({.n_batch = 2, .n = 700, .lengths = {700, 333}}, s);
    const seen at(p);
    const sketch::random_rotation rotation(128, s.seed);
    long different = 0, all = 0;
    for (int group = 0; group < 4; ++group) {
      const float* head = at.coded.heads + group * (2 * 128 + 8);
      const int n = group < 2 ? 700 : 333;
      for (int token = 0; token < (n - s.window) / 32 * 32; ++token) {
        const decoded_key k = decode(at, group, token, bits, 128);
        std::vector<float> y = p.row(p.host_k, group / 2, group % 2, token),
                           v = p.row(p.host_v, group / 2, group % 2, token);
        double r2 = 0;
        for (int j = 0; j < 128; ++j) {
          const auto i = static_cast<std::size_t>(j);
          y[i] -= head[j];
          r2 += std::pow(static_cast<double>(v[i]) - static_cast<double>(head[128 + j]), 2);
        }
        rotation.apply(y);
        double norm2 = 0, along = 0, square = 0;
        for (int j = 0; j < 128; ++j) {
          const auto x = static_cast<double>(y[static_cast<std::size_t>(j)]);
          norm2 += x * x, along += x * k.level[j], square += k.level[j] * k.level[j];
        }
        const double step = 2 * (bits == 1 ? 0.7979 : bits == 2 ? 0.4979 : 0.2930) * std::sqrt(norm2 / 128);
        for (int j = 0; j < 128; ++j) {
          const int top = 1 << (bits - 1),
                    c = std::clamp(
                        static_cast<int>(std::floor(static_cast<double>(y[static_cast<std::size_t>(j)]) / step)), -top,
                        top - 1);
          different += 2 * c + 1 != k.level[j], ++all;
        }
        const double alpha = norm2 / along,
                     rho = std::sqrt(std::max(0.0, norm2 - 2 * alpha * along + alpha * alpha * square));
        REQUIRE(std::abs(static_cast<double>(k.alpha * head[256]) / alpha - 1) < 2e-3);
        REQUIRE(static_cast<double>(k.rho * head[257]) > rho * (1 - 1e-3));
        REQUIRE(static_cast<double>((k.rho - 1) * head[257]) < rho * (1 + 1e-3));
        REQUIRE(std::abs(static_cast<double>(k.reach) - std::log2(std::sqrt(r2) / static_cast<double>(head[258]))) <
                0.02);
      }
    }
    REQUIRE(all > 100000);
    REQUIRE(different <= all / 20000);  // on a border, by the order of a sum
  }
}

TEST_CASE("host and GPU pick the same tokens and see the same evidence", "[cuda]") {
  if (!has_card()) return;
  for (const int group : {4, 2}) {
    cuda::settings s = samples();
    s.seed = 77;
    problem p({.n_batch = 1, .n_kv_heads = 2, .group = group, .n = 6000, .regime = "gauss2", .seed = 5}, s);
    for (std::uint32_t step = 1; step <= 3; ++step) p.run(step);  // thresholds settle
    p.run(4);
    const seen at(p);
    const auto certificates = p.certificates.get();
    const auto output = p.output.get();
    const auto lse = p.lse.get();
    const sketch::random_rotation rotation(128, s.seed);
    const int tiles = (6000 - s.window) / 32, coded = tiles * 32;
    const float least = std::log2(std::min(1.0f, p.plan.looked_at() / 6000.0f));
    int judged = 0;
    for (int kv = 0; kv < 2; ++kv) {
      const float* head = at.coded.heads + kv * (2 * 128 + 8);
      // The query's bytes, as the scan makes them.
      std::vector<std::vector<int>> bytes;
      std::vector<float> k1, k0;
      for (int h = 0; h < group; ++h) {
        std::vector<float> x(128);
        for (std::size_t j = 0; j < 128; ++j)
          x[j] = to_float(p.host_q[static_cast<std::size_t>((kv * group + h) * 128) + j], cuda::element::bf16);
        rotation.apply(x);
        float top = 0;
        for (const float v : x) top = std::max(top, std::abs(v));
        const float unit = std::max(top, 1e-20f) / 127, inverse = 1 / unit;
        std::vector<int> b;
        int sum = 0;
        for (const float v : x) b.push_back(static_cast<int>(std::nearbyint(v * inverse))), sum += b.back();
        bytes.push_back(b);
        const float per_code = 1 / std::sqrt(128.0f) * 1.4426950408889634f * head[0 + 256] * unit;
        k1.push_back(per_code * 2 / 64);
        k0.push_back(std::fma(-12582912.0f, k1.back(), -(per_code * static_cast<float>(3 * sum))));
      }
      std::map<std::uint32_t, cuda::candidate> found;
      for (int segment = 0; segment < p.plan.segments(); ++segment) {
        const int count =
            at.at.counts[kv * std::max(p.plan.splits, p.plan.second_splits) * cuda::detail::scan_warps + segment];
        REQUIRE(count <= p.plan.segment);
        for (int i = 0; i < count; ++i) {
          const auto& c =
              at.at.candidates[static_cast<std::size_t>(kv) * static_cast<std::size_t>(p.plan.group_candidates()) +
                               static_cast<std::size_t>(segment * p.plan.segment + i)];
          REQUIRE(found.emplace(c.token, c).second);
        }
      }
      const auto keys = draw_key_of(s.seed, 4, 0, static_cast<std::uint32_t>(kv));
      const float* marks = at.at.thresholds + kv * group * cuda::detail::mark_size;
      int picked = 0, unsure = 0, other_level = 0;
      for (int token = s.sinks; token < coded; ++token) {
        const decoded_key k = decode(at, kv, token, 2, 128);
        const auto it = found.find(static_cast<std::uint32_t>(token));
        const double u =
            (static_cast<double>(draw(static_cast<std::uint32_t>(token), keys[0], keys[1])) + 0.5) / 4294967296.0;
        float level = least;
        for (int h = 0; h < group; ++h) {
          int sum = 0;
          for (std::size_t j = 0; j < 128; ++j)
            sum += 64 * ((k.level[j] + 3) / 2) * bytes[static_cast<std::size_t>(h)][j];
          const float inner = std::fma(k1[static_cast<std::size_t>(h)], 12582912.0f + static_cast<float>(sum),
                                       k0[static_cast<std::size_t>(h)]);
          const float* m = marks + h * cuda::detail::mark_size;
          const float score = std::fma(k.alpha, inner, std::max(k.reach, m[cuda::detail::least_reach]));
          const float over = std::max(score - m[cuda::detail::plain],
                                      score - std::fma(k.rho, m[cuda::detail::slope], m[cuda::detail::floor_]));
          const float rounded = static_cast<float>(Eigen::half(over));
          if (it != found.end()) other_level += half_value(it->second.levels[h / 2] >> (h % 2 * 16)) != rounded;
          level = std::max(level, rounded);
        }
        const bool mine = k.certain || std::log2(u) < static_cast<double>(level);
        if (mine != (it != found.end())) {
          ++unsure;
          REQUIRE(std::abs(std::log2(u) - static_cast<double>(level)) < 1e-4);
        }
        picked += mine;
      }
      INFO("picked " << picked);
      REQUIRE(picked > 300);
      REQUIRE(unsure <= 1);
      REQUIRE(other_level == 0);
      // The estimate from those picks that the shifts leave, in double.
      struct kept {
        int token;
        double probability;
      };
      std::vector<kept> rows;
      for (int token = coded; token < 6000; ++token) rows.push_back({token, 1});
      int sampled = 0;
      for (const auto& [token, c] : found) {
        double lp = static_cast<double>(least);
        for (int h = 0; h < group; ++h)
          lp = std::max(lp, static_cast<double>(half_value(c.levels[h / 2] >> (h % 2 * 16)) -
                                                marks[h * cuda::detail::mark_size + cuda::detail::used_shift]));
        const double u = (static_cast<double>(draw(token, keys[0], keys[1])) + 0.5) / 4294967296.0;
        if ((c.flags & 256) == 0 && std::log2(u) >= lp) continue;
        rows.push_back({static_cast<int>(token), (c.flags & 256) != 0 ? 1.0 : std::exp2(std::min(lp, 0.0))});
        ++sampled;
      }
      for (int h = 0; h < group; ++h) {
        const auto id = static_cast<std::size_t>(kv * group + h);
        const auto& c = certificates[id];
        if (c.rounds != 1) continue;
        ++judged;
        REQUIRE(std::abs(c.rows - sampled - (6000 - coded)) <= 1);
        std::vector<double> logit, o(128);
        double top = -1e30, denominator = 0;
        for (const kept& r : rows) {
          const auto key = p.row(p.host_k, 0, kv, r.token);
          double l = 0;
          for (std::size_t j = 0; j < 128; ++j)
            l += static_cast<double>(key[j]) *
                 static_cast<double>(to_float(p.host_q[id * 128 + j], cuda::element::bf16));
          logit.push_back(l / std::sqrt(128.0));
          top = std::max(top, logit.back());
        }
        for (std::size_t i = 0; i < rows.size(); ++i) {
          const double w = std::exp(logit[i] - top) / rows[i].probability;
          const auto v = p.row(p.host_v, 0, kv, rows[i].token);
          denominator += w;
          for (std::size_t j = 0; j < 128; ++j) o[j] += w * static_cast<double>(v[j]);
        }
        double variance = 0, fourth = 0, off = 0, norm = 0;
        for (std::size_t j = 0; j < 128; ++j) {
          o[j] /= denominator;
          off += std::pow(o[j] - static_cast<double>(output[id * 128 + j]), 2), norm += o[j] * o[j];
        }
        for (std::size_t i = 0; i < rows.size(); ++i) {
          const double w = std::exp(logit[i] - top) / rows[i].probability / denominator;
          const auto v = p.row(p.host_v, 0, kv, rows[i].token);
          double away = 0;
          for (std::size_t j = 0; j < 128; ++j) away += std::pow(static_cast<double>(v[j]) - o[j], 2);
          const double t = (1 - rows[i].probability) * w * w * away;
          variance += t, fourth += t * t;
        }
        INFO("head " << id);
        REQUIRE(std::sqrt(off / norm) < 1e-3);
        REQUIRE(std::abs(static_cast<double>(c.log_denominator) - top - std::log(denominator)) < 2e-4);
        REQUIRE(std::abs(static_cast<double>(lse[id] - c.log_denominator)) < 1e-6);
        REQUIRE(std::abs(static_cast<double>(c.variance) / variance - 1) < 0.03);
        REQUIRE(std::abs(static_cast<double>(c.dof) / (2 * variance * variance / fourth) - 1) < 0.1);
        const double goal = s.epsilon * s.epsilon * std::max(norm - variance, norm / 4);
        REQUIRE(std::abs(static_cast<double>(c.goal) / goal - 1) < 0.01);
        stats::evidence e;
        e.denominator = 1, e.output2 = norm, e.variance = variance, e.dimension = static_cast<double>(c.dimension),
        e.dof = static_cast<double>(c.dof), e.rows = c.rows;
        const auto verdict = stats::judge<stats::clt>(e, {s.epsilon, s.delta, error_scale::output, 0.5});
        REQUIRE(static_cast<double>(c.epsilon_achieved) > 0.97 * verdict.epsilon_achieved);  // skew makes it larger
        REQUIRE(static_cast<double>(c.epsilon_achieved) < 1.3 * verdict.epsilon_achieved);
      }
    }
    REQUIRE(judged > 0);
  }
}

TEST_CASE("a step on a GPU gives the same bits again, in a graph, in every layout, and whatever else is in the batch",
          "[cuda]") {
  if (!has_card()) return;
  shape_of_problem shape{
      .n_batch = 3, .n_kv_heads = 2, .group = 4, .n = 5000, .regime = "gauss3", .lengths = {5000, 4111, 3000}};
  const auto steps = [](problem& p) {
    std::vector<float> all;
    for (std::uint32_t step = 1; step <= 4; ++step) {
      p.run(step);
      const auto o = p.output.get();
      all.insert(all.end(), o.begin(), o.end());
    }
    return all;
  };
  problem first(shape, samples());
  const auto expected = steps(first);
  problem again(shape, samples());
  REQUIRE(steps(again) == expected);
  for (const layout lies : {layout::nhd, layout::hnd, layout::vllm})
    for (const int page : {16, 32, 64}) {
      shape.lies = lies, shape.page = page;
      problem p(shape, samples());
      REQUIRE(steps(p) == expected);
    }
  shape.lies = layout::contiguous;
  {  // the graph's steps take their number from memory
    problem p(shape, samples());
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t run;
    require(cudaStreamCreate(&stream));
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    require(p.decoder->run(p.plan, p.a, stream));
    require(cudaStreamEndCapture(stream, &graph));
    require(cudaGraphInstantiate(&run, graph, 0));
    std::vector<float> all;
    for (std::uint32_t step = 1; step <= 4; ++step) {
      p.step.set({step});
      require(cudaGraphLaunch(run, stream));
      require(cudaStreamSynchronize(stream));
      const auto o = p.output.get();
      all.insert(all.end(), o.begin(), o.end());
    }
    REQUIRE(all == expected);
    require(cudaGraphExecDestroy(run));
    require(cudaGraphDestroy(graph));
    require(cudaStreamDestroy(stream));
  }
  // Other sequences beside the first one: other rows and another length.
  shape.lengths = {5000, 0, 999}, shape.seed = 1;
  problem others(shape, samples());
  const auto sequence = static_cast<std::size_t>(2 * 4 * 128);
  const auto o = steps(others);
  for (std::size_t step = 0; step < 4; ++step)
    for (std::size_t j = 0; j < sequence; ++j) REQUIRE(o[step * 3 * sequence + j] == expected[step * 3 * sequence + j]);
}

TEST_CASE("lists that overflow end in exact attention, never in a certificate", "[cuda]") {
  if (!has_card()) return;
  problem p({.n_batch = 1, .n = 6000, .regime = "gauss1"}, samples());
  p.plan.segment = 4;
  p.take_memory();
  for (std::uint32_t step = 1; step <= 3; ++step) {
    p.run(step);
    for (const auto& c : p.certificates.get()) {
      REQUIRE(c.rounds == 0);
      REQUIRE(c.rows == 6000);
      REQUIRE(c.epsilon_achieved == 0);
    }
    for (const double e : p.errors()) REQUIRE(e < 4e-3);
  }
}

TEST_CASE("rows that are not finite are read, and say so", "[cuda]") {
  if (!has_card()) return;
  problem p({.n_batch = 1, .n = 6000, .regime = "gauss1"}, samples());
  auto rows = p.host_v;
  rows[2222 * 128 + 5] = 0x7f80;  // +inf, of the first KV head
  p.v.set(rows);
  p.take_memory();
  p.run(1);
  const auto o = p.output.get();
  for (std::size_t h = 0; h < 4; ++h) REQUIRE_FALSE(std::isfinite(o[h * 128 + 5]));
  for (std::size_t j = 4 * 128; j < o.size(); ++j) REQUIRE(std::isfinite(o[j]));
}

TEST_CASE("appended tokens are coded as encoding after them does", "[cuda]") {
  if (!has_card()) return;
  shape_of_problem shape{.n_batch = 2, .n = 3000, .spare = 200};
  shape.lengths = {3000, 2500};
  problem one(shape, samples()), many(shape, samples());
  const auto heads = static_cast<std::size_t>(2);
  for (int token = 0; token < 200; ++token) {
    std::vector<std::uint16_t> k, v;
    for (std::size_t b = 0; b < 2; ++b)
      for (std::size_t h = 0; h < heads; ++h) {
        const std::size_t row =
            ((b * heads + h) * 3200 + static_cast<std::size_t>((b == 0 ? 3000 : 2500) + token)) * 128;
        k.insert(k.end(), one.host_k.begin() + static_cast<std::ptrdiff_t>(row),
                 one.host_k.begin() + static_cast<std::ptrdiff_t>(row + 128));
        v.insert(v.end(), one.host_v.begin() + static_cast<std::ptrdiff_t>(row),
                 one.host_v.begin() + static_cast<std::ptrdiff_t>(row + 128));
      }
    const device_array<std::uint16_t> dk(k), dv(v);
    one.lengths.set({3001 + token, 2501 + token});
    require(one.decoder->append(one.plan, one.a, dk.data(), dv.data(), nullptr));
    require(cudaDeviceSynchronize());
  }
  many.lengths.set({3200, 2700});
  require(many.decoder->encode_fresh(many.plan, many.a, 200, nullptr));
  require(cudaDeviceSynchronize());
  REQUIRE(one.codes.get() == many.codes.get());
  REQUIRE(one.k.get() == many.k.get());
}

TEST_CASE("an audit counts what was served wrongly", "[cuda]") {
  if (!has_card()) return;
  problem p({.n_batch = 4, .n = 6000, .regime = "gauss1"}, samples());
  const device_array<float> exact(p.output.size());
  const device_array<unsigned long long> counts(4);  // device_audit
  for (std::uint32_t step = 1; step <= 20; ++step) {
    p.run(step);
    require(p.decoder->audit(p.plan, p.a, 0.5f, reinterpret_cast<cuda::device_audit*>(counts.data()), exact.data(),
                             nullptr));
  }
  require(cudaDeviceSynchronize());
  auto seen_counts = counts.get();
  REQUIRE(seen_counts[0] > 256);
  REQUIRE(seen_counts[0] < 384);  // of 640, a half
  REQUIRE(seen_counts[2] < seen_counts[0] / 10);
  p.run(21);
  std::vector<float> wrong = p.output.get();
  for (float& x : wrong) x *= 1.5f;
  p.output.set(wrong);
  require(
      p.decoder->audit(p.plan, p.a, 1.0f, reinterpret_cast<cuda::device_audit*>(counts.data()), exact.data(), nullptr));
  require(cudaDeviceSynchronize());
  REQUIRE(counts.get()[2] >= seen_counts[2] + 32 - (counts.get()[1] - seen_counts[1]));
}

TEST_CASE("a plan refuses what it has no kernel for, in one line", "[cuda]") {
  cuda::plan_t p;
  cuda::settings s = samples();
  s.scale = 1;
  REQUIRE(cuda::make_plan({.n_q_heads = 8, .n_kv_heads = 2, .d = 128, .max_tokens = 9000}, s, p));
  REQUIRE(cuda::workspace_bytes(p) > 0);
  REQUIRE(static_cast<double>(cuda::code_bytes(p)) < 0.08 * (2 * 4 * 9000 * 128));
  REQUIRE_FALSE(cuda::make_plan({.n_q_heads = 8, .n_kv_heads = 2, .d = 96, .max_tokens = 9000}, s, p));
  REQUIRE_FALSE(cuda::make_plan({.n_q_heads = 34, .n_kv_heads = 2, .d = 128, .max_tokens = 9000}, s, p));
  s.scale = 0;
  REQUIRE_FALSE(cuda::make_plan({.n_q_heads = 8, .n_kv_heads = 2, .d = 128, .max_tokens = 9000}, s, p));
}
