// Attention without tensor cores: every shape, every cache type, every GPU. What the tensor-core kernels do
// not take runs here: GPUs before sm_80, F32 caches, odd head sizes.
//
// A block of 128 threads has up to ENTRIES queries that read one KV head and walks the positions 128 at a
// time. Scores: a thread has one position and multiplies its key row with all queries, which are broadcast
// from shared memory. Values: a thread has up to four columns of all queries. Sums are in f32. Bound by
// arithmetic from 8 queries on (2 instructions for each element of the cache and query), by memory below.
//
// In latent attention the key row is [c | k_pe], the query is in two buffers, and the values are the first
// columns of the keys.
#include "cells.cuh"

#define THREADS 128
#define ENTRIES 8
#define COLUMNS 4
#define LEAST_PAGES 2

// N elements of a key row.
template <typename T, int N>
__device__ __forceinline__ void load(const Rows<T>& row, unsigned i, float (&out)[N]) {
    if (N == 4) {
        const float4 v = row.get4(i);
        out[0] = v.x, out[1 % N] = v.y, out[2 % N] = v.z, out[3 % N] = v.w;
    } else {
        out[0] = row.get(i);
    }
}

// Scores of one key row with all queries; `queries` is [k_dim, ENTRIES].
template <typename T, int N>
__device__ __forceinline__ void score(const Rows<T>& key, const float* queries, unsigned k_dim, float (&scores)[ENTRIES]) {
    for (unsigned i = 0; i < k_dim; i += N) {
        float k[N];
        load<T, N>(key, i, k);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float4* q = reinterpret_cast<const float4*>(queries + (i + n) * ENTRIES);
#pragma unroll
            for (int e = 0; e < ENTRIES / 4; e++) {
                const float4 v = q[e];
                scores[4 * e] += k[n] * v.x;
                scores[4 * e + 1] += k[n] * v.y;
                scores[4 * e + 2] += k[n] * v.z;
                scores[4 * e + 3] += k[n] * v.w;
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void attend(const float* q, const float* q_tail, const float* sinks, T* cache,
                                       float* out, float* scratch, Batch batch, unsigned heads, unsigned kv_heads,
                                       unsigned k_dim, unsigned v_dim, unsigned q_dim, unsigned tail_stride,
                                       unsigned tail_offset, int latent, float scale, unsigned window,
                                       unsigned splits) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    extern __shared__ float4 shared4[];
    float* queries = reinterpret_cast<float*>(shared4);  // [k_dim, ENTRIES]
    float* weights = queries + k_dim * ENTRIES;          // [THREADS, ENTRIES]
    __shared__ float partial[THREADS / 32][ENTRIES], maxima[ENTRIES];
    const unsigned kv_head = blockIdx.y, split = blockIdx.z, group = heads / kv_heads, t = threadIdx.x;
    Tile tile;
    if (!find_tile(batch, blockIdx.x, ENTRIES, group, tile)) return;
    const Span span = span_of(tile, group, window, splits, split, LEAST_PAGES);
    if (span.begin >= span.end) return;

    for (unsigned i = t; i < k_dim * ENTRIES; i += THREADS) {
        const unsigned e = i % ENTRIES, d = i / ENTRIES;
        float x = 0.0f;
        if (e < tile.entries) {
            const size_t head = head_of(tile, e, group, heads, kv_head);
            x = d < q_dim ? q[head * q_dim + d] : q_tail[head * tail_stride + tail_offset + d - q_dim];
        }
        queries[i] = x * (scale * LOG2_E);
    }
    __syncthreads();

    const unsigned k_width = kv_heads * k_dim, v_width = latent ? 0 : kv_heads * v_dim;
    const bool vector = k_dim % 4 == 0;
    float acc[COLUMNS][ENTRIES] = {}, sums[ENTRIES] = {}, highest[ENTRIES];
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) highest[e] = -KTX_INFINITY;

    for (unsigned start = span.begin; start < span.end; start += THREADS) {
        const unsigned position = start + t;
        float scores[ENTRIES] = {};
        if (position < span.end) {
            const Rows<T> keys = Rows<T>::keys(cache, tile.pages[position / PAGE_TOKENS], k_width, v_width);
            const Rows<T> key = keys.skip((size_t)(position % PAGE_TOKENS) * k_width + kv_head * k_dim);
            if (vector) score<T, 4>(key, queries, k_dim, scores);
            else score<T, 1>(key, queries, k_dim, scores);
        }
#pragma unroll
        for (int e = 0; e < ENTRIES; e++) {
            const bool visible = position < span.end && e < tile.entries && sees(limit_of(tile, e, group), position, window);
            if (!visible) scores[e] = -KTX_INFINITY;
            const float most = warp_max(scores[e]);
            if (t % 32 == 0) partial[t / 32][e] = most;
        }
        __syncthreads();
        if (t < ENTRIES) {
            float most = -KTX_INFINITY;
            for (int w = 0; w < THREADS / 32; w++) most = fmaxf(most, partial[w][t]);
            maxima[t] = most;
        }
        __syncthreads();
#pragma unroll
        for (int e = 0; e < ENTRIES; e++) {
            const float most = fmaxf(highest[e], maxima[e]), base = base_of(most);
            const float weight = exp2f(scores[e] - base), rescale = exp2f(highest[e] - base);
            highest[e] = most;
            weights[t * ENTRIES + e] = weight;
            sums[e] = sums[e] * rescale + weight;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) acc[c][e] *= rescale;
        }
        __syncthreads();
        const unsigned count = min((unsigned)THREADS, span.end - start);
        for (unsigned j = 0; j < count; j++) {
            const unsigned at = start + j;
            const unsigned page = tile.pages[at / PAGE_TOKENS], slot = at % PAGE_TOKENS;
            const Rows<T> value = latent ? Rows<T>::keys(cache, page, k_width, v_width).skip((size_t)slot * k_width)
                                         : Rows<T>::values(cache, page, k_width, v_width).skip((size_t)slot * v_width + kv_head * v_dim);
            float w[ENTRIES];
#pragma unroll
            for (int e = 0; e < ENTRIES / 4; e++) {
                const float4 v = reinterpret_cast<const float4*>(weights + j * ENTRIES)[e];
                w[4 * e] = v.x, w[4 * e + 1] = v.y, w[4 * e + 2] = v.z, w[4 * e + 3] = v.w;
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const unsigned column = t + c * THREADS;
                if (column >= v_dim) break;
                const float v = value.get(column);
#pragma unroll
                for (int e = 0; e < ENTRIES; e++) acc[c][e] += w[e] * v;
            }
        }
        __syncthreads();
    }

    const Parts parts = part_of(scratch, ENTRIES, v_dim, gridDim.x, blockIdx.x, kv_heads, kv_head, splits, split);
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) {
        const float sum = warp_sum(sums[e]);
        if (t % 32 == 0) partial[t / 32][e] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) {
        if (e >= tile.entries) break;
        float sum = 0.0f;
        for (int w = 0; w < THREADS / 32; w++) sum += partial[w][e];
        const size_t head = head_of(tile, e, group, heads, kv_head);
        float factor = 1.0f;
        if (span.used == 1) {
            add_sink(sinks, (unsigned)head % heads, highest[e], sum, factor);
            factor /= sum;
        } else if (t == 0) {
            parts.sums[2 * e] = highest[e];
            parts.sums[2 * e + 1] = sum;
        }
        float* to = span.used == 1 ? out + head * v_dim : parts.values + (size_t)e * v_dim;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const unsigned column = t + c * THREADS;
            if (column < v_dim) to[column] = acc[c][e] * factor;
        }
    }
}

#define KTX_ATTEND_SCALAR(name, type)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                         \
        name(const float* q, const float* q_tail, const float* sinks, type* cache, float* out,              \
             float* scratch, const unsigned* first_row, const unsigned* tokens, const unsigned* past,                            \
             const unsigned* page_table, unsigned sequences, unsigned max_pages, unsigned heads,                  \
             unsigned kv_heads, unsigned k_dim, unsigned v_dim, unsigned q_dim, unsigned tail_stride,             \
             unsigned tail_offset, int latent, float scale, unsigned window, unsigned splits) {                   \
        attend<type>(q, q_tail, sinks, cache, out, scratch,                                                       \
                     Batch{first_row, tokens, past, page_table, sequences, max_pages}, heads, kv_heads, k_dim,   \
                     v_dim, q_dim, tail_stride, tail_offset, latent, scale, window, splits);                      \
    }

KTX_ATTEND_SCALAR(ktx_attend_scalar_f16, __half)
KTX_ATTEND_SCALAR(ktx_attend_scalar_f32, float)
KTX_ATTEND_SCALAR(ktx_attend_scalar_q8_0, Q8)
