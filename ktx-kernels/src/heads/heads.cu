// One small matrix product per attention head: out[t, h] = W_h x[t, h], with W_h [rows, cols] in F16.
//
// Few tokens: bound by reading the matrices once (16 MiB a layer in DeepSeek-V3). A row of a matrix belongs
// to 8, 16 or 32 lanes, which take 16 bytes of it at a time and have
// eight rows under way; up to 4 tokens share what was read. Many
// tokens: tensor cores (sm_80 and later), 64 tokens x 64 rows a block, 64 columns at a time, the next
// columns of the matrix copied meanwhile.
//
// x of token t and head h starts at t * x_width + x_offset + h * x_stride; out is [tokens, heads, rows].
#include "mma.cuh"
#include "reduce.cuh"

#define THREADS 128
// Rows of a matrix that a lane works on at once, so that as many loads are under way.
#define ROWS 8

__device__ __forceinline__ float2 halves(unsigned both) {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

// blockIdx: rows, head, tokens by FEW. Shared memory: FEW * cols floats. cols is x_cols rounded up to a
// multiple of 8, with zeros behind.
template <int FEW>
__device__ __forceinline__ void heads_few(const __half* weights, const float* x, float* out, unsigned tokens,
                                          unsigned heads, unsigned rows, unsigned cols, unsigned x_width,
                                          unsigned x_stride, unsigned x_offset, unsigned x_cols, unsigned lanes) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    extern __shared__ float4 shared4[];
    float* shared = reinterpret_cast<float*>(shared4);
    const unsigned head = blockIdx.y, first = blockIdx.z * FEW, count = min((unsigned)FEW, tokens - first);
    const unsigned lane = threadIdx.x % lanes, step = THREADS / lanes;
    const unsigned row = blockIdx.x * step * ROWS + threadIdx.x / lanes;
    const uint4* w[ROWS];
    uint4 v[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        w[r] = reinterpret_cast<const uint4*>(weights + ((size_t)head * rows + min(row + r * step, rows - 1)) * cols);
        v[r] = lane < cols / 8 ? __ldcs(w[r] + lane) : make_uint4(0, 0, 0, 0);
    }
    for (unsigned i = threadIdx.x; i < FEW * cols; i += THREADS) {
        const unsigned t = i / cols, c = i % cols;
        shared[i] = t < count && c < x_cols ? x[(size_t)(first + t) * x_width + x_offset + head * x_stride + c] : 0.0f;
    }
    __syncthreads();
    float sums[ROWS][FEW] = {};
    for (unsigned chunk = lane; chunk < cols / 8; chunk += lanes) {
        uint4 next[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) next[r] = chunk + lanes < cols / 8 ? __ldcs(w[r] + chunk + lanes) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int t = 0; t < FEW; t++) {
            const float4* q = reinterpret_cast<const float4*>(shared + t * cols + chunk * 8);
            const float4 low = q[0], high = q[1];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float2 a = halves(v[r].x), b = halves(v[r].y), c = halves(v[r].z), d = halves(v[r].w);
                sums[r][t] += a.x * low.x + a.y * low.y + b.x * low.z + b.y * low.w;
                sums[r][t] += c.x * high.x + c.y * high.y + d.x * high.z + d.y * high.w;
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) v[r] = next[r];
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < FEW; t++) {
            float sum = sums[r][t];
            for (unsigned far = lanes / 2; far > 0; far /= 2) sum += __shfl_xor_sync(KTX_FULL_WARP, sum, far);
            const unsigned at = row + r * step;
            if (lane == 0 && at < rows && t < count) out[((size_t)(first + t) * heads + head) * rows + at] = sum;
        }
}

#define KTX_HEADS_FEW(few)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        ktx_heads_few_##few(const __half* weights, const float* x, float* out, unsigned tokens, unsigned heads,    \
                            unsigned rows, unsigned cols, unsigned x_width, unsigned x_stride, unsigned x_offset,  \
                            unsigned x_cols, unsigned lanes) {                                                     \
        heads_few<few>(weights, x, out, tokens, heads, rows, cols, x_width, x_stride, x_offset, x_cols, lanes);    \
    }

KTX_HEADS_FEW(1)
KTX_HEADS_FEW(4)

#define TILE 64
#define ROW (TILE + 8)

// blockIdx: rows by TILE, tokens by TILE, head. cols is a multiple of TILE.
extern "C" __global__ void __launch_bounds__(128)
    ktx_heads_many(const __half* weights, const float* x, float* out, unsigned tokens, unsigned heads,
                   unsigned rows, unsigned cols, unsigned x_width, unsigned x_stride, unsigned x_offset) {
    wait_for_previous_kernel();
    let_next_kernel_start();
#ifdef KTX_TENSOR_CORES
    __shared__ __half w[2][TILE * ROW], a[TILE * ROW];
    const unsigned first_row = blockIdx.x * TILE, first = blockIdx.y * TILE, head = blockIdx.z;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    weights += (size_t)head * rows * cols;
    x += x_offset + (size_t)head * x_stride;
    auto fetch = [&](unsigned col, __half* to) {
#pragma unroll
        for (int i = 0; i < TILE * TILE / 8 / 128; i++) {
            const unsigned chunk = i * 128 + threadIdx.x, r = chunk / 8, at = chunk % 8 * 8;
            const bool there = first_row + r < rows && col < cols;
            copy_async(to + r * ROW + at, weights + (there ? (size_t)(first_row + r) * cols + col + at : 0), there);
        }
        commit_copies();
    };
    fetch(0, w[0]);
    float acc[TILE / 8][4] = {};
    for (unsigned col = 0, stage = 0; col < cols; col += TILE, stage ^= 1) {
        __syncthreads();
        fetch(col + TILE, w[stage ^ 1]);
#pragma unroll
        for (int i = 0; i < TILE * TILE / 4 / 128; i++) {
            const unsigned quad = i * 128 + threadIdx.x, t = quad / 16, at = quad % 16 * 4;
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (first + t < tokens) v = *reinterpret_cast<const float4*>(x + (size_t)(first + t) * x_width + col + at);
            *reinterpret_cast<uint2*>(a + t * ROW + at) = make_uint2(pack(v.x, v.y), pack(v.z, v.w));
        }
        await_copies<1>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < TILE / 16; k++) {
            unsigned left[4];
            load_matrices(left, a + (warp * 16 + lane % 16) * ROW + k * 16 + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < TILE / 16; n++) {
                unsigned right[4];
                load_matrices(right, w[stage] + (n * 16 + lane / 16 * 8 + lane % 8) * ROW + k * 16 + lane / 8 % 2 * 8);
                multiply(acc[2 * n], left, right[0], right[1]);
                multiply(acc[2 * n + 1], left, right[2], right[3]);
            }
        }
    }
    await_copies<0>();
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const unsigned t = first + warp * 16 + lane / 4 + 8 * r, row = first_row + n * 8 + lane % 4 * 2;
            if (t < tokens && row < rows)
                *reinterpret_cast<float2*>(out + ((size_t)t * heads + head) * rows + row) = make_float2(acc[n][2 * r], acc[n][2 * r + 1]);
        }
#endif
}
