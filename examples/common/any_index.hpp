// An index over keys that is chosen at run time.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "vattn/vattn.hpp"

namespace vattn::examples {

/// What the scores of an index are.
enum class score_says : std::uint8_t { order, estimate, bound };

/// Holds any index whose scores say `Says`. A call is virtual, once a query and run of tokens.
template <score_says Says>
class any_index {
 public:
  static constexpr bool estimates = Says == score_says::estimate;
  static constexpr bool upper_bounds = Says == score_says::bound;

  any_index() = default;
  template <class Index>
  requires(!std::same_as<std::remove_cvref_t<Index>, any_index>)
  explicit any_index(Index index) : self_(std::make_unique<model<Index>>(std::move(index))) {}
  any_index(const any_index& other) : self_(other.self_ ? other.self_->clone() : nullptr) {}
  any_index& operator=(any_index other) noexcept {
    self_ = std::move(other.self_);
    return *this;
  }
  any_index(any_index&&) noexcept = default;

  [[nodiscard]] index_t size() const noexcept { return self_->size(); }
  [[nodiscard]] std::size_t bytes() const noexcept { return self_->bytes(); }
  [[nodiscard]] std::size_t scratch_size() const noexcept { return self_->scratch_size(); }
  [[nodiscard]] float bound_over_error() const noexcept { return self_->bound_over_error(); }

  template <kernel::row R>
  void append(const R& key) {
    using kernel::load;
    buffer_.resize(std::max(buffer_.size(), std::size_t{key.size()}));
    load(key, buffer_.data());
    self_->append(std::span<const float>(buffer_).first(key.size()));
  }
  void truncate(index_t n) { self_->truncate(n); }
  void clear() { self_->truncate(0); }
  void score(const float* scaled_query, index_t first, std::span<float> scores, std::span<float> errors,
             std::span<float> scratch) const noexcept {
    self_->score(scaled_query, first, scores, errors, scratch);
  }

 private:
  struct interface {
    virtual ~interface() = default;
    [[nodiscard]] virtual std::unique_ptr<interface> clone() const = 0;
    [[nodiscard]] virtual index_t size() const noexcept = 0;
    [[nodiscard]] virtual std::size_t bytes() const noexcept = 0;
    [[nodiscard]] virtual std::size_t scratch_size() const noexcept = 0;
    [[nodiscard]] virtual float bound_over_error() const noexcept = 0;
    virtual void append(std::span<const float> key) = 0;
    virtual void truncate(index_t n) = 0;
    virtual void score(const float* q, index_t first, std::span<float> scores, std::span<float> errors,
                       std::span<float> scratch) const noexcept = 0;
  };
  template <key_index Index>
  struct model final : interface {
    static_assert(!estimates || Index::estimates, "any_index<estimate> holds indices that estimate logits");
    explicit model(Index i) : index(std::move(i)) {}
    [[nodiscard]] std::unique_ptr<interface> clone() const override { return std::make_unique<model>(index); }
    [[nodiscard]] index_t size() const noexcept override { return index.size(); }
    [[nodiscard]] std::size_t bytes() const noexcept override { return index.bytes(); }
    [[nodiscard]] std::size_t scratch_size() const noexcept override { return index.scratch_size(); }
    [[nodiscard]] float bound_over_error() const noexcept override {
      if constexpr (requires { index.bound_over_error(); }) return index.bound_over_error();
      return std::numeric_limits<float>::infinity();
    }
    void append(std::span<const float> key) override { index.append(key); }
    void truncate(index_t n) override { index.truncate(n); }
    void score(const float* q, index_t first, std::span<float> scores, std::span<float> errors,
               std::span<float> scratch) const noexcept override {
      index.score(q, first, scores, errors, scratch);
    }
    Index index;
  };

  std::unique_ptr<interface> self_;
  std::vector<float> buffer_;
};

}  // namespace vattn::examples
