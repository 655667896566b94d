// The largest elements of rows, for samplers: argmax, and the k best in order.
//
// Elements become 64-bit keys whose order is that of the values, the lower index first among equals; NaN
// is below everything. argmax is bound by reading the row once (0.6 MB of logits: several blocks a row).
// The k best are found in rounds: every block sorts TILE keys in shared memory and hands on its k best.
#include "reduce.cuh"

#define TILE 2048

typedef unsigned long long Key;

// Larger for larger values; of equal ones larger for the lower index. Zeros of both signs are equal.
__device__ __forceinline__ Key key_of(float x, unsigned index) {
    if (isnan(x)) return (Key)(~index);
    const unsigned bits = __float_as_uint(x + 0.0f);
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (Key)ordered << 32 | (unsigned)~index;
}

__device__ __forceinline__ unsigned index_of(Key key) { return ~(unsigned)key; }

__device__ __forceinline__ float value_of(Key key) {
    const unsigned ordered = key >> 32;
    if (ordered == 0) return KTX_NAN;
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ Key block_best(Key best, Key (&partial)[32]) {
    best = warp_max(best);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = best;
    __syncthreads();
    return warp_max(threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0);
}

// Best key of part blockIdx.x of row blockIdx.y, to keys [rows, parts].
extern "C" __global__ void ktx_argmax_parts(const float* x, unsigned width, Key* keys) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    __shared__ Key partial[32];
    const float* row = x + (size_t)blockIdx.y * width;
    Key best = 0;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < width; i += gridDim.x * blockDim.x) {
        const Key key = key_of(row[i], i);
        best = key > best ? key : best;
    }
    best = block_best(best, partial);
    if (threadIdx.x == 0) keys[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = best;
}

// Index of the best of a row's parts, a warp a row.
extern "C" __global__ void ktx_argmax_join(const Key* keys, unsigned parts, unsigned* ids) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    Key best = 0;
    for (unsigned i = threadIdx.x; i < parts; i += 32) {
        const Key key = keys[(size_t)blockIdx.x * parts + i];
        best = key > best ? key : best;
    }
    best = warp_max(best);
    if (threadIdx.x == 0) ids[blockIdx.x] = index_of(best);
}

// Sorts TILE keys in shared memory, descending; blockDim.x is TILE / 2.
__device__ void sort_tile(Key* tile) {
    for (unsigned size = 2; size <= TILE; size *= 2) {
        for (unsigned stride = size / 2; stride > 0; stride /= 2) {
            __syncthreads();
            const unsigned t = threadIdx.x, i = 2 * t - (t & (stride - 1)), j = i + stride;
            const bool descending = (i & size) == 0;
            const Key a = tile[i], b = tile[j];
            if ((a < b) == descending) tile[i] = b, tile[j] = a;
        }
    }
    __syncthreads();
}

__device__ void hand_on(const Key* tile, Key* out, unsigned k) {
    out += ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * k;
    for (unsigned i = threadIdx.x; i < k; i += blockDim.x) out[i] = tile[i];
}

// The k best of each tile of each row of x [rows, width], to out [rows, tiles, k].
extern "C" __global__ void __launch_bounds__(TILE / 2) ktx_topk_values(const float* x, unsigned width, unsigned k, Key* out) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    __shared__ Key tile[TILE];
    for (unsigned i = threadIdx.x; i < TILE; i += blockDim.x) {
        const unsigned at = blockIdx.x * TILE + i;
        tile[i] = at < width ? key_of(x[(size_t)blockIdx.y * width + at], at) : 0;
    }
    sort_tile(tile);
    hand_on(tile, out, k);
}

// The k best of each tile of keys [rows, count], to out [rows, tiles, k].
extern "C" __global__ void __launch_bounds__(TILE / 2) ktx_topk_keys(const Key* keys, unsigned count, unsigned k, Key* out) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    __shared__ Key tile[TILE];
    for (unsigned i = threadIdx.x; i < TILE; i += blockDim.x) {
        const unsigned at = blockIdx.x * TILE + i;
        tile[i] = at < count ? keys[(size_t)blockIdx.y * count + at] : 0;
    }
    sort_tile(tile);
    hand_on(tile, out, k);
}

// Keys [rows * k] to ids and values.
extern "C" __global__ void ktx_topk_write(const Key* keys, unsigned count, unsigned* ids, float* values) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    ids[i] = index_of(keys[i]);
    values[i] = value_of(keys[i]);
}
