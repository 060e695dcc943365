"""The engines that can write replies: our own, llama.cpp's server, and interp-engine."""
