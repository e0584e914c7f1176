#include "attend/engine.hpp"

template vattn::examples::engine vattn::examples::make_engine<Eigen::bfloat16>(const problem&, const request&);
