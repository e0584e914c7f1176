// Continuous batching: what a request gets depends neither on its place in the batch nor on who else is in it.
#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "vattn/base/thread_pool.hpp"
#include "vattn/vattn.hpp"

namespace {

using namespace vattn;
using vattn::test::contains;

constexpr index_t heads = 4, kv_heads = 2, d = 16, block = 16, longest_tokens = 2600;

/// All rows that a request will ever have, [kv_heads, longest_tokens, d], and where it is.
struct request {
  std::vector<float> k, v, q;  // q [longest_tokens, heads, d]
  std::uint64_t seed = 0;
  index_t n = 0;  // tokens now
  std::uint32_t step = 0;
  std::vector<std::int32_t> blocks;  // of the pool

  request(unsigned which, index_t prompt) : seed(which), n(prompt) {
    std::mt19937_64 random(which);
    std::normal_distribution<float> normal;
    k.resize(kv_heads * longest_tokens * d), v.resize(k.size()), q.resize(longest_tokens * heads * d);
    for (float& x : k) x = 1.5f * normal(random);
    for (float& x : v) x = normal(random) + 0.7f;
    for (float& x : q) x = normal(random);
  }
  [[nodiscard]] const float* key(index_t h, index_t token) const { return k.data() + (h * longest_tokens + token) * d; }
  [[nodiscard]] const float* value(index_t h, index_t token) const {
    return v.data() + (h * longest_tokens + token) * d;
  }
};

/// Everything that a call says of one request.
struct answer {
  std::vector<float> output, lse, weights;
  std::vector<std::int32_t> tokens, counts;
  std::vector<certificate> certificates;
};
bool same(const certificate& a, const certificate& b) {
  return a.n == b.n && a.rows_exact == b.rows_exact && a.rows_sampled == b.rows_sampled && a.budget == b.budget &&
         a.log_denominator == b.log_denominator && a.denominator_error == b.denominator_error &&
         a.epsilon_achieved == b.epsilon_achieved && a.coherence == b.coherence && a.breaches == b.breaches &&
         a.rounds == b.rounds && a.promise == b.promise && a.saturated == b.saturated;
}
bool same(const answer& a, const answer& b) {
  return a.output == b.output && a.lse == b.lse && a.weights == b.weights && a.tokens == b.tokens &&
         a.counts == b.counts &&
         std::equal(a.certificates.begin(), a.certificates.end(), b.certificates.begin(), b.certificates.end(),
                    [](const auto& x, const auto& y) { return same(x, y); });
}

/// A batch of requests, as an engine would lay it out.
struct batch {
  std::vector<const request*> who;
  index_t n = 0;
  std::vector<float> q;
  std::vector<std::int32_t> lengths;
  std::vector<sequence_key> keys;

  explicit batch(std::vector<const request*> requests) : who(std::move(requests)) {
    for (const request* r : who) {
      q.insert(q.end(), r->q.begin() + r->step * heads * d, r->q.begin() + (r->step + 1) * heads * d);
      lengths.push_back(static_cast<std::int32_t>(r->n));
      keys.push_back({.seed = r->seed, .step = r->step});
      n = std::max(n, r->n);
    }
  }
  [[nodiscard]] index_t size() const { return static_cast<index_t>(who.size()); }

