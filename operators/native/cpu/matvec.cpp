// One float32 row times a small float32 matrix. For the few kilobytes of a narrow model's weights, one thread is done
// before torch has woken the others.

#include <cstdint>

#include "simd.h"

extern "C" {

// x [inputs]; weight [outputs, inputs]; out [outputs].
ASCEND_V4_CLONES void ascend_v4_matvec(const float* x, const float* weight, int64_t outputs, int64_t inputs,
                                       float* out) {
  for (int64_t row = 0; row < outputs; ++row) {
    const float* values = weight + row * inputs;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < inputs; ++i) total += x[i] * values[i];
    out[row] = total;
  }
}

}  // extern "C"
