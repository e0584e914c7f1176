// Quantiles against tables made with mpmath at 30 digits (root of the distribution function).
#include "vattn/budget/quantile.hpp"

#include <vector>

#include "support/catch.hpp"

using namespace vattn::test;
namespace budget = vattn::budget;

TEST_CASE("normal quantiles", "[budget][quantile]") {
  struct entry {
    double p, z;
  };
  const std::vector<entry> table{
      {0.6, 0.2533471031357998},   {0.75, 0.67448975019608174},  {0.9, 1.2815515655446005},
      {0.95, 1.6448536269514727},  {0.975, 1.9599639845400542},  {0.99, 2.3263478740408411},
      {0.995, 2.5758293035489008}, {0.9995, 3.2905267314918948}, {0.999999, 4.7534243088228989},
      {1e-9, -5.9978070150076869}, {0.025, -1.9599639845400542},
  };
  for (const entry& e : table) {
    CAPTURE(e.p);
    CHECK_THAT(budget::normal_quantile(e.p), WithinRel(e.z, 1e-9));
  }
  CHECK_THAT(budget::normal_quantile(0.5), WithinAbs(0, 1e-12));
}

TEST_CASE("F quantiles, degrees of freedom whole and not", "[budget][quantile]") {
  struct entry {
    double delta, nu1, nu2, f;
  };
  const std::vector<entry> table{
      {0.05, 1, 10, 4.9646027437307144},         {0.05, 5, 10, 3.325834530413012},
      {0.01, 5, 10, 5.6363261876690792},         {0.1, 3, 20, 2.380087051069607},
      {0.1, 1, 1, 39.863458189061401},           {0.05, 64, 7, 3.2997562395577876},
      {0.1, 1.7, 12.3, 2.8796388253686827},      {0.05, 2.5, 3.5, 7.7548841716762347},
      {0.2, 17.25, 250.5, 1.2864390050845634},   {0.01, 1.01, 4.2, 19.816973204086676},
      {0.3, 128, 1.5, 3.722027140869943},        {0.001, 7.5, 40.25, 4.3077986215641259},
      {0.05, 127.5, 1000.5, 1.2320146367829588}, {0.5, 3.3, 9.9, 0.86501400982914774},
      {0.05, 1, 100000, 3.8415518136867745},     {0.1, 12.5, 50000, 1.5346943929122271},
  };
  for (const entry& e : table) {
    CAPTURE(e.delta, e.nu1, e.nu2);
    // Beyond 1e4 degrees of freedom the value at 1e4 stands in: never smaller, 0.2 % larger at most.
    const double q = budget::f_quantile(e.delta, e.nu1, e.nu2);
    if (e.nu2 <= 1e4) {
      CHECK_THAT(q, WithinRel(e.f, 1e-6));
    } else {
      CHECK(q >= e.f);
      CHECK(q <= 1.002 * e.f);
    }
    CHECK_THAT(budget::f_upper_tail(e.f, e.nu1, e.nu2), WithinRel(e.delta, 1e-6));
  }
}

TEST_CASE("with many degrees of freedom F is chi-square over its own", "[budget][quantile]") {
  struct entry {
    double delta, nu, chi2;
  };
  const std::vector<entry> table{
      {0.05, 1, 3.841458820694126},   {0.05, 2, 5.991464547107982},   {0.1, 5, 9.2363568997811185},
      {0.01, 10, 23.20925115895436},  {0.05, 30, 43.772971825742188}, {0.1, 128, 148.88525547499116},
      {0.2, 3.5, 5.3222221322605926},
  };
  for (const entry& e : table) {
    for (const double nu2 : {1e5, 1e7, std::numeric_limits<double>::infinity()}) {
      CAPTURE(e.delta, e.nu, nu2);
      const double q = budget::squared_error_quantile(e.delta, e.nu, nu2);
      CHECK(q >= e.chi2 / e.nu * (1 - 1e-9));
      CHECK(q <= e.chi2 / e.nu * 1.002);
    }
  }
  // One dimension of known variance: the square of the two-sided normal quantile, exactly.
  CHECK_THAT(budget::squared_error_quantile(0.05, 1, 1e9), WithinRel(1.9599639845400542 * 1.9599639845400542, 1e-9));
}

TEST_CASE("F quantiles fall with delta and with the degrees of freedom of the variance", "[budget][quantile]") {
  for (const double nu1 : {1.0, 1.5, 4.0, 33.3, 128.0}) {
    for (const double nu2 : {1.1, 2.0, 7.7, 60.0, 4000.0}) {
      double last = std::numeric_limits<double>::infinity();
      for (const double delta : {1e-6, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.5}) {
        const double q = budget::f_quantile(delta, nu1, nu2);
        CAPTURE(nu1, nu2, delta, q);
        CHECK(std::isfinite(q));
        CHECK(q < last);
        CHECK_THAT(budget::f_upper_tail(q, nu1, nu2), WithinRel(delta, 1e-5));
        if (delta <= 0.1) CHECK(budget::f_quantile(delta, nu1, 2 * nu2) < q);
        last = q;
      }
    }
  }
}

TEST_CASE("F quantiles of a delta that is hardly one are never too small", "[budget][quantile]") {
  for (const double delta : {1e-12, 1e-20, 1e-26, 1e-30, 1e-100, 1e-300}) {
    for (const double nu1 : {1.0, 8.0, 128.0}) {
      for (const double nu2 : {1.0, 3.0, 30.0, 1e4}) {
        CAPTURE(delta, nu1, nu2);
        // Infinite where it is out of reach: then nothing is verified.
        CHECK(budget::f_upper_tail(budget::f_quantile(delta, nu1, nu2), nu1, nu2) <= 1.001 * delta);
      }
    }
  }
}
