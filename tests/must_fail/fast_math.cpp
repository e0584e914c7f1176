// Its flags are what is wrong.
#include <vattn/vattn.hpp>

int main() { return vattn::config().validate() ? 0 : 1; }
