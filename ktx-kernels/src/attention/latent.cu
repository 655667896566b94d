// Absorbed latent attention over an F16 or Q8_0 cache on tensor cores (sm_80 and later): generation and prompts.
//
// All heads read the same rows [c 512 | k_pe 64], whose first columns are the values too: a row of 1,152
// bytes does 2,176 multiply-adds for every head, so that 128 heads are bound by arithmetic and 16 by memory.
// A block has M entries (heads of one or a few tokens) and walks its part of the positions 32 at a time;
// two buffers hold them, one being filled meanwhile. The scores are shared out by rows and positions, the
// second product by columns of the values, and the weights go from one to the other through shared memory,
// because no warp could hold all 512 columns of its rows.
//
// M = 64: 8 warps, 157 KB of shared memory. M = 16: 4 warps, 95 KB, two blocks a multiprocessor where there
// is room. Rows in shared memory are padded by 16 bytes; see generate.cu.
#include "halves.cuh"

#define COMPRESSED 512
#define ROTATED 64
#define WIDTH (COMPRESSED + ROTATED)
#define ROW (WIDTH + 8)
#define STEP_TOKENS 32
#define LEAST_PAGES 2
#define WEIGHT_ROW (STEP_TOKENS + 8)

#ifdef KTX_TENSOR_CORES
template <typename T, int M, int WARPS>
struct Latent {
    static constexpr int THREADS = 32 * WARPS, ROW_TILES = M / 16;
    // Warps side by side over the positions of a step, and groups of 8 positions of each.
    static constexpr int ACROSS = WARPS / ROW_TILES, GROUPS = STEP_TOKENS / ACROSS / 8;
    // Chunks of a row, and of a step's rows.
    static constexpr int IN_ROW = WIDTH / CHUNK<T>, CHUNKS = STEP_TOKENS * IN_ROW;
    // Columns of the values of a warp.
    static constexpr int COLUMNS = COMPRESSED / WARPS;

    struct Shared {
        __half queries[M * ROW];
        __half keys[2][STEP_TOKENS * ROW];
        __half weights[M * WEIGHT_ROW];
        float maxima[M][ACROSS], sums[M][ACROSS], rescales[M];
    };

    static __device__ __forceinline__ void fetch(__half* to, T* cache, const Tile& tile, unsigned position, unsigned end) {
        if (position < end) {
            const Rows<T> page = Rows<T>::keys(cache, tile.pages[position / PAGE_TOKENS], WIDTH, 0);
            const Rows<T> rows = page.skip((size_t)(position % PAGE_TOKENS) * WIDTH);
#pragma unroll
            for (int i = 0; i < (CHUNKS + THREADS - 1) / THREADS; i++) {
                const unsigned chunk = i * THREADS + threadIdx.x, row = chunk / IN_ROW, at = chunk % IN_ROW * CHUNK<T>;
                if (CHUNKS % THREADS && chunk >= CHUNKS) break;
                copy_chunk(to + row * ROW + at, rows.skip((size_t)row * WIDTH + at), position + row < end);
            }
        }
        commit_copies();
    }

    static __device__ __forceinline__ void load_queries(__half* to, const Tile& tile, const float* q, const float* q_tail,
                                                        unsigned heads, unsigned tail_stride, unsigned tail_offset, float factor) {
        // With one KV head the entries of a tile are the heads of its tokens in a row. Missing ones are read
        // as the last, whose results nobody takes; several loads are under way at once.
#pragma unroll 8
        for (unsigned i = threadIdx.x; i < M * COMPRESSED / 4; i += THREADS) {
            const unsigned e = i / (COMPRESSED / 4), at = i % (COMPRESSED / 4) * 4;
            const size_t head = head_of(tile, 0, heads, heads, 0) + min(e, tile.entries - 1);
            const float4 x = *reinterpret_cast<const float4*>(q + head * COMPRESSED + at);
            *reinterpret_cast<uint2*>(to + e * ROW + at) = make_uint2(pack(x.x * factor, x.y * factor), pack(x.z * factor, x.w * factor));
        }
#pragma unroll 8
        for (unsigned i = threadIdx.x; i < M * ROTATED; i += THREADS) {
            const unsigned e = i / ROTATED, at = i % ROTATED;
            const size_t head = head_of(tile, 0, heads, heads, 0) + min(e, tile.entries - 1);
            to[e * ROW + COMPRESSED + at] = __float2half_rn(q_tail[head * tail_stride + tail_offset + at] * factor);
        }
    }

