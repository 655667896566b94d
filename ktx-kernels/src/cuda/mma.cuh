// Tensor-core multiplication of f16 matrices with f32 sums, and copies to shared memory that the threads do
// not wait for (sm_80 and later).
#pragma once
#include <cuda_fp16.h>
#include "ptx.cuh"

#if __CUDA_ARCH__ >= 800
#define KTX_TENSOR_CORES 1
#endif

// Two floats as two halves, the first in the low half.
__device__ __forceinline__ unsigned pack(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&both);
}

#ifdef KTX_TENSOR_CORES
// Four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const __half* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

__device__ __forceinline__ void load_transposed(unsigned (&r)[4], const __half* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

// c += a b with a 16 x 16, b 16 x 8.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes to shared memory; zeros where `there` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

// ROWS rows of D halves, `width` apart, to rows of D + 8, by THREADS threads; zeros from row `there` on.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void copy_rows(__half* to, const __half* from, size_t width, unsigned there, unsigned thread) {
    constexpr int CHUNKS = D / 8, EACH = ROWS * CHUNKS / THREADS;
    if constexpr (THREADS % CHUNKS == 0) {
        // Every copy of a thread has the same columns.
        constexpr int STEP = THREADS / CHUNKS;
        const unsigned row = thread / CHUNKS, at = thread % CHUNKS * 8;
        from += row * width + at;
        to += row * (D + 8) + at;
#pragma unroll
        for (int i = 0; i < EACH; i++, from += STEP * width) copy_async(to + i * STEP * (D + 8), from, row + i * STEP < there);
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const unsigned chunk = i * THREADS + thread, row = chunk / CHUNKS, at = chunk % CHUNKS * 8;
            copy_async(to + row * (D + 8) + at, from + row * width + at, row < there);
        }
    }
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the latest N groups of this thread's copies are there.
template <int N>
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#endif
