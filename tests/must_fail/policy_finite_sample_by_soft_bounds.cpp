#include <vattn/vattn.hpp>

using codes = vattn::sketch::key_codes<8>;

struct mine : vattn::default_policy {
#if defined(VATTN_CORRECTED)
  using selector = vattn::select::hard_bounds<codes>;
  using bound = vattn::budget::bernstein;
#else
  using selector = vattn::select::upper_scores<codes>;
  using bound = vattn::budget::bernstein;
#endif
};

const vattn::vattention<mine> attend;
