#include "product/check.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string_view>

#include "reference/attention.hpp"

namespace vattn::product {

namespace {

// Float sums of rows against double ones, relative to the root mean square of the attended values. Logits of at most 30
// are off by 2e-6, and half of the cases are sums of thousands of terms.
constexpr double rounding = 2e-5;
// Of its ε an error may be this much more, where it may be more at all. At δ = 0.3 a mean of one dimension is within ε
// if that is 1.04 of its standard deviations: 7 ε are more than 7 of them, which none of 10⁵ rows comes to; what a part
// of the tokens makes that is lost or counted twice does.
constexpr double most_over_epsilon = 7;

struct expected {
  reference::row row;
  double power = 0;  // root mean square of the attended values
  double norm = 0;   // of the output
};

class judge {
 public:
  judge(const call& c, const policy_entry& policy, tally& all)
      : c_(c), policy_(policy), all_(all), d_(c.rows.p.s), exact_(c.rows.p.exactly()) {
    exact_.lengths.assign(c.rows.lengths.begin(), c.rows.lengths.end());
    exact_.causal = c.options.causal, exact_.sliding_window = c.options.sliding_window;
    if (c.options.positions) {
      exact_.cells.assign(c.cells.begin(), c.cells.end());
      exact_.query_positions.assign(c.query_positions.begin(), c.query_positions.end());
    }
  }

  std::vector<std::string> run() {
    if (!c_.results.intact()) say("wrote beside its results");
    const auto kind = static_cast<executor_kind>(c_.of[executor_axis]);
    if (kind != serial && !(c_.results == c_.again)) say("one thread alone gives other bits");
    long rows = 0, exact = 0, surely_off = 0, perhaps_off = 0;
    for (index_t b = 0; b < d_.batch; ++b) {
      for (index_t t = 0; t < d_.queries; ++t) {
        for (index_t h = 0; h < d_.heads; ++h, ++rows) {
          at_ = {b, t, h};
          const double over = check_row(expect(b, t, h));
          exact += over < 0;
          surely_off += over > 1 + 1e-3, perhaps_off += over > 1 - 1e-3;
          largest_ = std::max(largest_, over);
        }
      }
    }
    at_ = {-1, -1, -1};
    if (kind_ == family::group && c_.of[decisions_axis] == 1 && c_.of[certificate_axis] == 1) check_sharing();
    if (c_.of[observer_axis] != nobody) check_audit(rows, exact, surely_off, perhaps_off);
    if (c_.settings.joint && c_.of[certificate_axis] == 1 && kind_ != family::exact && fair_ > 0) {
      auto& p = all_.outputs[c_.settings.delta];
      ++p.draws, p.failures += failed_ > 0;
    }
    all_.largest = std::max(all_.largest, largest_);
    return std::move(wrong_);
  }

 private:
  template <class... A>
  void say(const char* format, A... values) {
    if (wrong_.size() > 8) return;
    char text[300], line[360];
    std::snprintf(text, sizeof(text), format, values...);
    if (at_[0] >= 0) {
      std::snprintf(line, sizeof(line), "batch %d, query %d, head %d: %s", static_cast<int>(at_[0]),
                    static_cast<int>(at_[1]), static_cast<int>(at_[2]), text);
      wrong_.emplace_back(line);
    } else {
      wrong_.emplace_back(text);
    }
  }
  void say(const char* text) { say("%s", text); }

  expected expect(index_t b, index_t t, index_t h) {
    expected e{.row = reference::attend(exact_, b, t, h)};
    // A set without tokens still has a denominator where there is a sink.
    if (e.row.tokens.empty() && !exact_.sinks.empty()) e.row.log_sum_exp = exact_.sinks[static_cast<std::size_t>(h)];
    const index_t kv = h / (d_.heads / d_.kv_heads);
    for (std::size_t i = 0; i < e.row.tokens.size(); ++i) {
      const double* v = exact_.v.data() + ((b * d_.kv_heads + kv) * d_.n + e.row.tokens[i]) * d_.dv;
      double square = 0;
      for (index_t j = 0; j < d_.dv; ++j) square += v[j] * v[j];
      e.power += std::exp(e.row.logits[i] - e.row.max_logit) * square;
    }
    if (e.row.denominator > 0) e.power = std::sqrt(e.power / e.row.denominator);
    for (const double o : e.row.output) e.norm += o * o;
    e.norm = std::sqrt(e.norm);
    return e;
  }

