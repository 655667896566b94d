// How the paged cache stores its rows, in one place: halves, floats, or blocks of 32 bytes with a scale.
//
// A page has its key rows and behind them its value rows. Of a Q8_0 cache each of the two has the bytes of all
// its rows first and then the rows' scales, so that both are aligned.
#pragma once
#include "paged.cuh"

// A byte of a Q8_0 cache.
struct Q8 {
    signed char byte;
};

// Key or value rows of a page, from one element on.
template <typename T>
struct Rows {
    T* p;

    static __device__ __forceinline__ Rows keys(T* cache, unsigned page, unsigned k_width, unsigned v_width) {
        return Rows{cache + (size_t)page * (k_width + v_width) * PAGE_TOKENS};
    }
    static __device__ __forceinline__ Rows values(T* cache, unsigned page, unsigned k_width, unsigned v_width) {
        return Rows{cache + (size_t)page * (k_width + v_width) * PAGE_TOKENS + (size_t)k_width * PAGE_TOKENS};
    }
    // From an element on; with a Q8_0 cache the first of a block.
    __device__ __forceinline__ Rows skip(size_t elements) const { return Rows{p + elements}; }
    __device__ __forceinline__ float get(unsigned i) const;
    // Four elements from a multiple of four on; the row is aligned so.
    __device__ __forceinline__ float4 get4(unsigned i) const;
    // Element i; with a Q8_0 cache the 32 lanes of a warp store a block.
    __device__ __forceinline__ void put(unsigned i, float x) const;
};

template <>
__device__ __forceinline__ float Rows<float>::get(unsigned i) const { return p[i]; }
template <>
__device__ __forceinline__ float4 Rows<float>::get4(unsigned i) const { return *reinterpret_cast<const float4*>(p + i); }
template <>
__device__ __forceinline__ void Rows<float>::put(unsigned i, float x) const { p[i] = x; }

template <>
__device__ __forceinline__ float Rows<__half>::get(unsigned i) const { return __half2float(p[i]); }
template <>
__device__ __forceinline__ float4 Rows<__half>::get4(unsigned i) const {
    const uint2 v = *reinterpret_cast<const uint2*>(p + i);
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&v.x));
    const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&v.y));
    return make_float4(a.x, a.y, b.x, b.y);
}
template <>
__device__ __forceinline__ void Rows<__half>::put(unsigned i, float x) const { p[i] = __float2half_rn(x); }

template <>
struct Rows<Q8> {
    static constexpr unsigned BLOCK = 32;
    signed char* quants;
    __half* scales;

    // Bytes of all rows of a width in a page.
    static __device__ __forceinline__ size_t bytes(unsigned width) { return (size_t)width * (PAGE_TOKENS / BLOCK) * (BLOCK + sizeof(__half)); }
    static __device__ __forceinline__ Rows at(Q8* start, unsigned width) {
        signed char* quants = reinterpret_cast<signed char*>(start);
        return Rows{quants, reinterpret_cast<__half*>(quants + (size_t)width * PAGE_TOKENS)};
    }
    static __device__ __forceinline__ Rows keys(Q8* cache, unsigned page, unsigned k_width, unsigned v_width) {
        return at(cache + page * bytes(k_width + v_width), k_width);
    }
    static __device__ __forceinline__ Rows values(Q8* cache, unsigned page, unsigned k_width, unsigned v_width) {
        return at(cache + page * bytes(k_width + v_width) + bytes(k_width), v_width);
    }
    __device__ __forceinline__ Rows skip(size_t elements) const { return Rows{quants + elements, scales + elements / BLOCK}; }
    __device__ __forceinline__ float get(unsigned i) const { return (float)quants[i] * __half2float(scales[i / BLOCK]); }
    __device__ __forceinline__ float4 get4(unsigned i) const {
        const char4 q = *reinterpret_cast<const char4*>(quants + i);
        const float scale = __half2float(scales[i / BLOCK]);
        return make_float4(q.x * scale, q.y * scale, q.z * scale, q.w * scale);
    }
    // Rounds as the host does (kv/element.rs).
    __device__ __forceinline__ void put(unsigned i, float x) const {
        const float most = warp_max(fabsf(x));
        const __half scale = __float2half_rn(fminf(__fdiv_rn(most, 127.0f), 65504.0f));
        const float wide = __half2float(scale), inverse = wide == 0.0f ? 0.0f : __frcp_rn(wide);
        quants[i] = (signed char)fminf(fmaxf(rintf(__fmul_rn(x, inverse)), -127.0f), 127.0f);
        if (i % BLOCK == 0) scales[i / BLOCK] = scale;
    }
};
