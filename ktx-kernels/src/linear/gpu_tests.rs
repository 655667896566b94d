use ktx_gguf::random_blocks;

use super::cases::{self, Case};
use super::cuda::{self, GpuMatrix, Norm, Product};
use super::tests::normal;
use super::{Activations, Precision, WeightRows, reference};
use crate::cuda::{DeviceBuffer, Gpu};
use crate::pool::ThreadPool;
use crate::testing::{GpuMatrix as Matrix, assert_close};

/// The cases of the CPU, those with tiles of 64 and 128 tokens, and tails of both.
fn all_cases() -> Vec<Case> {
    let mut cases = cases::correctness();
    for ty in cases::types() {
        let cols = 512.max(ty.block_len());
        for (rows, tokens) in [(200, 65), (129, 130), (4000, 1100)] {
            cases.push(Case {
                ty,
                rows,
                cols,
                tokens,
            });
        }
    }
    cases
}

/// What the kernels see of the weights: F16 where a type has no kernels.
fn seen_weights(w: WeightRows<'_>) -> Vec<f32> {
    let weights = reference::dequantize(w);
    match cuda::layout::is_native(w.ty()) {
        true => weights,
        false => weights
            .into_iter()
            .map(|w| half::f16::from_f32(w).to_f32())
            .collect(),
    }
}

/// What the kernels see of the activations: rounded to 8 bits as on the CPU where codes meet few tokens.
fn seen_values(case: Case, x: &[f32], precision: Precision) -> Vec<f32> {
    let codes = cuda::layout::is_native(case.ty) && case.ty.is_quantized();
    if precision == Precision::F32 || !codes || case.tokens > cuda::MAX_FEW_TOKENS {
        return x.to_vec();
    }
    let pool = ThreadPool::new(std::num::NonZeroUsize::MIN);
    let mut activations = Activations::default();
    // Each token alone: the CPU rounds many tokens to another form where it has tiles.
    x.chunks_exact(case.cols)
        .flat_map(|token| {
            activations
                .prepare(&pool, token, 1, case.cols, precision)
                .unwrap();
            activations.values(0).unwrap()
        })
        .collect()
}

fn walk(precision: Precision, bound: impl Fn(Case) -> f64) {
    let Some(gpu) = Gpu::for_tests() else { return };
    for case in all_cases() {
        if precision == Precision::F32 && case.tokens * case.rows > 200_000 {
            continue;
        }
        let bytes = random_blocks(case.ty, case.rows * case.cols / case.ty.block_len(), 7);
        let w = WeightRows::new(case.ty, case.rows, case.cols, &bytes).unwrap();
        let x = normal(case.tokens * case.cols, case.tokens as u64);
        let bias = normal(case.rows, 5);
        let weights = GpuMatrix::upload(&gpu, w).unwrap();
        let gpu_x = Matrix::of(&gpu, case.tokens, &x);
        let out = Matrix::poisoned(&gpu, case.tokens, case.rows);
        let floats = GpuMatrix::scratch_floats(case.tokens, case.cols);
        let scratch = Matrix::poisoned(&gpu, 1, floats);
        let gpu_bias = DeviceBuffer::upload(&gpu, &bias).unwrap();
        weights
            .multiply(
                gpu_x.matrix,
                Some(&gpu_bias),
                out.matrix,
                precision,
                scratch.matrix,
            )
            .unwrap();
        // The largest case is checked at its first and last tokens only: the reference is slow.
        let tokens: Vec<usize> = match case.tokens * case.rows > 200_000 {
            true => vec![0, 1, 63, 64, 127, 128, case.tokens - 2, case.tokens - 1],
            false => (0..case.tokens).collect(),
        };
        let (seen, x) = (seen_weights(w), seen_values(case, &x, precision));
        let (mut actual, mut expected) = (Vec::new(), Vec::new());
        let values = out.values();
        for token in tokens {
            let x = &x[token * case.cols..][..case.cols];
            for (row, weights) in seen.chunks_exact(case.cols).enumerate() {
                let products = weights
                    .iter()
                    .zip(x)
                    .map(|(w, x)| f64::from(*w) * f64::from(*x));
                expected.push(products.sum::<f64>() + f64::from(bias[row]));
                actual.push(values[token * case.rows + row]);
            }
        }
        assert_close(&actual, &expected, bound(case), &format!("{case:?}"));
    }
}