  [[nodiscard]] double distance(const std::vector<double>& to, double factor = 1) const {
    double square = 0;
    for (index_t j = 0; j < d_.dv; ++j)
      square +=
          std::pow(factor * double{c_.results.output(at_[0], at_[1], at_[2], j)} - to[static_cast<std::size_t>(j)], 2);
    return std::isfinite(square) ? std::sqrt(square) : std::numeric_limits<double>::infinity();
  }
  [[nodiscard]] static bool near(double a, double b, double tolerance) {
    return a == b || std::abs(a - b) <= tolerance;
  }

  // The error over ε of a sampled row, 0 where it is not known; negative where the row was read in full.
  double check_row(const expected& e) {
    const auto [b, t, h] = at_;
    const bool certified = c_.of[certificate_axis] == 1, with_lse = c_.of[lse_axis] == 1;
    const auto n = static_cast<index_t>(e.row.tokens.size());
    const certificate none, &cert = certified ? c_.results.certified(b, t, h) : none;
    const double lse = with_lse ? double{c_.results.lse(b, t, h)} : certified ? cert.log_denominator : 0;
    const bool knows_lse = certified || with_lse;
    const bool in_full = certified && cert.exact();
    if (certified) check_certificate(cert, n, lse);
    if (c_.of[decisions_axis] == 1) check_decisions(e, certified ? &cert : nullptr, knows_lse, lse);

    const double off = distance(e.row.output), ratio = knows_lse ? std::exp(lse - e.row.log_sum_exp) : 1;
    const bool must = kind_ == family::exact || in_full || n == 0;
    if (must) {
      if (!(off <= rounding * std::max(e.power, e.norm))) say("read in full, but off by %.3g of %.3g", off, e.power);
      if (knows_lse && !near(lse, e.row.log_sum_exp, rounding * (1 + 0.1 * std::abs(e.row.log_sum_exp))))
        say("read in full, but log-sum-exp is %.9g, not %.9g", lse, e.row.log_sum_exp);
      return -1;
    }
    if (!std::isfinite(off)) say("output is not finite");
    const double scale = c_.settings.scale == error_scale::rms ? e.power : e.norm;
    double error = off / scale;
    if (policy_.target == target_kind::denominator) {
      if (!knows_lse) return 0;
      error = std::abs(ratio - 1);
    } else if (policy_.target == target_kind::numerator) {
      if (!knows_lse) return 0;
      error = distance(e.row.output, ratio) / e.norm;
    }
    if (!certified) {  // as a row of which not even that is known
      const double epsilon = c_.of[rule_axis] == 1 ? 1 : c_.settings.epsilon;
      if (!(error <= most_over_epsilon * epsilon + rounding))
        say("error %.3g at epsilon %.3g", error, c_.settings.epsilon);
      return 0;
    }
    const double stated = std::max(c_.settings.epsilon, cert.epsilon_achieved);
    if (!(error <= most_over_epsilon * stated + rounding)) say("error %.3g, stated %.3g", error, cert.epsilon_achieved);
    if (cert.promise == guarantee::deterministic && !(error <= stated * (1 + 1e-4) + rounding))
      say("error %.3g, stated %.3g for certain", error, cert.epsilon_achieved);
    for (int a = 0; a < n_axes; ++a) {
      auto& by = all_.sampled_by[a];
      const auto level = static_cast<std::size_t>(c_.of[static_cast<axis>(a)]);
      if (by.size() <= level) by.resize(level + 1);
      ++by[level][0];
    }
    // Rows that share a sample are one draw; one of them, drawn by the seed, stands for all.
    const bool shared = kind_ == family::group || kind_ == family::store;
    const index_t row = (b * d_.queries + t) * d_.heads + h, rows = d_.batch * d_.queries * d_.heads;
    const bool failed = error > stated * (1 + 1e-4) + rounding;
    failed_ += failed, ++fair_;
    if (!c_.settings.joint &&
        (!shared || row == static_cast<index_t>(c_.of.seed / 7 % static_cast<std::uint32_t>(rows)))) {
      auto& p = all_.outputs[c_.settings.delta];
      ++p.draws, p.failures += failed;
      auto& q = all_.denominators[c_.settings.delta];
      ++q.draws, q.failures += std::abs(1 / ratio - 1) > cert.denominator_error * (1 + 1e-4) + rounding;
    }
    return error / cert.epsilon;
  }

