// The first exchange of a call: is it the same call on every rank, may it begin, and where do the shards lie?
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <span>

#include "vattn/base/philox.hpp"
#include "vattn/dist/communicator.hpp"
#include "vattn/kv/query.hpp"
#include "vattn/settings.hpp"

namespace vattn::VATTN_ABI::dist {

/// Which token of the whole sequence a shard's cell j is.
enum class split : std::uint8_t {
  blocks,       ///< the shards follow each other in order of rank: also where a sequence lies on one rank alone
  round_robin,  ///< token j·size + rank
  by_position,  ///< the one at options.positions.cells(sequence, j), which every rank then gives
};

/// A status on the wire.
struct notice {
  std::uint64_t code = 0;
  char text[232] = {};

  notice() = default;
  explicit notice(const status& s) noexcept : code(static_cast<std::uint64_t>(s.code())) {
    std::memcpy(text, s.message(), std::min(std::strlen(s.message()), sizeof text - 1));
  }
};

/// What the lowest rank says that failed. `first` is rank 0's notice, `stride` bytes lie from one to the next.
[[nodiscard]] inline status first_failure(const std::byte* first, std::size_t stride, int ranks) noexcept {
  for (int r = 0; r < ranks; ++r) {
    notice n;
    std::memcpy(&n, first + static_cast<std::size_t>(r) * stride, sizeof n);
    if (n.code == 0) continue;
    n.text[sizeof n.text - 1] = 0;
    if (ranks == 1) return status::error(static_cast<errc>(n.code), "%s", n.text);
    return status::error(static_cast<errc>(n.code), "rank %d: %s", r, n.text);
  }
  return {};
}

/// A number that hardly any other numbers have.
class digest {
 public:
  void add(std::uint64_t x) noexcept {
    value_ = (value_ ^ x) * 0x9e3779b97f4a7c15u;
    value_ ^= value_ >> 29;
  }
  template <class T>
  void add_bytes(const T* from, index_t count) noexcept {
    const auto* at = reinterpret_cast<const std::byte*>(from);
    for (std::size_t left = static_cast<std::size_t>(count) * sizeof(T); left > 0;) {
      std::uint64_t word = 0;
      const std::size_t part = std::min(left, sizeof word);
      std::memcpy(&word, at, part);
      add(word);
      at += part, left -= part;
    }
  }
  void add(double x) noexcept { add_bytes(&x, 1); }
  [[nodiscard]] std::uint64_t value() const noexcept { return value_; }

 private:
  std::uint64_t value_ = 0x6a09e667f3bcc909u;
};

/// What must be equal on all ranks, and what it is called.
struct terms {
  enum what : std::size_t { settings, shapes, options, key, query, arithmetic, count };
  std::array<digest, count> of{};

