// New rows to the paged cache, rounded to its type.
//
// Bound by latency for one token and by memory for many. A block has a row.
#include "cells.cuh"

template <typename T>
__device__ __forceinline__ void append(const float* k, const float* v, T* cache, const unsigned* positions,
                                       const unsigned* row_sequence, const unsigned* page_table,
                                       unsigned max_pages, unsigned k_width, unsigned v_width) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const unsigned row = blockIdx.x, position = positions[row];
    const unsigned page = page_table[(size_t)row_sequence[row] * max_pages + position / PAGE_TOKENS];
    const unsigned slot = position % PAGE_TOKENS;
    const Rows<T> keys = Rows<T>::keys(cache, page, k_width, v_width).skip((size_t)slot * k_width);
    const Rows<T> values = Rows<T>::values(cache, page, k_width, v_width).skip((size_t)slot * v_width);
    for (unsigned i = threadIdx.x; i < k_width; i += blockDim.x) keys.put(i, k[(size_t)row * k_width + i]);
    for (unsigned i = threadIdx.x; i < v_width; i += blockDim.x) values.put(i, v[(size_t)row * v_width + i]);
}

#define KTX_APPEND(suffix, type)                                                                                   \
    extern "C" __global__ void ktx_append_##suffix(const float* k, const float* v, type* cache, const unsigned* positions, \
                                                   const unsigned* row_sequence, const unsigned* page_table,       \
                                                   unsigned max_pages, unsigned k_width, unsigned v_width) {       \
        append(k, v, cache, positions, row_sequence, page_table, max_pages, k_width, v_width);                     \
    }

KTX_APPEND(f16, __half)
KTX_APPEND(f32, float)
KTX_APPEND(q8_0, Q8)
