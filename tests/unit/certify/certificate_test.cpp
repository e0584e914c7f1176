// Certificates and settings: plain data with rules.
#include <cstring>
#include <limits>

#include "support/catch.hpp"
#include "support/problem.hpp"

using vattn::certificate;
using vattn::config;
using vattn::test::contains;

TEST_CASE("an empty certificate promises nothing", "[certify]") {
  const certificate c;
  CHECK(c.n == 0);
  CHECK(c.rows_exact == 0);
  CHECK(c.rows_sampled == 0);
  CHECK(c.budget == 0);
  CHECK(c.log_denominator == -std::numeric_limits<double>::infinity());
  CHECK(c.denominator_error == 0);
  CHECK(c.epsilon == 0);
  CHECK(c.delta == 0);
  CHECK(c.epsilon_achieved == 0);
  CHECK(c.coherence == 0);
  CHECK(c.breaches == 0);
  CHECK(c.rounds == 0);
  CHECK(c.rows() == 0);
  CHECK(c.density() == 0);
  CHECK_FALSE(c.exact());
  CHECK_FALSE(c.saturated);
  CHECK(std::strcmp(to_string(c.promise), "none") == 0);
  CHECK(std::strcmp(to_string(c.target), "none") == 0);
}

TEST_CASE("density is rows over visible tokens", "[certify]") {
  certificate c;
  c.n = 400;
  c.rows_exact = 30;
  c.rows_sampled = 70;
  CHECK(c.rows() == 100);
  CHECK(c.density() == 0.25);
}

TEST_CASE("all rows read: no error, no chance, whatever was there before", "[certify]") {
  certificate c;
  c.n = 400;
  c.rows_exact = 30;
  c.rows_sampled = 70;
  c.epsilon_achieved = c.denominator_error = 0.5;
  c.saturated = true;
  c.promise = vattn::guarantee::asymptotic;
  certify_exact(c);
  CHECK(c.exact());
  CHECK(c.rows_exact == 400);
  CHECK(c.rows_sampled == 0);
  CHECK(c.density() == 1);
  CHECK(c.epsilon_achieved == 0);
  CHECK(c.denominator_error == 0);
  CHECK_FALSE(c.saturated);
  CHECK(contains(c.assumptions, "every visible row was read"));
}

TEST_CASE("names of targets and guarantees", "[certify]") {
  using vattn::guarantee;
  using vattn::target_kind;
  CHECK(std::strcmp(to_string(target_kind::denominator), "denominator") == 0);
  CHECK(std::strcmp(to_string(target_kind::numerator), "numerator") == 0);
  CHECK(std::strcmp(to_string(target_kind::sdpa), "sdpa") == 0);
  CHECK(std::strcmp(to_string(target_kind::output), "output") == 0);
  CHECK(std::strcmp(to_string(guarantee::asymptotic), "asymptotic") == 0);
  CHECK(std::strcmp(to_string(guarantee::finite_sample), "finite-sample") == 0);
  CHECK(std::strcmp(to_string(guarantee::deterministic), "deterministic") == 0);
  CHECK(std::strcmp(to_string(guarantee::exact), "exact") == 0);
  CHECK(std::strcmp(to_string(vattn::error_scale::output), "output") == 0);
  CHECK(std::strcmp(to_string(vattn::error_scale::rms), "rms") == 0);
  // An asymptotic bound never reads as a finite-sample one.
  CHECK(contains(vattn::budget::clt::assumptions, "asymptotic"));
  CHECK(contains(vattn::budget::student::assumptions, "asymptotic"));
  CHECK(contains(vattn::budget::hoeffding::assumptions, "finite-sample"));
  CHECK(contains(vattn::budget::bernstein::assumptions, "finite-sample"));
}

TEST_CASE("every setting out of its range is named, with its value and the rule", "[certify][config]") {
  CHECK(config{}.validate().ok());
  const auto why = [](auto&& change) {
    config c;
    change(c);
    const vattn::status s = c.validate();
    CHECK(s.code() == vattn::errc::invalid_argument);
    return std::string(s.message());
  };
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double bad : {0.0, 1.0, -0.1, 1.5, nan, 1e308}) {
    CHECK(contains(why([&](config& c) { c.epsilon = bad; }), "epsilon is "));
    CHECK(contains(why([&](config& c) { c.delta = bad; }), "delta is "));
  }
  CHECK(contains(why([](config& c) { c.epsilon = 1; }), "epsilon is 1: give a relative error in (0, 1)"));
  CHECK(contains(why([](config& c) { c.sinks = -1; }), "sinks is -1"));
  CHECK(contains(why([](config& c) { c.window = -1; }), "window is -1"));
  for (const double bad : {-0.5, 1.01, nan}) {
    CHECK(contains(why([&](config& c) { c.heavy = bad; }), "heavy is "));
    CHECK(contains(why([&](config& c) { c.base = bad; }), "base is "));
    CHECK(contains(why([&](config& c) { c.max_density = bad; }), "max_density is "));
  }
  CHECK(contains(why([](config& c) { c.base = 0; }), "base is 0"));
  CHECK(contains(why([](config& c) { c.max_density = 0; }), "max_density is 0"));
  CHECK(contains(why([](config& c) { c.min_sample = 1; }), "min_sample is 1: a variance needs"));
  CHECK(contains(why([](config& c) { c.max_rounds = 0; }), "max_rounds is 0"));
}

TEST_CASE("the published presets are valid and as published", "[certify][config]") {
  using namespace vattn::presets;
  for (const config& c : {paper_tight, paper_default, paper_moderate, paper_loose}) {
    CHECK(c.validate().ok());
    CHECK(c.sinks == 128);
    CHECK(c.window == 128);
    CHECK(c.heavy >= 0.02);
    CHECK(c.heavy <= 0.10);
    CHECK(c.base >= 0.01);
    CHECK(c.base <= 0.05);
    CHECK(c.epsilon == c.delta);
    CHECK(c.max_rounds == 2);
    CHECK(c.accept_last);
  }
}

TEST_CASE("a status is one line, cut at its capacity", "[certify][status]") {
  CHECK(vattn::status().ok());
  CHECK(std::strlen(vattn::status().message()) == 0);
  const std::string text(1000, 'x');
  const auto s = vattn::status::error(vattn::errc::invalid_argument, "%d %s", 7, text.c_str());
  CHECK_FALSE(s);
  CHECK(std::strlen(s.message()) == 231);
  CHECK(contains(s.message(), "7 xxx"));
}
