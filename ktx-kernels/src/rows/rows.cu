// Rows by number: gathering, copying columns, and the embedding of tokens from a table of GGUF blocks.
//
// Bound by memory. The embedding dequantises with a thread an element, in the order of operations of the
// host's reference and without contraction, so that the values have its bits.
#include <cuda_fp16.h>
#include "reduce.cuh"

// out[r] = x[index[r]]; an index beyond the end gives a row of NaN.
extern "C" __global__ void ktx_gather_rows(const float* x, const unsigned* index, float* out,
                                           unsigned x_rows, unsigned width) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const unsigned from = index[blockIdx.x];
    const float* source = x + (size_t)from * width;
    float* target = out + (size_t)blockIdx.x * width;
    for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < width; i += gridDim.y * blockDim.x)
        target[i] = from < x_rows ? source[i] : KTX_NAN;
}

// The first `cols` values of each row, between rows of other widths.
extern "C" __global__ void ktx_copy_columns(const float* from, float* to, unsigned rows, unsigned cols,
                                            unsigned from_stride, unsigned to_stride) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < (size_t)rows * cols; i += step) {
        const size_t row = i / cols, col = i - row * cols;
        to[row * to_stride + col] = from[row * from_stride + col];
    }
}

typedef unsigned char Byte;

__device__ __forceinline__ unsigned u16_at(const Byte* p) { return p[0] | p[1] << 8; }
__device__ __forceinline__ float half_at(const Byte* p) {
    return __half2float(__ushort_as_half((unsigned short)u16_at(p)));
}
__device__ __forceinline__ unsigned u32_at(const Byte* p) { return u16_at(p) | u16_at(p + 2) << 16; }
__device__ __forceinline__ unsigned nibble(const Byte* qs, unsigned i) { return qs[i % 16] >> (i / 16 * 4) & 15; }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }

__constant__ signed char IQ4NL_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                             1,    13,   25,  38,  53,  69,  89,  113};
__constant__ signed char MXFP4_VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Element i of 256 two-bit numbers: four planes of 32 in every 32 bytes.
__device__ __forceinline__ unsigned two_bits(const Byte* qs, unsigned i) {
    return qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
}

// Scale and minimum of sub-block `group` of Q4_K and Q5_K, six bits each.
__device__ __forceinline__ void scale_min(const Byte* packed, unsigned group, unsigned& scale, unsigned& min) {
    const unsigned i = group % 4, low = packed[i], low_min = packed[i + 4], high = packed[i + 8];
    scale = group < 4 ? low & 63 : (high & 15) | (low >> 2 & 48);
    min = group < 4 ? low_min & 63 : high >> 4 | (low_min >> 2 & 48);
}

__device__ float q2_k(const Byte* b, unsigned i) {
    const unsigned scales = b[i / 16];
    return __fsub_rn(mul(mul(half_at(b + 80), scales & 15), two_bits(b + 16, i)), mul(half_at(b + 82), scales >> 4));
}

__device__ float q3_k(const Byte* b, unsigned i) {
    const Byte *qs = b + 32, *scales = b + 96;
    const unsigned g = i / 16;
    const unsigned low = scales[g % 8] >> (4 * (g / 8)) & 15, high = scales[8 + g % 4] >> (2 * (g / 4)) & 3;
    const int scale = (int)(low | high << 4) - 32;
    const int q = (int)(two_bits(qs, i) | (b[i % 32] >> (i / 32) & 1) << 2) - 4;
    return mul(mul(half_at(b + 108), (float)scale), (float)q);
}

__device__ float q4_k(const Byte* b, unsigned i, bool fifth) {
    const unsigned g = i / 32;
    unsigned scale, min;
    scale_min(b + 4, g, scale, min);
    const Byte* qs = b + (fifth ? 48 : 16);
    unsigned q = qs[g / 2 * 32 + i % 32] >> (g % 2 * 4) & 15;
    if (fifth) q |= (b[16 + i % 32] >> g & 1) << 4;
    return __fsub_rn(mul(mul(half_at(b), (float)scale), (float)q), mul(half_at(b + 2), (float)min));
}

__device__ float q6_k(const Byte* b, unsigned i) {
    const unsigned low = b[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15;
    const unsigned q = low | two_bits(b + 128, i) << 4;
    const float scale = (float)(signed char)b[192 + i / 16];
    return mul(mul(half_at(b + 208), scale), (float)q - 32.0f);
}

__device__ float iq4_xs(const Byte* b, unsigned i) {
    const unsigned g = i / 32;
    const unsigned low = b[4 + g / 2] >> (4 * (g % 2)) & 15, high = u16_at(b + 2) >> (2 * g) & 3;
    const float scale = mul(half_at(b), (float)((int)(low | high << 4) - 32));
    return mul(scale, (float)IQ4NL_VALUES[nibble(b + 8 + g * 16, i % 32)]);
}

__device__ float mxfp4(const Byte* b, unsigned i) {
    const unsigned e = b[0], bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
    return mul(__uint_as_float(bits), (float)MXFP4_VALUES[nibble(b + 1, i)]);
}

// Element i of a block; `type` is ggml's number.
__device__ float element(int type, const Byte* b, unsigned i) {
    switch (type) {
        case 0: return __uint_as_float(u32_at(b));
        case 1: return half_at(b);
        case 30: return __uint_as_float(u16_at(b) << 16);
        case 2: return mul(half_at(b), (float)nibble(b + 2, i) - 8.0f);
        case 3: return __fadd_rn(mul(half_at(b), (float)nibble(b + 4, i)), half_at(b + 2));
        case 6: return mul(half_at(b), (float)(nibble(b + 6, i) | (u32_at(b + 2) >> i & 1) << 4) - 16.0f);
        case 7:
            return __fadd_rn(mul(half_at(b), (float)(nibble(b + 8, i) | (u32_at(b + 4) >> i & 1) << 4)), half_at(b + 2));
        case 8: return mul((float)(signed char)b[2 + i], half_at(b));
        case 10: return q2_k(b, i);
        case 11: return q3_k(b, i);
        case 12: return q4_k(b, i, false);
        case 13: return q4_k(b, i, true);
        case 14: return q6_k(b, i);
        case 20: return mul(half_at(b), (float)IQ4NL_VALUES[nibble(b + 2, i)]);
        case 23: return iq4_xs(b, i);
        case 39: return mxfp4(b, i);
        default: return KTX_NAN;
    }
}

// out[r] = row ids[r] of a table [vocabulary, width]; an id beyond the end gives a row of NaN.
extern "C" __global__ void ktx_embed(const Byte* table, const unsigned* ids, float* out, int type,
                                     unsigned vocabulary, unsigned width, unsigned block_len,
                                     unsigned block_bytes) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const unsigned id = ids[blockIdx.x];
    const Byte* row = table + (size_t)id * (width / block_len) * block_bytes;
    float* target = out + (size_t)blockIdx.x * width;
    for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < width; i += gridDim.y * blockDim.x)
        target[i] = id < vocabulary ? element(type, row + (size_t)(i / block_len) * block_bytes, i % block_len) : KTX_NAN;
}
