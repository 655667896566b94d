// Joins the parts of attention results that were split over positions, for the kernels that leave that to it.
//
// A block has one entry of one tile; each of its 8 warps adds up every eighth part, a lane up to 16 columns,
// and the warps meet in shared memory. Bound by latency: three round trips to memory.
#include "paged.cuh"

#define WARPS 8
#define MOST_SPLITS 512
#define MOST_COLUMNS 512

// Entry blockIdx.x of tile blockIdx.y for KV head blockIdx.z.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    ktx_attend_join(const float* sinks, float* out, float* scratch, const unsigned* first_row, const unsigned* tokens,
                    const unsigned* past, const unsigned* page_table, unsigned sequences, unsigned max_pages,
                    unsigned heads, unsigned kv_heads, unsigned m, unsigned v_dim, unsigned window, unsigned splits,
                    unsigned least) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    __shared__ float factors[MOST_SPLITS];
    __shared__ float meeting[WARPS][MOST_COLUMNS];
    const unsigned entry = blockIdx.x, kv_head = blockIdx.z, group = heads / kv_heads;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Batch batch = {first_row, tokens, past, page_table, sequences, max_pages};
    Tile tile;
    if (!find_tile(batch, blockIdx.y, m, group, tile) || entry >= tile.entries) return;
    const unsigned used = span_of(tile, group, window, splits, 0, least).used;
    if (used == 1) return;
    const Parts parts = part_of(scratch, m, v_dim, gridDim.y, blockIdx.y, kv_heads, kv_head, splits, 0);

    // Every warp finds the factors for itself; the first writes them.
    const float2* sums = reinterpret_cast<const float2*>(parts.sums) + entry;
    float highest = -KTX_INFINITY, sum = 0.0f, rescale;
    for (unsigned s = lane; s < used; s += 32) highest = fmaxf(highest, sums[s * m].x);
    highest = warp_max(highest);
    for (unsigned s = lane; s < used; s += 32) {
        const float2 of_part = sums[s * m];
        const float factor = exp2f(of_part.x - base_of(highest));
        sum += of_part.y * factor;
        if (warp == 0) factors[s] = factor;
    }
    sum = warp_sum(sum);
    const size_t head = head_of(tile, entry, group, heads, kv_head);
    add_sink(sinks, (unsigned)head % heads, highest, sum, rescale);
    rescale /= sum;
    __syncthreads();

    const size_t step = (size_t)m * v_dim;
    const float* values = parts.values + (size_t)entry * v_dim;
    for (unsigned column = lane; column < v_dim; column += 32) {
        float total = 0.0f;
#pragma unroll 8
        for (unsigned s = warp; s < used; s += WARPS) total += factors[s] * values[s * step + column];
        meeting[warp][column] = total;
    }
    __syncthreads();
    for (unsigned column = threadIdx.x; column < v_dim; column += 32 * WARPS) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += meeting[w][column];
        out[head * v_dim + column] = total * rescale;
    }
}
