// Logits of rows of q8_0 by integer dot products (AVX-512 VNNI): queries become three signed digits of 8 bits, whose
// products with the quants are summed exactly.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "vattn/kernel/block_rows.hpp"

#if VATTN_DISPATCH
#include <immintrin.h>

#define VATTN_VNNI_INLINE VATTN_TARGET_AVX512_BF16 inline __attribute__((always_inline))

namespace vattn::VATTN_ABI::kernel::detail {

/// 32 elements of a query: q_d = scale·Σ_j digit[j][d]·256^j.
struct query_digits {
  std::int8_t digit[3][block_elements];
  std::int32_t start[3];  ///< −128·Σ_d digit[j][d]: quants are multiplied as unsigned numbers, 128 too large
  float scale;
};

// The largest number of three signed digits; and 128 in each place, which makes digits of the bytes of a sum.
inline constexpr float most_digits = 127 * 65536 + 127 * 256 + 127;
inline constexpr std::uint32_t digit_offset = 0x808080;

/// q [dim] to dim/32 blocks, to 2⁻²³ of the largest of each; elements that are bfloat16 numbers times `factor`, but
/// for rounding, to few digits. False if one is not finite.
[[nodiscard]] inline bool split_query(const float* q, index_t dim, float factor, query_digits* out) noexcept {
  constexpr int n = static_cast<int>(block_elements);
  for (index_t d = 0; d < dim; d += n, ++out) {
    float x[n], most = 0;
    bool finite = true;
    for (int j = 0; j < n; ++j) {
      x[j] = q[d + j] / factor;
      finite = finite && std::abs(x[j]) <= 0x1p126f;
      const float brief = std::bit_cast<float>((std::bit_cast<std::uint32_t>(x[j]) + 0x8000u) & 0xffff0000u);
      if (std::abs(x[j] - brief) <= 0x1p-22f * std::abs(x[j])) x[j] = brief;
      most = std::max(most, std::abs(x[j]));
    }
    if (!finite) return false;
    // 2^e, such that the largest has 23 bits.
    const auto power = [](int e) { return std::bit_cast<float>(static_cast<std::uint32_t>(e + 127) << 23); };
    int e = std::max(static_cast<int>(std::bit_cast<std::uint32_t>(most) >> 23) - 127 - 22, -100);
    if (most * power(-e) > most_digits) ++e;
    std::int32_t sum[3] = {};
    for (int j = 0; j < n; ++j) {
      const float scaled = x[j] * power(-e);
      const auto whole = static_cast<std::int32_t>(scaled + std::copysign(0.5f, scaled));
      const std::uint32_t bytes = (static_cast<std::uint32_t>(whole) + digit_offset) ^ digit_offset;
      for (int i = 0; i < 3; ++i) sum[i] += out->digit[i][j] = static_cast<std::int8_t>(bytes >> 8 * i);
    }
    for (int i = 0; i < 3; ++i) out->start[i] = -128 * sum[i];
    out->scale = factor * power(e);
  }
  return true;
}

// GCC 12 takes what the unmasked forms of intrinsics leave undefined for a fault, as in block_avx512.hpp.
inline constexpr __mmask16 lanes_16 = 0xffff;
inline constexpr __mmask8 lanes_8 = 0xff;

// The rows of a block; behind the last it is that one again.
inline void row_pointers(const block_of_rows& rows, const std::byte* (&row)[block_rows]) noexcept {
  for (index_t r = 0; r < block_rows; ++r) row[r] = row_at(rows, std::min(r, rows.count - 1));
}

// Asks for the rows that follow a block a few at a time, so that memory works while digits are multiplied; gathered
// ones, whose followers are not known, just before they are read.
class block_fetcher {
 public:
  VATTN_VNNI_INLINE block_fetcher(const block_of_rows& rows, index_t bytes) noexcept
      : next_(rows.first + block_rows * rows.stride),
        stride_(rows.stride),
        bytes_(bytes),
        left_(rows.index ? 0 : block_rows) {
    for (index_t r = 0; rows.index && r < rows.count; ++r) fetch<3>(row_at(rows, r));
  }
  VATTN_VNNI_INLINE void operator()(index_t n) noexcept {
    for (; n > 0 && left_ > 0; --n, --left_, next_ += stride_) fetch<2>(next_);
  }

