// New rows to the paged cache, rounded to its type.
//
// Bound by latency for one token and by memory for many. A block has a row.
#include "paged.cuh"

__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }

template <typename T>
__device__ __forceinline__ void append(const float* k, const float* v, T* cache, const unsigned* positions,
                                       const unsigned* row_sequence, const unsigned* page_table,
                                       unsigned max_pages, unsigned k_width, unsigned v_width) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const unsigned row = blockIdx.x, position = positions[row];
    const unsigned page = page_table[(size_t)row_sequence[row] * max_pages + position / PAGE_TOKENS];
    T* start = cache + (size_t)page * (k_width + v_width) * PAGE_TOKENS;
    T* keys = start + (size_t)(position % PAGE_TOKENS) * k_width;
    T* values = start + (size_t)PAGE_TOKENS * k_width + (size_t)(position % PAGE_TOKENS) * v_width;
    for (unsigned i = threadIdx.x; i < k_width; i += blockDim.x) store(keys + i, k[(size_t)row * k_width + i]);
    for (unsigned i = threadIdx.x; i < v_width; i += blockDim.x) store(values + i, v[(size_t)row * v_width + i]);
}

extern "C" __global__ void ktx_append_f16(const float* k, const float* v, __half* cache, const unsigned* positions,
                                          const unsigned* row_sequence, const unsigned* page_table,
                                          unsigned max_pages, unsigned k_width, unsigned v_width) {
    append(k, v, cache, positions, row_sequence, page_table, max_pages, k_width, v_width);
}

extern "C" __global__ void ktx_append_f32(const float* k, const float* v, float* cache, const unsigned* positions,
                                          const unsigned* row_sequence, const unsigned* page_table,
                                          unsigned max_pages, unsigned k_width, unsigned v_width) {
    append(k, v, cache, positions, row_sequence, page_table, max_pages, k_width, v_width);
}
