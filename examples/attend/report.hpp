// The report, as JSON and as a page, and its summary: every certificate beside the error that was measured.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attend/problem.hpp"
#include "common/reference.hpp"
#include "common/report_files.hpp"
#include "common/rows.hpp"

namespace vattn::examples {

/// Certificates are written as they come, one a line: many trials of many heads do not fit in memory twice.
class report {
 public:
  report(const request& r, const problem& p, const std::string& program = "attend")
      : request_(r),
        problem_(p),
        files_(r.json_path, r.html_path, program + ": " + to_string(r.how) + ", " + r.q_path),
        head_failures_(count(p.heads)) {
    // Top-k and the like promise nothing; what they are measured by is the output.
    promised_ = promises(r.how) ? r.target : target_kind::output;
    files_.write("{\n\"program\": \"" + program + "\",\n\"certificates\": [");
  }

  void add(std::int64_t trial, index_t token, index_t head, const certificate& c, const row_error& e) {
    const double target_error = e.of(promised_);
    const bool failed = !(target_error <= request_.settings.epsilon);
    errors_.push_back(static_cast<float>(e.output));
    target_errors_.push_back(static_cast<float>(target_error));
    error_sum_ += e.output, target_error_sum_ += target_error, density_sum_ += c.density();
    rows_sum_ += static_cast<double>(c.rows());
    failures_ += failed, exact_ += c.exact(), saturated_ += c.saturated;
    head_failures_[count(head)] += failed;
    if (!files_) return;
    json j;
    j["trial"] = trial, j["token"] = token, j["head"] = head;
    j["n"] = c.n, j["rows"] = c.rows(), j["rows_exact"] = c.rows_exact, j["rows_sampled"] = c.rows_sampled;
    j["budget"] = c.budget, j["density"] = c.density();
    j["log_denominator"] = c.log_denominator;  // null where nothing is visible: log 0
    j["epsilon"] = request_.settings.epsilon, j["delta"] = request_.settings.delta;
    if (c.promise == guarantee::none) {
      j["epsilon_achieved"] = j["denominator_error"] = nullptr;  // nothing is promised, which is not 0
    } else {
      j["epsilon_achieved"] = c.epsilon_achieved, j["denominator_error"] = c.denominator_error;
    }
    j["error"] = e.output, j["target_error"] = target_error, j["denominator_error_actual"] = e.denominator;
    j["failed"] = failed, j["exact"] = c.exact(), j["saturated"] = c.saturated;
    j["target"] = vattn::to_string(c.target), j["scale"] = vattn::to_string(c.scale);
    j["bound"] = c.bound, j["guarantee"] = vattn::to_string(c.promise), j["assumptions"] = c.assumptions;
    j["coherence"] = c.coherence, j["rounds"] = c.rounds, j["breaches"] = c.breaches;
    files_.write((errors_.size() > 1 ? ",\n" : "\n") + dump(j));
  }

  /// Ends the file, without publishing it, and returns the summary, with `more` at its end.
  json finish(double seconds, const json& more = json::object()) {
    const double rows = static_cast<double>(std::max<std::size_t>(1, errors_.size()));
    const double per_head = rows / static_cast<double>(problem_.heads);
    json s;
    s["method"] = to_string(request_.how);
    if (promises(request_.how)) {
      s["target"] = vattn::to_string(request_.target), s["bound"] = to_string(request_.bound);
    } else {
      s["target"] = s["bound"] = "none";
    }
    s["selector"] = request_.how == method::vattention ? request_.selector : "none";
    s["sampler"] = to_string(request_.sampler);
    s["bits"] = request_.bits;
    s["scale"] = vattn::to_string(request_.settings.scale);
    s["epsilon"] = request_.settings.epsilon, s["delta"] = request_.settings.delta;
    s["n"] = problem_.n, s["queries"] = problem_.queries, s["heads"] = problem_.heads;
    s["kv_heads"] = problem_.kv_heads, s["dk"] = problem_.dk, s["dv"] = problem_.dv;
    s["trials"] = request_.trials, s["seed"] = request_.seed;
    s["density"] = density_sum_ / rows, s["rows"] = rows_sum_ / rows;
    s["error_mean"] = error_sum_ / rows, s["error_p90"] = p90(errors_);
    s["error_is"] = output_error();
    s["failures"] = static_cast<double>(failures_) / rows;
    s["target_error_is"] = target_error();  // failures: share of rows with target_error > epsilon
    s["target_error_mean"] = target_error_sum_ / rows, s["target_error_p90"] = p90(target_errors_);
    s["exact_share"] = static_cast<double>(exact_) / rows;
    s["saturated_share"] = static_cast<double>(saturated_) / rows;
    const auto worst = std::max_element(head_failures_.begin(), head_failures_.end());
    s["worst_head_failures"] = static_cast<double>(*worst) / per_head;
    s["worst_head"] = worst - head_failures_.begin();
    s["seconds"] = seconds;
    s.update(more);
    files_.write("\n],\n\"summary\": " + dump(s, 1) + "\n}\n");
    return s;
  }

  void publish() { files_.commit(); }

 private:
  [[nodiscard]] static std::size_t count(index_t i) { return static_cast<std::size_t>(i); }
  [[nodiscard]] static double p90(std::vector<float>& x) {
    if (x.empty()) return 0;
    const auto at = x.begin() + static_cast<std::ptrdiff_t>(std::ceil(0.9 * static_cast<double>(x.size()))) - 1;
    std::nth_element(x.begin(), at, x.end());
    return *at;
  }
  [[nodiscard]] std::string output_error() const {
    return request_.settings.scale == error_scale::rms ? "|o^ - o| / rms of the attended values" : "|o^ - o| / |o|";
  }
  [[nodiscard]] std::string target_error() const {
    if (promised_ == target_kind::denominator) return "|D^ - D| / D";
    return promised_ == target_kind::numerator ? "|N^ - N| / |N|" : output_error();
  }

  const request& request_;
  const problem& problem_;
  report_files files_;
  target_kind promised_;
  std::vector<float> errors_, target_errors_;
  double error_sum_ = 0, target_error_sum_ = 0, density_sum_ = 0, rows_sum_ = 0;
  std::int64_t failures_ = 0, exact_ = 0, saturated_ = 0;
  std::vector<std::int64_t> head_failures_;
};

}  // namespace vattn::examples