 private:
  template <int Locality>
  VATTN_VNNI_INLINE void fetch(const std::byte* row) const noexcept {
    prefetch_row<Locality>(row, static_cast<std::size_t>(bytes_));
  }
  const std::byte* next_;
  index_t stride_, bytes_, left_;
};

// Scales of a block, copied well before they are read as vectors, and in the order of memory; of rows not too wide for
// the stack.
inline constexpr index_t widest_digits = 1024;
struct scale_bits {
  alignas(64) std::uint16_t half[widest_digits / 32][block_rows];
};
inline void copy_scales(const std::byte* const* row, index_t count, index_t blocks, scale_bits& out) noexcept {
  for (index_t r = 0; r < count; ++r) {
    for (index_t b = 0; b < blocks; ++b) std::memcpy(&out.half[b][r], row[r] + b * row_bytes<q8_0_block>(32), 2);
  }
}
VATTN_VNNI_INLINE __m512 load_scales(const std::uint16_t* half) noexcept {
  return _mm512_maskz_cvtph_ps(lanes_16, _mm256_load_si256(reinterpret_cast<const __m256i*>(half)));
}

// 32 quants of two rows.
VATTN_VNNI_INLINE __m512i load_2(const std::byte* a, const std::byte* b) noexcept {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return _mm512_maskz_inserti64x4(lanes_8, _mm512_castsi256_si512(low), high, 1);
}

// Lane r of out[k]: quants 4k to 4k + 3 of row r, plus 128.
VATTN_VNNI_INLINE void transposed_16(const std::byte* const* row, index_t at, __m512i (&out)[8]) noexcept {
  __m512i four[2][4];
  VATTN_UNROLL for (int h = 0; h < 2; ++h) {
    const std::byte* const* from = row + 8 * h;
    __m512i z[4];
    VATTN_UNROLL for (int r = 0; r < 4; ++r) z[r] =
        _mm512_xor_si512(load_2(from[r] + at, from[r + 4] + at), _mm512_set1_epi8(-128));
    const __m512i a = _mm512_maskz_unpacklo_epi32(lanes_16, z[0], z[1]);
    const __m512i b = _mm512_maskz_unpackhi_epi32(lanes_16, z[0], z[1]);
    const __m512i c = _mm512_maskz_unpacklo_epi32(lanes_16, z[2], z[3]);
    const __m512i d = _mm512_maskz_unpackhi_epi32(lanes_16, z[2], z[3]);
    four[h][0] = _mm512_maskz_unpacklo_epi64(lanes_8, a, c);
    four[h][1] = _mm512_maskz_unpackhi_epi64(lanes_8, a, c);
    four[h][2] = _mm512_maskz_unpacklo_epi64(lanes_8, b, d);
    four[h][3] = _mm512_maskz_unpackhi_epi64(lanes_8, b, d);
  }
  VATTN_UNROLL for (int k = 0; k < 4; ++k) {
    out[k] = _mm512_maskz_shuffle_i64x2(lanes_8, four[0][k], four[1][k], 0x88);
    out[k + 4] = _mm512_maskz_shuffle_i64x2(lanes_8, four[0][k], four[1][k], 0xdd);
  }
}

// Σ_j sum[j]·256^j; |sum[j]| < 2²³.
VATTN_VNNI_INLINE __m512 value_of_digits(__m512i sum0, __m512i sum1, __m512i sum2) noexcept {
  const __m512i low = _mm512_add_epi32(_mm512_maskz_slli_epi32(lanes_16, sum1, 8), sum0);
  return _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(lanes_16, sum2), _mm512_set1_ps(65536),
                         _mm512_maskz_cvtepi32_ps(lanes_16, low));
}

[[nodiscard]] inline std::int32_t word_at(const std::int8_t* from) noexcept {
  std::int32_t word;
  std::memcpy(&word, from, 4);
  return word;
}

// out[g, r] += q_g·k_r for one block of 32 rows; first: it is the first of the rows, and out is not read. Quants are
// transposed, so that a lane sums its row's products alone.
VATTN_VNNI_INLINE void logits_of_32(const query_digits* q, index_t groups, index_t stride, const std::byte* const* row,
                                    index_t at, const std::uint16_t* half, bool first, block_fetcher& fetch,
                                    index_t per_query, float* out) noexcept {
  __m512i key[2][8];
  VATTN_UNROLL for (int h = 0; h < 2; ++h) transposed_16(row + 16 * h, at + 2, key[h]);
  const __m512 scale[2] = {load_scales(half), load_scales(half + 16)};
  for (index_t g = 0; g < groups; ++g) {
    fetch(per_query);
    const query_digits& query = q[g * stride];
    __m512i sum[2][3];
    VATTN_UNROLL for (int j = 0; j < 3; ++j) sum[0][j] = sum[1][j] = _mm512_set1_epi32(query.start[j]);
    VATTN_UNROLL for (int k = 0; k < 8; ++k) {
      VATTN_UNROLL for (int j = 0; j < 3; ++j) {
        const std::int32_t word = word_at(query.digit[j] + 4 * k);
        if (j == 0 && word == 0) continue;  // as most are, of queries of bfloat16
        const __m512i digits = _mm512_set1_epi32(word);
        sum[0][j] = _mm512_dpbusd_epi32(sum[0][j], key[0][k], digits);
        sum[1][j] = _mm512_dpbusd_epi32(sum[1][j], key[1][k], digits);
      }
    }
    VATTN_UNROLL for (int h = 0; h < 2; ++h) {
      float* to = out + g * block_rows + 16 * h;
      const __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
      const __m512 product =
          _mm512_mul_ps(value_of_digits(sum[h][0], sum[h][1], sum[h][2]), _mm512_set1_ps(query.scale));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(product, scale[h], before));
    }
  }
}

/// out[g, i] = q_g·k_i, q [groups, dim/32].
VATTN_TARGET_AVX512_BF16 inline void logits_digits(const query_digits* q, index_t groups, index_t dim,
                                                   const block_of_rows& rows, float* out) noexcept {
  const std::byte* row[block_rows];
  row_pointers(rows, row);
  const index_t blocks = dim / 32, padded = (rows.count + 31) / 32 * 32;
  scale_bits scales;
  copy_scales(row, padded, blocks, scales);
  block_fetcher fetch(rows, row_bytes<q8_0_block>(dim));
  const index_t per_query = (32 + blocks * groups - 1) / (blocks * groups);
  for (index_t i = 0; i < padded; i += 32) {
    for (index_t b = 0; b < blocks; ++b) {
      logits_of_32(q + b, groups, blocks, row + i, b * row_bytes<q8_0_block>(32), scales.half[b] + i, b == 0, fetch,
                   per_query, out + i);
    }
  }
}

}  // namespace vattn::VATTN_ABI::kernel::detail

#undef VATTN_VNNI_INLINE
#endif

#include "vattn/macros_pop.hpp"
