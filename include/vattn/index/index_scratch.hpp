// Memory of a call by an index, of its reader and of the pieces that its work is cut in; whether one is worth it.
#include "vattn/macros_push.hpp"
#pragma once

#include <algorithm>
#include <array>
#include <span>

#include "vattn/estimate/strata.hpp"
#include "vattn/exact_attention.hpp"
#include "vattn/index/cell_codes.hpp"
#include "vattn/index/cell_tables.hpp"
#include "vattn/index/gather.hpp"
#include "vattn/index/index_costs.hpp"
#include "vattn/index/index_plan.hpp"
#include "vattn/index/index_views.hpp"
#include "vattn/sample/thinning.hpp"

namespace vattn::VATTN_ABI {

/// What a worker needs for a piece of a group's work, at the front of its group's memory.
struct index_piece {
  static constexpr index_t blocks = 32;  // that are scanned
  static constexpr index_t rows = 128;   // whose keys or values are read
  static constexpr index_t most = 16;    // whose sums are kept at a time

  std::span<std::byte> gathered;  // gathered_bytes
  std::span<float> x, spare;      // [heads, block_rows]
  kernel::cell_candidates found;  // of `blocks` blocks

  [[nodiscard]] static index_piece take(arena& a, index_t heads, index_t dk, index_t dv) noexcept {
    constexpr index_t cells = blocks * kernel::scan_keys;
    const auto h = static_cast<std::size_t>(heads), n = static_cast<std::size_t>(cells);
    index_piece p;
    p.gathered = a.take<std::byte>(gathered_bytes(dk, dv));
    p.x = a.take<float>(h * static_cast<std::size_t>(kernel::block_rows));
    p.spare = a.take<float>(h * static_cast<std::size_t>(kernel::block_rows));
    ordinal* const cell = a.take<ordinal>(n).data();
    std::int16_t* const lanes = a.take<std::int16_t>((3 + h) * n).data();
    if (lanes) p.found = {cell, lanes, lanes + cells, lanes + 2 * cells, lanes + 3 * cells, cells, 0};
    return p;
  }
  [[nodiscard]] static std::size_t bytes(index_t heads, index_t dk, index_t dv) noexcept {
    arena count;
    static_cast<void>(take(count, heads, dk, dv));
    return count.used() + workspace::alignment;
  }
};

/// Memory of an `index_reader`, taken from the call's workspace.
struct index_reader_memory {
  // What pieces of keys say.
  struct keys_seen {
    std::array<float, max_group> top;
    std::array<index_t, max_group> outside;
    std::uint32_t odd;
  };
  // What pieces of values say of their spread; its third moment's sum of coefficients.
  struct spread_seen {
    std::array<double, max_group> variance, fourth, third;
  };

  std::span<std::byte> rows;                            // gathered_bytes
  std::span<float> prepared, centred;                   // queries and outputs as block kernels want them
  std::span<float> sampled, certain;                    // stratum::storage_size
  std::span<float> x, spare;                            // [heads, block_rows]
  std::span<float> third;                               // [heads, dv]
  std::span<ordinal> cells;                             // [capacity]: of candidates
  std::span<std::int16_t> reach, radius, noise, level;  // [capacity]
  std::span<std::int16_t> score;                        // [heads, capacity]
  std::span<float> logits;                              // [heads, capacity], of candidates whose keys were read
  std::span<std::uint8_t> seen;                         // [capacity]: its key was read
  std::span<ordinal> picks;                             // [capacity]: candidates that the thresholds take
  std::span<float> reach2;                              // [capacity], r² of picks
  std::span<float> thinning;                            // thinning::storage_size
  std::span<ordinal> kept;                              // [capacity]: picks whose values are read
  std::span<float> weights;                             // [capacity], 1/π of picks; 0: the value was not read
  std::span<float> by_level;                            // [levels] 1/π
  std::span<keys_seen> keys;                            // [capacity / index_piece::rows + 1]
  std::span<stratum> parts;                             // [index_piece::most]
  std::span<spread_seen> spreads;                       // [index_piece::most]
  std::span<float> part_vectors;                        // [index_piece::most, heads, dv]
  cells_of_queries seen_by;                             // of the group's queries, set by whoever knows them
  index_t capacity = 0;
  static constexpr index_t levels = 4096;  // steps below 0: no noise is larger than 17·ln 2 nats

