// vLLM's block tables in all their layouts: built from known rows, read back, and attended.
#include "vattn/kv/vllm.hpp"

#include "support/layouts.hpp"

namespace {

using namespace vattn;
using namespace vattn::test;

}  // namespace

TEST_CASE("vLLM blocks of 1, 16 and 128 with last blocks of every fill", "[kv][vllm]") {
  for (const index_t size : {1, 16, 128}) {
    const ragged<float> r({.heads = 2, .kv_heads = 2, .dk = 8, .dv = 8}, every_fill(size));
    const table t(r.lengths, size);
    const auto split = flash_layout(r, t), fused = fused_layout(r, t);
    const auto packed = x_packed_layout(r, t);
    check_rows(r, vllm_kv(split.data(), t.view(r.p.s)));
    check_rows(r, vllm_fused_kv(fused.data(), t.view(r.p.s)));
    check_rows(r, vllm_x_packed_kv(packed.first.data(), packed.second.data(), t.view(r.p.s)));
  }
}

TEST_CASE("attention over vLLM's layouts is that over contiguous rows", "[kv][vllm]") {
  const ragged<Eigen::half> r({.queries = 2, .heads = 6, .kv_heads = 2, .dk = 24, .dv = 24}, {400, 0, 17, 640});
  for (const index_t size : {16, 20}) {
    const table t(r.lengths, size);
    const auto split = flash_layout(r, t), fused = fused_layout(r, t);
    check_attention(r, vllm_kv(split.data(), t.view(r.p.s)));
    check_attention(r, vllm_fused_kv(fused.data(), t.view(r.p.s)));
    const auto packed = x_packed_layout(r, t);
    check_attention(r, vllm_x_packed_kv(packed.first.data(), packed.second.data(), t.view(r.p.s)), 1e-4);
  }
}

TEST_CASE("vLLM's fused layout in a buffer whose blocks are token-major and padded", "[kv][vllm]") {
  // Logical [blocks, heads, block_size, 2d], memory [blocks, block_size, heads, 2d + 2].
  const ragged<float> r({.heads = 2, .kv_heads = 2, .dk = 6, .dv = 6}, {40, 3});
  const table t(r.lengths, 16);
  constexpr index_t row = 14;
  std::vector<float> buffer(static_cast<std::size_t>(t.count * 16 * 2 * row), not_a_number);
  r.for_each_row([&](index_t b, index_t h, index_t token) {
    float* at = buffer.data() + ((t.block(b, token) * 16 + token % 16) * 2 + h) * row;
    std::copy_n(r.key(b, h, token), 6, at);
    std::copy_n(r.value(b, h, token), 6, at + 6);
  });
  check_rows(
      r, vllm_fused_kv(buffer.data(), t.view(r.p.s), {.page = 16 * 2 * row * 4, .cell = 2 * row * 4, .head = row * 4}));
}

TEST_CASE("vLLM's fp8 caches with k_scale and v_scale", "[kv][vllm]") {
  // Every byte that is a number, twice over; the known rows are what the format says of them.
  ragged<float> r({.heads = 2, .kv_heads = 2, .dk = 16, .dv = 16}, {900, 7});
  const table t(r.lengths, 16);
  constexpr float k_scale = 0.01f, v_scale = 0.5f;
  const index_t half = t.count * t.size * 2 * 16;
  std::vector<kernel::e4m3> bytes(static_cast<std::size_t>(2 * half));
  std::uint8_t next = 0;
  const auto draw = [&](float scale, float& known) {
    do {
      next = static_cast<std::uint8_t>(next * 5 + 3);
    } while ((next & 0x7f) > 0x50);  // up to 16
    known = scale * kernel::e4m3_to_float(next);
    return kernel::e4m3{next};
  };
  r.for_each_row([&](index_t b, index_t h, index_t token) {
    const index_t row = ((t.block(b, token) * t.size + token % t.size) * 2 + h) * 16;
    const index_t known = ((b * 2 + h) * r.p.s.n + token) * 16;
    for (index_t j = 0; j < 16; ++j) {
      bytes[static_cast<std::size_t>(row + j)] = draw(k_scale, r.p.k[static_cast<std::size_t>(known + j)]);
      bytes[static_cast<std::size_t>(half + row + j)] = draw(v_scale, r.p.v[static_cast<std::size_t>(known + j)]);
    }
  });
  const auto view = vllm_kv(bytes.data(), t.view(r.p.s), {.k = k_scale, .v = v_scale});
  check_rows(r, view);
  check_attention(r, view, 1e-4);
}