    // Scores of this warp's 16 rows and 8 * GROUPS positions.
    static __device__ __forceinline__ void score(const __half* queries, const __half* keys, float (&scores)[GROUPS][4]) {
        const unsigned lane = threadIdx.x % 32;
        const __half* left = queries + (lane % 16) * ROW + lane / 16 * 8;
        if (GROUPS == 2) {
            const __half* right = keys + (lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 8;
            // Two chains of sums for each group, since a multiplication takes longer than its issue.
            float odd[GROUPS][4] = {};
#pragma unroll 6
            for (int k = 0; k < WIDTH / 16; k += 2) {
                unsigned a[4], b[4], c[4], d[4];
                load_matrices(a, left + k * 16);
                load_matrices(b, right + k * 16);
                load_matrices(c, left + k * 16 + 16);
                load_matrices(d, right + k * 16 + 16);
                multiply(scores[0], a, b[0], b[1]);
                multiply(scores[GROUPS - 1], a, b[2], b[3]);
                multiply(odd[0], c, d[0], d[1]);
                multiply(odd[GROUPS - 1], c, d[2], d[3]);
            }
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
#pragma unroll
                for (int i = 0; i < 4; i++) scores[g][i] += odd[g][i];
        } else {
            const __half* right = keys + lane % 8 * ROW + lane / 8 * 8;
            float odd[4] = {};
#pragma unroll 6
            for (int k = 0; k < WIDTH / 16; k += 2) {
                unsigned a[4], b[4], c[4];
                load_matrices(b, right + k * 16);
                load_matrices(a, left + k * 16);
                load_matrices(c, left + k * 16 + 16);
                multiply(scores[0], a, b[0], b[1]);
                multiply(odd, c, b[2], b[3]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) scores[0][i] += odd[i];
        }
    }

    static __device__ __forceinline__ void run(const float* q, const float* q_tail, T* cache, float* out,
                                               float* scratch, const Batch& batch, unsigned heads,
                                               unsigned tail_stride, unsigned tail_offset, float scale, unsigned splits) {
        wait_for_previous_kernel();
        let_next_kernel_start();
        extern __shared__ float4 shared4[];
        Shared& shared = *reinterpret_cast<Shared*>(shared4);
        const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = blockIdx.z;
        const unsigned tile_index = gridDim.x - 1 - blockIdx.x;
        Tile tile;
        if (!find_tile(batch, tile_index, M, heads, tile)) return;
        const Span span = span_of(tile, heads, 0xffffffffu, splits, split, LEAST_PAGES);
        if (span.begin >= span.end) return;
        fetch(shared.keys[0], cache, tile, span.begin, span.end);
        load_queries(shared.queries, tile, q, q_tail, heads, tail_stride, tail_offset, scale * LOG2_E);

        const unsigned row_tile = warp % ROW_TILES, across = warp / ROW_TILES;
        const unsigned rows[2] = {row_tile * 16 + lane / 4, row_tile * 16 + lane / 4 + 8};
        const unsigned limits[2] = {limit_of(tile, min(rows[0], tile.entries - 1), heads),
                                    limit_of(tile, min(rows[1], tile.entries - 1), heads)};
        float highest[2] = {-KTX_INFINITY, -KTX_INFINITY}, sum[2] = {0.0f, 0.0f};
        float acc[ROW_TILES][COLUMNS / 8][4] = {};
        unsigned stage = 0;
        for (unsigned position = span.begin; position < span.end; position += STEP_TOKENS, stage ^= 1) {
            await_copies<0>();
            __syncthreads();
            fetch(shared.keys[stage ^ 1], cache, tile, position + STEP_TOKENS, span.end);
            const __half* keys = shared.keys[stage];

            float scores[GROUPS][4] = {};
            score(shared.queries + row_tile * 16 * ROW, keys + across * GROUPS * 8 * ROW, scores);
            float most[2] = {-KTX_INFINITY, -KTX_INFINITY};
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const unsigned at = position + (across * GROUPS + g) * 8 + lane % 4 * 2 + i % 2;
                    scores[g][i] = (at < span.end) & (at <= limits[i / 2]) ? scores[g][i] : -KTX_INFINITY;
                    most[i / 2] = fmaxf(most[i / 2], scores[g][i]);
                }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                most[r] = fmaxf(most[r], __shfl_xor_sync(KTX_FULL_WARP, most[r], 1));
                most[r] = fmaxf(most[r], __shfl_xor_sync(KTX_FULL_WARP, most[r], 2));
                if (lane % 4 == 0) shared.maxima[rows[r]][across] = most[r];
            }
            __syncthreads();
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float now = highest[r];
#pragma unroll
                for (int w = 0; w < ACROSS; w++) now = fmaxf(now, shared.maxima[rows[r]][w]);
                const float base = base_of(now), rescale = fast_exp2(highest[r] - base);
                highest[r] = now;
                sum[r] *= rescale;
                if (across == 0 && lane % 4 == 0) shared.rescales[rows[r]] = rescale;
#pragma unroll
                for (int g = 0; g < GROUPS; g++) {
                    const float low = fast_exp2(scores[g][2 * r] - base), high = fast_exp2(scores[g][2 * r + 1] - base);
                    sum[r] += low + high;
                    *reinterpret_cast<unsigned*>(shared.weights + rows[r] * WEIGHT_ROW + (across * GROUPS + g) * 8 + lane % 4 * 2) = pack(low, high);
                }
            }
            __syncthreads();
            weigh(shared, keys, acc);
        }
        await_copies<0>();
        write(shared, acc, highest, sum, rows, across, tile, out, heads,
              part_of(scratch, M, COMPRESSED, gridDim.x, tile_index, 1, 0, splits, split), span.used == 1);
    }

    // acc = acc * rescale + weights x values, this warp's columns of all rows.
    static __device__ __forceinline__ void weigh(const Shared& shared, const __half* keys, float (&acc)[ROW_TILES][COLUMNS / 8][4]) {
        const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            const float f[2] = {shared.rescales[m * 16 + lane / 4], shared.rescales[m * 16 + lane / 4 + 8]};
            if (__all_sync(KTX_FULL_WARP, f[0] == 1.0f && f[1] == 1.0f)) continue;
#pragma unroll
            for (int c = 0; c < COLUMNS / 8; c++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[m][c][i] *= f[i / 2];
        }
        const __half* values = keys + (lane % 16) * ROW + warp * COLUMNS + lane / 16 * 8;
        const __half* weights = shared.weights + (lane % 16) * WEIGHT_ROW + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < STEP_TOKENS / 16; k++) {
            unsigned a[ROW_TILES][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) load_matrices(a[m], weights + m * 16 * WEIGHT_ROW + k * 16);
#pragma unroll
            for (int c = 0; c < COLUMNS / 16; c++) {
                unsigned b[4];
                load_transposed(b, values + k * 16 * ROW + c * 16);
#pragma unroll
                for (int m = 0; m < ROW_TILES; m++) {
                    multiply(acc[m][2 * c], a[m], b[0], b[1]);
                    multiply(acc[m][2 * c + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    static __device__ __forceinline__ void write(Shared& shared, const float (&acc)[ROW_TILES][COLUMNS / 8][4],
                                                 const float (&highest)[2], float (&sum)[2], const unsigned (&rows)[2],
                                                 unsigned across, const Tile& tile, float* out, unsigned heads,
                                                 const Parts& parts, bool whole) {
        const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(KTX_FULL_WARP, sum[r], 1);
            sum[r] += __shfl_xor_sync(KTX_FULL_WARP, sum[r], 2);
            if (lane % 4 == 0) shared.sums[rows[r]][across] = sum[r];
            if (lane % 4 == 0 && across == 0) shared.maxima[rows[r]][0] = highest[r];
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const unsigned e = m * 16 + lane / 4 + 8 * r;
                if (e >= tile.entries) continue;
                float total = 0.0f;
#pragma unroll
                for (int w = 0; w < ACROSS; w++) total += shared.sums[e][w];
                const float factor = whole ? 1.0f / total : 1.0f;
                if (!whole && warp == 0 && lane % 4 == 0) {
                    parts.sums[2 * e] = shared.maxima[e][0];
                    parts.sums[2 * e + 1] = total;
                }
                float* to = whole ? out + head_of(tile, e, heads, heads, 0) * COMPRESSED : parts.values + (size_t)e * COMPRESSED;
                to += warp * COLUMNS + lane % 4 * 2;
#pragma unroll
                for (int c = 0; c < COLUMNS / 8; c++)
                    *reinterpret_cast<float2*>(to + c * 8) = make_float2(acc[m][c][2 * r] * factor, acc[m][c][2 * r + 1] * factor);
            }
    }
};
#define KTX_LATENT_BODY(type, m, warps)                                                                                 \
    Latent<type, m, warps>::run(q, q_tail, cache, out, scratch,                                                         \
                          Batch{first_row, tokens, past, page_table, sequences, max_pages}, heads, tail_stride,   \
                          tail_offset, scale, splits);
#else
#define KTX_LATENT_BODY(type, m, warps)
#endif

#define KTX_LATENT(suffix, type, m, warps)                                                                                      \
    extern "C" __global__ void __launch_bounds__(32 * warps)                                                      \
        ktx_latent_##suffix##_##m(const float* q, const float* q_tail, type* cache, float* out, float* scratch,      \
                       const unsigned* first_row, const unsigned* tokens, const unsigned* past,                   \
                       const unsigned* page_table, unsigned sequences, unsigned max_pages, unsigned heads,        \
                       unsigned tail_stride, unsigned tail_offset, float scale, unsigned splits) {                \
        KTX_LATENT_BODY(type, m, warps)                                                                           \
    }

KTX_LATENT(f16, __half, 16, 4)
KTX_LATENT(f16, __half, 64, 8)
KTX_LATENT(q8_0, Q8, 16, 4)
KTX_LATENT(q8_0, Q8, 64, 8)
