// Saved indices of any bytes: refused, or an index that scores, grows, shrinks and is saved like any other.
#include <cmath>
#include <vattn/vattn.hpp>
#include <vector>

#include "bytes.hpp"
#include "require.hpp"

namespace {

using vattn::index_t;
using vattn::fuzz::require;

template <class Index>
void check(std::span<const std::byte> content) {
  Index index;
  if (const vattn::status s = vattn::load(content, index); !s.ok()) {
    require(index.size() == 0 && s.message()[0] != '\0', "a refused file changes nothing, and says why");
    return;
  }
  const std::vector<std::byte> saved = vattn::save(index);
  Index again;
  require(vattn::load(saved, again).ok() && again.size() == index.size(), "what was loaded can be saved and loaded");

  const index_t n = index.size();
  if (index.dim() <= 0 || index.dim() > 4096 || n > 100000 || index.scratch_size() > std::size_t{1} << 24) return;
  const std::vector<float> query(static_cast<std::size_t>(index.dim()), 0.5f);
  std::vector<float> scratch(index.scratch_size());
  const auto score = [&] {
    std::vector<float> scores(static_cast<std::size_t>(index.size())), errors(Index::estimates ? scores.size() : 0);
    index.score(query.data(), 0, scores, errors, scratch);
  };
  score();
  index.append(std::span<const float>(query));
  require(index.size() == n + 1, "a loaded index takes the next key");
  scratch.resize(index.scratch_size());
  score();
  index.truncate(n / 2);
  require(index.size() == n / 2, "and forgets the last ones");
  score();
  require(vattn::load(vattn::save(index), again).ok(), "and is saved again");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace select = vattn::select;
  namespace sketch = vattn::sketch;
  vattn::fuzz::bytes in(data, size);
  const auto which = in.between(0, 10);
  const std::span<const std::byte> content = std::as_bytes(in.rest());
  switch (which) {
    case 0:
      return check<sketch::key_codes<1>>(content), 0;
    case 1:
      return check<sketch::key_codes<2>>(content), 0;
    case 2:
      return check<sketch::key_codes<4>>(content), 0;
    case 3:
      return check<sketch::key_codes<8>>(content), 0;
    case 4:
      return check<sketch::product_codes>(content), 0;
    case 5:
      return check<select::pq_cache>(content), 0;
    case 6:
      return check<select::quest>(content), 0;
    case 7:
      return check<select::double_sparsity>(content), 0;
    case 8:
      return check<select::hash_attention<select::simhash_map>>(content), 0;
    case 9:
      return check<select::magic_pig>(content), 0;
    default:
      return check<select::socket>(content), 0;
  }
}