  /// attend(query, result, key) over any layout; what it said, for each request.
  template <class Attend>
  [[nodiscard]] std::vector<answer> run(Attend&& attend, bool decide) const {
    const index_t b = size();
    const auto count = static_cast<std::size_t>(b * heads);
    const auto capacity = static_cast<std::size_t>(n);
    std::vector<float> output(count * d), lse(count), weights(count * capacity);
    std::vector<std::int32_t> tokens(count * capacity), counts(count);
    std::vector<certificate> certificates(count);
    attention_result result{.output = {output.data(), {b, 1, heads, d}},
                            .log_sum_exp = {lse.data(), {b, 1, heads}},
                            .certificates = {certificates.data(), {b, 1, heads}}};
    if (decide) {
      result.decisions = {.tokens = {tokens.data(), {b, 1, heads, n}},
                          .weights = {weights.data(), {b, 1, heads, n}},
                          .counts = {counts.data(), {b, 1, heads}}};
    }
    const status s = attend(tensor_view<const float, 4>(q.data(), {b, 1, heads, d}), result,
                            draw_key{.layer = 3, .sequences = keys});
    CAPTURE(s.message());
    REQUIRE(s.ok());
    std::vector<answer> all(who.size());
    for (std::size_t i = 0; i < count; ++i) {
      answer& a = all[i / heads];
      a.output.insert(a.output.end(), &output[i * d], &output[i * d] + d);
      a.lse.push_back(lse[i]);
      a.certificates.push_back(certificates[i]);
      if (!decide) continue;
      a.counts.push_back(counts[i]);
      a.tokens.insert(a.tokens.end(), &tokens[i * capacity], &tokens[i * capacity] + counts[i]);
      a.weights.insert(a.weights.end(), &weights[i * capacity], &weights[i * capacity] + counts[i]);
    }
    return all;
  }
};

/// Of one layout: `with(batch, f)` calls f(cache).
struct padded {
  template <class F>
  auto with(const batch& b, F&& f) const {
    std::vector<float> k(static_cast<std::size_t>(b.size() * kv_heads * b.n * d)), v(k.size());
    for (index_t i = 0; i < b.size(); ++i) {
      for (index_t h = 0; h < kv_heads; ++h) {
        const request& r = *b.who[static_cast<std::size_t>(i)];
        std::copy_n(r.key(h, 0), r.n * d, &k[static_cast<std::size_t>((i * kv_heads + h) * b.n * d)]);
        std::copy_n(r.value(h, 0), r.n * d, &v[static_cast<std::size_t>((i * kv_heads + h) * b.n * d)]);
      }
    }
    return f(padded_kv(k.data(), v.data(),
                       {.n_batch = b.size(), .n_kv_heads = kv_heads, .n_tokens = b.n, .dk = d, .dv = d},
                       b.lengths.data()));
  }
};
struct paged {
  static constexpr index_t most = longest_tokens / block + 1, pool = 6 * most;
  std::vector<float> kv = std::vector<float>(static_cast<std::size_t>(2 * pool * block * kv_heads * d));

