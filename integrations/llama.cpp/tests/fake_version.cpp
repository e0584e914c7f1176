// Loaded before ggml it says that another version is there: the library must then stand aside.
extern "C" const char* ggml_version() { return "9.9.9"; }
