// The view behind all engine layouts: where a token's cell is (places), where its row begins (strides), how it is
// read (row_format).
#include "vattn/macros_push.hpp"
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "vattn/kv/row_format.hpp"
#include "vattn/kv/view.hpp"

namespace vattn::VATTN_ABI {

/// A token's place: cell `slot` of page `page`. A cache without pages has one for each sequence.
struct cell_address {
  index_t page, slot;
};

/// Which cell holds token i of a sequence. `pages(b)` is a function of the token; `n_pages` and `page_size` bound
/// what it returns once `validate()` is ok.
template <class P>
concept cell_places = requires(const P& p, index_t b) {
  { p.n_batch() } -> std::convertible_to<index_t>;
  { p.n_pages() } -> std::convertible_to<index_t>;
  { p.page_size() } -> std::convertible_to<index_t>;
  { p.length(b) } -> std::convertible_to<index_t>;
  { p.sequence(b)(b) } noexcept -> std::same_as<cell_address>;
  { p.validate() } -> std::same_as<status>;
};

/// BYTES from one page, cell of a page, or KV head to the next; 0 repeats.
struct cell_strides {
  index_t page = 0;
  index_t cell = 0;
  index_t head = 0;
};

/// K, or V: its first row, its strides, and its format.
template <row_format F>
struct row_store {
  const void* first = nullptr;
  cell_strides strides{};
  [[no_unique_address]] F format{};

  [[nodiscard]] const std::byte* head(index_t h) const noexcept {
    const auto* bytes = static_cast<const std::byte*>(first);
    return bytes ? bytes + h * strides.head : nullptr;  // null where no row is ever read
  }
};

namespace detail {
/// Rows that begin `bytes` after others; null after null. As an integer: of sizes that are wrong, which validate()
/// refuses later, the sum is no address.
template <class T>
[[nodiscard]] const T* rows_after(const T* first, index_t bytes) noexcept {
  if (first == nullptr) return nullptr;
  return reinterpret_cast<const T*>(reinterpret_cast<std::uintptr_t>(first) + static_cast<std::uintptr_t>(bytes));
}

template <class F>
struct element_of_format {
  using type = void;
};
template <class F>
requires requires { typename F::element; }
struct element_of_format<F> {
  using type = typename F::element;
};
template <class F>
using element_of = typename element_of_format<F>::type;
}  // namespace detail

/// One KV head of one sequence of a `placed_kv`.
template <class Sequence, row_format K, row_format V>
class placed_head {
  static constexpr bool in_order = requires { requires Sequence::in_order; };

 public:
  using key_element = detail::element_of<K>;
  using value_element = detail::element_of<V>;

  placed_head(const Sequence& sequence, const row_store<K>& k, const row_store<V>& v, const row_norms& norms,
              index_t norm_page, index_t h, index_t n, index_t dk, index_t dv) noexcept
      : sequence_(sequence),
        k_(k),
        v_(v),
        k_first_(k.head(h)),
        v_first_(v.head(h)),
        norms_(norms),
        norm_page_(norm_page),
        n_(n),
        dk_(dk),
        dv_(dv) {}

  [[nodiscard]] index_t size() const noexcept { return n_; }
  [[nodiscard]] index_t dk() const noexcept { return K::width == dynamic ? dk_ : K::width; }
  [[nodiscard]] index_t dv() const noexcept { return V::width == dynamic ? dv_ : V::width; }
  [[nodiscard]] auto key(index_t token) const noexcept {
    const cell_address c = sequence_(token);
    return k_.format.at(k_first_ + c.page * k_.strides.page + c.slot * k_.strides.cell, dk());
  }
  [[nodiscard]] auto value(index_t token) const noexcept {
    const cell_address c = sequence_(token);
    return v_.format.at(v_first_ + c.page * v_.strides.page + c.slot * v_.strides.cell, dv());
  }
  /// For strided_head, where cells of a sequence follow each other and rows are of a type that block kernels read.
  [[nodiscard]] kernel::strided_rows key_rows() const noexcept
  requires in_order
  {
    return {k_first_ + sequence_(0).page * k_.strides.page + sequence_(0).slot * k_.strides.cell, k_.strides.cell};
  }
  [[nodiscard]] kernel::strided_rows value_rows() const noexcept
  requires in_order
  {
    return {v_first_ + sequence_(0).page * v_.strides.page + sequence_(0).slot * v_.strides.cell, v_.strides.cell};
  }
  [[nodiscard]] bool has_key_norms() const noexcept { return norms_.keys != nullptr; }
  [[nodiscard]] float key_norm(index_t token) const noexcept { return norms_.keys[norm(token)]; }
  [[nodiscard]] bool has_value_norms() const noexcept { return norms_.values != nullptr; }
  [[nodiscard]] float value_norm(index_t token) const noexcept { return norms_.values[norm(token)]; }
  [[nodiscard]] const float* value_centre() const noexcept { return norms_.value_centres; }

 private:
  [[nodiscard]] index_t norm(index_t token) const noexcept {
    const cell_address c = sequence_(token);
    return c.page * norm_page_ + c.slot;
  }