  void write(const request& r, index_t from) {
    for (index_t t = from; t < r.n; ++t) {
      for (index_t h = 0; h < kv_heads; ++h) {
        const index_t cell = ((r.blocks[static_cast<std::size_t>(t / block)] * block + t % block) * kv_heads + h) * d;
        std::copy_n(r.key(h, t), d, &kv[static_cast<std::size_t>(cell)]);
        std::copy_n(r.value(h, t), d, &kv[static_cast<std::size_t>(pool * block * kv_heads * d + cell)]);
      }
    }
  }
  template <class F>
  auto with(const batch& b, F&& f) const {
    std::vector<std::int32_t> table(static_cast<std::size_t>(b.size() * most));
    for (index_t i = 0; i < b.size(); ++i) {
      const std::vector<std::int32_t>& own = b.who[static_cast<std::size_t>(i)]->blocks;
      std::copy(own.begin(), own.end(), table.begin() + i * most);
    }
    return f(vllm_kv(kv.data(), vllm_blocks{.n_blocks = pool,
                                            .block_size = block,
                                            .n_kv_heads = kv_heads,
                                            .d = d,
                                            .n_batch = b.size(),
                                            .max_blocks = most,
                                            .block_table = table.data(),
                                            .seq_lens = b.lengths.data()}));
  }
};

/// The indices of a batch, in the order of its slots.
template <class Index>
std::vector<Index> indices(const batch& b) {
  std::vector<Index> all;
  for (const request* r : b.who) {
    for (index_t h = 0; h < kv_heads; ++h) {
      Index& index = all.emplace_back(d, static_cast<std::uint64_t>(h));
      for (index_t t = 0; t < r->n; ++t) index.append(std::span<const float>(r->key(h, t), d));
    }
  }
  return all;
}

using codes2 = sketch::key_codes<2>;
using codes4 = sketch::key_codes<4>;
using codes8 = sketch::key_codes<8>;
struct importance : default_policy {
  using selector = select::indexed<codes4>;
  using sampler = sample::by_importance;
};
struct group_importance : importance {
  using sampler = sample::by_group_importance;
};
struct two_phases : default_policy {
  using selector = select::two_phase<codes2, codes4>;
  using sampler = sample::in_two_phases;
};
using certified = certified_policy<codes8>;

const config settings{.epsilon = 0.2, .delta = 0.1, .sinks = 8, .window = 8};

/// Requests come, go, and change places; each step of each is compared with the request alone.
/// attend(batch, cache, query, result, key, workspace).
template <class Attend>
void serve(Attend&& attend, bool decide = true) {
  std::mt19937 random(5);
  std::vector<request> all;
  for (unsigned r = 0; r < 6; ++r) all.emplace_back(r, std::min<index_t>(longest_tokens - 20, 40 + 500 * r));
  paged pages;
  std::vector<std::int32_t> order(paged::pool);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (std::size_t i = 0; i < order.size(); ++i) all[i % 6].blocks.push_back(order[i]);
  for (const request& r : all) pages.write(r, 0);
  const padded dense;
  index_t sampled = 0;
  for (int step = 0; step < 4; ++step) {
    std::vector<const request*> active;
    for (request& r : all) {
      if (random() % 4 != 0) active.push_back(&r);
    }
    if (active.empty()) active.push_back(&all[5]);
    std::shuffle(active.begin(), active.end(), random);
    const batch together(active);
    const auto ask = [&](const batch& b, const auto& layout) {
      return layout.with(b, [&](const auto& cache) {
        workspace memory;
        return b.run([&](const auto& q, const attention_result& r,
                         const draw_key& key) { return attend(b, cache, q, r, key, memory); },
                     decide);
      });
    };
    const std::vector<answer> in_rows = ask(together, dense), in_pages = ask(together, pages);
    for (std::size_t i = 0; i < active.size(); ++i) {
      CAPTURE(step, i, active[i]->seed, active[i]->n);
      const batch alone({active[i]});
      CHECK(same(in_rows[i], ask(alone, dense)[0]));
      CHECK(same(in_pages[i], ask(alone, pages)[0]));
      for (const certificate& c : in_rows[i].certificates) sampled += c.exact() ? 0 : 1;
    }
    for (request& r : all) {
      if (std::find(active.begin(), active.end(), &r) == active.end()) continue;
      ++r.n, ++r.step;
      pages.write(r, r.n - 1);
    }
  }
  if (decide) CHECK(sampled > 8);  // else nothing was drawn, and nothing shown
}

template <class Policy, class Select>
void serve_policy(Select&& select) {
  serve([&](const batch& b, const auto& cache, const auto& q, const attention_result& r, const draw_key& key,
            workspace& memory) {
    return select(b, [&](const typename Policy::selector& selector) {
      thread_executor threads(2);
      return vattention<Policy>(settings, selector)(q, cache, {.scale = 0.25f}, r, memory, key, threads);
    });
  });
}

}  // namespace

TEST_CASE("batching: uniform sampling", "[batching]") {
  serve_policy<ranked_policy>([](const batch&, auto&& run) { return run({}); });
}

TEST_CASE("batching: importance sampling, by head and by group", "[batching]") {
  const auto with_codes = [](const batch& b, auto&& run) {
    const std::vector<codes4> codes = indices<codes4>(b);
    return run({codes});
  };
  serve_policy<importance>(with_codes);
  serve_policy<group_importance>(with_codes);
}

TEST_CASE("batching: two phases", "[batching]") {
  serve_policy<two_phases>([](const batch& b, auto&& run) {
    const std::vector<codes2> coarse = indices<codes2>(b);
    const std::vector<codes4> fine = indices<codes4>(b);
    return run({{coarse}, {fine}});
  });
}

TEST_CASE("batching: certified", "[batching]") {
  serve_policy<certified>([](const batch& b, auto&& run) {
    const std::vector<codes8> codes = indices<codes8>(b);
    return run({std::span<const codes8>(codes)});
  });
}

TEST_CASE("batching: exact attention", "[batching]") {
  serve([](const batch&, const auto& cache, const auto& q, const attention_result& r, const draw_key&,
           workspace& memory) { return exact_attention(q, cache, {.scale = 0.25f}, r, memory); },
        false);
}

