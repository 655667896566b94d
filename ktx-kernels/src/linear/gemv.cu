// Products of weights with few tokens (generation): bound by reading the weights once.
//
// A warp takes two rows at a time, or several warps share two where there are too few rows to fill the GPU.
// A lane takes a group of 32 columns: one load of 16 bytes for 4-bit codes, eight 4-way integer products, about 45
// instructions for 18 bytes, a quarter of what the SMs can issue while HBM delivers them.
//
// `ktx_gemv` is for one token: every block quantises the activations itself (2 KB to 32 KB from L2, hidden behind the
// first loads of weights, which it asks for before), with the RMS norm before the product and the residual sum after
// it if asked to. Several matrices with the same input are done in one launch.
// `ktx_gemv_4` and `_8` are for as many tokens, quantised by `ktx_quantize` before.
// `ktx_gemv_f32` makes every weight a float: exact, slower.

#include "products.cuh"

namespace {

constexpr u32 MAX_WARPS = 32;
constexpr u32 MAX_TARGETS = 4;
// Threads of a block of the kernels for several tokens, at most.
constexpr u32 FEW_THREADS = 256;

// One matrix.
struct Target {
    const u8* rows;
    // `[rows]` or null.
    const float* bias;
    // `[tokens, out_stride]` or null: added to the product; may be `out`.
    const float* residual;
    // `[tokens, out_stride]`.
    float* out;
    u32 type;
    u32 row_count;
    u32 row_bytes;
    u32 out_stride;
    // Blocks of the grid that work on this matrix: up to this number, from the previous one's on.
    u32 end_block;
    // Warps that share a row, a power of two.
    u32 warps_per_row;
};

struct Targets {
    Target of[MAX_TARGETS];
    // Activations `[tokens, columns]`.
    const float* x;
    // Quantised activations, `quantized_bytes` per token; for `ktx_gemv_*`.
    const u8* quantized;
    // `[columns]` or null: weights of the RMS norm of `x`; for `ktx_gemv`.
    const float* norm;
    float norm_epsilon;
    u32 columns;
    u32 tokens;
    u32 count;
};

// The block's matrix and its place among the matrix's blocks.
struct Place {
    u32 target;
    u32 block;
    u32 blocks;
};

__device__ __forceinline__ Place place_of(const Targets& targets) {
    u32 start = 0, target = 0;
    while (target + 1 < targets.count && blockIdx.x >= targets.of[target].end_block) {
        start = targets.of[target].end_block;
        ++target;
    }
    return {target, blockIdx.x - start, targets.of[target].end_block - start};
}

// Rows of a block at a time.
__device__ __forceinline__ u32 rows_per_block(const Target& target, u32 rows_per_warp) {
    return blockDim.x / 32 / target.warps_per_row * rows_per_warp;
}

// Bytes that a block asks for beforehand, at most. On an H100, 8192 x 8192 in Q4_K took 2 to 4 % longer without.
constexpr u32 PREFETCH_BYTES = 64 << 10;

// Asks for the first weights that the warp reads, with those that share its rows.
__device__ __forceinline__ void prefetch_rows(const Target& target, const Place& place, u32 rows_per_warp) {
    u32 lanes = target.warps_per_row * 32;
    u32 row = place.block * rows_per_block(target, rows_per_warp) + threadIdx.x / lanes * rows_per_warp;
    if (row >= target.row_count) {
        return;
    }
    u32 count = target.row_count - row < rows_per_warp ? target.row_count - row : rows_per_warp;
    const u8* from = target.rows + static_cast<u64>(row) * target.row_bytes;
    u32 share = PREFETCH_BYTES / blockDim.x * lanes;
    u32 bytes = min(count * target.row_bytes, share);
    for (u32 at = threadIdx.x % lanes * 128; at < bytes; at += lanes * 128) {
        prefetch_l2(from + at);
    }
}

// Multiplies the rows that are the block's: `dot(rows, first, step, sums)` adds a lane's share. `first` and `step` count
// lanes of all warps that share a row. All blocks work on neighbouring rows at any time: rows of its own in one
// piece for each warp, with the next ones prefetched, took 22 to 35 % longer where a warp has many (H100).
template <int ROWS, int TOKENS, class Dot>
__device__ __forceinline__ void walk_rows(const Target& target, const Place& place, u32 first_token, u32 tokens,
                                          Dot dot) {
    constexpr u32 most_warps = TOKENS == 1 ? MAX_WARPS : FEW_THREADS / 32;
    __shared__ float partial[most_warps][ROWS][TOKENS];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 sharing = target.warps_per_row, part = warp % sharing;
    u32 per_block = rows_per_block(target, ROWS);
    for (u32 base = place.block * per_block; base < target.row_count; base += place.blocks * per_block) {
        u32 row = base + warp / sharing * ROWS;
        float sums[ROWS][TOKENS] = {};
        if (row < target.row_count) {
            const u8* rows[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                u32 known = row + r < target.row_count ? row + r : row;
                rows[r] = target.rows + static_cast<u64>(known) * target.row_bytes;
            }
            dot(rows, part * 32 + lane, sharing * 32, sums);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                sums[r][t] = warp_sum(sums[r][t]);
            }
        }
        if (sharing > 1) {
            // The warps of a row add up in a fixed order.
            if (lane == 0) {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                    for (int t = 0; t < TOKENS; ++t) {
                        partial[warp][r][t] = sums[r][t];
                    }
                }
            }
            __syncthreads();
            if (part == 0) {
                for (u32 other = 1; other < sharing; ++other) {
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                        for (int t = 0; t < TOKENS; ++t) {
                            sums[r][t] += partial[warp + other][r][t];
                        }
                    }
                }
            }
            __syncthreads();
        }
        if (part == 0) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int t = 0; t < TOKENS; ++t) {
                    // Each sum is written by a lane of its own, so that stores do not queue up.
                    if (lane == (r * TOKENS + t) % 32 && row + r < target.row_count && first_token + t < tokens) {
                        u64 at = static_cast<u64>(first_token + t) * target.out_stride + row + r;
                        float sum = sums[r][t];
                        sum += target.bias ? target.bias[row + r] : 0.0f;
                        sum += target.residual ? target.residual[at] : 0.0f;
                        target.out[at] = sum;
                    }
                }
            }
        }
    }
}

