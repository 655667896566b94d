//! Weights on a GPU and their products with activations there.
//!
//! At upload rows are regrouped, without loss, so that aligned loads can read them (`blocks.cuh`); types
//! that no kernel reads (IQ1, IQ2, IQ3, the ternary ones, 8-bit floats) become F16.
//!
//! Three ways, chosen by the number of tokens and the precision:
//! - up to 16 tokens, [`Precision::Int8`]: integer products of codes with activations quantised per 32 as
//!   on the CPU, bound by reading the weights (`gemv.cu`). F32, F16 and BF16 weights keep `f32`
//!   activations;
//! - more tokens: weights and activations become halves with 11 bits each, summed in single precision by
//!   the tensor cores (`gemm.cu`). Normalised mean squared error of a product: about 2e-7;
//! - [`Precision::F32`]: every weight is made a float; as exact as single precision, for tests and
//!   debugging.

pub(crate) mod gemm;
pub(crate) mod gemv;
pub(crate) mod layout;
mod speed;
pub(crate) mod upload;

use ktx_gguf::GgmlType;

use super::{Precision, WeightRows};
use crate::cuda::{CudaError, DeviceBuffer, DeviceMatrix, Gpu};
use layout::RowLayout;
pub use speed::measured_flops;
use upload::DeviceRows;

/// Tokens up to which the kernels for few are used.
pub const MAX_FEW_TOKENS: usize = 16;

/// A weight matrix `[rows, cols]` in a GPU's memory.
#[derive(Debug)]
pub struct GpuMatrix {
    rows: DeviceRows,
    ty: GgmlType,
}

/// One product with activations that others may share.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// The weights.
    pub weights: &'a GpuMatrix,
    /// `[rows]`, added to every token's product.
    pub bias: Option<&'a DeviceBuffer>,
    /// `[tokens, rows]`, added to the product. May be `out` itself.
    pub residual: Option<DeviceMatrix>,
    /// `[tokens, rows]`.
    pub out: DeviceMatrix,
}

/// The RMS norm of a token before its products.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// `[cols]`.
    pub weights: &'a DeviceBuffer,
    /// Added to the mean of the squares.
    pub epsilon: f32,
}

impl GpuMatrix {
    /// Copies `weights` to the GPU; complete when the call returns.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    pub fn upload(gpu: &Gpu, weights: WeightRows<'_>) -> Result<Self, CudaError> {
        Ok(Self {
            rows: DeviceRows::upload(gpu, weights)?,
            ty: weights.ty(),
        })
    }

    /// Bytes that a matrix of this type and shape takes on a GPU.
    pub fn bytes_for(ty: GgmlType, rows: usize, cols: usize) -> usize {
        rows * RowLayout::of(ty, cols).bytes
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.rows.buffer.bytes()
    }

    /// Number of rows: results per token.
    pub fn rows(&self) -> usize {
        self.rows.rows
    }

    /// Number of columns: values per token.
    pub fn cols(&self) -> usize {
        self.rows.cols
    }

    /// The type that was uploaded.
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// The GPU that it is on.
    pub fn gpu(&self) -> &Gpu {
        self.rows.buffer.gpu()
    }

    /// Floats of scratch that products of up to `tokens` tokens of `cols` values need.
    pub fn scratch_floats(tokens: usize, cols: usize) -> usize {
        let few = gemv::padded_tokens(tokens.min(MAX_FEW_TOKENS)) * gemv::quantized_bytes(cols) / 4;
        match tokens <= MAX_FEW_TOKENS {
            true => few,
            false => few.max(gemm::scratch_floats(tokens, cols)),
        }
    }

    /// `out = x W^T + bias`: `x` `[tokens, cols]`, `out` `[tokens, rows]`.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Panics
    /// If a shape does not fit, or `scratch` has less than [`Self::scratch_floats`].
    pub fn multiply(
        &self,
        x: DeviceMatrix,
        bias: Option<&DeviceBuffer>,
        out: DeviceMatrix,
        precision: Precision,
        scratch: DeviceMatrix,
    ) -> Result<(), CudaError> {
        let product = Product {
            weights: self,
            bias,
            residual: None,
            out,
        };
        multiply_many(&[product], x, precision, scratch)
    }
}

/// Several products with the same activations `x` `[tokens, cols]`, which are quantised or converted once:
/// query, key and value, or gate and up.
///
/// # Errors
/// What the driver reports.
///
/// # Panics
/// If a shape does not fit, a matrix is on another GPU, or `scratch` has less than
/// [`GpuMatrix::scratch_floats`].
pub fn multiply_many(
    products: &[Product<'_>],
    x: DeviceMatrix,
    precision: Precision,
    scratch: DeviceMatrix,
) -> Result<(), CudaError> {
    let Some(first) = products.first() else {
        return Ok(());
    };
    let gpu = first.weights.gpu();
    check(products, x);
    assert!(
        scratch.len() >= GpuMatrix::scratch_floats(x.rows(), x.cols()),
        "multiply: scratch"
    );
    if x.rows() == 0 {
        return Ok(());
    }
    if precision == Precision::Int8 && x.rows() > MAX_FEW_TOKENS {
        return gemm::many(gpu, products, x, scratch);
    }
    for products in products.chunks(gemv::MAX_TARGETS) {
        match precision {
            Precision::F32 => gemv::exact(gpu, products, x)?,
            Precision::Int8 if x.rows() == 1 && gemv::fits_one(products, x.cols(), false) => {
                gemv::one(gpu, products, x, None)?;
            }
            Precision::Int8 => gemv::few(gpu, products, x, scratch)?,
        }
    }
    Ok(())
}

/// Products of the RMS norm of one token `x` `[1, cols]`, in one launch: for generation, with
/// [`Precision::Int8`].
///
/// # Errors
/// What the driver reports.
///
/// # Panics
/// If there is not one token, there are more than 4 products, [`fuses_norm`] says no, or a shape does not
/// fit.
pub fn multiply_normed(
    products: &[Product<'_>],
    x: DeviceMatrix,
    norm: Norm<'_>,
) -> Result<(), CudaError> {
    let Some(first) = products.first() else {
        return Ok(());
    };
    check(products, x);
    assert_eq!(x.rows(), 1, "multiply_normed: tokens");
    assert_eq!(
        norm.weights.bytes(),
        x.cols() * size_of::<f32>(),
        "multiply_normed: norm"
    );
    assert!(
        products.len() <= gemv::MAX_TARGETS && gemv::fits_one(products, x.cols(), true),
        "multiply_normed: products"
    );
    gemv::one(first.weights.gpu(), products, x, Some(norm))
}

/// Whether [`multiply_normed`] has room for tokens of so many values.
pub fn fuses_norm(products: &[Product<'_>], cols: usize) -> bool {
    products.len() <= gemv::MAX_TARGETS && gemv::fits_one(products, cols, true)
}

fn check(products: &[Product<'_>], x: DeviceMatrix) {
    for product in products {
        let weights = product.weights;
        assert_eq!(
            weights.gpu().index(),
            products[0].weights.gpu().index(),
            "multiply: GPUs"
        );
        assert_eq!(x.cols(), weights.cols(), "multiply: columns");
        for matrix in [Some(product.out), product.residual].into_iter().flatten() {
            assert_eq!(
                (matrix.rows(), matrix.cols()),
                (x.rows(), weights.rows()),
                "multiply: product"
            );
        }
        if let Some(bias) = product.bias {
            assert_eq!(
                bias.bytes(),
                weights.rows() * size_of::<f32>(),
                "multiply: bias"
            );
        }
    }
}
