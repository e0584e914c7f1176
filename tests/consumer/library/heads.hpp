#pragma once

#include <vattn/config.hpp>

inline vattn::index_t heads() { return 32; }