// 1 over the root of the mean square of `x`, the same in all threads.
__device__ __forceinline__ float inverse_rms(const float* x, u32 columns, float epsilon) {
    __shared__ float sums[MAX_WARPS];
    float sum = 0;
    for (u32 column = threadIdx.x * 4; column < columns; column += blockDim.x * 4) {
        float4 values = four_of(x, columns, column);
        sum += values.x * values.x + values.y * values.y + values.z * values.z + values.w * values.w;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    sum = 0;
    for (u32 warp = 0; warp < blockDim.x / 32; ++warp) {
        sum += sums[warp];
    }
    return 1.0f / sqrtf(sum / static_cast<float>(columns) + epsilon);
}

// Normalised activations, four from `column` on.
__device__ __forceinline__ float4 normed(const Targets& targets, float factor, u32 column) {
    float4 values = four_of(targets.x, targets.columns, column);
    if (targets.norm) {
        float4 weights = four_of(targets.norm, targets.columns, column);
        values = {values.x * factor * weights.x, values.y * factor * weights.y, values.z * factor * weights.z,
                  values.w * factor * weights.w};
    }
    return values;
}

__device__ __forceinline__ Values values_from(const Targets& targets, u32 first_token) {
    return {targets.x + static_cast<u64>(first_token) * targets.columns, targets.columns,
            targets.tokens - 1 - first_token};
}

// Rows of any type times `TOKENS` tokens: codes with the quantised activations `x`, floats with `values`.
template <int TOKENS>
__device__ __forceinline__ void multiply(const Target& target, const Place& place, u32 first_token, u32 tokens,
                                         const u8* x, const Values& values) {
    constexpr int ROWS = 2;
    walk_rows<ROWS, TOKENS>(
        target, place, first_token, tokens,
        [&](const u8* const(&rows)[ROWS], u32 first, u32 step, float(&sums)[ROWS][TOKENS]) {
            u32 groups = (values.columns + 31) / 32;
            switch (target.type) {
#define KTX_CASE(TYPE) \
    case TYPE: return dot_codes<TYPE, ROWS, TOKENS>(rows, groups, first, step, x, sums);
                KTX_CODE_TYPES(KTX_CASE)
#undef KTX_CASE
#define KTX_CASE(TYPE) \
    case TYPE: return dot_floats<TYPE, ROWS, TOKENS>(rows, first, step, values, sums);
                KTX_FLOAT_TYPES(KTX_CASE)
#undef KTX_CASE
            }
        });
}

template <int TOKENS>
__device__ __forceinline__ void multiply_tokens(const Targets& targets) {
    Place place = place_of(targets);
    const Target& target = targets.of[place.target];
    prefetch_rows(target, place, 2);
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 first_token = blockIdx.y * TOKENS, groups = (targets.columns + 31) / 32;
    const u8* x = targets.quantized + static_cast<u64>(first_token) * quantized_bytes(groups);
    multiply<TOKENS>(target, place, first_token, targets.tokens, x, values_from(targets, first_token));
}

}  // namespace

