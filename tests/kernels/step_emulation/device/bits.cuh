// plugins/kernels/device/bits.cuh in C++: the emulator of dijiang_linear has it.
#include "../../../../plugins/tests/emulator/device/bits.cuh"
