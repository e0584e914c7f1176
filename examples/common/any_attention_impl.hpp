// any_attention: from names on a command line to a vattention<Policy>. For any_attention_*.cpp alone.
#pragma once

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>
#include <variant>
#include <vector>

#include "common/any_attention.hpp"
#include "common/methods.hpp"
#include "common/selectors.hpp"

namespace vattn::examples {

/// A selector that is chosen at run time: by logit or by contribution, a share of the tokens or of the mass.
struct chosen_selector {
  bool by_contribution = false;
  double mass = 0;

  template <class Row>
  score_result score(const Row& row, const population& tokens, const score_buffers& out) const noexcept {
    if (by_contribution) return select::exact_contributions{}.score(row, tokens, out);
    return select::exact_logits{}.score(row, tokens, out);
  }
  index_t heavy_count(ranking& r, index_t n, const config& c) const noexcept {
    if (mass > 0) return extend_to_mass(r, mass, r.size());
    return select::top_k<>{}.heavy_count(r, n, c);
  }
};

template <class Target, class Bound>
struct chosen_policy : default_policy {
  using selector = chosen_selector;
  using target = Target;
  using bound = Bound;
};

/// Exact logits as estimates without error.
struct exact_estimates : select::exact_logits {
  index_t heavy_count(const ranking& r, index_t n, const config& c) const noexcept {
    return select::top_k<>{}.heavy_count(r, n, c);
  }
};

/// Exact logits as bounds that are met.
struct exact_bounds : exact_estimates {
  static constexpr bool upper_bounds = true;
};

template <class Selector, class Sampler, class Bound>
struct sampled_policy : default_policy {
  using selector = Selector;
  using sampler = Sampler;
  using bound = Bound;
};

/// What a call is made of.
template <class T>
struct attention_call {
  const tensor_view<const float, 4>& q;
  const kv_view<T>& cache;
  const attention_options& options;
  const attention_result& result;
  const draw_key& key;
  executor_ref& exec;
};

template <class T>
class any_attention<T>::engine {
 public:
  explicit engine(const method_choice& choice) : choice_(choice) {}

  [[nodiscard]] const method_choice& choice() const { return choice_; }
  void configure(const config& settings) { choice_.settings = settings; }

  void append(const kv_view<T>& cache) {
    if (choice_.how == method::magic_pig) return append_to_pigs(cache);
    if (choice_.how == method::store) return append_to_store(cache);
    if (choice_.how == method::index) return append_to_index(cache);
    if (choice_.how != method::vattention || choice_.selector == "exact" || choice_.selector == "streaming-llm") return;
    if (std::holds_alternative<std::monostate>(heads_)) {
      const selector_entry& entry = *find_selector(choice_.selector);
      for (index_t h = 0; h < cache.n_kv_heads(); ++h) {
        index_request prefill = prefill_of(cache.head(0, h), choice_.bits, index_seed);
        prefill.weights = weights_of(h, cache.n_kv_heads());
        std::visit(
            [&](auto&& index) {
              using list = std::vector<std::remove_cvref_t<decltype(index)>>;
              if (h == 0) heads_.template emplace<list>();
              std::get<list>(heads_).push_back(std::move(index));
            },
            entry.make(prefill));
        if (choice_.two_phases) coarse_.emplace_back(sketch::key_codes<1>(cache.dk(), index_seed + 1));
      }
    }
    for_each_index([&](auto& index, index_t h) { append_from(index, cache.head(0, h)); });
  }

  void truncate(index_t n) {
    for_each_index([n](auto& index, index_t) { index.truncate(n); });
    store_.truncate(n);
    for (kv_index& i : index_) i.truncate(n);
  }

  [[nodiscard]] std::size_t bytes() {
    std::size_t sum = store_.row_bytes() + store_.sketch_bytes();
    for (const kv_index& i : index_) sum += i.bytes();
    for_each_index([&](const auto& index, index_t) { sum += index.bytes(); });
    return sum;
  }