// Activations `[tokens, columns]` to `quantized_bytes` per token. Grid: (groups / 32 rounded up, tokens), 256 threads.
extern "C" __global__ void __launch_bounds__(256) ktx_quantize(u8* quantized, const float* x, u32 columns) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    u32 groups = (columns + 31) / 32, token = blockIdx.y;
    u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    float4 values = four_of(x + static_cast<u64>(token) * columns, columns, 4 * at);
    quantize_quarter(quantized + static_cast<u64>(token) * quantized_bytes(groups), groups, at / 8, at % 8, values);
}

// One token. Dynamic shared memory: `quantized_bytes`, and 4 bytes a column (a multiple of 32) where a matrix of
// plain floats is among the targets and the norm is asked for.
// The 64 registers of blocks of 1,024 threads leave 4 bytes to memory on Volta.
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 1) ktx_gemv(const __grid_constant__ Targets targets) {
    extern __shared__ uint4 shared[];
    Place place = place_of(targets);
    const Target& target = targets.of[place.target];
    prefetch_rows(target, place, 2);
    wait_for_previous_kernel();
    let_next_kernel_start();

    u32 groups = (targets.columns + 31) / 32;
    float factor = targets.norm ? inverse_rms(targets.x, targets.columns, targets.norm_epsilon) : 1.0f;
    const float* values = targets.x;
    if (!is_float_type(target.type)) {
        // Whole warps, because eight lanes work together.
        for (u32 at = threadIdx.x; at < (groups * 8 + 31) / 32 * 32; at += blockDim.x) {
            quantize_quarter(shared, groups, at / 8, at % 8, normed(targets, factor, 4 * at));
        }
        __syncthreads();
    } else if (targets.norm) {
        float4* normed_values = reinterpret_cast<float4*>(shared);
        for (u32 at = threadIdx.x; at < groups * 8; at += blockDim.x) {
            normed_values[at] = normed(targets, factor, 4 * at);
        }
        __syncthreads();
        values = reinterpret_cast<const float*>(shared);
    }
    multiply<1>(target, place, 0, 1, reinterpret_cast<const u8*>(shared), Values{values, targets.columns, 0});
}

// 256 threads. Grid: (blocks of the targets, tokens / 4 rounded up); quantised activations of so many tokens can be read.
extern "C" __global__ void __launch_bounds__(FEW_THREADS, 2) ktx_gemv_4(const __grid_constant__ Targets targets) {
    multiply_tokens<4>(targets);
}

// 256 threads. Grid: (blocks of the targets, tokens / 8 rounded up). Two blocks an SM leave 128 registers and up to 40
// bytes to memory.
extern "C" __global__ void __launch_bounds__(FEW_THREADS, 2) ktx_gemv_8(const __grid_constant__ Targets targets) {
    multiply_tokens<8>(targets);
}

// 128 threads. Grid: (blocks of the targets, tokens / 4 rounded up). Up to 36 bytes go to memory on the newest.
extern "C" __global__ void __launch_bounds__(128, 3) ktx_gemv_f32(const __grid_constant__ Targets targets) {
    Place place = place_of(targets);
    const Target& target = targets.of[place.target];
    wait_for_previous_kernel();
    let_next_kernel_start();
    constexpr int TOKENS = 4;
    u32 first_token = blockIdx.y * TOKENS;
    Values values = values_from(targets, first_token);
    walk_rows<1, TOKENS>(
        target, place, first_token, targets.tokens,
        [&](const u8* const(&rows)[1], u32 first, u32 step, float(&sums)[1][TOKENS]) {
            switch (target.type) {
#define KTX_CASE(TYPE) \
    case TYPE: return dot_exact<TYPE, 1, TOKENS>(rows, first, step, values, sums);
                KTX_CODE_TYPES(KTX_CASE)
#undef KTX_CASE
#define KTX_CASE(TYPE) \
    case TYPE: return dot_floats<TYPE, 1, TOKENS>(rows, first, step, values, sums);
                KTX_FLOAT_TYPES(KTX_CASE)
#undef KTX_CASE
            }
        });
}
