#pragma once

#include <vattn/base/config.hpp>

inline vattn::index_t heads() { return 32; }
