#include <vattn/vattn.hpp>

struct mine {
#if defined(VATTN_CORRECTED)
  using selector = vattn::select::none;
#endif
  using sampler = vattn::sample::uniform_without_replacement;
  using bound = vattn::budget::clt;
  using target = vattn::budget::denominator;
};

const vattn::vattention<mine> attend;
