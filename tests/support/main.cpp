// main() for Catch2 2, which brings none in a library.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
