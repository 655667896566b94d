// What lies between the projections and attention, in one launch: head norms, rotation, and the new rows to
// the paged cache. One after the other these are five launches of a microsecond or two each.
//
// A warp has a head of a row, in shared memory between its steps. Bound by latency for one token, by memory
// for many. Norm and rotation round as norm.cu and rope.cu do.
#include "cells.cuh"

#define WARPS 8

struct Rotation {
    const float* table;  // [positions, dim], rows [cos | sin]
    unsigned dim, positions;
    int interleaved;
};

// Normalises `width` values in place; a null weight leaves them.
__device__ __forceinline__ void normalise(float* x, const float* weight, unsigned width, float eps) {
    if (!weight) return;
    const unsigned lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (unsigned i = lane; i < width; i += 32) sum += x[i] * x[i];
    const float factor = 1.0f / sqrtf(warp_sum(sum) / (float)width + eps);
    for (unsigned i = lane; i < width; i += 32) x[i] = __fmul_rn(__fmul_rn(x[i], factor), weight[i]);
    __syncwarp();
}

__device__ __forceinline__ void rotate(float* x, const Rotation& rotation, unsigned position) {
    const unsigned half = rotation.dim / 2;
    const float* row = rotation.table + (size_t)min(position, rotation.positions - 1) * rotation.dim;
    for (unsigned pair = threadIdx.x % 32; pair < half; pair += 32) {
        float *first = rotation.interleaved ? x + 2 * pair : x + pair, *second = rotation.interleaved ? first + 1 : first + half;
        const float a = *first, b = *second, c = row[pair], s = row[half + pair];
        *first = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
        *second = __fadd_rn(__fmul_rn(a, s), __fmul_rn(b, c));
    }
    __syncwarp();
}

// The page of a row's position.
__device__ __forceinline__ unsigned page_of(const unsigned* row_sequence, const unsigned* page_table, unsigned max_pages,
                                            unsigned row, unsigned position) {
    return page_table[(size_t)row_sequence[row] * max_pages + position / PAGE_TOKENS];
}

// Heads of q, then of k, then of v, a warp each; blockIdx: row, heads by WARPS.
template <typename T>
__device__ __forceinline__ void grouped(float* q, const float* k, const float* v, T* cache, const float* q_norm,
                                        const float* k_norm, float q_eps, float k_eps,
                                        const Rotation& rotation, const unsigned* positions, const unsigned* row_sequence,
                                        const unsigned* page_table, unsigned max_pages, unsigned heads,
                                        unsigned kv_heads, unsigned k_dim, unsigned v_dim) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    extern __shared__ float shared[];
    const unsigned row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned head = blockIdx.y * WARPS + warp;
    if (head >= heads + 2 * kv_heads) return;
    const unsigned position = positions[row], slot = position % PAGE_TOKENS;
    const unsigned k_width = kv_heads * k_dim, v_width = kv_heads * v_dim;
    if (head >= heads + kv_heads) {
        const unsigned page = page_of(row_sequence, page_table, max_pages, row, position);
        const unsigned at = (head - heads - kv_heads) * v_dim;
        const Rows<T> to = Rows<T>::values(cache, page, k_width, v_width).skip((size_t)slot * v_width + at);
        for (unsigned i = lane; i < v_dim; i += 32) to.put(i, v[(size_t)row * v_width + at + i]);
        return;
    }
    const bool is_query = head < heads;
    float* x = shared + warp * k_dim;
    const float* from = is_query ? q + ((size_t)row * heads + head) * k_dim : k + (size_t)row * k_width + (head - heads) * k_dim;
    for (unsigned i = lane; i < k_dim; i += 32) x[i] = from[i];
    __syncwarp();
    normalise(x, is_query ? q_norm : k_norm, k_dim, is_query ? q_eps : k_eps);
    rotate(x, rotation, position);
    if (is_query) {
        float* to = q + ((size_t)row * heads + head) * k_dim;
        for (unsigned i = lane; i < k_dim; i += 32) to[i] = x[i];
        return;
    }
    const unsigned page = page_of(row_sequence, page_table, max_pages, row, position);
    const Rows<T> to = Rows<T>::keys(cache, page, k_width, v_width).skip((size_t)slot * k_width + (head - heads) * k_dim);
    for (unsigned i = lane; i < k_dim; i += 32) to.put(i, x[i]);
}

// The rotated parts of q's heads, and one warp that normalises c, rotates k_pe and stores both.
template <typename T>
__device__ __forceinline__ void latent(float* q, const float* rows, T* cache, const float* norm, float eps,
                                       const Rotation& rotation, const unsigned* positions,
                                       const unsigned* row_sequence, const unsigned* page_table,
                                       unsigned max_pages, unsigned heads, unsigned q_stride, unsigned q_offset,
                                       unsigned compressed) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    extern __shared__ float shared[];
    const unsigned row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned head = blockIdx.y * WARPS + warp, position = positions[row];
    if (head < heads) return rotate(q + ((size_t)row * heads + head) * q_stride + q_offset, rotation, position);
    if (head > heads) return;
    const unsigned width = compressed + rotation.dim;
    for (unsigned i = lane; i < width; i += 32) shared[i] = rows[(size_t)row * width + i];
    __syncwarp();
    normalise(shared, norm, compressed, eps);
    rotate(shared + compressed, rotation, position);
    const unsigned page = page_of(row_sequence, page_table, max_pages, row, position);
    const Rows<T> to = Rows<T>::keys(cache, page, width, 0).skip((size_t)(position % PAGE_TOKENS) * width);
    for (unsigned i = lane; i < width; i += 32) to.put(i, shared[i]);
}

#define KTX_INPUTS(suffix, type)                                                                                   \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                       \
        ktx_grouped_inputs_##suffix(float* q, const float* k, const float* v, type* cache, const float* q_norm,    \
                                    const float* k_norm, float q_eps, float k_eps, const float* table,             \
                                    unsigned rope_dim,                                                             \
                                    unsigned table_positions, int interleaved, const unsigned* positions,          \
                                    const unsigned* row_sequence, const unsigned* page_table, unsigned max_pages,  \
                                    unsigned heads, unsigned kv_heads, unsigned k_dim, unsigned v_dim) {           \
        grouped<type>(q, k, v, cache, q_norm, k_norm, q_eps, k_eps, Rotation{table, rope_dim, table_positions, interleaved}, \
                      positions, row_sequence, page_table, max_pages, heads, kv_heads, k_dim, v_dim);              \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                       \
        ktx_latent_inputs_##suffix(float* q, const float* rows, type* cache, const float* norm, float eps,         \
                                   const float* table, unsigned rope_dim, unsigned table_positions,                \
                                   int interleaved, const unsigned* positions, const unsigned* row_sequence,       \
                                   const unsigned* page_table, unsigned max_pages, unsigned heads,                 \
                                   unsigned q_stride, unsigned q_offset, unsigned compressed) {                    \
        latent<type>(q, rows, cache, norm, eps, Rotation{table, rope_dim, table_positions, interleaved},           \
                     positions, row_sequence, page_table, max_pages, heads, q_stride, q_offset, compressed);       \
    }

KTX_INPUTS(f16, __half)
KTX_INPUTS(f32, float)
KTX_INPUTS(q8_0, Q8)
