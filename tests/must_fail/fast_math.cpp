// Its flags are what is wrong.
#include <vattn/settings.hpp>

int main() { return vattn::config().validate() ? 0 : 1; }
