//! The router on a GPU; see `gate.cu`.

use super::{GateConfig, GroupScore, Scoring, WeightScaling};
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch};

const MODULE: &str = "gate/gate";
/// Threads of a block, at most; further experts are taken in turn.
const MOST_THREADS: usize = 1024;

/// Routes `logits` `[tokens, experts]`: the chosen experts' numbers go to `ids` (u32 in the bits of the
/// floats) and their weights to `weights`, both `[tokens, top_k]`. `bias` `[experts]` counts for the
/// choice only.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the configuration does not pass [`GateConfig::check`], or a shape does not fit.
pub fn route(
    gpu: &Gpu,
    config: &GateConfig,
    logits: DeviceMatrix,
    bias: Option<&DeviceBuffer>,
    ids: DeviceMatrix,
    weights: DeviceMatrix,
) -> Result<(), CudaError> {
    if let Err(error) = config.check() {
        panic!("route: {error}");
    }
    let tokens = logits.rows();
    assert_eq!(logits.cols(), config.experts, "route: logits");
    for chosen in [ids, weights] {
        assert_eq!(
            (chosen.rows(), chosen.cols()),
            (tokens, config.top_k),
            "route: chosen"
        );
    }
    if let Some(bias) = bias {
        assert_eq!(
            bias.bytes(),
            config.experts * size_of::<f32>(),
            "route: bias"
        );
    }
    if tokens == 0 {
        return Ok(());
    }
    let groups = config.groups.map(|g| {
        let sum_of_two = i32::from(g.score == GroupScore::SumOfTop2);
        (g.n_group, g.topk_group, sum_of_two, g.masked_value)
    });
    let (n_group, topk_group, sum_of_two, masked) = groups.unwrap_or((0, 0, 0, 0.0));
    let (scaling, factor) = match config.scaling {
        WeightScaling::Scale(factor) => (0, factor),
        WeightScaling::Normalise => (1, 1.0),
        WeightScaling::NormaliseThenScale(factor) => (2, factor),
    };
    let args = [
        logits.arg(),
        Arg::Ptr(bias.map_or(0, DeviceBuffer::address)),
        ids.arg(),
        weights.arg(),
        Arg::U32(config.experts as u32),
        Arg::U32(config.top_k as u32),
        Arg::I32(i32::from(config.scoring == Scoring::Sigmoid)),
        Arg::U32(n_group as u32),
        Arg::U32(topk_group as u32),
        Arg::I32(sum_of_two),
        Arg::F32(masked),
        Arg::I32(scaling),
        Arg::F32(factor),
    ];
    let floats = 2 * config.experts + n_group + config.top_k;
    let threads = config.experts.next_multiple_of(32).min(MOST_THREADS);
    let launch = Launch::linear(tokens, threads as u32)
        .early()
        .with_shared(floats * size_of::<f32>());
    // SAFETY: the kernel's arguments; shapes checked above.
    unsafe { gpu.launch(gpu.function(MODULE, "ktx_route")?, launch, &args) }
}
