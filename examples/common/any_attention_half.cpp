#include "common/any_attention_impl.hpp"

template class vattn::examples::any_attention<Eigen::half>;
