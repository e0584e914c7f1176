// Which cell holds a token: one run of cells a sequence, a ring, or a table of pages.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "vattn/kv/placed.hpp"

namespace vattn::VATTN_ABI {

/// Token i is in cell i of the sequence's own page.
struct own_page {
  static constexpr bool in_order = true;  ///< cell i + 1 is the next: see strided_head
  index_t page;
  [[nodiscard]] cell_address operator()(index_t token) const noexcept { return {page, token}; }
};

/// Sequence b has cells 0, 1, ... of page b: `capacity` of them, of which it uses lengths[b], or all.
class padded_sequences {
 public:
  padded_sequences() = default;
  padded_sequences(index_t n_batch, index_t capacity, const std::int32_t* lengths = nullptr) noexcept
      : n_batch_(n_batch), capacity_(capacity), lengths_(lengths) {}

  [[nodiscard]] index_t n_batch() const noexcept { return n_batch_; }
  [[nodiscard]] index_t n_pages() const noexcept { return n_batch_; }
  [[nodiscard]] index_t page_size() const noexcept { return capacity_; }
  [[nodiscard]] index_t length(index_t b) const noexcept { return lengths_ ? index_t{lengths_[b]} : capacity_; }
  [[nodiscard]] own_page sequence(index_t b) const noexcept { return {b}; }
  [[nodiscard]] status validate() const noexcept {
    if (n_batch_ < 0 || capacity_ < 0) {
      return status::error(errc::invalid_argument,
                           "the cache has n_batch %lld and room for %lld tokens: give 0 or more",
                           static_cast<long long>(n_batch_), static_cast<long long>(capacity_));
    }
    if (lengths_ == nullptr) return {};
    if (status s = detail::check_aligned("lengths", lengths_, alignof(std::int32_t)); !s) return s;
    for (index_t b = 0; b < n_batch_; ++b) {
      if (length(b) < 0 || length(b) > capacity_) {
        return status::error(errc::invalid_argument, "sequence %lld has length %lld: give one from 0 to %lld, its room",
                             static_cast<long long>(b), static_cast<long long>(length(b)),
                             static_cast<long long>(capacity_));
      }
    }
    return {};
  }

 private:
  index_t n_batch_ = 0, capacity_ = 0;
  const std::int32_t* lengths_ = nullptr;
};

/// Token i is in cell (first + i) mod capacity, both below capacity.
struct wrapped_page {
  index_t capacity, first;
  [[nodiscard]] cell_address operator()(index_t token) const noexcept {
    const index_t slot = first + token;
    return {0, slot < capacity ? slot : slot - capacity};
  }
};

/// One sequence in a ring of `capacity` cells: position p in cell p mod capacity. Token i of the view is position
/// `first_position + i`, so that tokens are in the order of their positions whatever cell they are in.
class ring_sequence {
 public:
  ring_sequence() = default;
  ring_sequence(index_t capacity, index_t first_position, index_t length) noexcept
      : capacity_(capacity), first_position_(first_position), length_(length) {}

  [[nodiscard]] index_t n_batch() const noexcept { return 1; }
  [[nodiscard]] index_t n_pages() const noexcept { return 1; }
  [[nodiscard]] index_t page_size() const noexcept { return capacity_; }
  [[nodiscard]] index_t length(index_t) const noexcept { return length_; }
  [[nodiscard]] wrapped_page sequence(index_t) const noexcept {
    return {capacity_, capacity_ > 0 ? first_position_ % capacity_ : 0};
  }
  [[nodiscard]] status validate() const noexcept {
    if (first_position_ < 0 || length_ < 0 || length_ > capacity_ || capacity_ >= detail::widest_buffer) {
      return status::error(
          errc::invalid_argument,
          "%lld tokens from position %lld in a ring of %lld cells: give a position of 0 or more and no "
          "more tokens than cells",
          static_cast<long long>(length_), static_cast<long long>(first_position_), static_cast<long long>(capacity_));
    }
    return {};
  }

 private:
  index_t capacity_ = 0, first_position_ = 0, length_ = 0;
};

/// Token i is in cell i mod page_size of page pages[i / page_size].
class paged_sequence {
 public:
  paged_sequence(const std::int32_t* pages, index_t page_size) noexcept
      : pages_(pages),
        size_(page_size),
        shift_(std::has_single_bit(static_cast<std::uint64_t>(page_size))
                   ? std::countr_zero(static_cast<std::uint64_t>(page_size))
                   : -1) {}
  [[nodiscard]] cell_address operator()(index_t token) const noexcept {
    const index_t page = shift_ >= 0 ? token >> shift_ : token / size_;  // a division costs more than a short row
    return {pages_[page], token - page * size_};
  }

