// Sums, maxima and minima over the lanes of a warp and the threads of a block.
#pragma once
#include "ptx.cuh"

#define KTX_FULL_WARP 0xffffffffu
#define KTX_INFINITY __int_as_float(0x7f800000)
#define KTX_NAN __int_as_float(0x7fc00000)

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(KTX_FULL_WARP, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(KTX_FULL_WARP, x, lane));
    return x;
}

__device__ __forceinline__ unsigned long long warp_max(unsigned long long x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        unsigned long long other = __shfl_xor_sync(KTX_FULL_WARP, x, lane);
        x = other > x ? other : x;
    }
    return x;
}

// Sum over a block of whole warps, up to 1024 threads; every thread gets it. `partial` is shared.
__device__ __forceinline__ float block_sum(float x, float (&partial)[32]) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (warps == 1) return x;
    __syncthreads();
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

__device__ __forceinline__ float block_max(float x, float (&partial)[32]) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_max(x);
    if (warps == 1) return x;
    __syncthreads();
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? partial[lane] : -KTX_INFINITY);
}

// Whether all of these addresses and lengths allow loads of four floats.
__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<size_t>(p) & 15) == 0; }
