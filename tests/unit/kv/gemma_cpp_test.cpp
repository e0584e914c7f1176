// gemma.cpp's ring of rows that hold all layers: built from known rows wherever it has wrapped, read back, attended.
#include "vattn/kv/gemma_cpp.hpp"

#include "support/layouts.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

}  // namespace

TEST_CASE("gemma.cpp's ring, before it wraps and wherever it has", "[kv][gemma]") {
  for (const index_t first : {0, 1, 30, 49, 50, 51, 1234567}) {
    for (const index_t n : {0, 1, 20, 49, 50}) {
      const ragged<float> r({.heads = 2, .kv_heads = 2, .dk = 6, .dv = 6}, {static_cast<std::int32_t>(n)});
      const gemma_cpp_layer l{.n_rows = 50,
                              .row_stride = (3 * 2 * 12 + 5) * 4,
                              .layer = 1,
                              .n_kv_heads = 2,
                              .d = 6,
                              .first_position = first,
                              .n_tokens = n};
      const std::vector<float> cache = ring(r, l);
      check_rows(r, gemma_cpp_kv(cache.data(), l));
      check_rows(r, gemma_cpp_kv<6>(cache.data(), l));
    }
  }
}

TEST_CASE("attention over gemma.cpp's ring keeps to positions", "[kv][gemma]") {
  // Causal, windows, sinks and the config's own ends are all of positions: a ring that has wrapped twice agrees.
  ragged<float> r({.queries = 2, .heads = 4, .kv_heads = 2, .dk = 16, .dv = 16}, {800});
  r.p.options.causal = true;
  r.p.set_alibi({0.001f, 0.01f, 0.02f, 0});
  for (const index_t window : {0, 700}) {
    r.p.options.sliding_window = window;
    const gemma_cpp_layer l{.n_rows = 1000,
                            .row_stride = 4 * 64 * 4,
                            .layer = 2,
                            .n_kv_heads = 2,
                            .d = 16,
                            .first_position = 2700,
                            .n_tokens = 800};
    const std::vector<float> cache = ring(r, l);
    check_attention(r, gemma_cpp_kv(cache.data(), l));
  }
}

TEST_CASE("rings that cannot be meant say why", "[kv][gemma]") {
  const std::vector<float> rows(1000);
  gemma_cpp_layer l{.n_rows = 10, .row_stride = 96, .n_kv_heads = 1, .d = 8, .n_tokens = 10};
  const auto why = [&] { return std::string(gemma_cpp_kv(rows.data(), l).validate().message()); };
  REQUIRE(why().empty());
  l.n_tokens = 11;
  CHECK(contains(why(), "11 tokens from position 0 in a ring of 10 cells"));
  l.n_tokens = -1;
  CHECK(contains(why(), "-1 tokens"));
  l.n_tokens = 10, l.first_position = -1;
  CHECK(contains(why(), "from position -1"));
  l.first_position = 0, l.row_stride = 16;
  CHECK(contains(why(), "the cell stride of K is 16 bytes"));
  l.row_stride = 96;
  for (const index_t layer : {index_t{-1}, index_t{2}, std::numeric_limits<index_t>::max()}) {
    l.layer = layer;  // a row of 96 bytes holds one, of 64
    CHECK(contains(why(), "give a layer that the rows hold"));
  }
  l.layer = 0, l.n_rows = std::numeric_limits<index_t>::max();
  CHECK(contains(why(), "a ring of 9223372036854775807 cells"));
  l.n_rows = 10;
  CHECK(contains(gemma_cpp_kv(nullptr, l).validate().message(), "K is null"));
  l.n_rows = 0, l.n_tokens = 0;
  CHECK(gemma_cpp_kv(nullptr, l).validate().ok());
}
