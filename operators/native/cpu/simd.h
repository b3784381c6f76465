// Instruction sets picked at run time, and float32 loops that may sum in any order.

#ifndef ASCEND_V4_SIMD_H_
#define ASCEND_V4_SIMD_H_

// GCC on x86-64 Linux compiles marked functions several times and picks one when the library is loaded. Elsewhere
// (clang, aarch64) the baseline is compiled: NEON is part of it on aarch64.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define ASCEND_V4_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ASCEND_V4_CLONES
#endif

#endif  // ASCEND_V4_SIMD_H_