  Sequence sequence_;
  row_store<K> k_;
  row_store<V> v_;
  const std::byte* k_first_;
  const std::byte* v_first_;
  row_norms norms_;  // of this head's cells in page 0
  index_t norm_page_, n_, dk_, dv_;
};

/// Non-owning view of an engine's cache; models `kv_cache`. Allocates nothing; the engine's buffers and tables must
/// outlive it. `validate()`, which every call begins with, walks the page tables.
template <cell_places Places, row_format K, row_format V>
class placed_kv {
 public:
  placed_kv() = default;
  placed_kv(const Places& places, index_t n_kv_heads, index_t dk, index_t dv, const row_store<K>& k,
            const row_store<V>& v) noexcept
      : places_(places), k_(k), v_(v), n_kv_heads_(n_kv_heads), dk_(dk), dv_(dv) {}

  [[nodiscard]] index_t n_batch() const noexcept { return places_.n_batch(); }
  [[nodiscard]] index_t n_kv_heads() const noexcept { return n_kv_heads_; }
  [[nodiscard]] index_t dk() const noexcept { return K::width == dynamic ? dk_ : K::width; }
  [[nodiscard]] index_t dv() const noexcept { return V::width == dynamic ? dv_ : V::width; }

  /// Numbers about the rows, kept in the cells' own order so that sequences may share pages: keys and values
  /// [n_pages, n_kv_heads, room], value_centres [n_kv_heads, dv]. `room` >= page_size is the distance between heads,
  /// for views of a part of the cells; 0 = page_size. Without value norms a call reads all values.
  [[nodiscard]] placed_kv with_norms(const row_norms& norms, index_t room = 0) const noexcept {
    placed_kv copy = *this;
    copy.norms_ = norms;
    copy.norm_room_ = room;
    return copy;
  }

  [[nodiscard]] auto head(index_t batch, index_t h) const noexcept {
    const auto sequence = places_.sequence(batch);
    const index_t room = norm_room_ == 0 ? places_.page_size() : norm_room_;
    const auto at = [h](const float* first, index_t width) { return first ? first + h * width : nullptr; };
    const row_norms norms{at(norms_.keys, room), at(norms_.values, room), at(norms_.value_centres, dv())};
    return placed_head<std::remove_cvref_t<decltype(sequence)>, K, V>(sequence, k_, v_, norms, n_kv_heads_ * room, h,
                                                                      places_.length(batch), dk_, dv_);
  }

  [[nodiscard]] status validate() const noexcept {
    if (n_kv_heads_ < 1 || dk_ < 1 || dv_ < 1) {
      return status::error(errc::invalid_argument,
                           "the cache has n_kv_heads %lld, dk %lld, dv %lld: all must be at least 1", ll(n_kv_heads_),
                           ll(dk_), ll(dv_));
    }
    if ((K::width != dynamic && K::width != dk_) || (V::width != dynamic && V::width != dv_)) {
      return status::error(errc::invalid_argument,
                           "the view is compiled for dk %lld, dv %lld but the cache has dk %lld, dv %lld: use "
                           "vattn::dynamic or the right sizes (are K and V swapped?)",
                           ll(K::width), ll(V::width), ll(dk_), ll(dv_));
    }
    if (status s = places_.validate(); !s) return s;
    if (status s = detail::check_norms(norms_, norm_room_, places_.page_size(),
                                       saturated_product(places_.n_pages(), n_kv_heads_));
        !s)
      return s;
    index_t longest = 0;
    for (index_t b = 0; b < n_batch(); ++b) longest = std::max<index_t>(longest, places_.length(b));
    if (longest == 0) return {};  // no row is ever read
    if (status s = check("K", k_, dk_); !s) return s;
    return check("V", v_, dv_);
  }

 private:
  static constexpr long long ll(index_t value) noexcept { return static_cast<long long>(value); }

  template <row_format F>
  [[nodiscard]] status check(const char* name, const row_store<F>& rows, index_t width) const noexcept {
    if (rows.first == nullptr) return status::error(errc::invalid_argument, "%s is null: pass its first row", name);
    if (const index_t multiple = rows.format.multiple(); multiple < 1 || width % multiple != 0) {
      return status::error(errc::invalid_argument,
                           "%s has rows of %lld elements, no multiple of %lld, the size of its blocks", name, ll(width),
                           ll(multiple));
    }
    constexpr auto alignment = static_cast<index_t>(F::alignment);
    const index_t bytes = rows.format.extent(width);
    const auto along = [&](const char* axis, index_t stride, index_t extent) -> status {
      if (extent <= 1 || stride == 0) return {};
      if (detail::magnitude(stride) < bytes || stride % alignment != 0) {
        return status::error(errc::invalid_argument,
                             "the %s stride of %s is %lld bytes: give a multiple of %lld of at least %lld bytes, the "
                             "extent of a row; strides are in bytes, not in elements",
                             axis, name, ll(stride), ll(alignment), ll(bytes));
      }
      return {};
    };
    if (status s = along("cell", rows.strides.cell, places_.page_size()); !s) return s;
    if (status s = along("head", rows.strides.head, n_kv_heads_); !s) return s;
    if (status s = along("page", rows.strides.page, places_.n_pages()); !s) return s;
    index_t step = alignment;  // between groups of a row, where it has them
    if constexpr (requires { rows.format.stride; }) step = rows.format.stride;
    return detail::check_elements<4>(name, rows.first, {places_.n_pages(), n_kv_heads_, places_.page_size(), width},
                                     {rows.strides.page, rows.strides.head, rows.strides.cell, step}, F::alignment);
  }

  Places places_{};
  row_store<K> k_{};
  row_store<V> v_{};
  row_norms norms_{};
  index_t norm_room_ = 0;
  index_t n_kv_heads_ = 1, dk_ = 0, dv_ = 0;
};

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
