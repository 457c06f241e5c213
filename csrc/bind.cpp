// Every entry point of streamgen._cpu, with its checks: the table of contents of the CPU kernels.
//
// Arrays come as integers (addresses) with their sizes; the caller keeps them alive for the call. The Python side
// (backends/cpu.py) has checked dtypes and shapes when the program was loaded.
#include <nanobind/nanobind.h>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "cpu/sampling.h"

namespace nb = nanobind;

NB_MODULE(_cpu, m) { m.doc() = "CPU kernels of streamgen"; }
