// Rows of the cache as halves in shared memory, for the tensor cores: an F16 cache is copied without waiting,
// blocks of bytes go through registers and are multiplied by their scales, rounded to halves.
#pragma once
#include "cells.cuh"
#include "mma.cuh"

#ifdef KTX_TENSOR_CORES
// Two signed bytes of four as halves times `scale`. A byte below 0x64 is 1024 and the byte in half precision.
template <int SELECT>
__device__ __forceinline__ unsigned widen_pair(unsigned flipped, __half2 scale) {
    const unsigned magic = __byte_perm(flipped, 0x64646464u, SELECT);
    const __half2 exact = __hsub2(*reinterpret_cast<const __half2*>(&magic), __float2half2_rn(1152.0f));
    const __half2 scaled = __hmul2(exact, scale);
    return *reinterpret_cast<const unsigned*>(&scaled);
}

// Elements of a row that a thread copies at once.
template <typename T>
constexpr int CHUNK = 8;
template <>
constexpr int CHUNK<Q8> = 16;

// A chunk from a multiple of its length on, to as many aligned halves; zeros where `there` is false.
__device__ __forceinline__ void copy_chunk(__half* to, const Rows<__half>& row, bool there) { copy_async(to, row.p, there); }
__device__ __forceinline__ void copy_chunk(__half* to, const Rows<Q8>& row, bool there) {
    uint4 bytes = make_uint4(0, 0, 0, 0);
    __half2 scale = __float2half2_rn(0.0f);
    if (there) {
        bytes = *reinterpret_cast<const uint4*>(row.quants);
        scale = __half2half2(*row.scales);
    }
    const unsigned words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    unsigned wide[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned flipped = words[i] ^ 0x80808080u;
        wide[2 * i] = widen_pair<0x4140>(flipped, scale);
        wide[2 * i + 1] = widen_pair<0x4342>(flipped, scale);
    }
    uint4* out = reinterpret_cast<uint4*>(to);
    out[0] = make_uint4(wide[0], wide[1], wide[2], wide[3]);
    out[1] = make_uint4(wide[4], wide[5], wide[6], wide[7]);
}

// ROWS rows of D elements, `width` apart, to rows of D + 8 halves, by THREADS threads; zeros from row `there` on.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void fetch_rows(__half* to, const Rows<__half>& from, size_t width, unsigned there, unsigned thread) {
    copy_rows<D, ROWS, THREADS>(to, from.p, width, there, thread);
}
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void fetch_rows(__half* to, const Rows<Q8>& from, size_t width, unsigned there, unsigned thread) {
    constexpr int CHUNKS = D / CHUNK<Q8>;
    // More chunks on their way at once would spill registers.
#pragma unroll(D > 128 ? 4 : 8)
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        const unsigned chunk = i * THREADS + thread, row = chunk / CHUNKS, at = chunk % CHUNKS * CHUNK<Q8>;
        copy_chunk(to + row * (D + 8) + at, from.skip(row * width + at), row < there);
    }
}
#endif
