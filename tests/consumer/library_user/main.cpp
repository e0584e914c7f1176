#include <heads.hpp>

int main() { return heads() == 32 ? 0 : 1; }
