// GGUF blocks to the planes of `blocks.cuh`: reads and writes every byte once, a warp per row, a lane per group of 32
// columns. Runs at upload; some 500 instructions for 18 bytes keep it far above the speed of the bus they come over.

#include "blocks.cuh"

namespace {

// The code at `index` of 32, as types with 16 bytes of halves of bytes have it.
__device__ __forceinline__ u32 nibble(const u8* bytes, u32 index) { return bytes[index % 16] >> index / 16 * 4 & 15; }

__device__ __forceinline__ u32 two_bits(const u8* bytes, u32 index) {
    return bytes[index / 128 * 32 + index % 32] >> index % 128 / 32 * 2 & 3;
}

// Bytes of a block, its columns, and bits of its codes in the low and the high plane.
template <u32 type>
struct Source;

#define KTX_SOURCE(TYPE, BYTES, COLUMNS, LOW, HIGH, CODE)                            \
    template <>                                                                      \
    struct Source<TYPE> {                                                            \
        static constexpr u32 bytes = BYTES, columns = COLUMNS, low = LOW, high = HIGH; \
        static __device__ __forceinline__ u32 code(const u8* block, u32 i) { return CODE; } \
    };

KTX_SOURCE(Q4_0, 18, 32, 4, 0, nibble(block + 2, i))
KTX_SOURCE(Q4_1, 20, 32, 4, 0, nibble(block + 4, i))
KTX_SOURCE(Q5_0, 22, 32, 4, 1, nibble(block + 6, i) | (block[2 + i / 8] >> i % 8 & 1) << 4)
KTX_SOURCE(Q5_1, 24, 32, 4, 1, nibble(block + 8, i) | (block[4 + i / 8] >> i % 8 & 1) << 4)
KTX_SOURCE(Q8_0, 34, 32, 8, 0, block[2 + i])
KTX_SOURCE(Q2_K, 84, 256, 2, 0, two_bits(block + 16, i))
KTX_SOURCE(Q3_K, 110, 256, 2, 1, two_bits(block + 32, i) | (block[i % 32] >> i / 32 & 1) << 2)
KTX_SOURCE(Q4_K, 144, 256, 4, 0, block[16 + i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15)
KTX_SOURCE(Q5_K, 176, 256, 4, 1,
           (block[48 + i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15) | (block[16 + i % 32] >> i / 32 & 1) << 4)
KTX_SOURCE(Q6_K, 210, 256, 4, 2,
           (block[i / 128 * 64 + i % 64] >> i % 128 / 64 * 4 & 15) | two_bits(block + 128, i) << 4)
KTX_SOURCE(IQ4_NL, 18, 32, 4, 0, nibble(block + 2, i))
KTX_SOURCE(IQ4_XS, 136, 256, 4, 0, nibble(block + 8 + i / 32 * 16, i % 32))
KTX_SOURCE(MXFP4, 17, 32, 4, 0, nibble(block + 1, i))
template <>
struct Source<F32> {
    static constexpr u32 bytes = 4;
};
template <>
struct Source<F16> {
    static constexpr u32 bytes = 2;
};
template <>
struct Source<BF16> {
    static constexpr u32 bytes = 2;
};

// The planes of low and high bits of one group.
template <u32 type>
__device__ __forceinline__ void write_codes(u8* low, u8* high, const u8* block, u32 first) {
    using S = Source<type>;
    u32 low_bits[8] = {}, high_bits[2] = {};
#pragma unroll
    for (u32 i = 0; i < 32; ++i) {
        u32 code = S::code(block, first + i);
        u32 half = i / 16, t = i % 16 / 4, b = i % 4;
        if constexpr (S::low == 8) {
            low_bits[i / 4] |= code << 8 * b;
        } else if constexpr (S::low == 4) {
            low_bits[t] |= (code & 15) << (8 * b + 4 * half);
        } else {
            low_bits[half] |= (code & 3) << (8 * b + 2 * t);
        }
        if constexpr (S::high == 1) {
            high_bits[0] |= (code >> S::low & 1) << (8 * b + 4 * half + t);
        } else if constexpr (S::high == 2) {
            high_bits[half] |= (code >> S::low & 3) << (8 * b + 2 * t);
        }
    }
#pragma unroll
    for (u32 word = 0; word < S::low; ++word) {
        reinterpret_cast<u32*>(low)[word] = low_bits[word];
    }
    if constexpr (S::high > 0) {
#pragma unroll
        for (u32 word = 0; word < S::high; ++word) {
            reinterpret_cast<u32*>(high)[word] = high_bits[word];
        }
    }
}

__device__ __forceinline__ void copy_bytes(u8* to, const u8* from, u32 count) {
    for (u32 i = 0; i < count; ++i) {
        to[i] = from[i];
    }
}

// The planes of scales: what belongs to one group, and for the first group of a block of 256 what belongs to that.
template <u32 type>
__device__ __forceinline__ void write_scales(u8* row, const u8* block, u32 groups, u32 group) {
    u32 super = group / 8, inner = group % 8;
    if constexpr (type == Q4_0 || type == IQ4_NL) {
        copy_bytes(row + 16 * groups + 2 * group, block, 2);
    } else if constexpr (type == Q4_1) {
        copy_bytes(row + 16 * groups + 4 * group, block, 4);
    } else if constexpr (type == Q5_0) {
        copy_bytes(row + 20 * groups + 2 * group, block, 2);
    } else if constexpr (type == Q5_1) {
        copy_bytes(row + 20 * groups + 4 * group, block, 4);
    } else if constexpr (type == Q8_0) {
        copy_bytes(row + 32 * groups + 2 * group, block, 2);
    } else if constexpr (type == MXFP4) {
        copy_bytes(row + 16 * groups + group, block, 1);
    } else if constexpr (type == Q2_K) {
        copy_bytes(row + 8 * groups + groups / 2 + 2 * group, block + 2 * inner, 2);
        if (inner == 0) {
            copy_bytes(row + 8 * groups + 4 * super, block + 80, 4);
        }
    } else if constexpr (type == Q3_K) {
        const u8* packed = block + 96;
        u8* scales = row + 12 * groups;
        u32 lower[2], upper[2];
        for (u32 half = 0; half < 2; ++half) {
            u32 index = 2 * inner + half;
            lower[half] = packed[index % 8] >> index / 8 * 4 & 15;
            upper[half] = packed[8 + index % 4] >> index / 4 * 2 & 3;
        }
        scales[groups / 2 + group] = static_cast<u8>(lower[0] | lower[1] << 4);
        // Two groups share a byte of upper bits: the even one writes both.
        if (inner % 2 == 0) {
            u32 next[2];
            for (u32 half = 0; half < 2; ++half) {
                u32 index = 2 * inner + 2 + half;
                next[half] = packed[8 + index % 4] >> index / 4 * 2 & 3;
            }
            scales[group / 2] = static_cast<u8>(upper[0] | upper[1] << 2 | next[0] << 4 | next[1] << 6);
        }
        if (inner == 0) {
            copy_bytes(scales + groups / 2 + groups + 2 * super, block + 108, 2);
        }
    } else if constexpr (type == Q4_K || type == Q5_K) {
        if (inner == 0) {
            copy_bytes(row + 16 * groups + 16 * super, block, 16);
        }
    } else if constexpr (type == Q6_K) {
        copy_bytes(row + 24 * groups + 2 * group, block + 192 + 2 * inner, 2);
        if (inner == 0) {
            copy_bytes(row + 26 * groups + 2 * super, block + 208, 2);
        }
    } else if constexpr (type == IQ4_XS) {
        if (inner == 0) {
            copy_bytes(row + 16 * groups + 8 * super, block, 8);
        }
    }
}

// Where the plane of high bits starts.
template <u32 type>
__device__ __forceinline__ u32 high_plane(u32 groups) {
    return type == Q3_K ? 8 * groups : type == Q5_K ? 18 * groups : 16 * groups;
}

// The largest magnitude of what a product multiplies: weights, scales and offsets.
template <u32 type>
__device__ __forceinline__ float largest(const u8* row, u32 groups, u32 group) {
    float weights[32], most = 0;
    group_weights<type>(row, groups, group, weights);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        most = fmaxf(most, fabsf(weights[i]));
    }
    if constexpr (!is_float_type(type)) {
        Codes codes;
        Format<type>::unpack(Format<type>::load(row, groups, group), group, codes);
        for (int half = 0; half < 2; ++half) {
            most = fmaxf(most, fabsf(codes.scale[half]));
            if (Format<type>::OFFSET) {
                most = fmaxf(most, fabsf(codes.offset[half]));
            }
        }
    }
    return most;
}

// The power of two that brings `most` into 2^12..2^13, within what floats hold.
__device__ __forceinline__ float factor_for(float most) {
    int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 127;
    bool ordinary = most > 0 && exponent < 128;
    int shift = ordinary ? 12 - exponent : 0;
    shift = shift > 120 ? 120 : shift;
    return __uint_as_float(static_cast<u32>(127 + shift) << 23);
}

template <u32 type>
__device__ void repack_row(u8* row, const u8* source, u32 columns, u32 lane) {
    using S = Source<type>;
    u32 groups = (columns + 31) / 32;
    for (u32 group = lane; group < groups; group += 32) {
        if constexpr (is_float_type(type)) {
            u32 first = group * 32 * S::bytes, end = columns * S::bytes;
            for (u32 i = first; i < first + 32 * S::bytes; ++i) {
                row[i] = i < end ? source[i] : 0;
            }
        } else {
            constexpr u32 groups_per_block = S::columns / 32;
            const u8* block = source + static_cast<u64>(group / groups_per_block) * S::bytes;
            u8* low = row + group * S::low * 4;
            u8* high = row + high_plane<type>(groups) + group * S::high * 4;
            write_codes<type>(low, high, block, group % groups_per_block * 32);
            write_scales<type>(row, block, groups, group);
        }
    }
}

template <u32 type>
__device__ void write_factor(u8* row, u32 groups, u32 lane) {
    float most = 0;
    for (u32 group = lane; group < groups; group += 32) {
        most = fmaxf(most, largest<type>(row, groups, group));
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
    }
    if (lane == 0) {
        *reinterpret_cast<float*>(row + factor_at<type>(groups)) = factor_for(most);
    }
}

}  // namespace

// Rows of `columns` columns in GGUF blocks from `source`, which needs no alignment, to the planes of rows of
// `row_bytes` bytes.
extern "C" __global__ void __launch_bounds__(128)
    ktx_repack(u8* rows, const u8* source, u32 type, u32 row_count, u32 columns, u32 row_bytes, u32 source_row_bytes) {
    u32 row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= row_count) {
        return;
    }
    u8* to = rows + static_cast<u64>(row) * row_bytes;
    const u8* from = source + static_cast<u64>(row) * source_row_bytes;
    switch (type) {
#define KTX_CASE(TYPE) \
    case TYPE: return repack_row<TYPE>(to, from, columns, threadIdx.x % 32);
        KTX_CODE_TYPES(KTX_CASE)
        KTX_FLOAT_TYPES(KTX_CASE)
#undef KTX_CASE
    }
}

// The powers of two at the ends of rows that `ktx_repack` has written.
extern "C" __global__ void __launch_bounds__(128)
    ktx_row_factors(u8* rows, u32 type, u32 row_count, u32 columns, u32 row_bytes) {
    u32 row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= row_count) {
        return;
    }
    u8* at = rows + static_cast<u64>(row) * row_bytes;
    switch (type) {
#define KTX_CASE(TYPE) \
    case TYPE: return write_factor<TYPE>(at, (columns + 31) / 32, threadIdx.x % 32);
        KTX_CODE_TYPES(KTX_CASE)
        KTX_FLOAT_TYPES(KTX_CASE)
#undef KTX_CASE
    }
}
