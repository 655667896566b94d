//! One module's part of an adapter, and what it adds.

use std::sync::Arc;

use ktx_gguf::Tensor;
use ktx_kernels::activation::add;
use ktx_kernels::linear::{Precision, WeightRows};
use ktx_kernels::workspace::{Act, Workspace};

use super::active::AdapterId;
use super::adapter::Attachment;
use crate::build::OpError;
use crate::linear::{kernel_error, multiply};
use crate::module::{Forward, HostMatrix};

/// `scale * B A`: A `[rank, in]` and B `[out, rank]`, in the types that the adapter's file holds.
/// Products with them take their activations in f32.
#[derive(Debug, Clone)]
pub struct LowRank {
    a: Tensor,
    b: Tensor,
    scale: f32,
}

impl LowRank {
    /// Two matrices whose ranks are equal and a finite factor: the caller has checked that.
    pub(crate) fn new(a: Tensor, b: Tensor, scale: f32) -> Self {
        Self { a, b, scale }
    }

    /// Width between the two matrices.
    pub fn rank(&self) -> usize {
        self.b.row_len()
    }

    /// A `[rank, in]`; of an embedding, `[vocab, rank]`.
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// B `[out, rank]`.
    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// The adapter's own factor: alpha over rank.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Bytes of both matrices.
    pub fn bytes(&self) -> u64 {
        (self.a.bytes().len() + self.b.bytes().len()) as u64
    }

    /// Values of f32 that [`Self::add`] takes of the workspace for this many rows.
    pub fn scratch(&self, rows: usize) -> usize {
        Workspace::values_for(rows, self.rank()) + Workspace::values_for(rows, self.b.rows())
    }

    /// `out += factor * scale * x A^T B^T`; `x` is `[rows, in]`, `out` `[rows, out]`.
    ///
    /// # Errors
    /// [`OpError`] if the workspace is too small.
    pub fn add(
        &self,
        cx: &mut Forward<'_>,
        path: &str,
        x: Act,
        out: Act,
        factor: f32,
    ) -> Result<(), OpError> {
        cx.scoped(|cx| {
            let low = self.reduce(cx, path, x, factor)?;
            let delta = cx.alloc(x.device(), x.rows(), out.cols())?;
            product(cx, path, &self.b, low, delta)?;
            add_to(cx, delta, out);
            Ok(())
        })
    }

    /// `factor * scale * x A^T`, `[rows, rank]`, taken of the workspace.
    pub(crate) fn reduce(
        &self,
        cx: &mut Forward<'_>,
        path: &str,
        x: Act,
        factor: f32,
    ) -> Result<Act, OpError> {
        let low = cx.alloc(x.device(), x.rows(), self.rank())?;
        product(cx, path, &self.a, x, low)?;
        self.scale_rows(cx, low, factor);
        Ok(low)
    }

    /// Multiplies by the adapter's own factor and the session's.
    pub(crate) fn scale_rows(&self, cx: &mut Forward<'_>, rows: Act, factor: f32) {
        let factor = factor * self.scale;
        cx.workspace
            .write(rows)
            .iter_mut()
            .for_each(|v| *v *= factor);
    }
}

/// `out += delta`.
pub(crate) fn add_to(cx: &mut Forward<'_>, delta: Act, out: Act) {
    let ([delta], [out]) = cx.workspace.views([delta], [out]);
    add(cx.pool, out, delta);
}

/// `out = x W^T` with f32 activations, whatever the engine's precision is.
pub(crate) fn product(
    cx: &mut Forward<'_>,
    path: &str,
    w: &Tensor,
    x: Act,
    out: Act,
) -> Result<(), OpError> {
    let weights = WeightRows::of(w).map_err(|e| kernel_error(path, e))?;
    product_of(cx, path, weights, x, out)
}

/// The same with some rows of a matrix.
pub(crate) fn product_of(
    cx: &mut Forward<'_>,
    path: &str,
    weights: WeightRows<'_>,
    x: Act,
    out: Act,
) -> Result<(), OpError> {
    let engine = std::mem::replace(&mut cx.precision, Precision::F32);
    let matrix = HostMatrix {
        weights,
        bias: None,
    };
    let result = multiply(cx, path, &[matrix], x, [out]);
    cx.precision = engine;
    result
}

/// The parts of adapters that one operator carries.
#[derive(Debug, Default)]
pub struct Attached {
    parts: Vec<(AdapterId, Arc<LowRank>)>,
}

impl Attached {
    /// Takes the part of the module at `path`, if the adapter has one.
    pub fn attach(&mut self, path: &str, attachment: &mut Attachment<'_>) {
        if let Some(part) = attachment.take(path) {
            self.parts.push((attachment.id(), part));
        }
    }

    /// Lets go of one adapter's part.
    pub fn detach(&mut self, id: AdapterId) {
        self.parts.retain(|(i, _)| *i != id);
    }

    /// Whether no adapter has a part for the operator.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The part of one adapter.
    pub fn of(&self, id: AdapterId) -> Option<&LowRank> {
        let (_, part) = self.parts.iter().find(|(i, _)| *i == id)?;
        Some(part)
    }

    /// All parts.
    pub fn iter(&self) -> impl Iterator<Item = &LowRank> {
        self.parts.iter().map(|(_, part)| part.as_ref())
    }

    /// Values of f32 that [`Self::add`] takes of the workspace at most.
    pub fn scratch(&self, rows: usize) -> usize {
        self.iter().map(|p| p.scratch(rows)).max().unwrap_or(0)
    }

    /// Adds to `out` `[rows, out]` what the adapters of each row make of `x` `[rows, in]`.
    ///
    /// # Errors
    /// [`OpError`] if the rows are not those that the context says.
    pub fn add(&self, cx: &mut Forward<'_>, path: &str, x: Act, out: Act) -> Result<(), OpError> {
        self.each(cx, path, x.rows(), |cx, first, rows, part, factor| {
            let (x, out) = (x.row_range(first, rows), out.row_range(first, rows));
            part.add(cx, path, x, out, factor)
        })
    }

    /// Calls `body` with the first row, the number of rows, the part and the session's factor, for
    /// every span of rows and every adapter that applies to it and has a part here.
    pub(crate) fn each(
        &self,
        cx: &mut Forward<'_>,
        path: &str,
        rows: usize,
        mut body: impl FnMut(&mut Forward<'_>, usize, usize, &LowRank, f32) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        if self.parts.is_empty() || cx.adapters.is_empty() {
            return Ok(());
        }
        cx.adapters.require_rows(path, rows)?;
        let adapters = std::mem::take(&mut cx.adapters);
        let result = adapters.spans().iter().try_for_each(|span| {
            span.adapters.iter().try_for_each(|active| {
                let Some(part) = self.of(active.id) else {
                    return Ok(());
                };
                body(cx, span.first_row, span.rows, part, active.scale)
            })
        });
        cx.adapters = adapters;
        result
    }
}
