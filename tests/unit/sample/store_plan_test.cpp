// What the cost model says of dense and sparse steps at each instruction set.
#include "vattn/store/store_plan.hpp"

#include "support/catch.hpp"

namespace {

using namespace vattn;
using kernel::isa;
using test::WithinAbs, test::WithinRel;

constexpr isa levels[] = {isa::portable, isa::neon, isa::avx2, isa::avx512, isa::avx512_bf16};

// The least n, to a hundred tokens, at which sampling may pay.
double crossover(isa how, index_t heads) {
  const read_costs costs(how, heads);
  index_t n = 100;
  while (n < 1'000'000 && !costs.may_pay(n, n)) n += 100;
  return static_cast<double>(n);
}

}  // namespace

TEST_CASE("costs grow with rows and heads, and a scan's depends on the instruction set", "[sample][store]") {
  for (const isa how : levels) {
    const read_costs one(how, 1), four(how, 4);
    CHECK(four.scan(1000) > one.scan(1000));
    CHECK_THAT(four.scan(2000), WithinRel(2 * four.scan(1000), 1e-12));
    CHECK(four.scan(1000) < four.dense(1000));  // codes are read for less than keys and values
    CHECK(four.pick() > four.slice());          // a row anywhere costs more than one that follows another
    CHECK_THAT(four.dense(1000), WithinRel(read_costs(isa::avx512_bf16, 1).dense(1000), 1e-12));  // the unit
  }
  const auto scan = [](isa how) { return read_costs(how, 4).scan(1000); };
  CHECK(scan(isa::avx512_bf16) < scan(isa::avx2));
  CHECK(scan(isa::avx2) < scan(isa::avx512));
  CHECK(scan(isa::avx512) < scan(isa::portable));
}

TEST_CASE("sampling pays from a length on, sooner for fewer heads and where scans are cheap", "[sample][store]") {
  // docs/performance.md states them.
  CHECK_THAT(crossover(isa::avx512_bf16, 4), WithinAbs(19000, 600));
  CHECK_THAT(crossover(isa::avx512_bf16, 1), WithinAbs(10000, 600));
  CHECK_THAT(crossover(isa::avx512, 4), WithinAbs(21000, 600));
  CHECK_THAT(crossover(isa::avx2, 4), WithinAbs(19000, 600));
  CHECK_THAT(crossover(isa::portable, 4), WithinAbs(30000, 600));
  for (const isa how : levels) {
    const read_costs costs(how, 4);
    const auto n = static_cast<index_t>(crossover(how, 4));
    CHECK_FALSE(costs.may_pay(n / 2, n / 2));
    CHECK(costs.may_pay(2 * n, 2 * n));
    CHECK_FALSE(costs.may_pay(50 * n, n));  // a scan of fifty tokens for each that might be read instead
  }
}
