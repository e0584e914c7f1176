#include <vattn/vattn.hpp>

using codes = vattn::sketch::key_codes<8>;

struct mine : vattn::default_policy {
#if defined(VATTN_CORRECTED)
  using selector = vattn::select::indexed<codes>;
  using sampler = vattn::sample::by_importance;
#else
  using selector = vattn::select::indexed<codes>;
  using sampler = vattn::sample::by_importance;
  using target = vattn::budget::denominator;
#endif
};

const vattn::vattention<mine> attend;
