// Exact attention by itself, over every layout, in the library's own types.
#include "product/policies.hpp"

namespace vattn::product {

namespace {

template <class Q, class KV>
void exactly(const KV& cache, call& c) {
  const auto kind = static_cast<executor_kind>(c.of[executor_axis]);
  const tensor_view<const Q, 4> q = c.query<Q>();
  chosen_executor exec(kind);
  const auto attempt = [&](workspace& memory) {
    return exact_attention(q, cache, c.options, c.results.view(), memory, exec);
  };
  workspace memory;
  c.returned = c.of[workspace_axis] == one_byte_short
                   ? with_short_workspace(c, std::numeric_limits<std::size_t>::max(), attempt)
                   : attempt(memory);
  if (!c.returned || kind == serial) return;
  if (const status s = exact_attention(q, cache, c.options, c.again.view(), memory); !s)
    c.wrong.push_back(std::string("one thread alone: ") + s.message());
}

void run(call& c) {
  bool done = false;
  with_types(c.of, [&](auto l, auto e) {
    if constexpr (own_types(0, l.value, e.value)) {
      if (c.of[query_axis] != 0) return;
      done = true;
      with_layout<l.value, e.value>(c.of, c.rows, [&](const auto& cache, const row_order& order) {
        c.order = order;
        exactly<float>(cache, c);
      });
    }
  });
  if (done) return;
  with_any_cache(c, [&](const any_kv& cache) {
    if (refused_for_order(cache, c)) return;
    if (c.of[query_axis] == 0) return exactly<float>(cache, c);
    c.of[query_axis] == 1 ? exactly<Eigen::half>(cache, c) : exactly<Eigen::bfloat16>(cache, c);
  });
}

}  // namespace

void add_exact(policy_list& to) { to.push_back({.name = "exact_attention", .kind = family::exact, .run = run}); }

}  // namespace vattn::product