  void check_certificate(const certificate& cert, index_t n, double lse) {
    const config& s = c_.settings;
    if (cert.n != n)
      say("the certificate counts %lld visible tokens, of %lld", static_cast<long long>(cert.n),
          static_cast<long long>(n));
    if (static_cast<double>(static_cast<float>(cert.log_denominator)) != cert.log_denominator ||
        cert.log_denominator != lse)
      say("log_denominator %.9g, log-sum-exp %.9g", cert.log_denominator, lse);
    if (cert.rows_exact < 0 || cert.rows_sampled < 0 || cert.budget < 0 || cert.breaches < 0 || cert.rounds < 0)
      say("a count of the certificate is negative");
    if (n > 0 && !near(cert.density(), static_cast<double>(cert.rows()) / static_cast<double>(n), 1e-12))
      say("density %.3g", cert.density());
    // An accepted last look that knows no range, or too little of a denominator, states that it knows nothing.
    const bool unknown = cert.saturated && s.accept_last;
    const auto stated = [&](double x) { return x >= 0 && (std::isfinite(x) || unknown); };
    if (!stated(cert.epsilon_achieved)) say("epsilon_achieved %.3g", cert.epsilon_achieved);
    if (!stated(cert.denominator_error)) say("denominator_error %.3g", cert.denominator_error);
    if (!(cert.coherence >= 0 && cert.coherence <= 1 + 1e-3)) say("coherence %.6g", cert.coherence);
    if (std::string_view(cert.assumptions).empty()) say("assumptions are empty");
    if (kind_ == family::exact) {
      if (!cert.exact() || cert.target != target_kind::none) say("exact attention is not certified so");
    } else {
      const double rows = static_cast<double>(d_.batch * d_.queries * d_.heads);
      if (cert.epsilon != s.epsilon || !near(cert.delta, s.joint ? s.delta / rows : s.delta, 1e-15))
        say("promised %.3g at %.3g, asked for %.3g at %.3g", cert.epsilon, cert.delta, s.epsilon, s.delta);
      if (cert.target != policy_.target || cert.scale != s.scale) say("another target or scale than asked for");
    }
    if (cert.exact()) {
      if (cert.rows_exact != n || cert.rows_sampled != 0 || cert.epsilon_achieved != 0 || cert.denominator_error != 0 ||
          cert.saturated || std::string_view(cert.bound) != "none")
        say("exact, but read %lld and %lld of %lld rows, states %.3g by %s", static_cast<long long>(cert.rows_exact),
            static_cast<long long>(cert.rows_sampled), static_cast<long long>(n), cert.epsilon_achieved, cert.bound);
      return;
    }
    if (cert.promise == guarantee::none) return say("nothing is promised");
    const bool settled = kind_ == family::certified && cert.promise == guarantee::deterministic;
    if (cert.promise != policy_.promise && !settled) say("promise %s by %s", to_string(cert.promise), policy_.bound);
    if (kind_ != family::certified && std::string_view(cert.bound) != policy_.bound)
      say("bound %s, not %s", cert.bound, policy_.bound);
    if (!(cert.epsilon_achieved <= cert.epsilon) && !cert.saturated)
      say("epsilon_achieved %.17g of %.17g, not saturated", cert.epsilon_achieved, cert.epsilon);
    if (cert.saturated && !s.accept_last) say("saturated, though the last look was not to be accepted");
    if (cert.rounds < 1 || cert.rounds > std::max<index_t>(s.max_rounds, kind_ == family::certified ? 3 : 1))
      say("%lld looks of %lld", static_cast<long long>(cert.rounds), static_cast<long long>(s.max_rounds));
    const index_t ends = std::min(n, s.sinks + s.window);
    if (kind_ != family::store && cert.rows_exact < ends)
      say("%lld rows for certain, of %lld ends", static_cast<long long>(cert.rows_exact), static_cast<long long>(ends));
    // Pilots and a first sample that is thrown away are read too.
    const index_t kept = kind_ == family::uniform ? cert.rows() : cert.rows_exact + cert.budget;
    const double most = kind_ == family::store ? 1 : s.max_density;
    if (static_cast<double>(kept) > most * static_cast<double>(n))
      say("%lld rows of %lld, past max_density", static_cast<long long>(kept), static_cast<long long>(n));
    if (cert.rows_sampled + cert.rows_exact <= 0) say("sampled from no row");
  }

