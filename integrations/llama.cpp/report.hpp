// Counts of what was served, by layer, and their report.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "settings.hpp"
#include "vattn/call/audit.hpp"

namespace vattn_ggml {

/// One layer of whatever model: caches that come and go add to the same counts.
struct layer_counts {
  explicit layer_counts(double share) : audit(share) {}
  std::uint64_t calls = 0, verified = 0;          ///< of all queries of a node; those that used an index
  std::uint64_t exact = 0;                        ///< passes over all rows, for the others
  std::uint64_t heads = 0, dense = 0;             ///< outputs that an index was asked for; of these, read in full
  std::uint64_t rows = 0, rows_read = 0;          ///< of those outputs: visible, and read
  std::uint64_t coded = 0, stale = 0, plain = 0;  ///< cells coded; times that codes were found stale; unready numbers
  double seconds = 0, verified_seconds = 0;       ///< in calls
  vattn::auditor audit;
};

class report {
 public:
  static report& instance();

  void configure(const settings& s);
  /// The counts of a layer; its number is taken from the cache's name.
  [[nodiscard]] layer_counts& layer(std::uint32_t number);
  /// Adds to counts under one lock.
  template <class F>
  void add(F&& f) {
    std::lock_guard lock(mutex_);
    f();
  }
  /// What exact attention takes: so many rows of so many heads, measured now and then.
  void exact_took(double seconds, double rows);

  [[nodiscard]] std::string text();
  [[nodiscard]] std::string json();
  /// To where VATTN_REPORT says: text on stderr, JSON in a file whose name ends in .json, else text.
  void write();
  /// Asked for by SIGUSR1: written by the next graph.
  void write_if_asked();

  static constexpr std::uint32_t most_layers = 1024;

 private:
  std::mutex mutex_;
  settings settings_;
  std::array<std::unique_ptr<layer_counts>, most_layers> layers_{};
  double exact_seconds_ = 0, exact_rows_ = 0;
};

}  // namespace vattn_ggml