TEST_CASE("batching: without keys of sequences a slot changes nothing either", "[batching]") {
  const request one(3, 2000), other(4, 1500);
  const auto ask = [&](std::vector<const request*> who, std::size_t slot) {
    const batch b(std::move(who));
    return padded{}.with(b, [&](const auto& cache) {
      workspace memory;
      return b.run(
          [&](const auto& q, const attention_result& r, const draw_key&) {
            return vattention<ranked_policy>(settings)(q, cache, {.scale = 0.25f}, r, memory, {.seed = 9, .step = 4});
          },
          true)[slot];
    });
  };
  const answer alone = ask({&one}, 0);
  CHECK(same(alone, ask({&one, &other}, 0)));
  CHECK(same(alone, ask({&other, &one}, 1)));
}

TEST_CASE("batching: heads of a shard draw as heads of the model", "[batching]") {
  const request one(3, 2000);
  const batch b({&one});
  padded{}.with(b, [&](const auto& cache) {
    workspace memory;
    const std::vector<answer> whole = b.run(
        [&](const auto& q, const attention_result& r, const draw_key& key) {
          return vattention<ranked_policy>(settings)(q, cache, {.scale = 0.25f}, r, memory, key);
        },
        false);
    // The second KV head with its two query heads.
    std::vector<float> output(2 * d);
    const auto shard = contiguous_kv(one.key(1, 0), one.value(1, 0), {.n_tokens = one.n, .dk = d, .dv = d});
    const sequence_key key{.seed = one.seed, .step = one.step};
    REQUIRE(vattention<ranked_policy>(settings)(tensor_view<const float, 4>(b.q.data() + 2 * d, {1, 1, 2, d}), shard,
                                                {.scale = 0.25f}, {.output = {output.data(), {1, 1, 2, d}}}, memory,
                                                {.layer = 3, .sequences = {&key, 1}, .first_head = 2})
                .ok());
    CHECK(std::equal(output.begin(), output.end(), whole[0].output.begin() + 2 * d));
    return 0;
  });
}

TEST_CASE("batching: several queries draw as one at a time", "[batching]") {
  const request one(7, 2000);
  const index_t n = one.n;
  workspace memory;
  const auto ask = [&](index_t tokens, index_t first, index_t queries, std::uint32_t step) {
    std::vector<float> output(static_cast<std::size_t>(queries * heads * d)), k, v;
    for (index_t h = 0; h < kv_heads; ++h) {
      k.insert(k.end(), one.key(h, 0), one.key(h, tokens));
      v.insert(v.end(), one.value(h, 0), one.value(h, tokens));
    }
    REQUIRE(vattention<ranked_policy>(settings)(
                tensor_view<const float, 4>(one.q.data() + first * heads * d, {1, queries, heads, d}),
                contiguous_kv(k.data(), v.data(), {.n_kv_heads = kv_heads, .n_tokens = tokens, .dk = d, .dv = d}),
                {.scale = 0.25f, .causal = true}, {.output = {output.data(), {1, queries, heads, d}}}, memory,
                {.seed = 1, .step = step})
                .ok());
    return output;
  };
  std::vector<float> each = ask(n - 1, 0, 1, 7);
  const std::vector<float> last = ask(n, 1, 1, 8);
  each.insert(each.end(), last.begin(), last.end());
  CHECK(ask(n, 0, 2, 7) == each);
}

TEST_CASE("batching: keys that do not fit the call", "[batching]") {
  const request one(3, 300), other(4, 200);
  const batch b({&one, &other});
  padded{}.with(b, [&](const auto& cache) {
    std::vector<float> output(2 * heads * d);
    workspace memory;
    const auto why = [&](const draw_key& key) {
      const status s = vattention<ranked_policy>(settings)(tensor_view<const float, 4>(b.q.data(), {2, 1, heads, d}),
                                                           cache, {.scale = 0.25f},
                                                           {.output = {output.data(), {2, 1, heads, d}}}, memory, key);
      CHECK(s.code() == errc::invalid_argument);
      return std::string(s.message());
    };
    const std::vector<sequence_key> keys(3);
    CHECK(contains(why({.sequences = {keys.data(), 3}}), "keys of 3 sequences, q has n_batch 2"));
    CHECK(contains(why({.sequences = {keys.data(), 1}}), "give one for each, or none"));
    CHECK(contains(why({.layer = 1u << 24}), "layers end at 2^24"));
    CHECK(contains(why({.first_head = 65533}), "query heads 65533 to 65536"));
    return 0;
  });
}
