// The promise of attention from a store: failures against δ over regimes, values, ε, group sizes and orders of the
// past, and D̂ against D.
#include <cmath>

#include "stat/binomial.hpp"
#include "stat/cells.hpp"
#include "support/catch.hpp"
#include "support/long_enough.hpp"

namespace {

using namespace vattn;
using namespace vattn::stat;
using test::long_enough;

// A KV head of one of the regimes with its group of queries, what they attend to exactly, and stores of it.
class stored_problem {
 public:
  stored_problem(const std::string& regime, const std::string& values, index_t n, index_t dim, index_t group,
                 std::uint64_t seed)
      : c_(synthetic::make_cache(regime, values, n, dim, seed, group)),
        exact_(static_cast<std::size_t>(group * dim)),
        output_(exact_.size()),
        log_sum_exp_(static_cast<std::size_t>(group)),
        lse_(log_sum_exp_.size()),
        certificates_(log_sum_exp_.size()) {
    const status s = exact_attention(query(), view(), options(), result(exact_, log_sum_exp_), memory_);
    REQUIRE(s.ok());
  }

  [[nodiscard]] index_t group() const { return c_.heads; }
  [[nodiscard]] shuffled_store<float> store(std::uint64_t seed) const {
    shuffled_store<float> s({.dk = c_.dim, .dv = c_.dim, .seed = seed});
    REQUIRE(s.assign(view()).ok());
    return s;
  }

  /// One decode step; `visit(head, certificate, error relative to ‖o‖, D̂/D)`.
  template <class Visit>
  void draw(const shuffled_store<float>& from, const config& c, const draw_key& key, Visit&& visit) {
    const status s = vattention<store_policy>(c)(query(), from, options(), result(output_, lse_), memory_, key);
    INFO(s.message());
    REQUIRE(s.ok());
    const auto dim = static_cast<std::size_t>(c_.dim);
    for (std::size_t h = 0; h < lse_.size(); ++h) {
      double off = 0, norm = 0;
      for (std::size_t j = h * dim; j < (h + 1) * dim; ++j) {
        off += std::pow(static_cast<double>(output_[j] - exact_[j]), 2);
        norm += std::pow(static_cast<double>(exact_[j]), 2);
      }
      visit(h, certificates_[h], std::sqrt(off / norm), std::exp(static_cast<double>(lse_[h] - log_sum_exp_[h])));
    }
  }

 private:
  [[nodiscard]] tensor_view<const float, 4> query() const { return {c_.q.data(), {1, 1, c_.heads, c_.dim}}; }
  [[nodiscard]] kv_view<float> view() const {
    return contiguous_kv(c_.k.data(), c_.v.data(), kv_shape{1, 1, c_.n, c_.dim, c_.dim});
  }
  [[nodiscard]] attention_options options() const {
    attention_options o;
    o.scale = c_.scale();
    return o;
  }
  [[nodiscard]] attention_result result(std::vector<float>& output, std::vector<float>& lse) {
    return {{output.data(), {1, 1, c_.heads, c_.dim}},
            {lse.data(), {1, 1, c_.heads}},
            {certificates_.data(), {1, 1, c_.heads}}};
  }

  synthetic::cache c_;
  workspace memory_;
  std::vector<float> exact_, output_, log_sum_exp_, lse_;
  std::vector<certificate> certificates_;
};

}  // namespace

TEST_CASE("a store's failures <= delta on every regime, kind of values and group size", "[stat][store]") {
  constexpr std::uint64_t stores = 4;
  constexpr std::uint32_t steps = 25;
  constexpr index_t groups[] = {4, 1, 8, 3};
  std::vector<tested> cells;
  long sampled = 0, calls = 0;
  std::uint64_t which = 0;
  for (const std::string& regime : all_regimes()) {
    for (const char* values : {"mean", "follow", "heavy_tailed"}) {
      const index_t group = groups[(which + which / 12) % 4], n = long_enough(group);
      const std::uint64_t seed = ++which;
      stored_problem p(regime, values, n, 64, group, seed);
      std::vector<std::vector<tested>> of_head;
      for (const double epsilon : {0.05, 0.1, 0.2}) {
        auto& heads = of_head.emplace_back();
        for (index_t h = 0; h < group; ++h) {
          heads.push_back({regime + "/" + values + "/n=" + std::to_string(n) + "/group=" + std::to_string(group) +
                               "/head=" + std::to_string(h) + "/eps=" + std::to_string(epsilon) +
                               "/seed=" + std::to_string(seed),
                           0, 0, 0.1});
        }
      }
      for (std::uint64_t s = 0; s < stores; ++s) {
        const shuffled_store<float> store = p.store(100 * seed + s);
        std::size_t e = 0;
        for (const double epsilon : {0.05, 0.1, 0.2}) {
          for (std::uint32_t step = 0; step < steps; ++step) {
            p.draw(store, promise(epsilon, 0.1), {.seed = seed, .step = step},
                   [&](std::size_t h, const certificate& c, double error, double) {
                     ++of_head[e][h].draws, ++calls;
                     of_head[e][h].failures += error > epsilon;
                     sampled += !c.exact();
                   });
          }
          ++e;
        }
      }
      for (const auto& heads : of_head) cells.insert(cells.end(), heads.begin(), heads.end());
    }
  }
  require_promise(cells);
  INFO(sampled << " of " << calls << " were sampled");
  CHECK(3 * sampled > calls);  // what is read whole cannot fail
}

TEST_CASE("a store's estimates of D are without bias but for that of stopping, over draws and orders",
          "[stat][store]") {
  for (const char* regime : {"flat", "gauss1", "gauss2", "laplace", "plateau", "bimodal"}) {
    stored_problem p(regime, "mean", long_enough(1), 32, 1, 11);
    constexpr int stores = 60, steps = 20;
    double sum = 0, square = 0;
    long sampled = 0;
    for (int s = 0; s < stores; ++s) {
      const shuffled_store<float> store = p.store(500 + static_cast<std::uint64_t>(s));
      double mean = 0;
      for (std::uint32_t step = 0; step < steps; ++step) {
        p.draw(store, promise(0.2, 0.1), {.seed = 9, .step = step},
               [&](std::size_t, const certificate& c, double, double ratio) {
                 sampled += !c.exact();
                 mean += ratio / steps;
               });
      }
      sum += mean, square += mean * mean;
    }
    // Draws from one store share its order and codes: the stores' means are what is independent.
    const double mean = sum / stores, error = std::sqrt((square / stores - mean * mean) / (stores - 1));
    CAPTURE(regime, mean, error, sampled);
    CHECK(sampled > stores * steps / 2);
    // A look stops where D̂ is large rather than small; that is a few hundredths of ε.
    CHECK(std::abs(mean - 1) < 4 * error + 0.05 * 0.2);
    CHECK(error < 0.02);
  }
}