  [[nodiscard]] status operator()(const attention_call<T>& c) {
    const config& s = choice_.settings;
    const auto fixed = [&](const row_budget& budget) {
      return fixed_budget(c.q, c.cache, c.options, c.result, memory_, budget, c.key, c.exec);
    };
    switch (choice_.how) {
      case method::dense:
        return exact_attention(c.q, c.cache, c.options, c.result, memory_, c.exec);
      case method::top_k:
        return fixed({.sinks = s.sinks, .window = s.window, .heavy = s.heavy});
      case method::sample:
        return fixed({.sinks = s.sinks, .window = s.window, .sampled = s.base});
      case method::sinks_window:
        return fixed({.sinks = s.sinks, .window = s.window});
      case method::magic_pig:
        append(c.cache);
        return magic_pig_attention(c.q, c.cache, c.options, c.result, memory_, pigs_,
                                   {.sinks = s.sinks, .window = s.window}, c.key, c.exec);
      case method::store:
        append(c.cache);
        return vattention<store_policy>(s)(c.q, store_, c.options, c.result, memory_, c.key, c.exec);
      case method::index:
        append(c.cache);
        return vattention<index_policy>(s, {index_, remembered_})(c.q, c.cache, c.options, c.result, memory_, c.key,
                                                                  c.exec);
      default:
        break;
    }
    if (choice_.selector == "streaming-llm") return with_selector(select::none{}, c);
    if (choice_.selector != "exact") return with_indices(c);
    if (choice_.sampler == sampler_kind::importance) {
      if (choice_.bound == bound_kind::bernstein)
        return attend_with<sampled_policy<exact_bounds, sample::by_importance, budget::bernstein>>({}, c);
      return sample_by_importance(exact_estimates{}, c);
    }
    switch (choice_.target) {
      case target_kind::denominator:
        return with_target<budget::denominator>(c);
      case target_kind::numerator:
        return with_target<budget::numerator>(c);
      case target_kind::sdpa:
        return with_target<budget::sdpa>(c);
      default:
        return with_target<budget::output>(c);
    }
  }