 private:
  const std::int32_t* pages_;
  index_t size_;
  int shift_;
};

namespace detail {
[[nodiscard]] inline status check_pages(index_t n_pages, index_t page_size) noexcept {
  if (n_pages >= 0 && page_size >= 1 && page_size >> 31 == 0) return {};
  return status::error(errc::invalid_argument, "%lld pages of %lld tokens: give 0 or more of 1 to 2^31 - 1",
                       static_cast<long long>(n_pages), static_cast<long long>(page_size));
}

[[nodiscard]] inline status check_page_ids(const std::int32_t* pages, index_t count, index_t n_pages,
                                           index_t b) noexcept {
  for (index_t i = 0; i < count; ++i) {
    if (pages[i] >= 0 && pages[i] < n_pages) continue;
    return status::error(errc::invalid_argument,
                         "page %lld of sequence %lld is page id %lld, but the cache has %lld pages: give ids from 0 up "
                         "to, and not including, that number",
                         static_cast<long long>(i), static_cast<long long>(b), static_cast<long long>(pages[i]),
                         static_cast<long long>(n_pages));
  }
  return {};
}
}  // namespace detail

/// vLLM's block table: int32 [n_batch, max_blocks], and int32 seq_lens [n_batch].
class block_table {
 public:
  block_table() = default;
  /// `row_stride`: entries from one sequence's row to the next, at least max_blocks; 0 = max_blocks.
  block_table(const std::int32_t* table, const std::int32_t* seq_lens, index_t n_batch, index_t max_blocks,
              index_t n_blocks, index_t block_size, index_t row_stride = 0) noexcept
      : table_(table),
        seq_lens_(seq_lens),
        n_batch_(n_batch),
        max_blocks_(max_blocks),
        n_blocks_(n_blocks),
        block_size_(block_size),
        row_stride_(row_stride == 0 ? max_blocks : row_stride) {}

  [[nodiscard]] index_t n_batch() const noexcept { return n_batch_; }
  [[nodiscard]] index_t n_pages() const noexcept { return n_blocks_; }
  [[nodiscard]] index_t page_size() const noexcept { return block_size_; }
  [[nodiscard]] index_t length(index_t b) const noexcept { return seq_lens_[b]; }
  [[nodiscard]] paged_sequence sequence(index_t b) const noexcept { return {table_ + b * row_stride_, block_size_}; }
  [[nodiscard]] status validate() const noexcept {
    if (status s = detail::check_pages(n_blocks_, block_size_); !s) return s;
    if (n_batch_ < 0 || max_blocks_ < 0 || row_stride_ < max_blocks_ || row_stride_ >= detail::widest_buffer) {
      return status::error(errc::invalid_argument,
                           "the block table is [%lld, %lld] with rows %lld entries apart: rows are at least as far "
                           "apart as they are long",
                           static_cast<long long>(n_batch_), static_cast<long long>(max_blocks_),
                           static_cast<long long>(row_stride_));
    }
    if (n_batch_ > 0 && (seq_lens_ == nullptr || (table_ == nullptr && max_blocks_ > 0)))
      return status::error(errc::invalid_argument, "%s is null", seq_lens_ ? "the block table" : "seq_lens");
    if (status s = detail::check_aligned("seq_lens", seq_lens_, alignof(std::int32_t)); !s) return s;
    if (status s = detail::check_elements<2>("the block table", table_, {n_batch_, max_blocks_}, {4 * row_stride_, 4},
                                             alignof(std::int32_t));
        !s)
      return s;
    for (index_t b = 0; b < n_batch_; ++b) {
      const index_t n = seq_lens_[b], used = (n + block_size_ - 1) / block_size_;
      if (n < 0 || used > max_blocks_) {
        return status::error(errc::invalid_argument,
                             "sequence %lld has seq_len %lld, but its row of the block table holds %lld blocks of %lld "
                             "tokens: give lengths from 0 to what the table covers",
                             static_cast<long long>(b), static_cast<long long>(n), static_cast<long long>(max_blocks_),
                             static_cast<long long>(block_size_));
      }
      if (status s = detail::check_page_ids(table_ + b * row_stride_, used, n_blocks_, b); !s) return s;
    }
    return {};
  }

