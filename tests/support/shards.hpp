// A problem's cache cut into shards, and its call on as many threads as there are ranks.
#pragma once

#include <cstring>
#include <functional>
#include <numeric>
#include <thread>

#include "support/problem.hpp"
#include "vattn/dist/sharded_attention.hpp"
#include "vattn/dist/threads.hpp"

namespace vattn::test {

/// `rank_of(token)` says who has a token; each rank keeps them in order.
template <class T>
struct shards {
  shards(const problem<T>& p, int ranks, const std::function<int(index_t)>& rank_of) {
    tokens.resize(static_cast<std::size_t>(ranks));
    for (index_t i = 0; i < p.s.n; ++i) tokens[static_cast<std::size_t>(rank_of(i))].push_back(i);
    for (const std::vector<index_t>& mine : tokens) {
      const auto rows = [&](const std::vector<T>& from, index_t width) {
        std::vector<T> to;
        for (index_t head = 0; head < p.s.batch * p.s.kv_heads; ++head) {
          for (const index_t i : mine) {
            const auto at = from.begin() + (head * p.s.n + i) * width;
            to.insert(to.end(), at, at + width);
          }
        }
        to.resize(to.size() + 1);  // not null, where there are no rows
        return to;
      };
      k.push_back(rows(p.k, p.s.dk));
      v.push_back(rows(p.v, p.s.dv));
      shape.push_back(p.cache_shape());
      shape.back().n_tokens = static_cast<index_t>(mine.size());
      std::vector<std::int32_t> at;
      for (index_t b = 0; b < p.s.batch; ++b) at.insert(at.end(), mine.begin(), mine.end());
      at.resize(at.size() + 1);
      positions.push_back(at);
      // Each query stands where it does in the whole.
      std::vector<std::int32_t> queries;
      for (index_t b = 0; b < p.s.batch; ++b) {
        for (index_t t = 0; t < p.s.queries; ++t) queries.push_back(static_cast<std::int32_t>(p.s.n - p.s.queries + t));
      }
      query_positions.push_back(queries);
    }
  }
  [[nodiscard]] int ranks() const { return static_cast<int>(tokens.size()); }
  [[nodiscard]] kv_view<T> view(int r) const {
    const auto i = static_cast<std::size_t>(r);
    return contiguous_kv(k[i].data(), v[i].data(), shape[i]);
  }
  /// For split::by_position.
  [[nodiscard]] cell_positions places(int r) const {
    const auto i = static_cast<std::size_t>(r);
    const index_t batch = shape[i].n_batch;
    return {{positions[i].data(), {batch, shape[i].n_tokens}},
            {query_positions[i].data(), {batch, static_cast<index_t>(query_positions[i].size()) / batch}}};
  }
  [[nodiscard]] std::vector<kv_index> index(int r, int bits = 2) const {
    std::vector<kv_index> all;
    const kv_view<T> cache = view(r);
    for (index_t b = 0; b < cache.n_batch(); ++b) {
      all.emplace_back(index_shape{.n_kv_heads = cache.n_kv_heads(), .dk = cache.dk(), .dv = cache.dv(), .bits = bits});
      const status s = all.back().build(cache, b);
      if (!s) std::abort();
    }
    return all;
  }

  std::vector<std::vector<index_t>> tokens;
  std::vector<std::vector<T>> k, v;
  std::vector<kv_shape> shape;
  std::vector<std::vector<std::int32_t>> positions, query_positions;
};

/// `f(communicator)` on a thread for each rank; what each returns.
template <class F>
std::vector<status> on_ranks(int ranks, F&& f) {
  dist::thread_group group(ranks, std::chrono::seconds(20));
  std::vector<status> all(static_cast<std::size_t>(ranks));
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      dist::thread_rank comm(group, r);
      all[static_cast<std::size_t>(r)] = f(comm);
    });
  }
  for (std::thread& t : threads) t.join();
  return all;
}

/// The same bits: outputs, log-sum-exps and what certificates say.
inline bool same(const results& a, const results& b) {
  const auto bytes = [](const auto& x) { return x.size() * sizeof(x[0]); };
  if (std::memcmp(a.output.data(), b.output.data(), bytes(a.output)) != 0) return false;
  if (std::memcmp(a.log_sum_exp.data(), b.log_sum_exp.data(), bytes(a.log_sum_exp)) != 0) return false;
  for (std::size_t i = 0; i < a.certificates.size(); ++i) {
    const certificate &x = a.certificates[i], &y = b.certificates[i];
    if (x.n != y.n || x.rows_exact != y.rows_exact || x.rows_sampled != y.rows_sampled || x.rounds != y.rounds ||
        x.shards != y.shards || x.breaches != y.breaches || x.epsilon_achieved != y.epsilon_achieved ||
        x.denominator_error != y.denominator_error || x.promise != y.promise || x.log_denominator != y.log_denominator)
      return false;
  }
  return true;
}

}  // namespace vattn::test
