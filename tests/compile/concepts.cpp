// What models which concept, decided by the compiler.
#include <string_view>
#include <type_traits>
#include <vattn/vattn.hpp>
#include <vector>

#include "mixes.hpp"

namespace {

using namespace vattn;

// Views are cheap to copy and own nothing.
static_assert(std::is_trivially_copyable_v<kv_view<float>>);
static_assert(std::is_trivially_copyable_v<kv_head_view<Eigen::half, float, 64, 64>>);
static_assert(std::is_trivially_copyable_v<tensor_view<float, 4>>);
static_assert(std::is_trivially_copyable_v<certificate>);
static_assert(std::is_trivially_copyable_v<config>);
static_assert(!std::is_copy_constructible_v<workspace>);
static_assert(std::is_nothrow_move_constructible_v<workspace>);

// Caches and rows.
static_assert(kv_cache<kv_view<float>>);
static_assert(kv_cache<kv_view<Eigen::half, Eigen::bfloat16, 576, 512>>);
static_assert(kv_head<kv_head_view<float, float, dynamic, dynamic>>);
using paged_view = flashinfer_kv<plain_rows<Eigen::half, 128>, plain_rows<Eigen::half, 128>>;
static_assert(std::is_trivially_copyable_v<paged_view> && kv_cache<paged_view>);
static_assert(kv_head_with_value_norms<decltype(paged_view().head(0, 0))>);
static_assert(kv_cache<ggml_cache<quantised_rows<kernel::q8_0_block>, grouped_rows<float>>>);
static_assert(kv_cache<vllm_view<e4m3_rows>> && kv_cache<gemma_cpp_view<>>);
static_assert(row_format<quantised_rows<kernel::q4_0_block>> && !row_format<kernel::q4_0_block>);
static_assert(cell_places<ring_sequence> && cell_places<page_lists> && !cell_places<paged_sequence>);
static_assert(executor<const own_share>);
static_assert(kv_head_with_value_norms<kv_head_view<float, float, dynamic, dynamic>>);
static_assert(kv_head<detail::any_head>);
static_assert(!kv_head_with_value_norms<detail::any_head>);
static_assert(!kv_head<int>);
static_assert(!kv_cache<std::vector<float>>);
static_assert(kernel::row<std::span<const float>>);
static_assert(kernel::row<std::span<const Eigen::bfloat16, 64>>);
static_assert(!kernel::row<std::span<const double>>);
static_assert(!kernel::element<int>);
static_assert(!kernel::element<double>);

// Slots of a policy.
static_assert(bound<budget::clt> && bound<budget::student> && bound<budget::hoeffding> && bound<budget::bernstein>);
static_assert(!bound<budget::output>);
static_assert(target_for<budget::denominator, budget::clt> && target_for<budget::output, budget::bernstein>);
static_assert(!target_for<budget::clt, budget::clt>);
// Each kind of evidence by bounds of its kind.
static_assert(stats::evidence_for<stats::evidence, budget::clt> &&
              stats::evidence_for<stats::evidence, budget::student>);
static_assert(stats::evidence_for<stats::uniform_ranges, budget::hoeffding> &&
              stats::evidence_for<stats::poisson_ranges, budget::bernstein>);
static_assert(!stats::evidence_for<stats::evidence, budget::bernstein> &&
              !stats::evidence_for<stats::uniform_ranges, budget::clt>);
static_assert(uniform_sampler<sample::uniform_without_replacement>);
static_assert(uniform_sampler<sample::uniform_with_replacement>);
static_assert(!uniform_sampler<random_stream>);
static_assert(executor<serial_executor> && executor<thread_executor>);
static_assert(!executor<int>);
static_assert(selector_for<select::none, query_row<detail::any_head>>);
static_assert(selector_for<select::top_p<>, query_row<kv_head_view<float, float, 8, 8>>>);
static_assert(!selector_for<select::exact_logits, query_row<detail::any_head>>);  // it counts no heavy places
static_assert(attention_policy<default_policy> && attention_policy<ranked_policy> && attention_policy<index_policy> &&
              attention_policy<verified_denominator> && attention_policy<verified_numerator> &&
              attention_policy<verified_sdpa>);

// Which slots go together: 14 selectors, 6 samplers, 4 bounds, 4 targets.
namespace mixes {
using namespace vattn::test;
constexpr serves no = serves::never, any = serves::all, asym = serves::asymptotic;
constexpr serves clt = serves::asymptotic_output, bern = serves::bernstein_output;
//                               uniform, importance, group, two phases, store
static_assert(mixes_are<ranks_nothing, any, no, no, no, clt>);
static_assert(mixes_are<ranks, any, no, no, no, no>);
static_assert(mixes_are<exact_estimates, any, clt, clt, no, no>);
static_assert(mixes_are<exact_mass, any, clt, clt, no, no>);
static_assert(mixes_are<exact_reach, any, no, no, no, no>);
static_assert(mixes_are<norm_reach, any, no, no, no, no>);
static_assert(mixes_are<norms, any, no, no, no, no>);
static_assert(mixes_are<estimates, any, clt, clt, no, no>);
static_assert(mixes_are<index_bounds, any, bern, no, no, no>);
static_assert(mixes_are<soft_bounds, asym, no, no, no, no>);
static_assert(mixes_are<soft_reach, asym, no, no, no, no>);
static_assert(mixes_are<hard, any, bern, no, no, no>);
static_assert(mixes_are<calibrated_ranks, any, clt, clt, no, no>);
static_assert(mixes_are<two, no, no, no, clt, no>);
static_assert(attention_policy<store_policy> && attention_policy<certified_policy<mix_codes>>);
}  // namespace mixes

// Rows that are in the order of their tokens, and those of a store.
static_assert(rows_in_order<kv_head_view<float, float, dynamic, dynamic>> && rows_in_order<detail::any_head>);
static_assert(!rows_in_order<store_head<float>>);

struct no_bound : default_policy {
  using bound = int;
};
static_assert(!attention_policy<no_bound>);
static_assert(!attention_policy<int>);

// Nothing throws on the way to a result.
using call_q = tensor_view<const float, 4>;
static_assert(noexcept(std::declval<const vattention<>&>()(std::declval<const call_q&>(),
                                                           std::declval<const kv_view<float>&>(), attention_options{},
                                                           attention_result{}, std::declval<workspace&>())));
static_assert(noexcept(exact_attention(std::declval<const call_q&>(), std::declval<const kv_view<float>&>(),
                                       attention_options{}, attention_result{}, std::declval<workspace&>())));
// A stateless functor costs its settings alone.
static_assert(sizeof(vattention<ranked_policy>) == sizeof(config));
// The default takes what a call may have: indices and memory, or nothing, and then with any bound and target.
template <class Bound, class Target>
struct default_with : default_policy {
  using bound = Bound;
  using target = Target;
};
static_assert(std::same_as<vattention<>, vattention<default_policy>> &&
              attention_policy<default_with<budget::bernstein, budget::output>> &&
              attention_policy<default_with<budget::student, budget::denominator>>);

// Randomness at compile time: the first known answer of Philox.
static_assert(philox4x32({0, 0, 0, 0}, {0, 0})[0] == 0x6627e8d5u);

// Feature macros are 0 or 1, the version is the project's.
static_assert(VATTN_CHECKS == 0 || VATTN_CHECKS == 1);
#define VATTN_TEXT_(x) #x
#define VATTN_TEXT(x) VATTN_TEXT_(x)
static_assert(std::string_view(VATTN_TEXT(VATTN_VERSION_MAJOR) "." VATTN_TEXT(VATTN_VERSION_MINOR) "." VATTN_TEXT(
                  VATTN_VERSION_PATCH)) == VATTN_PROJECT_VERSION);

}  // namespace
