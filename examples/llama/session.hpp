// A context that has been prefilled, from the model or from a file that an earlier run has left.
#pragma once

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "llama/decode.hpp"
#include "support/atomic_file.hpp"
#include "vattn/base/archive.hpp"

namespace vattn::llama {

/// What is saved of a prefill. archivable: vattn/base/archive.hpp.
struct saved_prefill {
  std::uint64_t model = 0, tokens = 0;  // fingerprints
  std::uint64_t type = 0, layers = 0, n = 0;
  double seconds = 0;           // that it took
  std::vector<float> hidden;    // the last token's residual stream
  std::vector<std::byte> rows;  // layer by layer, as layer_cache::save writes them
  std::uint64_t rows_fingerprint = 0;

  static constexpr std::string_view format() noexcept { return "llama prefill 1"; }
  template <class Archive>
  void archive(Archive& a) {
    a(model, tokens, type, layers, n, seconds, hidden, rows, rows_fingerprint);
  }
  [[nodiscard]] bool valid() const { return rows_fingerprint == fingerprint_of(rows); }
  [[nodiscard]] static std::uint64_t fingerprint_of(std::span<const std::byte> bytes) {
    fingerprint f;
    f.add(bytes.data(), bytes.size());
    return f.value();
  }
};

/// Caches with a context in them.
struct context {
  std::vector<layer_cache> caches;
  index_t n = 0;
  double prefill_seconds = 0;  // also of one that was loaded: what it took when it was made
  bool loaded = false;
  matrix last;  // residual stream of its last token, [hidden, 1]
};

namespace detail {

[[nodiscard]] inline bool load_context(const std::filesystem::path& path, const model& m, std::uint64_t tokens,
                                       cache_type type, context& c) {
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) return false;
  const auto complain = [&](const std::string& what) {
    std::fprintf(stderr, "llama: %s: %s: made again\n", path.string().c_str(), what.c_str());
    return false;
  };
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  if (!in) return complain("cannot be opened");
  std::vector<std::byte> bytes(static_cast<std::size_t>(std::max<std::streamoff>(0, in.tellg())));
  in.seekg(0);
  in.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (!in) return complain("cannot be read");
  saved_prefill s;
  if (const status st = vattn::load(bytes, s); !st) return complain(st.message());
  const auto n = static_cast<std::uint64_t>(c.n);
  if (s.model != m.fingerprint || s.tokens != tokens || s.type != static_cast<std::uint64_t>(type) || s.n != n)
    return complain("of another model, context or cache type");
  const std::size_t each = c.caches.front().bytes(c.n);
  if (s.layers != c.caches.size() || s.rows.size() != each * c.caches.size() ||
      s.hidden.size() != static_cast<std::size_t>(m.config.hidden))
    return complain("of other sizes than the model");
  for (std::size_t l = 0; l < c.caches.size(); ++l) c.caches[l].load(std::span(s.rows).subspan(l * each, each), c.n);
  c.last = Eigen::Map<const matrix>(s.hidden.data(), m.config.hidden, 1);
  c.prefill_seconds = s.seconds;
  return c.loaded = true;
}

}  // namespace detail

/// Prefills `tokens`, with room for `more`; with a folder `saved` takes the result from there, or leaves it there.
[[nodiscard]] inline context make_context(const model& m, std::span<const std::int32_t> tokens, index_t more,
                                          cache_type type, thread_pool& pool, const std::filesystem::path& saved,
                                          const std::string& label) {
  context c;
  c.n = static_cast<index_t>(tokens.size());
  c.caches = make_caches(m.config, type, c.n + more);
  fingerprint of_tokens;
  of_tokens.add(tokens.data(), tokens.size_bytes());
  std::filesystem::path path;
  if (!saved.empty()) {
    char name[80];
    std::snprintf(name, sizeof name, "%016llx-%016llx.%s", static_cast<unsigned long long>(m.fingerprint),
                  static_cast<unsigned long long>(of_tokens.value()), to_string(type));
    path = saved / name;
    if (detail::load_context(path, m, of_tokens.value(), type, c)) return c;
  }
  const auto start = decode_clock::now();
  const matrix x = prefill(m, tokens, c.caches, pool, label);
  c.last = x.rightCols(1);
  c.prefill_seconds = seconds_since(start);
  if (path.empty()) return c;

  saved_prefill s{.model = m.fingerprint,
                  .tokens = of_tokens.value(),
                  .type = static_cast<std::uint64_t>(type),
                  .layers = c.caches.size(),
                  .n = tokens.size(),
                  .seconds = c.prefill_seconds,
                  .hidden = std::vector<float>(c.last.data(), c.last.data() + c.last.size()),
                  .rows = {}};
  s.rows.reserve(c.caches.size() * c.caches.front().bytes(c.n));
  for (const layer_cache& cache : c.caches) cache.save(s.rows);
  s.rows_fingerprint = saved_prefill::fingerprint_of(s.rows);
  support::atomic_file file(path);
  const std::vector<std::byte> bytes = save(s);
  file.write(bytes.data(), bytes.size());
  file.commit();
  return c;
}

}  // namespace vattn::llama
