#include <vattn/vattn.hpp>

using codes = vattn::sketch::key_codes<8>;

struct mine : vattn::default_policy {
#if defined(VATTN_CORRECTED)
  using selector = vattn::select::two_phase<vattn::sketch::key_codes<1>, codes>;
  using sampler = vattn::sample::in_two_phases;
#else
  using selector = vattn::select::indexed<codes>;
  using sampler = vattn::sample::in_two_phases;
#endif
};

const vattn::vattention<mine> attend;
