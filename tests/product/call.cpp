// What a scenario's call carries, and where its results go.
#include <charconv>
#include <cstring>
#include <vattn/base/thread_pool.hpp>

#include "product/run.hpp"
#include "vattn/base/openmp.hpp"

namespace vattn::product {

namespace {

// N(0, 1) fast enough to fill caches: a table that is read round and round, from another place each time.
class normals {
 public:
  explicit normals(std::uint32_t seed) : at_(seed * 2654435761u >> 8) {
    if (!table().empty()) return;
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < length; ++i) table().push_back(normal(random));
  }
  float operator()() {
    const std::uint32_t at = at_++;
    return table()[(at + (at >> 15) * 7919) % length];
  }

 private:
  static constexpr std::size_t length = 32768;
  static std::vector<float>& table() {
    static std::vector<float> t;
    return t;
  }
  std::uint32_t at_;
};

template <class Table>
auto at(const Table& table, int level) {
  return table[static_cast<std::size_t>(level)];
}

test::shape shape_of(const scenario& s) {
  const head_counts h = at(all_heads, s[heads_axis]);
  const head_size d = at(all_sizes, s[size_axis]);
  return {.batch = at(all_batches, s[batch_axis]),
          .queries = at(all_queries, s[queries_axis]),
          .heads = h.query,
          .kv_heads = h.kv,
          .n = at(all_lengths, s[length_axis]),
          .dk = d.dk,
          .dv = d.dv};
}

test::ragged<float> rows_of(const scenario& s) {
  const test::shape d = shape_of(s);
  const float spread = std::array{0.5f, 2.0f, 1.0f}[static_cast<std::size_t>(s[regime_axis])];
  test::problem<float> p(d, spread, normals(s.seed));
  // Needles: tokens that a query of each group is after, and values that tell them from the others.
  for (index_t b = 0; s[regime_axis] == 2 && d.n >= 300 && b < d.batch; ++b) {
    for (index_t h = 0; h < d.kv_heads; ++h) {
      const float* q = p.q.data() + (b * d.queries * d.heads + h * (d.heads / d.kv_heads)) * d.dk;
      float square = 1e-3f;
      for (index_t j = 0; j < d.dk; ++j) square += q[j] * q[j];
      for (index_t i = 0; i < 4; ++i) {
        const index_t token = (2 * i + 1) * d.n / 8, row = (b * d.kv_heads + h) * d.n + token;
        for (index_t j = 0; j < d.dk; ++j)
          p.k[static_cast<std::size_t>(row * d.dk + j)] = 7 * q[j] / square / p.options.scale;
        for (index_t j = 0; j < d.dv; ++j) p.v[static_cast<std::size_t>(row * d.dv + j)] *= 3;
      }
    }
  }
  for (float& x : p.v) x *= at(all_values, s[values_axis]);
  const auto n = static_cast<std::int32_t>(d.n);
  const int l = s[layout_axis];
  std::vector<std::int32_t> own(static_cast<std::size_t>(d.batch), n);
  if (paged(l) || l == ragged_rows) {
    if (d.batch > 1) own[1] = std::max(0, n - 37);
    if (d.batch > 2) own[2] = n / 2;
  }
  return {std::move(p), std::move(own)};
}

}  // namespace

