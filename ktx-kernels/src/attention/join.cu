// Joins the parts of attention results that were split over positions.
//
// A block has one entry of one tile; its threads have the columns. Bound by latency: the parts' maxima are
// read first, then the values, all parts' at once.
#include "paged.cuh"

// Entry blockIdx.x of tile blockIdx.y for KV head blockIdx.z.
extern "C" __global__ void ktx_attend_join(const float* sinks, float* out, float* scratch, const unsigned* first_row, const unsigned* tokens, const unsigned* past, const unsigned* page_table,
                                           unsigned sequences, unsigned max_pages, unsigned heads,
                                           unsigned kv_heads, unsigned m, unsigned v_dim, unsigned window,
                                           unsigned splits) {
    __shared__ float factors[512];
    const unsigned entry = blockIdx.x, kv_head = blockIdx.z, group = heads / kv_heads;
    const Batch batch = {first_row, tokens, past, page_table, sequences, max_pages};
    Tile tile;
    if (!find_tile(batch, blockIdx.y, m, group, tile) || entry >= tile.entries) return;
    const unsigned used = span_of(tile, group, window, splits, 0).used;
    const Parts parts = part_of(scratch, m, v_dim, gridDim.y, blockIdx.y, kv_heads, kv_head, splits, 0);

    // Every warp finds the factors for itself; all write the same.
    const unsigned lane = threadIdx.x % 32;
    float highest = -KTX_INFINITY, sum = 0.0f;
    for (unsigned s = lane; s < used; s += 32) highest = fmaxf(highest, parts.sums[(size_t)(s * m + entry) * 2]);
    highest = warp_max(highest);
    for (unsigned s = lane; s < used; s += 32) {
        const float* of_part = parts.sums + (size_t)(s * m + entry) * 2;
        const float factor = exp2f(of_part[0] - base_of(highest));
        sum += of_part[1] * factor;
        if (threadIdx.x < 32) factors[s] = factor;
    }
    sum = warp_sum(sum);
    const size_t head = head_of(tile, entry, group, heads, kv_head);
    float rescale;
    add_sink(sinks, head % heads, highest, sum, rescale);
    rescale /= sum;
    __syncthreads();

    const size_t step = (size_t)m * v_dim;
    const float* values = parts.values + (size_t)entry * v_dim;
    if (v_dim % 4 == 0) {
        for (unsigned column = 4 * threadIdx.x; column < v_dim; column += 4 * blockDim.x) {
            float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
            for (unsigned s = 0; s < used; s++) {
                const float4 v = *reinterpret_cast<const float4*>(values + s * step + column);
                const float f = factors[s];
                total.x += f * v.x, total.y += f * v.y, total.z += f * v.z, total.w += f * v.w;
            }
            *reinterpret_cast<float4*>(out + head * v_dim + column) =
                make_float4(total.x * rescale, total.y * rescale, total.z * rescale, total.w * rescale);
        }
        return;
    }
    for (unsigned column = threadIdx.x; column < v_dim; column += blockDim.x) {
        float total = 0.0f;
        for (unsigned s = 0; s < used; s++) total += factors[s] * values[s * step + column];
        out[head * v_dim + column] = total * rescale;
    }
}