  // A softmax over the chosen rows alone, e^logit times their weights, is the output.
  void check_decisions(const expected& e, const certificate* cert, bool knows_lse, double lse) {
    const auto [b, t, h] = at_;
    const decision_result& to = c_.results.decisions();
    const index_t count = to.counts(b, t, h), n = static_cast<index_t>(e.row.tokens.size());
    if (count < 0 || count > to.tokens.extents[3]) return say("%lld decisions", static_cast<long long>(count));
    if (count < to.tokens.extents[3] && to.tokens(b, t, h, count) != -77) say("a token behind the last decision");
    seen_.assign(static_cast<std::size_t>(d_.n), 0);
    for (const std::int64_t token : e.row.tokens) seen_[static_cast<std::size_t>(token)] = 1;
    const index_t kv = h / (d_.heads / d_.kv_heads);
    const double sink =
        exact_.sinks.empty() ? -std::numeric_limits<double>::infinity() : exact_.sinks[static_cast<std::size_t>(h)];
    std::vector<std::pair<std::int64_t, double>> chosen;
    std::vector<double> logits;
    double top = sink;
    index_t whole = 0, heavier = 0;
    for (index_t i = 0; i < count; ++i) {
      const std::int32_t cell = to.tokens(b, t, h, i);
      if (cell < 0 || cell >= d_.n) return say("decision %lld is token %d", static_cast<long long>(i), cell);
      const std::int64_t token = c_.order.empty() ? cell : c_.order[static_cast<std::size_t>(cell)];
      const double w = double{to.weights(b, t, h, i)};
      char& mark = seen_[static_cast<std::size_t>(token)];
      if (mark == 0)
        return say("decision %lld is token %lld, which the query does not see", static_cast<long long>(i),
                   static_cast<long long>(token));
      if (mark == 2 && !policy_.with_replacement)
        return say("token %lld is chosen twice", static_cast<long long>(token));
      mark = 2;
      if (!(w > 0 && std::isfinite(w)) || (w < 1 - 1e-6 && !policy_.with_replacement))
        return say("token %lld has weight %.9g", static_cast<long long>(token), w);
      whole += w == 1, heavier += w != 1;
      chosen.emplace_back(token, w);
      logits.push_back(reference::logit(exact_, b, t, h, token));
      top = std::max(top, logits.back());
    }
    double denominator = std::exp(sink - top), power = 0;
    if (count == 0) denominator = std::isfinite(sink) ? 1 : 0;
    std::vector<double> o(static_cast<std::size_t>(d_.dv));
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      const double x = chosen[i].second * std::exp(logits[i] - top);
      const double* v = exact_.v.data() + ((b * d_.kv_heads + kv) * d_.n + chosen[i].first) * d_.dv;
      denominator += x;
      for (index_t j = 0; j < d_.dv; ++j) o[static_cast<std::size_t>(j)] += x * v[j], power += x * v[j] * v[j];
    }
    if (denominator > 0) {
      for (double& x : o) x /= denominator;
      power = std::sqrt(power / denominator);
    }
    // Weights are floats too.
    if (!(distance(o) <= 2 * rounding * power))
      say("the output is %.3g of %.3g off its %lld decisions", distance(o), power, static_cast<long long>(count));
    const double own = top + std::log(denominator);
    if (knows_lse && !near(lse, own, 2 * rounding * (1 + 0.1 * std::abs(own))))
      say("log-sum-exp is %.9g, that of its decisions %.9g", lse, own);
    if (cert == nullptr) return;
    if (cert->exact()) {
      if (count != n || heavier != 0)
        say("read in full, but %lld decisions of %lld, %lld of them weighted", static_cast<long long>(count),
            static_cast<long long>(n), static_cast<long long>(heavier));
      return;
    }
    const index_t said = kind_ == family::uniform ? cert->rows() : cert->rows_exact + cert->budget;
    // Some rows of an index's sample have shown by their keys that their values need not be read.
    if (kind_ == family::index ? count > said : kind_ != family::store && count != said)
      say("%lld decisions, but %lld rows", static_cast<long long>(count), static_cast<long long>(said));
    if (kind_ != family::store && whole < cert->rows_exact)
      say("%lld rows for certain, but %lld decisions of weight 1", static_cast<long long>(cert->rows_exact),
          static_cast<long long>(whole));
  }