  [[nodiscard]] static index_reader_memory take(arena& a, index_t heads, index_t dk, index_t dv,
                                                index_t capacity) noexcept {
    capacity = (capacity + kernel::scan_keys - 1) / kernel::scan_keys * kernel::scan_keys;
    const auto h = static_cast<std::size_t>(heads), n = static_cast<std::size_t>(capacity);
    index_reader_memory m;
    m.rows = a.take<std::byte>(gathered_bytes(dk, dv));
    m.prepared = a.take<float>(kernel::query_storage(heads, dk));
    m.centred = a.take<float>(kernel::query_storage(heads, dv));
    m.sampled = a.take<float>(stratum::storage_size(heads, dv));
    m.certain = a.take<float>(stratum::storage_size(heads, dv));
    m.x = a.take<float>(h * kernel::block_rows);
    m.spare = a.take<float>(h * kernel::block_rows);
    m.third = a.take<float>(h * static_cast<std::size_t>(dv));
    m.cells = a.take<ordinal>(n);
    m.reach = a.take<std::int16_t>(n);
    m.radius = a.take<std::int16_t>(n);
    m.noise = a.take<std::int16_t>(n);
    m.level = a.take<std::int16_t>(n);
    m.score = a.take<std::int16_t>(h * n);
    m.logits = a.take<float>(h * n);
    m.seen = a.take<std::uint8_t>(n);
    m.picks = a.take<ordinal>(n);
    m.reach2 = a.take<float>(n + static_cast<std::size_t>(kernel::block_rows));
    m.thinning = a.take<float>(thinning::storage_size(heads, capacity));
    m.kept = a.take<ordinal>(n);
    m.weights = a.take<float>(n);
    m.by_level = a.take<float>(static_cast<std::size_t>(levels));
    constexpr auto parts = static_cast<std::size_t>(index_piece::most);
    m.keys = a.take<keys_seen>(n / static_cast<std::size_t>(index_piece::rows) + 1);
    m.parts = a.take<stratum>(parts);
    m.spreads = a.take<spread_seen>(parts);
    m.part_vectors = a.take<float>(parts * h * static_cast<std::size_t>(dv));
    m.capacity = capacity;
    return m;
  }
};

/// Scratch of a group of heads, taken from the call's workspace.
struct index_scratch {
  std::span<std::uint8_t> tables;  // cell_tables::table_bytes
  std::span<float> table;          // cell_tables::scratch_size
  std::span<float> queries;        // [heads, dk]
  std::span<float> output, away;   // [heads, dv]
  std::span<float> vectors;        // [2, dv]
  std::span<std::uint64_t> seen;   // [blocks]: cells that are sampled
  std::span<std::uint64_t> views;  // [heads, blocks]: cells_of_queries
  std::span<ordinal> certain;      // cells that are read for certain
  std::span<float> plan;           // plan_sample::storage_size
  std::span<float> looks;          // [heads + 1, look_cells], scores
  index_reader_memory reader;
  exact_scratch exact;

  static constexpr index_t look_cells = 16 * kernel::scan_keys;

  /// More candidates than this cost more than reading all rows.
  [[nodiscard]] static index_t most_candidates(index_t n) noexcept { return n / 3 + 1024; }
  [[nodiscard]] static index_t most_certain(index_t n, index_t fixed) noexcept {
    return std::min(n, fixed) + n / 8 + 64;
  }

  /// `fixed`: sinks and window.
  [[nodiscard]] static index_scratch take(arena& a, index_t n, index_t heads, index_t dk, index_t dv,
                                          index_t fixed) noexcept {
    const auto h = static_cast<std::size_t>(heads), width = static_cast<std::size_t>(dv);
    const cell_layout most(dk, cell_codes::most_bits);
    index_scratch s;
    static_cast<void>(a.take<std::byte>(
        std::max(exact_scratch::piece_bytes(heads, dv), index_piece::bytes(heads, dk, dv))));  // of pieces, in front
    s.tables = a.take<std::uint8_t>(cell_tables::table_bytes(most, heads));
    s.table = a.take<float>(cell_tables::scratch_size(most, heads));
    s.queries = a.take<float>(h * static_cast<std::size_t>(dk));
    s.output = a.take<float>(h * width);
    s.away = a.take<float>(h * width);
    s.vectors = a.take<float>(2 * width);
    const auto blocks = static_cast<std::size_t>(n / kernel::scan_keys + 1);
    s.seen = a.take<std::uint64_t>(blocks);
    s.views = a.take<std::uint64_t>(h * blocks);
    s.certain = a.take<ordinal>(static_cast<std::size_t>(most_certain(n, fixed)));
    s.plan = a.take<float>(plan_sample::storage_size(heads));
    s.looks = a.take<float>((h + 1) * static_cast<std::size_t>(look_cells));
    s.reader = index_reader_memory::take(a, heads, dk, dv, most_candidates(n));
    s.exact = exact_scratch::take(a, heads, dk, dv);
    return s;
  }
};

/// Bytes of `index_scratch` for a group.
[[nodiscard]] inline std::size_t index_bytes(index_t n, index_t heads, index_t dk, index_t dv, index_t fixed) noexcept {
  arena count;
  static_cast<void>(index_scratch::take(count, n, heads, dk, dv, fixed));
  return count.used() + workspace::alignment;
}

/// Whether sampling n tokens, `fixed` of them certain, may cost less than reading them all.
[[nodiscard]] inline bool index_may_pay(index_t n, index_t fixed, const index_costs& costs) noexcept {
  constexpr index_shape_of_sample shape;
  const double rows = costs.key * (shape.pilot_base + shape.pilot) + static_cast<double>(fixed);
  return n - fixed >= costs.least && costs.scan * static_cast<double>(n) + rows + costs.once < static_cast<double>(n);
}

}  // namespace vattn::VATTN_ABI

#include "vattn/macros_pop.hpp"
