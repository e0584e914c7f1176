#include <vattn/vattn.hpp>

// A bound without a name and without its assumptions.
struct my_bound {
  static constexpr auto kind = vattn::guarantee::asymptotic;
#if defined(VATTN_CORRECTED)
  static constexpr const char* name = "mine";
  static constexpr const char* assumptions = "asymptotic: mine";
#endif
  static double squared_quantile(const vattn::stats::error_shape& e, double delta) noexcept {
    return vattn::budget::clt::squared_quantile(e, delta);
  }
};

struct mine : vattn::default_policy {
  using bound = my_bound;
};

const vattn::vattention<mine> attend;
