#include "attend/engine.hpp"

template vattn::examples::engine vattn::examples::make_engine<Eigen::half>(const problem&, const request&);