  // Heads of a group that see the same tokens share one sample, which grows until the last of them has enough: of two
  // of them one's rows are among the other's.
  void check_sharing() {
    if (c_.of[mask_axis] == head_mask) return;
    const index_t group = d_.heads / d_.kv_heads;
    const decision_result& to = c_.results.decisions();
    for (index_t b = 0; b < d_.batch; ++b) {
      for (index_t t = 0; t < d_.queries; ++t) {
        for (index_t first = 0; first < d_.heads; first += group) {
          std::vector<std::vector<std::int32_t>> sets;
          for (index_t h = first; h < first + std::min(group, max_shared); ++h) {
            if (c_.results.certified(b, t, h).exact()) continue;
            const std::int32_t* tokens = &to.tokens(b, t, h, 0);
            sets.emplace_back(tokens, tokens + to.counts(b, t, h));
            std::sort(sets.back().begin(), sets.back().end());
          }
          std::sort(sets.begin(), sets.end(), [](const auto& x, const auto& y) { return x.size() < y.size(); });
          for (std::size_t i = 1; i < sets.size(); ++i) {
            if (std::includes(sets[i].begin(), sets[i].end(), sets[i - 1].begin(), sets[i - 1].end())) continue;
            at_ = {b, t, first};
            return say("heads of its group do not share a sample");
          }
        }
      }
    }
  }

  void check_audit(long rows, long exact, long surely, long perhaps) {
    const audit_report r = c_.audit.report();
    if (r.rows != static_cast<std::uint64_t>(rows))
      say("the auditor was served %lld of %ld rows", static_cast<long long>(r.rows), rows);
    if (r.audited > r.rows || r.exact + r.violations > r.audited) say("the auditor's counts: %s", r.text().c_str());
    if (r.audited > 0 &&
        !near(r.delta, c_.settings.joint ? c_.settings.delta / static_cast<double>(rows) : c_.settings.delta, 1e-8))
      say("the auditor's delta is %.6g", r.delta);
    if (c_.of[observer_axis] != audit_all) {
      // 40 of 64 rows or more in one half, by chance: once in 50 such calls; all or none of them never.
      if (rows >= 64 && (r.audited == 0 || r.audited == r.rows))
        say("of %ld rows half were to be audited, not %lld", rows, static_cast<long long>(r.audited));
      return;
    }
    if (r.audited != r.rows)
      say("audited %lld of %lld rows", static_cast<long long>(r.audited), static_cast<long long>(r.rows));
    if (c_.of[certificate_axis] != 1) return;
    if (r.exact != static_cast<std::uint64_t>(exact))
      say("the auditor saw %lld exact rows of %ld", static_cast<long long>(r.exact), exact);
    if (static_cast<long>(r.violations) < surely || static_cast<long>(r.violations) > perhaps)
      say("the auditor saw %lld violations, there are %ld to %ld", static_cast<long long>(r.violations), surely,
          perhaps);
    if (!near(r.largest, std::max(0.0, largest_), 1e-3 * (1 + std::max(0.0, largest_))))
      say("the auditor's largest error is %.6g epsilon, it is %.6g", r.largest, largest_);
  }

  const call& c_;
  const policy_entry& policy_;
  tally& all_;
  const test::shape& d_;
  family kind_ = policy_.kind;
  reference::problem exact_;
  std::vector<char> seen_;
  std::array<index_t, 3> at_{-1, -1, -1};
  std::vector<std::string> wrong_;
  double largest_ = -1;
  long failed_ = 0, fair_ = 0;
};

}  // namespace

const rule* refusal(const scenario& s, family f) {
  for (const rule& r : rules()) {
    if (r.v == verdict::refused && r.applies(s, f)) return &r;
  }
  return nullptr;
}

std::vector<std::string> check(const call& c, const policy_entry& policy, tally& all) {
  std::vector<std::string> wrong = c.wrong;
  const std::string_view message = c.returned.message();
  if (const rule* r = refusal(c.of, policy.kind)) {
    if (c.returned.code() != errc::invalid_argument || message.find(r->text) == std::string_view::npos)
      wrong.push_back("to be refused as '" + std::string(r->text) +
                      "', but: " + (c.returned ? "ok" : std::string(message)));
    return wrong;
  }
  if (!c.returned) {
    wrong.push_back("to be served, but: " + std::string(message));
    return wrong;
  }
  const std::vector<std::string> more = judge(c, policy, all).run();
  wrong.insert(wrong.end(), more.begin(), more.end());
  return wrong;
}

}  // namespace vattn::product
