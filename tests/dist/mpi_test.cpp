// Ranks that are processes: run by mpirun with any number of them. Exits with 1 where something is not as it must be.
#include "vattn/dist/mpi.hpp"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "vattn/dist/merge.hpp"
#include "vattn/dist/sharded_attention.hpp"
#include "vattn/exact_attention.hpp"

namespace {

using namespace vattn;

int failures = 0;
void check(bool ok, const char* what, const char* more = "") {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "failed: %s %s\n", what, more);
}

// The whole, which every process makes alike, and the rank's part of it.
struct cache {
  static constexpr index_t n = 16001, heads = 4, dim = 32;
  cache() : q(static_cast<std::size_t>(heads * dim)), k(static_cast<std::size_t>(n * dim)), v(k.size()) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (float& x : q) x = 2 * normal(random);
    for (float& x : k) x = normal(random);
    for (float& x : v) x = normal(random) + 1;
  }
  [[nodiscard]] tensor_view<const float, 4> query() const { return {q.data(), {1, 1, heads, dim}}; }
  [[nodiscard]] static kv_view<float> view(const std::vector<float>& k, const std::vector<float>& v) {
    return contiguous_kv(k.data(), v.data(),
                         {.n_kv_heads = 1, .n_tokens = static_cast<index_t>(k.size()) / dim, .dk = dim, .dv = dim});
  }
  void take(index_t i, std::vector<float>& to_k, std::vector<float>& to_v) const {
    to_k.insert(to_k.end(), k.begin() + i * dim, k.begin() + (i + 1) * dim);
    to_v.insert(to_v.end(), v.begin() + i * dim, v.begin() + (i + 1) * dim);
  }
  std::vector<float> q, k, v;
};

// Every rank has what rank 0 has.
bool everywhere(dist::mpi_communicator& comm, const std::vector<float>& mine) {
  std::vector<float> all(mine.size() * static_cast<std::size_t>(comm.size()));
  if (!comm.all_gather(std::as_bytes(std::span(mine)), std::as_writable_bytes(std::span(all)))) return false;
  for (std::size_t at = 0; at < all.size(); at += mine.size()) {
    if (std::memcmp(all.data(), all.data() + at, mine.size() * sizeof(float)) != 0) return false;
  }
  return true;
}

double error(const std::vector<float>& output, const std::vector<float>& exact, index_t h) {
  double off = 0, norm = 0;
  for (index_t j = h * cache::dim; j < (h + 1) * cache::dim; ++j) {
    const auto i = static_cast<std::size_t>(j);
    off += std::pow(double{output[i]} - double{exact[i]}, 2), norm += std::pow(double{exact[i]}, 2);
  }
  return std::sqrt(off / norm);
}

void run() {
  dist::mpi_communicator comm;
  const int rank = comm.rank(), size = comm.size();
  const cache all;
  const std::array<index_t, 4> shape{1, 1, cache::heads, cache::dim};
  const std::array<index_t, 3> rows{1, 1, cache::heads};
  attention_options options;
  options.scale = 1 / std::sqrt(static_cast<float>(cache::dim));
  workspace memory;
  std::vector<float> exact(all.q.size()), output(exact.size()), lse(cache::heads);
  check(
      exact_attention(all.query(), cache::view(all.k, all.v), options, {.output = {exact.data(), shape}}, memory).ok(),
      "exact");
  std::vector<certificate> certificates(cache::heads);
  const attention_result result{{output.data(), shape}, {lse.data(), rows}, {certificates.data(), rows}};

  for (const dist::split how : {dist::split::round_robin, dist::split::blocks}) {
    std::vector<float> k, v;
    for (index_t i = 0; i < cache::n; ++i) {
      const index_t owner = how == dist::split::round_robin ? i % size : i * size / cache::n;
      if (owner == rank) all.take(i, k, v);
    }
    const kv_view<float> shard = cache::view(k, v);
    std::vector<kv_index> index;
    index.emplace_back(index_shape{.dk = cache::dim, .dv = cache::dim});
    check(index[0].build(shard).ok(), "index");

    // Dense shards.
    status s = dist::sharded_attention<>({}, {}, how)(all.query(), shard, options, result, memory, comm);
    check(s.ok(), "dense shards:", s.message());
    for (index_t h = 0; h < cache::heads; ++h) check(error(output, exact, h) < 1e-5, "dense shards are the whole");
    check(everywhere(comm, output), "dense shards: the same bits");
    s = exact_attention(all.query(), shard, options, result, memory);
    s = dist::merge_outputs(result.output, result.log_sum_exp, memory, comm, s);
    check(s.ok(), "merge:", s.message());
    for (index_t h = 0; h < cache::heads; ++h) check(error(output, exact, h) < 1e-5, "merged outputs are the whole's");

    // Samples.
    config settings;
    settings.epsilon = 0.1, settings.delta = 0.1, settings.sinks = 16, settings.window = 16;
    const dist::sharded_attention<> attend(settings, index, how);
    int failed = 0, sampled = 0;
    constexpr std::uint32_t draws = 50;
    for (std::uint32_t d = 0; d < draws; ++d) {
      dist::traffic cost;
      s = attend(all.query(), shard, options, result, memory, comm, {.seed = 3, .step = d}, serial_executor{}, &cost);
      check(s.ok(), "sampled shards:", s.message());
      for (index_t h = 0; h < cache::heads; ++h) {
        failed += error(output, exact, h) > settings.epsilon;
        sampled += !certificates[static_cast<std::size_t>(h)].exact();
        check(certificates[static_cast<std::size_t>(h)].shards == size, "the certificate says the shards");
      }
      check(everywhere(comm, output), "samples: the same bits");
      check(cost.bytes_sent < static_cast<std::size_t>(cost.exchanges) * 24000, "few bytes");
    }
    // Of 200 at δ = 0.1, 45 or more would be seen once in ten thousand runs, were all dependent no more than this.
    check(failed < 45, "failures");
    check(sampled > 150, "samples");

    // One rank's mistake is everyone's.
    settings.epsilon = rank == size - 1 ? 2 : 0.1;
    s = dist::sharded_attention<>(settings, index, how)(all.query(), shard, options, result, memory, comm);
    check(!s.ok() && std::string(s.message()).find("epsilon is 2") != std::string::npos,
          "a mistake is told:", s.message());
    const draw_key key{.step = static_cast<std::uint32_t>(rank == size - 1 ? 1 : 0)};
    s = attend(all.query(), shard, options, result, memory, comm, key);
    check(size == 1 || std::string(s.message()).find("another draw key") != std::string::npos,
          "a key that differs:", s.message());
    if (rank == 0)
      std::printf("%s over %d ranks: %d of %d sampled, %d failures\n",
                  how == dist::split::blocks ? "blocks" : "round robin", size, sampled, 4 * static_cast<int>(draws),
                  failed);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (MPI_Init(&argc, &argv) != MPI_SUCCESS) return 2;
  run();
  int all = 0;
  MPI_Allreduce(&failures, &all, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
  MPI_Finalize();
  return all == 0 ? 0 : 1;
}
