#include <vattn/vattn.hpp>

struct mine : vattn::default_policy {
#if defined(VATTN_CORRECTED)
  using selector = vattn::select::top_k<vattn::select::exact_logits>;
  using sampler = vattn::sample::by_importance;
#else
  using sampler = vattn::sample::by_importance;
#endif
};

const vattn::vattention<mine> attend;
