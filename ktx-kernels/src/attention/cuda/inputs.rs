//! Head norms, rotation and the append to the cache in one launch; see `inputs.cu`.

use super::super::{AttentionShape, MlaShape};
use super::device_cache;
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch, StepView};
use crate::kv::LayerKv;
use crate::rope::RopeLayout;
use crate::rope::cuda::{DeviceRopeTable, layout_number};

/// Warps of a block, a head each.
const WARPS: usize = 8;

/// How heads are rotated.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRotation<'a> {
    /// Cosines and sines of the positions.
    pub table: &'a DeviceRopeTable,
    /// Which elements form pairs.
    pub layout: RopeLayout,
}

impl DeviceRotation<'_> {
    fn args(&self) -> [Arg; 4] {
        [
            Arg::Ptr(self.table.address()),
            Arg::U32(self.table.dim() as u32),
            Arg::U32(self.table.positions() as u32),
            Arg::I32(1 - layout_number(self.layout)),
        ]
    }
}

/// A norm of rows: its weight, a row of floats, and its epsilon.
#[derive(Debug, Clone, Copy)]
pub struct DeviceNorm<'a> {
    /// Factor of each element.
    pub weight: &'a DeviceBuffer,
    /// Added to the mean square.
    pub eps: f32,
}

