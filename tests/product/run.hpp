// One call of the product: everything that it carries, and what came of it. Types of policies, caches and elements end
// in `perform`; what is checked of the outcome (check.cpp) knows none.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vattn/call/audit.hpp>
#include <vattn/plan.hpp>
#include <vattn/vattn.hpp>

#include "product/caches.hpp"
#include "product/erased.hpp"
#include "product/indices.hpp"
#include "vattn/kv/reference.hpp"

namespace vattn::product {

/// The results of a call, each in a buffer with room around it.
struct result_buffers {
  result_buffers() = default;
  result_buffers(const test::shape& s, const scenario& of);
  /// What the scenario asks for.
  [[nodiscard]] attention_result view() const;
  [[nodiscard]] float output(index_t b, index_t t, index_t h, index_t j) const { return output_(b, t, h, j); }
  [[nodiscard]] float lse(index_t b, index_t t, index_t h) const { return lse_(b, t, h); }
  [[nodiscard]] const certificate& certified(index_t b, index_t t, index_t h) const { return certificate_(b, t, h); }
  [[nodiscard]] const decision_result& decisions() const { return decisions_; }
  /// Nothing was written beside the results.
  [[nodiscard]] bool intact() const;
  /// The same bits.
  [[nodiscard]] bool operator==(const result_buffers& other) const;

 private:
  static constexpr float untouched = -12345;
  test::shape s_;
  bool wants_lse_ = false, wants_certificates_ = false;
  std::shared_ptr<std::vector<float>> floats_, weights_;
  std::shared_ptr<std::vector<std::int32_t>> integers_;
  std::shared_ptr<std::vector<certificate>> certificates_;
  tensor_view<float, 4> output_;
  tensor_view<float, 3> lse_;
  tensor_view<certificate, 3> certificate_;
  decision_result decisions_;
};

/// The scenario's executor, or one thread.
class chosen_executor {
 public:
  explicit chosen_executor(executor_kind kind) : kind_(kind) {}
  [[nodiscard]] index_t workers() const noexcept { return kind_ == serial ? 1 : 3; }
  template <class F>
  void for_each(index_t n, F&& f) {
    if (kind_ == serial) return serial_executor().for_each(n, f);
    in_parallel(n, [&f](index_t task, index_t worker) { f(task, worker); });
  }

 private:
  void in_parallel(index_t n,
                   const std::function<void(index_t, index_t)>& f);  // call.cpp: built with OpenMP, if there is
  executor_kind kind_;
};
static_assert(executor<chosen_executor> && !partial_executor<chosen_executor>);

/// The same, or one of several shares: for policies that are instantiated once.
class any_executor : public chosen_executor {
 public:
  explicit any_executor(executor_kind kind) : chosen_executor(kind) {}
  explicit any_executor(own_share share) : chosen_executor(serial), share_(share) {}
  [[nodiscard]] index_t workers() const noexcept { return share_ ? share_->workers() : chosen_executor::workers(); }
  [[nodiscard]] index_t share(index_t n) const noexcept { return share_ ? share_->share(n) : n; }
  template <class F>
  void for_each(index_t n, F&& f) {
    if (share_) return share_->for_each(n, f);
    chosen_executor::for_each(n, f);
  }

 private:
  std::optional<own_share> share_;
};
static_assert(partial_executor<any_executor>);

/// An auditor, or nobody.
struct any_observer {
  auditor* audit = nullptr;
  template <kv_head Head>
  void operator()(head_task<Head>& task) const noexcept {
    if (audit) (*audit)(task);
  }
};

/// What `perform` needs to know, and what it leaves.
struct call {
  explicit call(const scenario& s);

  scenario of;
  test::ragged<float> rows;  ///< as stored, once the cache is made
  std::vector<std::int32_t> cells, query_positions;
  std::vector<float> mask;
  std::vector<Eigen::half> half_mask;
  std::vector<float> slopes, sinks;
  attention_options options;
  config settings;
  std::vector<sequence_key> keys;
  draw_key key;
  row_order order;  ///< of the cache's rows

  // q in its element type, in a buffer of its own strides.
  std::vector<float> q32;
  std::vector<Eigen::half> q16;
  std::vector<Eigen::bfloat16> qb16;
  std::array<index_t, 4> q_extents{}, q_strides{};  ///< strides in elements

  result_buffers results, again;  ///< `again`: by one thread
  auditor audit{0};
  std::vector<std::string> wrong;  ///< what `perform` has seen itself
  status returned;

