// RMSNorm of rows, alone or after a residual sum: y = x / sqrt(mean(x^2) + eps) * weight.
//
// Bound by memory on many rows and by latency on few. Wide rows take a block each, whose second pass
// reads what the first left in the first-level cache; heads of up to 512 elements take a warp each.
// A row is read and written by the same threads, so it may be normalised in place.
#include "reduce.cuh"

// Threads and their numbers in whatever works on one row.
struct Row {
    unsigned first, step;
};

__device__ __forceinline__ float squares(const float* x, unsigned width, Row row, bool quads) {
    float sum = 0.0f;
    if (quads) {
        for (unsigned i = row.first; i < width / 4; i += row.step) {
            const float4 v = reinterpret_cast<const float4*>(x)[i];
            sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
        return sum;
    }
    for (unsigned i = row.first; i < width; i += row.step) sum += x[i] * x[i];
    return sum;
}

// Without contraction, so that the products round as the host's do.
__device__ __forceinline__ float scaled(float x, float factor, float weight) {
    return __fmul_rn(__fmul_rn(x, factor), weight);
}

__device__ __forceinline__ void write_scaled(const float* x, const float* weight, float factor, float* out,
                                             unsigned width, Row row, bool quads) {
    if (quads) {
        for (unsigned i = row.first; i < width / 4; i += row.step) {
            const float4 v = reinterpret_cast<const float4*>(x)[i];
            const float4 w = reinterpret_cast<const float4*>(weight)[i];
            reinterpret_cast<float4*>(out)[i] =
                make_float4(scaled(v.x, factor, w.x), scaled(v.y, factor, w.y), scaled(v.z, factor, w.z),
                            scaled(v.w, factor, w.w));
        }
        return;
    }
    for (unsigned i = row.first; i < width; i += row.step) out[i] = scaled(x[i], factor, weight[i]);
}

__device__ __forceinline__ float factor_of(float sum, unsigned width, float eps) {
    return 1.0f / sqrtf(sum / (float)width + eps);
}

// A block a row of [rows, width].
extern "C" __global__ void ktx_rms_norm(const float* x, const float* weight, float* out, unsigned width,
                                        float eps) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    __shared__ float partial[32];
    x += (size_t)blockIdx.x * width;
    out += (size_t)blockIdx.x * width;
    const Row row = {threadIdx.x, blockDim.x};
    const bool quads = width % 4 == 0 && aligned16(x) && aligned16(weight) && aligned16(out);
    const float sum = block_sum(squares(x, width, row, quads), partial);
    write_scaled(x, weight, factor_of(sum, width, eps), out, width, row, quads);
}

// hidden += y, then out = norm(hidden): the residual sum and the norm behind it in one pass.
extern "C" __global__ void ktx_add_rms_norm(float* hidden, const float* y, const float* weight, float* out,
                                            unsigned width, float eps) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    __shared__ float partial[32];
    hidden += (size_t)blockIdx.x * width;
    y += (size_t)blockIdx.x * width;
    out += (size_t)blockIdx.x * width;
    const Row row = {threadIdx.x, blockDim.x};
    const bool quads =
        width % 4 == 0 && aligned16(hidden) && aligned16(y) && aligned16(weight) && aligned16(out);
    float sum = 0.0f;
    if (quads) {
        for (unsigned i = row.first; i < width / 4; i += row.step) {
            float4 v = reinterpret_cast<float4*>(hidden)[i];
            const float4 a = reinterpret_cast<const float4*>(y)[i];
            v.x += a.x, v.y += a.y, v.z += a.z, v.w += a.w;
            reinterpret_cast<float4*>(hidden)[i] = v;
            sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
    } else {
        for (unsigned i = row.first; i < width; i += row.step) {
            const float v = hidden[i] + y[i];
            hidden[i] = v;
            sum += v * v;
        }
    }
    sum = block_sum(sum, partial);
    write_scaled(hidden, weight, factor_of(sum, width, eps), out, width, row, quads);
}

// A warp a row; row r of token t starts at offset + t * token_stride + r * row_stride. In place.
extern "C" __global__ void ktx_rms_norm_heads(float* x, const float* weight, unsigned width, float eps,
                                              unsigned tokens, unsigned rows, unsigned token_stride,
                                              unsigned row_stride, unsigned offset) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const unsigned index = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (index >= tokens * rows) return;
    x += offset + (size_t)(index / rows) * token_stride + (size_t)(index % rows) * row_stride;
    const Row row = {threadIdx.x % 32, 32};
    const bool quads = width % 4 == 0 && aligned16(x) && aligned16(weight);
    const float sum = warp_sum(squares(x, width, row, quads));
    write_scaled(x, weight, factor_of(sum, width, eps), x, width, row, quads);
}
