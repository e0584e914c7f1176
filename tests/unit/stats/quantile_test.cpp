// Quantiles against tables made with mpmath at 40 digits (root of the distribution function), and against Eigen.
#include "vattn/stats/quantile.hpp"

#include <unsupported/Eigen/SpecialFunctions>
#include <vector>

#include "support/catch.hpp"

using namespace vattn::test;
namespace stats = vattn::stats;

TEST_CASE("the incomplete beta function is that of tables and of Eigen", "[stats][quantile]") {
  struct entry {
    double a, b, x, value;
  };
  const std::vector<entry> table{
      {0.5, 0.5, 0.3, 0.36901011956554538},           {2, 3, 0.4, 0.52480000000000004},
      {0.7, 128, 0.01, 0.82889246926451382},          {128, 64, 0.7, 0.8363434074448491},
      {5000, 1.5, 0.9997, 0.39153266151989975},       {500000.0, 64, 0.9998, 4.8420877944727057e-5},
      {500000.0, 0.5, 0.999999, 0.31731050785589558}, {30, 1, 0.2, 1.0737418240000018e-21},
  };
  for (const entry& e : table) {
    CAPTURE(e.a, e.b, e.x);
    CHECK_THAT(stats::incomplete_beta(e.a, e.b, e.x), WithinRel(e.value, 1e-11));
  }
  for (const double a : {0.5, 0.7, 1.0, 3.0, 8.5, 63.75, 128.0}) {
    for (const double b : {0.5, 1.0, 2.25, 30.0, 500.0}) {
      for (const double x : {1e-6, 0.01, 0.2, 0.5, 0.77, 0.999}) {
        CAPTURE(a, b, x);
        CHECK_THAT(stats::incomplete_beta(a, b, x),
                   WithinRel(Eigen::numext::betainc(a, b, x), 1e-10) || WithinAbs(0, 1e-290));
      }
    }
  }
  CHECK(stats::incomplete_beta(2, 3, 0) == 0);
  CHECK(stats::incomplete_beta(2, 3, 1) == 1);
}

TEST_CASE("normal quantiles", "[stats][quantile]") {
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
    CHECK_THAT(stats::normal_quantile(e.p), WithinRel(e.z, 1e-9));
  }
  CHECK_THAT(stats::normal_quantile(0.5), WithinAbs(0, 1e-12));
  const std::vector<entry> upper{
      {0.3, 0.52440051270804082},   {0.05, 1.6448536269514727},  {1e-3, 3.0902323061678135},
      {1e-8, 5.6120012441747887},   {1e-15, 7.9413453261709968}, {1e-50, 14.933337534788489},
      {1e-300, 37.047096299361199},
  };
  for (const entry& e : upper) {
    CAPTURE(e.p);
    CHECK_THAT(stats::normal_upper_quantile(e.p), WithinRel(e.z, 1e-13));
  }
}

TEST_CASE("F quantiles from one degree of freedom to a million", "[stats][quantile]") {
  struct entry {
    double delta, nu1, nu2, f;
  };
  const std::vector<entry> table{
      {0.05, 1, 10, 4.9646027437307142},         {0.05, 5, 10, 3.3258345304130119},
      {0.01, 5, 10, 5.6363261876690792},         {0.1, 3, 20, 2.3800870510696069},
      {0.1, 1, 1, 39.863458189061396},           {0.05, 64, 7, 3.2997562395577875},
      {0.1, 1.7, 12.3, 2.8796388253686826},      {0.05, 2.5, 3.5, 7.7548841716762344},
      {0.2, 17.25, 250.5, 1.2864390050845633},   {0.01, 1.01, 4.2, 19.816973204086674},
      {0.3, 128, 1.5, 3.7220271408699432},       {0.001, 7.5, 40.25, 4.3077986215641259},
      {0.05, 127.5, 1000.5, 1.2320146367829588}, {0.5, 3.3, 9.9, 0.86501400982914773},
      {0.05, 1, 100000, 3.8415518136867744},     {0.1, 12.5, 50000, 1.5346943929122271},
      {1e-12, 1, 1, 4.052847345693511e+23},      {1e-12, 256, 1000000.0, 1.7533860985478845},
      {1e-12, 16, 30, 23.672944641807371},       {0.5, 256, 1000000.0, 0.99739770749313515},
      {0.05, 1, 1000000.0, 3.8414681198431634},  {1e-06, 40, 3, 12559.857004063683},
  };
  for (const entry& e : table) {
    CAPTURE(e.delta, e.nu1, e.nu2);
    CHECK_THAT(stats::f_quantile(e.delta, e.nu1, e.nu2), WithinRel(e.f, 2e-10));
    CHECK_THAT(stats::f_upper_tail(e.f, e.nu1, e.nu2), WithinRel(e.delta, 1e-9));
  }
}