/// Normalises (where the model does) and rotates the heads of `q` `[rows, heads * k_head_dim]` in place,
/// and those of `k` on their way to the cache, to which `v` goes too. `k` itself stays as it is. The first
/// elements of a head are rotated, as many as the table has.
///
/// The same as [`rms_norm_in_place`](crate::norm::cuda::rms_norm_in_place) twice,
/// [`rope`](crate::rope::cuda::rope) twice and [`append`](super::append), bit for bit up to the order in
/// which squares are added.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If a matrix or the cache does not fit the shape, or the cache is not on this GPU.
#[allow(clippy::too_many_arguments)]
pub fn gqa_inputs(
    gpu: &Gpu,
    shape: &AttentionShape,
    kv: &LayerKv,
    step: StepView,
    [q, k, v]: [DeviceMatrix; 3],
    norms: Option<[DeviceNorm<'_>; 2]>,
    rotation: DeviceRotation<'_>,
) -> Result<(), CudaError> {
    shape.check();
    let (rows, cache) = (q.rows(), device_cache(kv, gpu));
    let widths = [shape.heads * shape.k_head_dim, kv.k_width(), kv.v_width()];
    assert_eq!(
        widths[1],
        shape.kv_heads * shape.k_head_dim,
        "inputs: key row of the cache"
    );
    assert_eq!(
        widths[2],
        shape.kv_heads * shape.v_head_dim,
        "inputs: value row of the cache"
    );
    for (matrix, width) in [q, k, v].into_iter().zip(widths) {
        assert_eq!(
            (matrix.rows(), matrix.cols()),
            (rows, width),
            "inputs: a projection"
        );
    }
    check_step(rows, step, rotation.table, shape.k_head_dim);
    let bytes = shape.k_head_dim * size_of::<f32>();
    for norm in norms.iter().flatten() {
        assert_eq!(norm.weight.bytes(), bytes, "inputs: a norm's weight");
    }
    if rows == 0 {
        return Ok(());
    }
    let mut args = vec![q.arg(), k.arg(), v.arg(), Arg::Ptr(cache.address())];
    args.extend([
        Arg::Ptr(norms.map_or(0, |[q, _]| q.weight.address())),
        Arg::Ptr(norms.map_or(0, |[_, k]| k.weight.address())),
        Arg::F32(norms.map_or(0.0, |[q, _]| q.eps)),
        Arg::F32(norms.map_or(0.0, |[_, k]| k.eps)),
    ]);
    args.extend(rotation.args());
    args.extend(step_args(step));
    let sizes = [
        shape.heads,
        shape.kv_heads,
        shape.k_head_dim,
        shape.v_head_dim,
    ];
    args.extend(sizes.map(|n| Arg::U32(n as u32)));
    let name = format!("ktx_grouped_inputs_{}", kv.kv_type().name());
    let heads = shape.heads + 2 * shape.kv_heads;
    let launch = Launch::grid([rows, heads.div_ceil(WARPS), 1], 32 * WARPS as u32).early();
    let launch = launch.with_shared(WARPS * bytes);
    // SAFETY: the kernel's arguments; shapes checked above, and the step's pages are the cache's.
    unsafe { gpu.launch(gpu.function("attention/inputs", &name)?, launch, &args) }
}

/// Where the heads' rotated parts lie in a row of queries.
#[derive(Debug, Clone, Copy)]
pub struct RotatedParts {
    /// Elements from one head's to the next's; `heads` times it is a row.
    pub stride: usize,
    /// Elements before the first head's.
    pub offset: usize,
}

/// Rotates the parts of `q` that `parts` names in place, and brings `rows` `[rows, kv_lora + rope]` to the
/// cache: the first part normalised by `norm` `[kv_lora]`, the second rotated. `rows` stay as they are.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If a matrix or the cache does not fit the shape, or the cache is not on this GPU.
#[allow(clippy::too_many_arguments)]
pub fn mla_inputs(
    gpu: &Gpu,
    shape: &MlaShape,
    kv: &LayerKv,
    step: StepView,
    q: DeviceMatrix,
    parts: RotatedParts,
    rows: DeviceMatrix,
    norm: DeviceNorm<'_>,
    rotation: DeviceRotation<'_>,
) -> Result<(), CudaError> {
    let (width, cache) = (shape.kv_lora + shape.rope, device_cache(kv, gpu));
    assert_eq!(
        (kv.k_width(), kv.v_width()),
        (width, 0),
        "inputs: rows of the cache"
    );
    assert_eq!(
        (rows.rows(), rows.cols()),
        (q.rows(), width),
        "inputs: rows"
    );
    assert_eq!(q.cols(), shape.heads * parts.stride, "inputs: queries");
    assert!(
        parts.offset + shape.rope <= parts.stride,
        "inputs: rotated parts"
    );
    assert_eq!(
        norm.weight.bytes(),
        shape.kv_lora * size_of::<f32>(),
        "inputs: norm"
    );
    assert_eq!(rotation.table.dim(), shape.rope, "inputs: rotated elements");
    check_step(q.rows(), step, rotation.table, shape.rope);
    if q.rows() == 0 {
        return Ok(());
    }
    let mut args = vec![q.arg(), rows.arg(), Arg::Ptr(cache.address())];
    args.extend([Arg::Ptr(norm.weight.address()), Arg::F32(norm.eps)]);
    args.extend(rotation.args());
    args.extend(step_args(step));
    let sizes = [shape.heads, parts.stride, parts.offset, shape.kv_lora];
    args.extend(sizes.map(|n| Arg::U32(n as u32)));
    let name = format!("ktx_latent_inputs_{}", kv.kv_type().name());
    let blocks = (shape.heads + 1).div_ceil(WARPS);
    let launch = Launch::grid([q.rows(), blocks, 1], 32 * WARPS as u32).early();
    let launch = launch.with_shared(width * size_of::<f32>());
    // SAFETY: as above.
    unsafe { gpu.launch(gpu.function("attention/inputs", &name)?, launch, &args) }
}

fn step_args(step: StepView) -> [Arg; 4] {
    [
        Arg::Ptr(step.positions()),
        Arg::Ptr(step.row_sequence()),
        Arg::Ptr(step.pages()),
        Arg::U32(step.max_pages() as u32),
    ]
}

fn check_step(rows: usize, step: StepView, table: &DeviceRopeTable, dim: usize) {
    assert!(rows <= step.capacity().rows, "inputs: rows of the step");
    assert!(table.positions() > 0 && table.dim() <= dim, "inputs: table");
}