 private:
  // The bytes of a KV head's weights, none where none were given.
  [[nodiscard]] std::string weights_of(index_t head, index_t heads) const {
    const auto& files = choice_.weights;
    if (files.empty()) return {};
    if (files.size() > 1 && static_cast<index_t>(files.size()) != heads)
      throw std::runtime_error("--weights names " + std::to_string(files.size()) + " files for " +
                               std::to_string(heads) + " KV heads: give one, or one for each");
    const std::string& path = files[files.size() > 1 ? static_cast<std::size_t>(head) : 0];
    std::ifstream file(path, std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (!file) throw std::runtime_error("cannot read " + path);
    return bytes;
  }

  // Rotations and hyperplanes; draws have a seed of their own.
  static constexpr std::uint64_t index_seed = 1;

  template <class Visit>
  void for_each_index(Visit&& visit) {
    std::visit(
        [&](auto& heads) {
          if constexpr (!std::is_same_v<std::remove_cvref_t<decltype(heads)>, std::monostate>) {
            for (std::size_t h = 0; h < heads.size(); ++h) visit(heads[h], static_cast<index_t>(h));
          }
        },
        heads_);
    for (std::size_t h = 0; h < coarse_.size(); ++h) visit(coarse_[h], static_cast<index_t>(h));
    for (std::size_t h = 0; h < pigs_.size(); ++h) visit(pigs_[h], static_cast<index_t>(h));
  }

  template <class Policy>
  [[nodiscard]] status attend_with(const typename Policy::selector& selector, const attention_call<T>& c) {
    const vattention<Policy> attend(choice_.settings, selector);
    return attend(c.q, c.cache, c.options, c.result, memory_, c.key, c.exec);
  }

  template <class Selector>
  [[nodiscard]] status sample_by_importance(const Selector& selector, const attention_call<T>& c) {
    using by = sample::by_importance;
    if (choice_.bound == bound_kind::student)
      return attend_with<sampled_policy<Selector, by, budget::student>>(selector, c);
    if (choice_.share_group)
      return attend_with<sampled_policy<Selector, sample::by_group_importance, budget::clt>>(selector, c);
    return attend_with<sampled_policy<Selector, by, budget::clt>>(selector, c);
  }

  // A selector that ranks: as it is for the uniform sampler, calibrated for the other.
  template <class Selector>
  [[nodiscard]] status with_selector(const Selector& selector, const attention_call<T>& c) {
    if (choice_.sampler == sampler_kind::importance)
      return sample_by_importance(select::calibrated<Selector>{selector}, c);
    return sample_uniformly(selector, c);
  }

  template <class Selector>
  [[nodiscard]] status sample_uniformly(const Selector& selector, const attention_call<T>& c) {
    using uniform = sample::uniform_without_replacement;
    return choice_.bound == bound_kind::student
               ? attend_with<sampled_policy<Selector, uniform, budget::student>>(selector, c)
               : attend_with<sampled_policy<Selector, uniform, budget::clt>>(selector, c);
  }

  [[nodiscard]] status with_indices(const attention_call<T>& c) {
    append(c.cache);
    return std::visit([&](const auto& heads) { return with_heads(heads, c); }, heads_);
  }
  [[nodiscard]] status with_heads(std::monostate, const attention_call<T>&) {
    return status::error(errc::invalid_argument, "the cache has no KV head");
  }
  template <class Index>
  [[nodiscard]] status with_heads(const std::vector<Index>& heads, const attention_call<T>& c) {
    const select::indexed<Index> selector{.heads = heads};
    if constexpr (Index::estimates) {
      using by = sample::by_importance;
      if (choice_.bound == bound_kind::bernstein)
        return attend_with<sampled_policy<select::hard_bounds<Index>, by, budget::bernstein>>({heads}, c);
      if (choice_.two_phases)
        return attend_with<sampled_policy<select::two_phase<Index, Index>, sample::in_two_phases, budget::clt>>(
            {{coarse_}, {heads}}, c);
      if (choice_.sampler == sampler_kind::importance) return sample_by_importance(selector, c);
      // What a token may move at most, as far as its score can be trusted: ranks, and guards what is not read.
      select::top_k<select::contributions<select::upper_scores<Index>>> guarded;
      guarded.heads = heads;
      return sample_uniformly(guarded, c);
    } else if constexpr (Index::upper_bounds) {
      if (choice_.bound == bound_kind::bernstein)
        return attend_with<sampled_policy<select::indexed<Index>, sample::by_importance, budget::bernstein>>(selector,
                                                                                                             c);
      // Bounds of logits become bounds of what a token can move: a guard for what is not ranked high.
      using guarded = select::top_k<select::contributions<select::indexed<Index>>>;
      guarded bounded;
      bounded.heads = heads;
      return with_selector(bounded, c);
    } else {
      return with_selector(selector, c);
    }
  }

  // MagicPIG's own estimator asks the hash tables themselves.
  void append_to_pigs(const kv_view<T>& cache) {
    for (index_t h = static_cast<index_t>(pigs_.size()); h < cache.n_kv_heads(); ++h)
      pigs_.emplace_back(cache.dk(), 10, 150, index_seed,
                         prefill_of(cache.head(0, h), choice_.bits, index_seed).centre);
    for (std::size_t h = 0; h < pigs_.size(); ++h) append_from(pigs_[h], cache.head(0, static_cast<index_t>(h)));
  }

  // The whole cache at first, then its new tokens. With sinks and window as they are at first.
  void append_to_store(const kv_view<T>& cache) {
    const auto require = [](const status& s) {
      if (!s) throw std::runtime_error(s.message());
    };
    const auto rows_of = [&](index_t h) { return cache.head(0, h); };
    const index_t heads = cache.n_kv_heads(), n = heads > 0 ? rows_of(0).size() : 0;
    if (store_.size() == 0) {
      store_ = shuffled_store<T>({.n_kv_heads = heads,
                                  .dk = cache.dk(),
                                  .dv = cache.dv(),
                                  .sinks = choice_.settings.sinks,
                                  .window = choice_.settings.window,
                                  .seed = index_seed});
      return require(store_.assign(cache));
    }
    const index_t last = heads - 1;
    for (index_t i = store_.size(); i < n; ++i) {
      const T *k = rows_of(0).key(i).data(), *v = rows_of(0).value(i).data();
      const auto stride = [last](const T* first, const T* of_last) { return last > 0 ? (of_last - first) / last : 0; };
      require(store_.append(k, stride(k, rows_of(last).key(i).data()), v, stride(v, rows_of(last).value(i).data())));
    }
  }

  void append_to_index(const kv_view<T>& cache) {
    if (index_.empty()) {
      index_.emplace_back(
          index_shape{.n_kv_heads = cache.n_kv_heads(), .dk = cache.dk(), .dv = cache.dv(), .seed = index_seed});
      remembered_.resize(static_cast<std::size_t>(cache.n_kv_heads()));
    }
    if (const status s = index_[0].append_from(cache); !s) throw std::runtime_error(s.message());
  }

  template <class Target>
  [[nodiscard]] status with_target(const attention_call<T>& c) {
    switch (choice_.bound) {
      case bound_kind::student:
        return run<Target, budget::student>(c);
      case bound_kind::bernstein:
        return run<Target, budget::bernstein>(c);
      case bound_kind::hoeffding:
        return run<Target, budget::hoeffding>(c);
      default:
        return run<Target, budget::clt>(c);
    }
  }

  template <class Target, class Bound>
  [[nodiscard]] status run(const attention_call<T>& c) {
    // The paper ranks by logit. Contributions for the output, and where a bound needs a known range of x·v.
    const bool range_of_values = Bound::kind == guarantee::finite_sample && Target::kind != target_kind::denominator;
    const chosen_selector select{.by_contribution = Target::kind == target_kind::output || range_of_values,
                                 .mass = choice_.top_p};
    return attend_with<chosen_policy<Target, Bound>>(select, c);
  }

  method_choice choice_;
  workspace memory_;
  // One index for each KV head.
  std::variant<std::monostate, std::vector<any_index<score_says::order>>, std::vector<any_index<score_says::estimate>>,
               std::vector<any_index<score_says::bound>>>
      heads_;
  std::vector<any_index<score_says::estimate>> coarse_;
  std::vector<select::magic_pig> pigs_;
  shuffled_store<T> store_;
  std::vector<kv_index> index_;           // one, once there is a cache
  std::vector<index_memory> remembered_;  // [KV heads]
};

template <class T>
any_attention<T>::any_attention(const method_choice& choice) : engine_(std::make_unique<engine>(choice)) {}
template <class T>
any_attention<T>::~any_attention() = default;
template <class T>
any_attention<T>::any_attention(any_attention&&) noexcept = default;
template <class T>
any_attention<T>& any_attention<T>::operator=(any_attention&&) noexcept = default;

template <class T>
status any_attention<T>::check(const tensor_view<const float, 4>& q, const kv_view<T>& cache,
                               const attention_options& options, const attention_result& result) const {
  if (status s = check_choice(engine_->choice()); !s) return s;
  return check_call(q, cache, options, result);
}

template <class T>
void any_attention<T>::configure(const config& settings) {
  engine_->configure(settings);
}
template <class T>
void any_attention<T>::append(const kv_view<T>& cache) {
  engine_->append(cache);
}
template <class T>
void any_attention<T>::truncate(index_t n) {
  engine_->truncate(n);
}
template <class T>
std::size_t any_attention<T>::bytes() const {
  return engine_->bytes();
}

template <class T>
status any_attention<T>::operator()(const tensor_view<const float, 4>& q, const kv_view<T>& cache,
                                    const attention_options& options, const attention_result& result,
                                    const draw_key& key, executor_ref exec) {
  return (*engine_)({q, cache, options, result, key, exec});
}

template <class T>
reference any_attention<T>::exact(const tensor_view<const float, 4>& q, const kv_view<T>& cache,
                                  const attention_options& options, executor_ref exec) {
  return exact_reference(q, cache, options, exec);
}

}  // namespace vattn::examples