#[test]
fn gpu_products_agree_with_f64() {
    walk(Precision::Int8, |case| {
        if case.tokens <= cuda::MAX_FEW_TOKENS {
            1e-9
        } else {
            1e-6
        }
    });
}

#[test]
fn gpu_f32_products_are_exact() {
    walk(Precision::F32, |_| 1e-10);
}

#[test]
fn gpu_products_of_one_input_are_those_of_each_alone() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let types = [
        ktx_gguf::GgmlType::Q4_K,
        ktx_gguf::GgmlType::Q6_K,
        ktx_gguf::GgmlType::F32,
        ktx_gguf::GgmlType::Q8_0,
        ktx_gguf::GgmlType::BF16,
    ];
    let (cols, rows) = (512, [300, 17, 128, 64, 5]);
    for tokens in [1, 3, 8, 40] {
        let x = Matrix::of(&gpu, tokens, &normal(tokens * cols, 3));
        let scratch = Matrix::poisoned(&gpu, 1, GpuMatrix::scratch_floats(tokens, cols));
        let weights: Vec<GpuMatrix> = types
            .iter()
            .zip(rows)
            .map(|(ty, rows)| {
                let bytes = random_blocks(*ty, rows * cols / ty.block_len(), 9);
                GpuMatrix::upload(&gpu, WeightRows::new(*ty, rows, cols, &bytes).unwrap()).unwrap()
            })
            .collect();
        let outs = rows.map(|rows| Matrix::of(&gpu, tokens, &normal(tokens * rows, 4)));
        let alone = rows.map(|rows| Matrix::poisoned(&gpu, tokens, rows));
        let before = outs.each_ref().map(Matrix::values);
        for (weights, out) in weights.iter().zip(&alone) {
            weights
                .multiply(x.matrix, None, out.matrix, Precision::Int8, scratch.matrix)
                .unwrap();
        }
        // In place: what is there is added.
        let products: Vec<Product<'_>> = weights
            .iter()
            .zip(&outs)
            .map(|(weights, out)| Product {
                weights,
                bias: None,
                residual: Some(out.matrix),
                out: out.matrix,
            })
            .collect();
        cuda::multiply_many(&products, x.matrix, Precision::Int8, scratch.matrix).unwrap();
        for ((out, alone), before) in outs.iter().zip(&alone).zip(before) {
            let sums = alone.values().into_iter().zip(before).map(|(a, b)| a + b);
            assert_eq!(out.values(), sums.collect::<Vec<_>>(), "{tokens} tokens");
        }
    }
}

#[test]
fn gpu_norm_before_a_product_is_the_norm_of_its_input() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for (ty, cols) in [
        (ktx_gguf::GgmlType::Q4_K, 2048),
        (ktx_gguf::GgmlType::Q8_0, 96),
        (ktx_gguf::GgmlType::F32, 2048),
        (ktx_gguf::GgmlType::F16, 70),
    ] {
        let rows = 33;
        let bytes = random_blocks(ty, rows * cols / ty.block_len(), 2);
        let w = WeightRows::new(ty, rows, cols, &bytes).unwrap();
        let x: Vec<f32> = normal(cols, 8).into_iter().map(|v| v * 30.0).collect();
        let norm = normal(cols, 6);
        let square: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / cols as f64;
        let normed: Vec<f32> = x
            .iter()
            .zip(&norm)
            .map(|(x, n)| (f64::from(*x) / (square + 1e-6).sqrt() * f64::from(*n)) as f32)
            .collect();
        let weights = GpuMatrix::upload(&gpu, w).unwrap();
        let out = Matrix::poisoned(&gpu, 1, rows);
        let product = Product {
            weights: &weights,
            bias: None,
            residual: None,
            out: out.matrix,
        };
        let norm = DeviceBuffer::upload(&gpu, &norm).unwrap();
        let norm = Norm {
            weights: &norm,
            epsilon: 1e-6,
        };
        let x = Matrix::of(&gpu, 1, &x);
        assert!(cuda::fuses_norm(&[product], cols));
        cuda::multiply_normed(&[product], x.matrix, norm).unwrap();
        let bound = if ty.is_quantized() { 2e-4 } else { 1e-11 };
        let expected = reference::matmul(w, &normed);
        assert_close(&out.values(), &expected, bound, &format!("{ty} {cols}"));
    }
}