  template <class Q>
  [[nodiscard]] tensor_view<const Q, 4> query() const {
    const Q* first = nullptr;
    if constexpr (std::same_as<Q, float>) {
      first = q32.data();
    } else if constexpr (std::same_as<Q, Eigen::half>) {
      first = q16.data();
    } else {
      first = qb16.data();
    }
    const auto one = static_cast<index_t>(sizeof(Q));
    return {first, q_extents, {q_strides[0] * one, q_strides[1] * one, q_strides[2] * one, q_strides[3] * one}};
  }
  [[nodiscard]] plan_shape plan_for(index_t threads) const {
    const test::shape& s = rows.p.s;
    return {.n_batch = s.batch,
            .n_queries = s.queries,
            .n_q_heads = s.heads,
            .n_kv_heads = s.kv_heads,
            .max_tokens = s.n,
            .dk = s.dk,
            .dv = s.dv,
            .masked = options.mask || options.positions,
            .threads = threads};
  }
};

/// Calls with a workspace of the caller's: refused where it is a byte short, and with a message that names its size.
/// `attempt(workspace&) -> status`; `most`: what workspace_bytes() says.
[[nodiscard]] status with_short_workspace(call& c, std::size_t most, const std::function<status(workspace&)>& attempt);
/// The same for a plan's memory.
[[nodiscard]] status with_exact_memory(call& c, std::size_t bytes,
                                       const std::function<status(std::span<std::byte>)>& attempt);

template <class KV>
[[nodiscard]] decltype(auto) by_value(const KV& cache) {
  if constexpr (std::is_same_v<KV, interleaved_store<float>> || std::is_same_v<KV, interleaved_store<Eigen::half>> ||
                std::is_same_v<KV, interleaved_store<Eigen::bfloat16>> || std::is_same_v<KV, shuffled_store<float>> ||
                std::is_same_v<KV, shuffled_store<Eigen::half>> ||
                std::is_same_v<KV, shuffled_store<Eigen::bfloat16>>) {
    return kv_reference<KV>(cache);
  } else {
    return (cache);
  }
}

/// A cache whose rows are in no order says so by the type of its heads, which an erased one hides: that is asked.
template <class KV>
[[nodiscard]] bool refused_for_order(const KV& cache, call& c) {
  if constexpr (std::is_same_v<KV, any_kv>) {
    if (cache.in_order()) return false;
    c.returned = cache.check(c.options, c.results.view(), c.q_extents);
    return !c.returned;
  }
  return false;
}

/// `typed`: with the library's own executors and observers, as users have them; else with erased ones.
template <class Policy, class Q, bool typed, class KV>
void perform(const KV& given, call& c) {
  using cache_type = std::remove_cvref_t<decltype(by_value(given))>;
  const cache_type& cache = by_value(given);
  const test::shape& d = c.rows.p.s;
  const auto kind = static_cast<executor_kind>(c.of[executor_axis]);
  const indices<typename Policy::selector> index(cache, c.of.seed);
  const typename Policy::selector select = index.selector();
  const vattention<Policy> attend(c.settings, select);
  const tensor_view<const Q, 4> q = c.query<Q>();
  const bool watched = c.of[observer_axis] != nobody;
  any_observer observer{watched ? &c.audit : nullptr};
  if (refused_for_order(cache, c)) return;

  using executor_type = std::conditional_t<typed, chosen_executor, any_executor>;
  const auto once = [&](const attention_result& to, executor_type& exec, workspace& memory, bool audited) {
    if constexpr (typed) {
      return audited ? attend(q, cache, c.options, to, memory, c.key, exec, c.audit)
                     : attend(q, cache, c.options, to, memory, c.key, exec);
    } else {
      any_observer nobody_{};
      return attend(q, cache, c.options, to, memory, c.key, exec, audited ? observer : nobody_);
    }
  };

  if (kind >= one_share) {
    const index_t threads = kind == one_share ? 1 : 3;
    const attention_plan<Policy> p = plan<Policy>(c.plan_for(threads), c.settings, select);
    const run_arguments<Q, cache_type> arguments{q, cache, c.options, c.results.view(), c.key};
    c.returned = with_exact_memory(c, workspace_bytes(p), [&](std::span<std::byte> memory) {
      status worst;
      for (index_t ith = threads; ith-- > 0;) {  // in any order
        status s;
        if constexpr (typed) {
          s = run(p, arguments, memory, ith, threads, observer);
        } else {
          any_executor exec(own_share{ith, threads});
          s = run(p, arguments, memory, exec, observer);
        }
        if (!s) worst = s;
      }
      return worst;
    });
  } else {
    executor_type exec(kind);
    const bool masked = c.options.mask || c.options.positions;
    const auto attempt = [&](workspace& memory) { return once(c.results.view(), exec, memory, watched); };
    if (c.of[workspace_axis] == one_byte_short) {
      const std::size_t most = attend.workspace_bytes(d.n, d.dk, d.dv, masked, exec.workers());
      c.returned = with_short_workspace(c, most, attempt);
    } else {
      workspace memory;
      c.returned = attempt(memory);
    }
  }
  if (!c.returned || kind == serial) return;
  workspace memory;
  executor_type alone(serial);
  if (const status s = once(c.again.view(), alone, memory, false); !s)
    c.wrong.push_back(std::string("one thread alone: ") + s.message());
}

template <class Policy, bool typed, class KV>
void perform(const KV& cache, call& c) {
  switch (c.of[query_axis]) {
    case 0:
      return perform<Policy, float, typed>(cache, c);
    case 1:
      return perform<Policy, Eigen::half, typed>(cache, c);
    default:
      return perform<Policy, Eigen::bfloat16, typed>(cache, c);
  }
}

/// Makes the cache of any layout, erased, and calls f.
void with_any_cache(call& c, const std::function<void(const any_kv&)>& f);

/// One level of the policy axis.
struct policy_entry {
  std::string name;
  family kind = family::uniform;
  bool with_replacement = false, pilots = false;
  guarantee promise = guarantee::none;
  const char* bound = "none";
  target_kind target = target_kind::none;
  void (*run)(call&) = nullptr;
};

}  // namespace vattn::product