call::call(const scenario& s) : of(s), rows(rows_of(s)), audit(s[observer_axis] == audit_all ? 1.0 : 0.5) {
  test::problem<float>& p = rows.p;
  const test::shape& d = p.s;
  std::mt19937 random(s.seed);
  const auto unit = [&] { return std::uniform_real_distribution<float>(0, 1)(random); };

  // q, as it will be read.
  const index_t wide = s[buffers_axis] == 0 ? 0 : 5;
  q_extents = {d.batch, d.queries, d.heads, d.dk};
  const index_t row = d.dk + wide;
  q_strides = wide == 0 ? std::array<index_t, 4>{d.queries * d.heads * row, d.heads * row, row, 1}
                        : std::array<index_t, 4>{d.queries * row, row, d.batch * d.queries * row, 1};
  const auto place = [&](auto& to) {
    using Q = typename std::remove_cvref_t<decltype(to)>::value_type;
    to.assign(static_cast<std::size_t>(d.batch * d.queries * d.heads * row), Q(test::not_a_number));
    std::size_t from = 0;
    for (index_t b = 0; b < d.batch; ++b) {
      for (index_t t = 0; t < d.queries; ++t) {
        for (index_t h = 0; h < d.heads; ++h) {
          for (index_t j = 0; j < d.dk; ++j) {
            Q& x = to[static_cast<std::size_t>(b * q_strides[0] + t * q_strides[1] + h * q_strides[2] + j)];
            x = Q(p.q[from]);
            p.q[from++] = static_cast<float>(x);
          }
        }
      }
    }
  };
  if (s[query_axis] == 0) {
    place(q32);
  } else if (s[query_axis] == 1) {
    place(q16);
  } else {
    place(qb16);
  }

  options = p.options;
  options.causal = s[causal_axis] == 1;
  options.sliding_window = std::array{0, 40, 900}[static_cast<std::size_t>(s[window_axis])];
  if (s[softcap_axis] == 1) options.softcap = 4;
  p.options = options;
  for (index_t h = 0; h < d.heads; ++h) {
    // From the front of the sequence to its end at most 6 nats; one head without, one that looks back.
    if (s[alibi_axis] == 1)
      slopes.push_back(std::array{2.0f, 0.0f, -1.0f, 6.0f}[static_cast<std::size_t>(h % 4)] /
                       static_cast<float>(d.n + 1));
    if (s[sink_axis] == 1) sinks.push_back(h % 3 == 2 ? -test::infinity : 1.0f + 0.5f * static_cast<float>(h % 4));
  }
  if (!slopes.empty()) options.alibi_slopes = slopes.data();
  if (!sinks.empty()) options.sink_logits = sinks.data();
  p.alibi = slopes, p.sinks = sinks;

  // A fifth is masked, and all for the last query of the last head.
  if (s[mask_axis] != no_mask) {
    const bool by_head = s[mask_axis] == head_mask;
    const index_t own = by_head ? d.heads : 1;
    for (index_t b = 0; b < d.batch; ++b) {
      for (index_t h = 0; h < own; ++h) {
        for (index_t t = 0; t < d.queries; ++t) {
          const bool all = b == d.batch - 1 && h == own - 1 && t == d.queries - 1 && s.seed % 3 == 0;
          for (index_t i = 0; i < d.n; ++i) {
            const float x = all || random() % 5 == 0 ? -test::infinity : static_cast<float>(Eigen::half(unit() - 0.5f));
            by_head ? mask.push_back(x) : half_mask.push_back(Eigen::half(x));
          }
        }
      }
    }
    if (by_head) {
      p.mask = mask;
      mask.push_back(0);  // an address, even of no tokens
      options.mask = mask_view(tensor_view<const float, 4>(mask.data(), {d.batch, d.heads, d.queries, d.n}));
    } else {
      for (index_t b = 0; b < d.batch; ++b) {
        for (index_t h = 0; h < d.heads; ++h) {
          for (index_t i = 0; i < d.queries * d.n; ++i)
            p.mask.push_back(static_cast<float>(half_mask[static_cast<std::size_t>(b * d.queries * d.n + i)]));
        }
      }
      half_mask.push_back(Eigen::half(0));
      options.mask = mask_view(tensor_view<const Eigen::half, 4>(half_mask.data(), {d.batch, d.heads, d.queries, d.n},
                                                                 {2 * d.queries * d.n, 0, 2 * d.n, 2}));
    }
  }

  if (s[positions_axis] != no_positions) {
    // In order, with gaps and empty cells or without; or all that at random.
    const bool gaps = s[positions_axis] == shuffled_positions || s.seed % 2 == 1;
    for (index_t b = 0; b < d.batch; ++b) {
      const index_t n = rows.lengths[static_cast<std::size_t>(b)];
      std::vector<std::int32_t> line;
      for (index_t i = 0; i < d.n; ++i)
        line.push_back(static_cast<std::int32_t>(gaps && i % 7 == 3 ? -1 : 5 + i + (gaps ? i / 5 : 0)));
      if (s[positions_axis] == shuffled_positions)
        std::shuffle(line.begin(), line.begin() + static_cast<std::ptrdiff_t>(n), random);
      std::int32_t last = 4;
      for (index_t i = 0; i < n; ++i) last = std::max(last, line[static_cast<std::size_t>(i)]);
      cells.insert(cells.end(), line.begin(), line.end());
      for (index_t t = 0; t < d.queries; ++t)
        query_positions.push_back(static_cast<std::int32_t>(last - d.queries + 1 + t));
    }
    cells.push_back(0);
    options.positions = {{cells.data(), {d.batch, d.n}}, {query_positions.data(), {d.batch, d.queries}}};
  }

  const auto level = [&](axis a) { return static_cast<std::size_t>(s[a]); };
  settings.epsilon = settings.delta = s[promise_axis] == 1 ? 0.1 : 0.3;
  settings.joint = s[promise_axis] == 2;
  settings.scale = s[scale_axis] == 0 ? error_scale::output : error_scale::rms;
  settings.sinks = std::array{4, 0, 16}[level(ends_axis)];
  settings.window = std::array{8, 0, 40}[level(ends_axis)];
  settings.min_sample = 16;
  if (s[rule_axis] == 1) settings.max_rounds = 2, settings.accept_last = true;
  if (s[rule_axis] == 2) settings.max_density = 1;
  if (s[rule_axis] == 3) settings.max_rounds = 1;
  key = {.seed = s.seed, .layer = 3, .step = 1000 + s.seed % 17};
  // Without keys of their own sequences draw alike, and what fails for one fails for another.
  for (index_t b = 0; b < d.batch; ++b)
    keys.push_back({s.seed * 31ull + static_cast<std::uint64_t>(b) + 5, static_cast<std::uint32_t>(100 * b)});
  if (d.batch > 1) key.sequences = keys;
  results = again = result_buffers(d, s);
  again = result_buffers(d, s);
}

