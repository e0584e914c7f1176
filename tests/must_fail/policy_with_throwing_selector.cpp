#include <vattn/vattn.hpp>

#if defined(VATTN_CORRECTED)
#define MY_NOEXCEPT noexcept
#else
#define MY_NOEXCEPT
#endif

struct my_selector : vattn::select::none {
  vattn::index_t heavy_count(const vattn::ranking&, vattn::index_t n, const vattn::config&) const MY_NOEXCEPT {
    return n / 10;
  }
};

struct mine : vattn::default_policy {
  using selector = my_selector;
};

const vattn::vattention<mine> attend;
