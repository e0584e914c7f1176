#include "report.hpp"

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "layers.hpp"

namespace vattn_ggml {
namespace {

volatile std::sig_atomic_t asked = 0;

std::string format(const char* how, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* how, ...) {
  char line[512];
  std::va_list arguments;
  va_start(arguments, how);
  std::vsnprintf(line, sizeof line, how, arguments);
  va_end(arguments);
  return line;
}

using number = unsigned long long;

double share(double part, double of) { return of > 0 ? part / of : 0; }

struct totals {
  number calls = 0, verified = 0, exact = 0, heads = 0, dense = 0, rows = 0, rows_read = 0, coded = 0, stale = 0,
         plain = 0;
  double seconds = 0, verified_seconds = 0;
  void add(const layer_counts& l) {
    calls += l.calls, verified += l.verified, exact += l.exact, heads += l.heads, dense += l.dense, rows += l.rows;
    rows_read += l.rows_read, coded += l.coded, stale += l.stale, plain += l.plain;
    seconds += l.seconds, verified_seconds += l.verified_seconds;
  }
};

}  // namespace

report& report::instance() {
  static auto* const one = new report;  // not destroyed: written at exit
  return *one;
}

void report::configure(const settings& s) {
  settings_ = s;
  if (s.report.empty()) return;
  std::atexit([] { instance().write(); });
  // Node has a use of its own for this signal.
  struct sigaction now {};
  if (sigaction(SIGUSR1, nullptr, &now) == 0 && now.sa_handler == SIG_DFL) {
    struct sigaction ours {};
    ours.sa_handler = [](int) { asked = 1; };
    ours.sa_flags = SA_RESTART;
    sigaction(SIGUSR1, &ours, nullptr);
  }
}

layer_counts& report::layer(std::uint32_t which) {
  std::lock_guard lock(mutex_);
  std::unique_ptr<layer_counts>& l = layers_[std::min(which, most_layers - 1)];
  if (!l) l = std::make_unique<layer_counts>(settings_.audit);
  return *l;
}

void report::exact_took(double seconds, double rows) {
  std::lock_guard lock(mutex_);
  exact_seconds_ += seconds, exact_rows_ += rows;
}

std::string report::text() {
  const auto [codes, cache] = layer_registry::instance().bytes();
  std::lock_guard lock(mutex_);
  totals t;
  for (const auto& l : layers_) {
    if (l) t.add(*l);
  }
  std::string out = "vattn: " + promise_of(settings_) + "\n";
  if (t.calls == 0)
    return out + "vattn: no attention was taken over: flash attention off, caches not on the CPU, or short contexts\n";
  out += format("vattn: %llu calls in %.3f s; %llu by codes in %.3f s", t.calls, t.seconds, t.verified,
                t.verified_seconds);
  if (exact_rows_ > 0 && t.verified > 0) {
    const double exact = exact_seconds_ / exact_rows_ * static_cast<double>(t.rows);
    out += format(", for which exact attention by the same kernels takes about %.3f s", exact);
  }
  out += format("\nvattn: rows read %.2f %%, outputs read in full %.2f %%; cells coded %llu, stale codes found %llu\n",
                100 * share(static_cast<double>(t.rows_read), static_cast<double>(t.rows)),
                100 * share(static_cast<double>(t.dense), static_cast<double>(t.heads)), t.coded, t.stale);
  out += format("vattn: codes take %.1f MiB beside %.1f MiB of cache\n", static_cast<double>(codes) / 1048576,
                static_cast<double>(cache) / 1048576);
  if (t.plain > 0) out += format("vattn: %llu calls met numbers that are not finite\n", t.plain);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    if (!layers_[i] || layers_[i]->verified == 0) continue;
    const layer_counts& l = *layers_[i];
    out +=
        format("vattn: layer %zu: calls %llu, rows read %.2f %%, in full %.2f %%", i, static_cast<number>(l.verified),
               100 * share(static_cast<double>(l.rows_read), static_cast<double>(l.rows)),
               100 * share(static_cast<double>(l.dense), static_cast<double>(l.heads)));
    if (settings_.audit > 0) out += "; audit: " + l.audit.report().text();
    out += "\n";
  }
  return out;
}

std::string report::json() {
  const auto [codes, cache] = layer_registry::instance().bytes();
  std::lock_guard lock(mutex_);
  totals t;
  for (const auto& l : layers_) {
    if (l) t.add(*l);
  }
  const auto counts = [](const auto& c) {
    return format("\"calls\": %llu, \"verified\": %llu, \"exact\": %llu, \"outputs\": %llu, ",
                  static_cast<number>(c.calls), static_cast<number>(c.verified), static_cast<number>(c.exact),
                  static_cast<number>(c.heads)) +
           format("\"dense\": %llu, \"rows\": %llu, ", static_cast<number>(c.dense), static_cast<number>(c.rows)) +
           format("\"rows_read\": %llu, \"cells_coded\": %llu, \"stale\": %llu, \"not_finite\": %llu, ",
                  static_cast<number>(c.rows_read), static_cast<number>(c.coded), static_cast<number>(c.stale),
                  static_cast<number>(c.plain)) +
           format("\"seconds\": %.6f, \"verified_seconds\": %.6f", c.seconds, c.verified_seconds);
  };
  const char* modes[] = {"verified", "exact", "off"};
  std::string out = format("{\"mode\": \"%s\", \"epsilon\": %g, \"delta\": %g, ",
                           modes[static_cast<int>(settings_.mode)], settings_.epsilon, settings_.delta);
  out += format("\"code_bytes\": %zu, \"cache_bytes\": %zu, \"exact_seconds_per_row\": %.6g, ", codes, cache,
                share(exact_seconds_, exact_rows_));
  out += counts(t) + ", \"layers\": [";
  bool first = true;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    if (!layers_[i]) continue;
    out += format("%s\n {\"layer\": %zu, ", first ? "" : ",", i) + counts(*layers_[i]);
    if (settings_.audit > 0) {
      const vattn::audit_report a = layers_[i]->audit.report();
      out += format(", \"audited\": %llu, \"violations\": %llu, \"p_value\": %.6g", static_cast<number>(a.audited),
                    static_cast<number>(a.violations), a.p_value());
    }
    out += "}";
    first = false;
  }
  return out + "]}\n";
}

void report::write() {
  if (settings_.report.empty()) return;
  const std::string& to = settings_.report;
  if (to == "stderr") {
    std::fputs(text().c_str(), stderr);
    return;
  }
  std::FILE* const file = std::fopen(to.c_str(), "w");
  if (file == nullptr) {
    std::fprintf(stderr, "vattn: %s cannot be written: give VATTN_REPORT a file that can\n", to.c_str());
    return;
  }
  std::fputs((to.ends_with(".json") ? json() : text()).c_str(), file);
  std::fclose(file);
}

void report::write_if_asked() {
  if (asked == 0) return;
  asked = 0;
  write();
}

}  // namespace vattn_ggml
