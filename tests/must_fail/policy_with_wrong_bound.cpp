#include <vattn/vattn.hpp>

// A bound without a name and without its assumptions.
struct my_bound {
  static constexpr auto kind = vattn::guarantee::asymptotic;
#if defined(VATTN_CORRECTED)
  static constexpr const char* name = "mine";
  static constexpr const char* assumptions = "asymptotic: mine";
#endif
  static double radius(const vattn::sum_evidence& e, double m, double delta) noexcept {
    return vattn::budget::clt::radius(e, m, delta);
  }
};

struct mine : vattn::default_policy {
  using bound = my_bound;
};

const vattn::vattention<mine> attend;
