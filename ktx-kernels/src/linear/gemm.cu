// Products of weights with many tokens (prefill): bound by the tensor cores and by expanding codes to halves, about two
// instructions a weight and tile of tokens. See `gemm.cuh` for the tile.

#include "gemm.cuh"

#define KTX_GEMM(NAME, TOKENS, TYPE)                                                                \
    extern "C" __global__ void __launch_bounds__(tile_threads(TOKENS), tile_blocks(TOKENS))                 \
        NAME(const __grid_constant__ Product product) {                                              \
        extern __shared__ uint4 shared[];                                                            \
        tile_product<TOKENS, TYPE>(product, reinterpret_cast<__half*>(shared));                      \
    }

// Grid: (tiles of tokens, rows / 128 rounded up, parts of K), or rows / 64 with a gated activation.
// Two blocks an SM, which hide each other's waits, leave 128 registers a thread: 20 bytes go to memory.
KTX_GEMM(ktx_gemm_128, 128, ANY_TYPE)
KTX_GEMM(ktx_gemm_64, 64, ANY_TYPE)

// Activations `[tokens, columns]` as halves `[tokens, stride]`, each token times a power of two that brings its largest
// into 2^12..2^13; `factors` get the inverse of that. A block per token.
extern "C" __global__ void __launch_bounds__(256)
    ktx_halves(__half* halves, float* factors, const float* x, u32 columns, u32 stride) {
    __shared__ u32 largest[8];
    const float* from = x + static_cast<u64>(blockIdx.x) * columns;
    __half* to = halves + static_cast<u64>(blockIdx.x) * stride;
    bool aligned = columns % 4 == 0;
    float most = 0;
    for (u32 at = threadIdx.x; at < (aligned ? columns / 4 : columns); at += 256) {
        if (aligned) {
            float4 v = reinterpret_cast<const float4*>(from)[at];
            most = fmaxf(most, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
        } else {
            most = fmaxf(most, fabsf(from[at]));
        }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
    }
    if (threadIdx.x % 32 == 0) {
        largest[threadIdx.x / 32] = __float_as_uint(most);
    }
    __syncthreads();
    for (u32 warp = 0; warp < 8; ++warp) {
        most = fmaxf(most, __uint_as_float(largest[warp]));
    }
    int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 127;
    int shift = most > 0 && exponent < 128 ? 12 - exponent : 0;
    shift = shift > 120 ? 120 : shift;
    float factor = __uint_as_float(static_cast<u32>(127 + shift) << 23);
    if (threadIdx.x == 0) {
        factors[blockIdx.x] = __uint_as_float(static_cast<u32>(127 - shift) << 23);
    }
    for (u32 at = threadIdx.x * 2; at < stride; at += 512) {
        float first = at < columns ? from[at] : 0.0f, second = at + 1 < columns ? from[at + 1] : 0.0f;
        *reinterpret_cast<__half2*>(to + at) = __floats2half2_rn(first * factor, second * factor);
    }
}

// `out = bias + residual + sum of parts`, the parts in their order. `count` values in rows of `columns`.
extern "C" __global__ void __launch_bounds__(256)
    ktx_gemm_sum(float* out, const float* parts, const float* bias, const float* residual, u32 part_count, u32 columns,
                 u32 count) {
    for (u32 at = blockIdx.x * 256 + threadIdx.x; at < count; at += gridDim.x * 256) {
        float sum = parts[at];
        for (u32 part = 1; part < part_count; ++part) {
            sum += parts[static_cast<u64>(part) * count + at];
        }
        sum += bias ? bias[at % columns] : 0.0f;
        out[at] = residual ? sum + residual[at] : sum;
    }
}