result_buffers::result_buffers(const test::shape& s, const scenario& of)
    : s_(s),
      wants_lse_(of[lse_axis] == 1),
      wants_certificates_(of[certificate_axis] == 1),
      floats_(std::make_shared<std::vector<float>>()),
      weights_(std::make_shared<std::vector<float>>()),
      integers_(std::make_shared<std::vector<std::int32_t>>()),
      certificates_(std::make_shared<std::vector<certificate>>()) {
  const index_t rows = s.batch * s.queries * s.heads, pad = of[buffers_axis] == 0 ? 0 : 3, wide = s.dv + pad;
  const std::array<index_t, 3> extents{s.batch, s.queries, s.heads};
  floats_->assign(static_cast<std::size_t>(rows * wide + rows * (1 + pad)), untouched);
  certificates_->resize(static_cast<std::size_t>(rows));
  float* lse = floats_->data() + rows * wide;
  output_ = {floats_->data(), {s.batch, s.queries, s.heads, s.dv}};
  lse_ = {lse, extents};
  certificate_ = {certificates_->data(), extents};
  if (pad > 0) {  // heads outermost, then queries
    output_.strides = {4 * wide, 4 * s.batch * wide, 4 * s.queries * s.batch * wide, 4};
    lse_.strides = {4 * (1 + pad), 4 * s.batch * (1 + pad), 4 * s.queries * s.batch * (1 + pad)};
    const auto one = static_cast<index_t>(sizeof(certificate));
    certificate_.strides = {one, s.batch * one, s.queries * s.batch * one};
  }
  if (of[decisions_axis] == 0) return;
  const index_t room = s.n + pad;
  integers_->assign(static_cast<std::size_t>(rows * (room + 1) + 1), -77);
  weights_->assign(static_cast<std::size_t>(rows * room + 1), untouched);
  decisions_ = {{integers_->data() + rows, {s.batch, s.queries, s.heads, room}},
                {weights_->data(), {s.batch, s.queries, s.heads, room}},
                {integers_->data(), extents}};
}

attention_result result_buffers::view() const {
  attention_result r{.output = output_, .decisions = decisions_};
  if (wants_lse_) r.log_sum_exp = lse_;
  if (wants_certificates_) r.certificates = certificate_;
  return r;
}

bool result_buffers::intact() const {
  std::size_t touched = 0;
  for (const float x : *floats_) touched += x != untouched;
  const auto rows = static_cast<std::size_t>(s_.batch * s_.queries * s_.heads);
  return touched <= rows * static_cast<std::size_t>(s_.dv) + (wants_lse_ ? rows : 0);
}

