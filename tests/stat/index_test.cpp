// The promise of attention by an index: failures against δ over regimes, values, bits, ε and group sizes, for steps
// that know nothing and for steps that remember the last.
#include <cmath>

#include "stat/binomial.hpp"
#include "stat/cells.hpp"
#include "support/catch.hpp"

namespace {

using namespace vattn;
using namespace vattn::stat;

struct indexed_problem {
  indexed_problem(const std::string& regime, const std::string& values, index_t n, index_t dim, index_t group, int bits,
                  std::uint64_t seed)
      : c(synthetic::make_cache(regime, values, n, dim, seed, group)),
        exact(static_cast<std::size_t>(group * dim)),
        output(exact.size()),
        certificates(static_cast<std::size_t>(group)) {
    REQUIRE(exact_attention(query(), view(), options(), {.output = {exact.data(), {1, 1, group, dim}}}, memory).ok());
    index.emplace_back(index_shape{.dk = dim, .dv = dim, .bits = bits, .seed = seed});
    REQUIRE(index[0].build(view()).ok());
  }
  [[nodiscard]] tensor_view<const float, 4> query() const { return {c.q.data(), {1, 1, c.heads, c.dim}}; }
  [[nodiscard]] kv_view<float> view() const {
    return contiguous_kv(c.k.data(), c.v.data(), kv_shape{1, 1, c.n, c.dim, c.dim});
  }
  [[nodiscard]] attention_options options() const {
    attention_options o;
    o.scale = c.scale();
    return o;
  }
  /// `visit(head, certificate, error relative to ‖o‖)`.
  template <class Visit>
  void draw(const config& settings, std::span<index_memory> remembered, const draw_key& key, Visit&& visit) {
    const vattention<index_policy> attend(settings, {index, remembered});
    const std::array<index_t, 3> rows{1, 1, c.heads};
    const status s = attend(
        query(), view(), options(),
        {.output = {output.data(), {1, 1, c.heads, c.dim}}, .certificates = {certificates.data(), rows}}, memory, key);
    INFO(s.message());
    REQUIRE(s.ok());
    const auto dim = static_cast<std::size_t>(c.dim);
    for (std::size_t h = 0; h < certificates.size(); ++h) {
      double off = 0, norm = 0;
      for (std::size_t j = h * dim; j < (h + 1) * dim; ++j) {
        off += std::pow(static_cast<double>(output[j] - exact[j]), 2);
        norm += std::pow(static_cast<double>(exact[j]), 2);
      }
      visit(h, certificates[h], std::sqrt(off / norm));
    }
  }

  synthetic::cache c;
  workspace memory;
  std::vector<float> exact, output;
  std::vector<certificate> certificates;
  std::vector<kv_index> index;
};

}  // namespace

TEST_CASE("by an index failures <= delta on every regime, kind of values, number of bits and group size",
          "[stat][index]") {
  constexpr std::uint32_t steps = 40;
  constexpr index_t groups[] = {4, 1, 8, 3};
  std::vector<tested> cells;
  long sampled = 0, calls = 0;
  std::uint64_t which = 0;
  for (const std::string& regime : all_regimes()) {
    for (const char* values : {"mean", "follow", "heavy_tailed"}) {
      const index_t group = groups[(which + which / 12) % 4];
      const int bits = 1 + static_cast<int>(which % 4);
      const bool warm = which % 2 == 1;
      const std::uint64_t seed = ++which;
      indexed_problem p(regime, values, 12000, 64, group, bits, seed);
      for (const double epsilon : {0.05, 0.2}) {
        std::vector<tested> heads;
        for (index_t h = 0; h < group; ++h) {
          heads.push_back({regime + "/" + values + "/group=" + std::to_string(group) + "/bits=" + std::to_string(bits) +
                               "/head=" + std::to_string(h) + "/eps=" + std::to_string(epsilon),
                           0, 0, 0.1});
        }
        std::vector<index_memory> remembered(warm ? 1 : 0);
        for (std::uint32_t step = 0; step < steps; ++step) {
          p.draw(promise(epsilon, 0.1), remembered, {.seed = seed, .step = step},
                 [&](std::size_t h, const certificate& c, double error) {
                   ++heads[h].draws, ++calls;
                   heads[h].failures += error > epsilon;
                   sampled += !c.exact();
                 });
        }
        cells.insert(cells.end(), heads.begin(), heads.end());
      }
    }
  }
  require_promise(cells);
  INFO(sampled << " of " << calls << " were sampled");
  CHECK(2 * sampled > calls);  // what is read whole cannot fail
}
