// A line on stderr for work that takes long, and silence for work that does not.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace vattn::support {

/// Says nothing for the first two seconds; then one line that is redrawn on a terminal, and one line every
/// five seconds elsewhere. `step` may be called from any thread.
class progress {
 public:
  using clock = std::chrono::steady_clock;

  progress(std::string label, std::int64_t total) : label_(std::move(label)), total_(total) {}
  ~progress() { finish(); }
  progress(const progress&) = delete;
  progress& operator=(const progress&) = delete;

  void label(std::string text) {
    const std::lock_guard lock(mutex_);
    label_ = std::move(text);
  }

  void step(std::int64_t count = 1) noexcept {
    const std::int64_t done = done_.fetch_add(count, std::memory_order_relaxed) + count;
    const double seconds = elapsed();
    if (seconds < next_.load(std::memory_order_relaxed)) return;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || finished_) return;
    next_ = seconds + (terminal_ ? 0.2 : 5.0);
    const double left = done > 0 ? seconds * static_cast<double>(total_ - done) / static_cast<double>(done) : 0;
    std::fprintf(stderr, "%s%s: %lld of %lld, %.0f s left%s", terminal_ ? "\r" : "", label_.c_str(),
                 static_cast<long long>(done), static_cast<long long>(total_), left, terminal_ ? "\033[K" : "\n");
    std::fflush(stderr);
    shown_ = true;
  }

  /// Clears the line, so that what is printed next stands alone. Later steps say nothing.
  void finish() noexcept {
    const std::lock_guard lock(mutex_);
    if (shown_ && terminal_) std::fputs("\r\033[K", stderr);
    finished_ = true;
  }
  /// Clears the line for something that is printed meanwhile.
  void pause() noexcept {
    const std::lock_guard lock(mutex_);
    if (shown_ && terminal_) std::fputs("\r\033[K", stderr);
  }

  [[nodiscard]] double elapsed() const noexcept { return std::chrono::duration<double>(clock::now() - start_).count(); }

 private:
  [[nodiscard]] static bool is_terminal() noexcept {
#if defined(__unix__) || defined(__APPLE__)
    return isatty(STDERR_FILENO) == 1;
#else
    return false;
#endif
  }

  std::string label_;
  std::int64_t total_;
  clock::time_point start_ = clock::now();
  std::atomic<std::int64_t> done_{0};
  std::atomic<double> next_{2.0};
  std::mutex mutex_;
  bool terminal_ = is_terminal(), shown_ = false, finished_ = false;
};

/// An executor that counts the tasks of another.
template <class Executor>
class counting_executor {
 public:
  counting_executor(Executor inner, progress& count) : inner_(std::move(inner)), count_(&count) {}
  [[nodiscard]] std::int64_t workers() const noexcept { return inner_.workers(); }
  template <class F>
  void for_each(std::int64_t n, F&& f) {
    inner_.for_each(n, [&](std::int64_t task, std::int64_t worker) {
      f(task, worker);
      count_->step();
    });
  }

 private:
  Executor inner_;
  progress* count_;
};

}  // namespace vattn::support