 private:
  const std::int32_t* table_ = nullptr;
  const std::int32_t* seq_lens_ = nullptr;
  index_t n_batch_ = 0, max_blocks_ = 0, n_blocks_ = 0, block_size_ = 1, row_stride_ = 0;
};

/// FlashInfer's page lists: sequence b has pages indices[indptr[b]] ... indices[indptr[b + 1] − 1], all full but the
/// last, which holds last_page_len[b] tokens, 1 to page_size. A sequence without pages is empty.
class page_lists {
 public:
  page_lists() = default;
  page_lists(const std::int32_t* indptr, const std::int32_t* indices, const std::int32_t* last_page_len,
             index_t n_batch, index_t n_pages, index_t page_size) noexcept
      : indptr_(indptr),
        indices_(indices),
        last_page_len_(last_page_len),
        n_batch_(n_batch),
        n_pages_(n_pages),
        page_size_(page_size) {}

  [[nodiscard]] index_t n_batch() const noexcept { return n_batch_; }
  [[nodiscard]] index_t n_pages() const noexcept { return n_pages_; }
  [[nodiscard]] index_t page_size() const noexcept { return page_size_; }
  [[nodiscard]] index_t length(index_t b) const noexcept {
    const index_t pages = index_t{indptr_[b + 1]} - indptr_[b];
    return pages > 0 ? (pages - 1) * page_size_ + last_page_len_[b] : 0;
  }
  [[nodiscard]] paged_sequence sequence(index_t b) const noexcept { return {indices_ + indptr_[b], page_size_}; }
  [[nodiscard]] status validate() const noexcept {
    if (status s = detail::check_pages(n_pages_, page_size_); !s) return s;
    if (n_batch_ < 0) return status::error(errc::invalid_argument, "n_batch is %lld", static_cast<long long>(n_batch_));
    if (n_batch_ == 0) return {};
    if (indptr_ == nullptr || last_page_len_ == nullptr)
      return status::error(errc::invalid_argument, "%s is null", indptr_ ? "last_page_len" : "indptr");
    if (status s = detail::check_aligned("indptr", indptr_, alignof(std::int32_t)); !s) return s;
    if (status s = detail::check_aligned("indices", indices_, alignof(std::int32_t)); !s) return s;
    if (status s = detail::check_aligned("last_page_len", last_page_len_, alignof(std::int32_t)); !s) return s;
    // All of indptr first: it says how many indices there are.
    if (indptr_[0] < 0)
      return status::error(errc::invalid_argument, "indptr[0] is %lld: give 0 or more",
                           static_cast<long long>(indptr_[0]));
    for (index_t b = 0; b < n_batch_; ++b) {
      if (indptr_[b + 1] >= indptr_[b]) continue;
      return status::error(errc::invalid_argument,
                           "indptr falls from %lld to %lld at sequence %lld: it is the running sum of pages, "
                           "[n_batch + 1]",
                           static_cast<long long>(indptr_[b]), static_cast<long long>(indptr_[b + 1]),
                           static_cast<long long>(b));
    }
    if (indices_ == nullptr && indptr_[n_batch_] > 0) return status::error(errc::invalid_argument, "indices is null");
    for (index_t b = 0; b < n_batch_; ++b) {
      const index_t pages = index_t{indptr_[b + 1]} - indptr_[b], last = last_page_len_[b];
      if (pages == 0) continue;
      if (last < 1 || last > page_size_) {
        return status::error(errc::invalid_argument,
                             "last_page_len of sequence %lld is %lld: give 1 to page_size %lld, or a sequence of no "
                             "pages where it is empty",
                             static_cast<long long>(b), static_cast<long long>(last),
                             static_cast<long long>(page_size_));
      }
      if (status s = detail::check_page_ids(indices_ + indptr_[b], pages, n_pages_, b); !s) return s;
    }
    return {};
  }

 private:
  const std::int32_t* indptr_ = nullptr;
  const std::int32_t* indices_ = nullptr;
  const std::int32_t* last_page_len_ = nullptr;
  index_t n_batch_ = 0, n_pages_ = 0, page_size_ = 1;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
