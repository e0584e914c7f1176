#include "attend/engine.hpp"

template vattn::examples::engine vattn::examples::make_engine<float>(const problem&, const request&);