TEST_CASE("block tables that cannot be meant say why", "[kv][vllm]") {
  const std::vector<float> rows(2 * 4 * 16 * 2 * 8, 1.0f);
  std::int32_t entries[] = {3, 0, 1, 99}, seq_lens[] = {32, 10};
  vllm_blocks b{.n_blocks = 4,
                .block_size = 16,
                .n_kv_heads = 2,
                .d = 8,
                .n_batch = 2,
                .max_blocks = 2,
                .block_table = entries,
                .seq_lens = seq_lens};
  const auto why = [&] {
    const status s = vllm_kv(rows.data(), b).validate();
    CHECK(s.code() == errc::invalid_argument);
    return std::string(s.message());
  };
  REQUIRE(vllm_kv(rows.data(), b).validate().ok());  // the 99 is past its sequence's end

  SECTION("lengths") {
    seq_lens[0] = 33;
    CHECK(contains(why(), "sequence 0 has seq_len 33, but its row of the block table holds 2 blocks of 16"));
    seq_lens[0] = -1;
    CHECK(contains(why(), "sequence 0 has seq_len -1"));
    seq_lens[0] = 32, seq_lens[1] = 17;
    CHECK(contains(why(), "page 1 of sequence 1 is page id 99"));
  }
  SECTION("tables") {
    b.table_stride = 1;
    CHECK(contains(why(), "rows 1 entries apart"));
    b.table_stride = 0, b.block_table = nullptr;
    CHECK(contains(why(), "the block table is null"));
    b.seq_lens = nullptr;
    CHECK(contains(why(), "seq_lens is null"));
    b.block_size = -16;
    CHECK(contains(why(), "4 pages of -16"));
  }
  SECTION("misaligned tables") {
    const auto off = [](const std::int32_t* at) {
      return reinterpret_cast<const std::int32_t*>(reinterpret_cast<std::uintptr_t>(at) + 1);
    };
    b.block_table = off(entries);
    CHECK(contains(why(), "the block table is not aligned"));
    b.block_table = entries, b.seq_lens = off(seq_lens);
    CHECK(contains(why(), "seq_lens is not aligned"));
  }
  SECTION("sizes past what can be counted") {
    constexpr index_t most = std::numeric_limits<index_t>::max();
    for (const index_t blocks : {index_t{1} << 51, most}) {
      b.n_blocks = blocks;
      CHECK(contains(why(), "reaches over more than 2^60 bytes"));
      CHECK_FALSE(vllm_fused_kv(rows.data(), b).validate().ok());
      CHECK_FALSE(vllm_x_packed_kv(rows.data(), rows.data(), b).validate().ok());
    }
    b.n_blocks = 4, b.block_size = most;
    CHECK(contains(why(), "give 0 or more of 1 to 2^31 - 1"));
    b.block_size = 16, b.max_blocks = b.table_stride = most;
    CHECK(contains(why(), "rows are at least as far apart"));
    b.max_blocks = 2, b.table_stride = 0, b.d = most;
    CHECK_FALSE(vllm_kv(rows.data(), b).validate().ok());
    CHECK_FALSE(vllm_x_packed_kv(rows.data(), rows.data(), b).validate().ok());
    seq_lens[0] = std::numeric_limits<std::int32_t>::min(), b.d = 8;
    CHECK(contains(why(), "sequence 0 has seq_len -2147483648"));
    seq_lens[0] = 32, entries[0] = std::numeric_limits<std::int32_t>::min();
    CHECK(contains(why(), "page 0 of sequence 0 is page id -2147483648"));
  }
  SECTION("head sizes that x does not divide") {
    b.d = 6;
    CHECK(contains(vllm_x_packed_kv(rows.data(), rows.data(), b).validate().message(),
                   "K has rows of 6 elements, no multiple of 4"));
  }
}