TEST_CASE("of a variance of which nothing is known, no quantile is finite", "[stats][quantile]") {
  for (const double dof : {0.0, -1.0, std::nan("")}) {
    CHECK(stats::f_quantile(0.1, 5, dof) == stats::infinity);
    CHECK(stats::squared_error_quantile(0.1, 1, dof) == stats::infinity);
  }
}

TEST_CASE("Student's quantiles", "[stats][quantile]") {
  struct entry {
    double p, nu, t;
  };
  const std::vector<entry> table{
      {0.95, 1, 6.3137515146750374},
      {0.975, 4, 2.7764451051977935},
      {0.9, 30, 1.3104150253913957},
      {0.999, 2.5, 13.82219311086596},
  };
  for (const entry& e : table) {
    CAPTURE(e.p, e.nu);
    CHECK_THAT(stats::student_quantile(e.p, e.nu), WithinRel(e.t, 1e-10));
  }
  CHECK(stats::student_quantile(0.5, 3) == 0);
}

TEST_CASE("with many degrees of freedom F is chi-square over its own", "[stats][quantile]") {
  struct entry {
    double delta, nu, chi2;
  };
  const std::vector<entry> table{
      {0.05, 1, 3.841458820694126},   {0.05, 2, 5.991464547107982},   {0.1, 5, 9.2363568997811185},
      {0.01, 10, 23.20925115895436},  {0.05, 30, 43.772971825742188}, {0.1, 128, 148.88525547499116},
      {0.2, 3.5, 5.3222221322605926},
  };
  for (const entry& e : table) {
    for (const double nu2 : {1e6, 1e7, stats::infinity}) {
      CAPTURE(e.delta, e.nu, nu2);
      const double q = stats::squared_error_quantile(e.delta, e.nu, nu2);
      CHECK(q >= e.chi2 / e.nu * (1 - 1e-9));
      CHECK(q <= e.chi2 / e.nu * (1 + 2e-5));
    }
  }
  // One dimension of known variance: the square of the two-sided normal quantile, exactly.
  CHECK_THAT(stats::squared_error_quantile(0.05, 1, 1e9), WithinRel(1.9599639845400542 * 1.9599639845400542, 1e-12));
}

TEST_CASE("F quantiles fall with delta and with the degrees of freedom of the variance", "[stats][quantile]") {
  for (const double nu1 : {1.0, 1.5, 4.0, 33.3, 256.0}) {
    for (const double nu2 : {1.0, 1.1, 2.0, 7.7, 60.0, 4000.0, 5e5}) {
      double last = stats::infinity;
      for (const double delta : {1e-12, 1e-9, 1e-6, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.5}) {
        const double q = stats::f_quantile(delta, nu1, nu2);
        CAPTURE(nu1, nu2, delta, q);
        CHECK(std::isfinite(q));
        CHECK(q < last);
        CHECK_THAT(Eigen::numext::betainc(nu2 / 2, nu1 / 2, nu2 / (nu2 + nu1 * q)), WithinRel(delta, 2e-9));
        if (delta <= 0.1) CHECK(stats::f_quantile(delta, nu1, 2 * nu2) < q);
        last = q;
      }
    }
  }
}

TEST_CASE("F quantiles of a delta that is hardly one are never too small", "[stats][quantile]") {
  for (const double delta : {1e-12, 1e-20, 1e-26, 1e-30, 1e-100, 1e-300}) {
    for (const double nu1 : {1.0, 8.0, 128.0}) {
      for (const double nu2 : {1.0, 3.0, 30.0, 1e4}) {
        CAPTURE(delta, nu1, nu2);
        // Infinite where it is out of reach: then nothing is verified.
        CHECK(stats::f_upper_tail(stats::f_quantile(delta, nu1, nu2), nu1, nu2) <= 1.001 * delta);
      }
    }
  }
}
