#include <vattn/vattn.hpp>

struct mine : vattn::default_policy {
#if defined(VATTN_CORRECTED)
  using selector = vattn::select::none;
  using sampler = vattn::sample::from_store;
#else
  using selector = vattn::select::none;
  using sampler = vattn::sample::from_store;
  using bound = vattn::budget::bernstein;
#endif
};

const vattn::vattention<mine> attend;