bool result_buffers::operator==(const result_buffers& other) const {
  const auto same = [](const auto& a, const auto& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
  };
  if (!same(*floats_, *other.floats_) || !same(*integers_, *other.integers_) || !same(*weights_, *other.weights_))
    return false;
  for (std::size_t i = 0; i < certificates_->size(); ++i) {
    const certificate &a = (*certificates_)[i], &b = (*other.certificates_)[i];
    if (a.n != b.n || a.rows_exact != b.rows_exact || a.rows_sampled != b.rows_sampled || a.budget != b.budget ||
        a.epsilon_achieved != b.epsilon_achieved || a.log_denominator != b.log_denominator || a.promise != b.promise ||
        a.rounds != b.rounds || a.breaches != b.breaches)
      return false;
  }
  return true;
}

void chosen_executor::in_parallel(index_t n, const std::function<void(index_t, index_t)>& f) {
  static thread_pool shared(3);
#if defined(_OPENMP)
  if (kind_ == openmp) return openmp_executor(3).for_each(n, f);
#endif
  shared.for_each(n, f);
}

namespace {

// Memory that begins anywhere, with a mark behind it.
class marked_memory {
 public:
  explicit marked_memory(std::size_t bytes, std::uint32_t seed)
      : from_(seed % 64), bytes_(bytes), all_(from_ + bytes + 64, mark) {}
  [[nodiscard]] std::span<std::byte> first(std::size_t bytes) { return std::span(all_).subspan(from_, bytes); }
  [[nodiscard]] bool intact() const {
    return std::all_of(all_.begin() + static_cast<std::ptrdiff_t>(from_ + bytes_), all_.end(),
                       [](std::byte b) { return b == mark; });
  }

 private:
  static constexpr std::byte mark{0xa5};
  std::size_t from_, bytes_;
  std::vector<std::byte> all_;
};

// The bytes that a refusal asks for; 0: it names none.
std::size_t needed(const status& s) {
  const std::string_view text = s.message();
  const std::string_view before = "the call needs ";
  const std::size_t from = text.find(before);
  std::size_t bytes = 0;
  if (from != std::string_view::npos)
    std::from_chars(text.data() + from + before.size(), text.data() + text.size(), bytes);
  return bytes;
}

}  // namespace

status with_exact_memory(call& c, std::size_t bytes, const std::function<status(std::span<std::byte>)>& attempt) {
  if (c.of[workspace_axis] == one_byte_short) {
    const status none = attempt({});
    if (none.code() != errc::workspace_too_small) return none;  // refused for another reason, or fell through
    const std::size_t least = needed(none);
    if (least == 0 || least > bytes)
      c.wrong.push_back("workspace_bytes() says " + std::to_string(bytes) + " but: " + none.message());
    marked_memory memory(least, c.of.seed);
    // A store that is read in full by blocks needs less than it names.
    if (const status s = attempt(memory.first(least - std::min<std::size_t>(least, 1)));
        s.code() != errc::workspace_too_small && !(s && c.of[layout_axis] == shuffled))
      c.wrong.push_back("a workspace one byte short of " + std::to_string(least) + " gave " + (s ? "ok" : s.message()));
    const status s = attempt(memory.first(least));
    if (!memory.intact()) c.wrong.push_back("wrote past the workspace");
    return s;
  }
  marked_memory memory(bytes, c.of.seed);
  const status s = attempt(memory.first(bytes));
  if (!memory.intact()) c.wrong.push_back("wrote past the workspace");
  return s;
}

status with_short_workspace(call& c, std::size_t most, const std::function<status(workspace&)>& attempt) {
  return with_exact_memory(c, most, [&](std::span<std::byte> memory) {
    workspace w(memory);
    return attempt(w);
  });
}

void with_any_cache(call& c, const std::function<void(const any_kv&)>& f) {
  with_types(c.of, [&](auto l, auto e) {
    with_layout<l.value, e.value>(c.of, c.rows, [&](const auto& cache, const row_order& order) {
      c.order = order;
      f(any_kv(cache));
    });
  });
}

}  // namespace vattn::product
