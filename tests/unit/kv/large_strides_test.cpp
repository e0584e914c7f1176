// Byte strides past 4 GiB: no product of an index and a stride may be made in 32 bits. The memory is address space of
// which a few pages are touched.
#include "support/catch.hpp"
#include "support/problem.hpp"

#if defined(__linux__) && UINTPTR_MAX > 0xffffffffu
#include <sys/mman.h>

using namespace vattn::test;
using vattn::index_t;

namespace {

constexpr index_t gib = index_t{1} << 30;

class address_space {
 public:
  explicit address_space(index_t bytes)
      : size_(static_cast<std::size_t>(bytes)),
        data_(::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~address_space() {
    if (*this) ::munmap(data_, size_);
  }
  address_space(const address_space&) = delete;
  address_space& operator=(const address_space&) = delete;
  explicit operator bool() const { return data_ != MAP_FAILED; }
  [[nodiscard]] float* at(index_t bytes) const {
    return reinterpret_cast<float*>(static_cast<std::byte*>(data_) + bytes);
  }

 private:
  std::size_t size_;
  void* data_;
};

}  // namespace

TEST_CASE("strides past 4 GiB, of tokens, heads, batches, queries, masks and results", "[kv]") {
  // Tokens 1 GiB + 64 bytes apart: from the fourth on past 4 GiB; heads 5 GiB, sequences 11 GiB.
  const shape s{.batch = 2, .queries = 2, .heads = 4, .kv_heads = 2, .n = 5, .dk = 8, .dv = 8};
  problem<float> p(s);
  p.set_mask(std::vector<float>(static_cast<std::size_t>(s.batch * s.heads * s.queries * s.n), 0.25f));
  const vattn::kv_strides strides{.token = gib + 64, .head = 5 * gib + 192, .batch = 11 * gib + 448};
  const address_space keys(24 * gib), values(24 * gib), rest(40 * gib);
  if (!keys || !values || !rest) {
    WARN("this system gives no 88 GiB of address space: not tested");
    return;
  }
  for (index_t b = 0; b < s.batch; ++b) {
    for (index_t h = 0; h < s.kv_heads; ++h) {
      for (index_t i = 0; i < s.n; ++i) {
        const index_t to = b * strides.batch + h * strides.head + i * strides.token;
        const auto from = ((b * s.kv_heads + h) * s.n + i) * s.dk;
        std::copy_n(p.k.begin() + from, s.dk, keys.at(to));
        std::copy_n(p.v.begin() + from, s.dv, values.at(to));
      }
    }
  }
  const vattn::kv_view<float> cache(keys.at(0), strides, values.at(0), strides, p.cache_shape());

  // q, mask and output in one stretch of address space, 2 GiB and more from head to head.
  const std::array<index_t, 4> apart{17 * gib, 4 * gib + 4096, 1 * gib + 512, 4};
  vattn::tensor_view<float, 4> q(rest.at(0), {s.batch, s.queries, s.heads, s.dk}, apart);
  vattn::tensor_view<float, 4> output(rest.at(1024 * 64), {s.batch, s.queries, s.heads, s.dv}, apart);
  vattn::tensor_view<float, 4> mask(rest.at(1024 * 128), {s.batch, s.heads, s.queries, s.n}, apart);
  std::size_t at = 0;
  for (index_t b = 0; b < s.batch; ++b) {
    for (index_t t = 0; t < s.queries; ++t)
      for (index_t h = 0; h < s.heads; ++h)
        for (index_t j = 0; j < s.dk; ++j) q(b, t, h, j) = p.q[at++];
    for (index_t h = 0; h < s.heads; ++h)
      for (index_t t = 0; t < s.queries; ++t)
        for (index_t i = 0; i < s.n; ++i) mask(b, h, t, i) = 0.25f;
  }
  const vattn::tensor_view<const float, 4> const_q(rest.at(0), q.extents, apart);
  p.options.mask = vattn::mask_view(vattn::tensor_view<const float, 4>(mask.data, mask.extents, apart));

  vattn::workspace memory;
  REQUIRE(vattn::exact_attention(const_q, cache, p.options, {.output = output}, memory).ok());
  results r(s);
  std::size_t to = 0;
  for (index_t b = 0; b < s.batch; ++b)
    for (index_t t = 0; t < s.queries; ++t)
      for (index_t h = 0; h < s.heads; ++h)
        for (index_t j = 0; j < s.dv; ++j) r.output[to++] = output(b, t, h, j);
  CHECK(compare(p, r).output < 1e-5);
}

TEST_CASE("token times stride past 2^31 and 2^32 with ordinary rows", "[kv]") {
  // 70000 tokens 64 KiB apart, as in a cache of many heads with tokens outermost: 4.3 GiB.
  constexpr index_t n = 70000, stride = 65536, d = 4;
  const address_space cache_memory(n * stride + gib);
  if (!cache_memory) {
    WARN("this system gives no 6 GiB of address space: not tested");
    return;
  }
  // Only some tokens are not masked, so that only their pages are touched.
  problem<float> p({.n = n, .dk = d, .dv = d});
  std::vector<float> mask(n, -infinity);
  for (const index_t token : {index_t{0}, index_t{32767}, index_t{32768}, index_t{65535}, index_t{65536}, n - 1}) {
    mask[static_cast<std::size_t>(token)] = 0;
    std::copy_n(p.k.begin() + token * d, d, cache_memory.at(token * stride));
    std::copy_n(p.v.begin() + token * d, d, cache_memory.at(token * stride + 1024));
  }
  p.set_mask(mask);
  const vattn::kv_strides strides{.token = stride};
  const vattn::kv_view<float> cache(cache_memory.at(0), strides, cache_memory.at(1024), strides, p.cache_shape());
  results r(p.s);
  vattn::workspace memory;
  REQUIRE(vattn::exact_attention(p.query(), cache, p.options, r.view(), memory).ok());
  CHECK(compare(p, r).output < 1e-5);
}
#endif