  [[nodiscard]] static const char* name(std::size_t w) noexcept {
    static constexpr const char* names[count] = {
        "other settings",
        "other shapes or another split",
        "other options (scale, cap, causal, windows, sinks, slopes, positions of queries, a mask or none)",
        "another draw key",
        "another query",
        "other arithmetic (build of the library, or exp() of the machine)"};
    return names[w];
  }
  /// exp and log are the machine's: judging by other ones might end otherwise.
  void add_arithmetic() noexcept {
    of[arithmetic].add(std::uint64_t{VATTN_VERSION_MAJOR << 16 | VATTN_VERSION_MINOR << 8 | VATTN_VERSION_PATCH});
    for (int i = 1; i <= 8; ++i) {
      const volatile double x = 0.37 * i * i;
      of[arithmetic].add(std::exp(-x)), of[arithmetic].add(std::log(x)), of[arithmetic].add(std::exp(x * 0.1));
    }
  }
};

/// The terms of a call of `sharded_attention`.
template <class Q>
[[nodiscard]] terms terms_of_call(const config& settings, const tensor_view<const Q, 4>& q, index_t n_kv_heads,
                                  index_t dv, split how, const attention_options& options,
                                  const draw_key& key) noexcept {
  terms t;
  digest& s = t.of[terms::settings];
  for (const double x : {settings.epsilon, settings.delta, settings.max_density}) s.add(x);
  for (const index_t x : {settings.sinks, settings.window, settings.max_rounds, index_t{settings.joint},
                          static_cast<index_t>(settings.scale)})
    s.add(static_cast<std::uint64_t>(x));
  digest& shape = t.of[terms::shapes];
  shape.add_bytes(q.extents.data(), 4);
  for (const index_t x : {n_kv_heads, dv, static_cast<index_t>(how)}) shape.add(static_cast<std::uint64_t>(x));
  digest& o = t.of[terms::options];
  o.add(double{options.scale}), o.add(double{options.softcap});
  o.add(std::uint64_t{options.causal}), o.add(static_cast<std::uint64_t>(options.sliding_window));
  o.add(std::uint64_t{static_cast<bool>(options.mask)});
  for (const float* p : {options.sink_logits, options.alibi_slopes}) {
    o.add(std::uint64_t{p != nullptr});
    if (p) o.add_bytes(p, q.extents[2]);
  }
  const auto& at = options.positions.queries;
  for (index_t b = 0; at && b < q.extents[0]; ++b) {
    for (index_t i = 0; i < q.extents[1]; ++i) o.add(static_cast<std::uint64_t>(at(b, i)));
  }
  for (const std::uint64_t x :
       {key.seed, std::uint64_t{key.layer}, std::uint64_t{key.step}, std::uint64_t{key.first_head}})
    t.of[terms::key].add(x);
  for (const sequence_key& k : key.sequences) t.of[terms::key].add(k.seed), t.of[terms::key].add(std::uint64_t{k.step});
  for (index_t b = 0; b < q.extents[0]; ++b) {
    for (index_t i = 0; i < q.extents[1]; ++i) {
      for (index_t h = 0; h < q.extents[2]; ++h) t.of[terms::query].add_bytes(&q(b, i, h, 0), q.extents[3]);
    }
  }
  t.add_arithmetic();
  return t;
}

/// What a split and a call's options must be to each other.
[[nodiscard]] inline status check_split(split how, const attention_options& options, int ranks) noexcept {
  const bool placed = how == split::by_position;
  if (placed != static_cast<bool>(options.positions)) {
    return status::error(errc::invalid_argument,
                         placed ? "split::by_position without options.positions: give the position of each cell, and "
                                  "of each query"
                                : "options.positions with another split: say split::by_position");
  }
  if (how == split::round_robin && options.alibi_slopes != nullptr && ranks > 1) {
    return status::error(errc::invalid_argument,
                         "ALiBi and split::round_robin: give split::by_position and options.positions");
  }
  return {};
}

/// Where the shards of a sequence lie, to a rank.
struct sequence_shard {
  index_t total = 0;  ///< tokens of all shards
  index_t first = 0;  ///< tokens on lower ranks
  index_t last = -1;  ///< the last position of any shard, where cells have positions
};

/// The exchange. `local`: what is wrong on this rank already; `own` [n_batch] its shards, {total: its cells, last: its
/// last position}, which become those of the whole. `heads_apart`: heads see different tokens, here or, then, anywhere.
/// An error is the same on all ranks.
template <communicator C>
[[nodiscard]] status agree(C& comm, split how, const status& local, const terms& mine, std::span<sequence_shard> own,
                           bool& heads_apart) noexcept {
  constexpr std::size_t most = 8;  // sequences of one message
  struct envelope {
    notice local;
    std::uint64_t apart = 0;
    std::array<std::uint64_t, terms::count> digests{};
    std::array<std::array<index_t, 2>, most> shards{};
  };
  alignas(envelope) std::array<std::byte, sizeof(envelope) * static_cast<std::size_t>(most_ranks)> received;
  const int size = comm.size(), rank = comm.rank();
  const std::span<std::byte> all =
      std::span<std::byte>(received).first(sizeof(envelope) * static_cast<std::size_t>(size));
  const auto of = [&](int r) {
    envelope e;
    std::memcpy(&e, all.data() + static_cast<std::size_t>(r) * sizeof e, sizeof e);
    return e;
  };
  for (std::size_t from = 0;; from += most) {
    envelope e{notice(local), heads_apart ? 1u : 0u, {}, {}};
    for (std::size_t w = 0; w < terms::count; ++w) e.digests[w] = mine.of[w].value();
    const std::size_t count = std::min(most, own.size() - std::min(own.size(), from));
    for (std::size_t i = 0; i < count; ++i) e.shards[i] = {own[from + i].total, own[from + i].last};
    if (status s = comm.all_gather(std::as_bytes(std::span(&e, 1)), all); !s) return s;
    if (status s = first_failure(all.data(), sizeof e, size); !s) return s;
    const envelope zero = of(0);
    for (std::size_t w = 0; w < terms::count; ++w) {
      for (int r = 1; r < size; ++r) {
        if (of(r).digests[w] != zero.digests[w])
          return status::error(errc::invalid_argument, "rank %d has %s than rank 0: give all ranks the same", r,
                               terms::name(w));
      }
    }
    for (std::size_t i = 0; i < count; ++i) own[from + i] = {};
    for (int r = 0; r < size; ++r) {
      const envelope theirs = of(r);
      heads_apart = heads_apart || theirs.apart != 0;
      for (std::size_t i = 0; i < count; ++i) {
        sequence_shard& s = own[from + i];
        const auto [cells, last] = theirs.shards[i];
        if (r < rank) s.first += cells;
        s.total += cells, s.last = std::max(s.last, last);
      }
    }
    for (std::size_t i = from; i < from + count; ++i) {
      if (own[i].total < population::max_size) continue;
      return status::error(errc::invalid_argument, "%lld tokens of sequence %zu in all shards: sequences end at 2^31",
                           static_cast<long long>(own[i].total), i);
    }
    for (int r = 0; how == split::round_robin && r < size; ++r) {
      const envelope theirs = of(r);
      for (std::size_t i = 0; i < count; ++i) {
        const index_t cells = theirs.shards[i][0], total = own[from + i].total, want = (total - r + size - 1) / size;
        if (cells != want) {
          return status::error(errc::invalid_argument,
                               "rank %d has %lld of %lld tokens of sequence %zu, not the %lld of split::round_robin: "
                               "give token i to rank i mod %d, or say how they are split",
                               r, static_cast<long long>(cells), static_cast<long long>(total), from + i,
                               static_cast<long long>(want), size);
        }
      }
    }
    if (from + most >= own.size()) return {};
  }
}

/// What a query sees of a shard, its sinks in front and its window at the end.
struct visible_part {
  population tokens;
  index_t sinks = 0, window = 0;
};

/// Query at `position` of a whole sequence, which sees a part of the shard's n cells. `storage` [n] and `ends`
/// [min(n, sinks + window)] where there is a mask or positions.
[[nodiscard]] inline visible_part visible_cells(index_t n, split how, const sequence_shard& whole, int rank, int ranks,
                                                index_t position, const mask_view::line& mask,
                                                const cell_positions::line& positions, const attention_options& options,
                                                index_t sinks, index_t window, std::span<ordinal> storage,
                                                std::span<ordinal> ends) noexcept {
  const position_range range = visible_positions(position, options);
  const index_t low = range.first;
  const index_t high = std::min<index_t>(range.last, how == split::by_position ? whole.last : whole.total - 1);
  // Of what may be seen: [low, low + sinks) and (high − window, high] without those.
  const index_t sinks_end = low + sinks, window_first = std::max(sinks_end, high + 1 - window);
  visible_part part;
  if (how == split::by_position) {
    for (index_t c = 0; c < n; ++c) {
      const index_t at = positions(c);
      if (at < low || at > high || (mask && mask.hides(c))) continue;
      part.sinks += at < sinks_end ? 1 : 0, part.window += at >= window_first ? 1 : 0;
    }
    // Tokens may share a position.
    part.sinks = std::min(part.sinks, sinks), part.window = std::min(part.window, window);
    part.tokens = visible_by_position(n, mask, positions, range, part.sinks, part.window, storage, ends);
    return part;
  }
  const bool dealt = how == split::round_robin;
  const index_t step = dealt ? ranks : 1, offset = dealt ? rank : whole.first;
  // Cells at positions below p: those j with offset + j·step < p.
  const auto below = [&](index_t p) { return p <= offset ? index_t{0} : std::min(n, (p - offset + step - 1) / step); };
  part.tokens = population(below(low), below(high + 1), mask, storage);
  const index_t seen = part.tokens.size();
  while (part.sinks < seen && part.tokens[part.sinks] < below(sinks_end)) ++part.sinks;
  while (part.window < seen - part.sinks && part.tokens[seen - 1 - part.window] >= below(window_first)) ++part.window;
  return part;
}

}  // namespace vattn::VATTN_ABI::dist

#include "vattn/macros_pop.hpp"
