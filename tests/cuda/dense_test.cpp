// Exact attention on the device against double precision, in every layout.
#include "cuda/problem.hpp"

using namespace vattn;
using namespace vattn::test;

namespace {

void require_exact(problem& p, double tolerance) {
  p.run(1);
  for (const double e : p.errors()) REQUIRE(e < tolerance);
  const auto lse = p.lse.get();
  for (std::size_t h = 0; h < lse.size(); ++h) REQUIRE(std::abs(static_cast<double>(lse[h]) - p.exact_lse[h]) < 2e-4);
}

cuda::settings all_rows() {
  cuda::settings s;
  s.reads = cuda::reads::all;
  return s;
}

}  // namespace

TEST_CASE("dense decode on a GPU is exact for every group, head size and element", "[cuda]") {
  if (!has_card()) return;
  for (const auto type : {cuda::element::bf16, cuda::element::f16})
    for (const int d : {64, 128})
      for (const int group : {1, 3, 4, 8, 16})
        for (const int n : {1, 31, 1000, 4500}) {
          INFO("d " << d << " group " << group << " n " << n);
          problem p({.n_batch = 2, .n_kv_heads = 2, .group = group, .d = d, .n = n, .type = type}, all_rows());
          require_exact(p, type == cuda::element::bf16 ? 4e-3 : 1e-3);
        }
}

TEST_CASE("dense decode on a GPU: caps, windows and learned sinks", "[cuda]") {
  if (!has_card()) return;
  for (const int which : {0, 1, 2}) {
    cuda::settings s = all_rows();
    if (which == 0) s.softcap = 5;
    if (which == 1) s.sliding_window = 333;
    problem p({.n_batch = 3, .n = 2000, .lengths = {2000, 7, 901}}, s);
    const device_array<float> sinks(std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8});
    if (which == 2) p.a.sink_logits = sinks.data();
    require_exact(p, 4e-3);
  }
}

TEST_CASE("dense decode on a GPU gives the same bits in every layout", "[cuda]") {
  if (!has_card()) return;
  shape_of_problem shape{.n_batch = 3, .n = 3000, .lengths = {3000, 65, 1234}};
  problem contiguous(shape, all_rows());
  require_exact(contiguous, 4e-3);
  const auto expected = contiguous.output.get();
  for (const layout lies : {layout::nhd, layout::hnd, layout::vllm})
    for (const int page : {16, 32, 64}) {
      shape.lies = lies, shape.page = page;
      problem p(shape, all_rows());
      p.run(1);
      CHECK(p.output.get() == expected);
    }
}

TEST_CASE("an empty sequence attends to nothing", "[cuda]") {
  if (!has_card()) return;
  problem p({.n_batch = 2, .n = 100, .lengths = {0, 100}}, all_rows());
  p.run(1);
  const auto o = p.output.get();
  for (std::size_t j = 0; j < o.size() / 2; ++j) REQUIRE(o[j] == 0);
  REQUIRE(p.lse.get()[0] == -std::numeric_limits<float>::infinity());
}
