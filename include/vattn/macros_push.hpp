// No #pragma once: each header of the library begins with this and ends with macros_pop.hpp. Macros of the program that
// are words of ours (windows.h defines most of these) are set aside in between, and are as before after it.
#pragma push_macro("min")
#pragma push_macro("max")
#pragma push_macro("small")
#pragma push_macro("near")
#pragma push_macro("far")
#pragma push_macro("interface")
#pragma push_macro("ERROR")
#pragma push_macro("IN")
#pragma push_macro("OUT")
#pragma push_macro("CONST")
#pragma push_macro("OPTIONAL")
#pragma push_macro("Yield")
#undef min
#undef max
#undef small
#undef near
#undef far
#undef interface
#undef ERROR
#undef IN
#undef OUT
#undef CONST
#undef OPTIONAL
#undef Yield
