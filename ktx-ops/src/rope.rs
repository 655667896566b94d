//! Rotary position embedding as an operator.

use std::sync::Arc;

use ktx_kernels::attention::cuda::DeviceRotation;
use ktx_kernels::device::Device;
use ktx_kernels::rope::cuda::{self, DeviceRopeTable};
use ktx_kernels::rope::{RopeHeads, RopeScaling, RopeTable, rope};
use ktx_kernels::workspace::Act;

use crate::build::{BuildArgs, OpError, Operator, Placement, WeightStore};
use crate::gpu::{OnGpus, refused};
use crate::kwargs::NoKwargs;
use crate::linear::kernel_error;
use crate::module::{Forward, HeadSpan, KModule, Loader, Phase, Rope};
use crate::register_operator;
use crate::spec::{RopeSpec, Spec};
use crate::tree::Module;

/// Positions that a table covers at least, whatever context the model states.
const MIN_POSITIONS: usize = 1 << 20;

/// Rotates by the frequencies of the model's configuration; tables are shared between layers.
pub struct RotaryEmbedding {
    path: String,
    class: &'static str,
    placement: Placement,
    spec: RopeSpec,
    table: Option<Arc<RopeTable>>,
    on_gpus: OnGpus<Arc<DeviceRopeTable>>,
}

impl RotaryEmbedding {
    const CLASS: &'static str = "ktransformers.operators.RoPE.RotaryEmbedding";
    const YARN: &'static str = "ktransformers.operators.RoPE.YarnRotaryEmbeddingV3";

    fn new(args: &mut BuildArgs<'_>, class: &'static str) -> Result<Self, OpError> {
        let Spec::Rope(spec) = args.spec().clone() else {
            return Err(args.unfit("a rotary embedding"));
        };
        Ok(Self {
            path: args.module.path.clone(),
            class,
            placement: args.placement,
            spec,
            table: None,
            on_gpus: OnGpus::default(),
        })
    }
}

impl KModule for RotaryEmbedding {
    fn path(&self) -> &str {
        &self.path
    }

    fn class_path(&self) -> &'static str {
        self.class
    }

    fn device(&self, phase: Phase) -> Device {
        self.placement.device(phase)
    }

    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        let positions = self.spec.max_positions.max(MIN_POSITIONS);
        let table = loader
            .rope_table(&self.spec.config, positions)
            .map_err(|e| kernel_error(&self.path, e))?;
        self.on_gpus = OnGpus::load(&self.path, self.placement, |gpu| {
            loader
                .rope_table_on(gpu, &self.spec.config, &table)
                .map_err(refused)
        })?;
        self.table = Some(table);
        Ok(())
    }
}

impl Rope for RotaryEmbedding {
    fn gpu_rotation(&self, device: Device) -> Option<DeviceRotation<'_>> {
        let table = self.on_gpus.get(&self.path, device).ok()?;
        Some(DeviceRotation {
            table,
            layout: self.spec.layout,
        })
    }

    fn forward(&self, cx: &mut Forward<'_>, x: Act, span: HeadSpan) -> Result<(), OpError> {
        let Some(table) = &self.table else {
            return Err(kernel_error(&self.path, "its table is not made"));
        };
        let heads = RopeHeads {
            heads: span.heads,
            head_stride: span.stride,
            token_stride: x.cols(),
            offset: span.offset,
        };
        if let Some(gpu) = cx.gpu(x) {
            let table = self.on_gpus.get(&self.path, x.device())?;
            let (step, x) = (cx.workspace.step(x.device()), cx.workspace.matrix(x));
            let (layout, positions) = (self.spec.layout, step.positions());
            return cuda::rope(&gpu, table, layout, &heads, positions, x).map_err(refused);
        }
        let values = cx.workspace.write(x);
        rope(
            cx.pool,
            table,
            self.spec.layout,
            &heads,
            &cx.batch.positions,
            values,
        );
        Ok(())
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    Ok(Operator::Rope(Box::new(RotaryEmbedding::new(
        args,
        RotaryEmbedding::CLASS,
    )?)))
}

/// A YaRN operator on a model without YaRN would rotate plainly in silence: that is refused.
fn needs_yarn(module: &Module, _: &dyn WeightStore) -> Result<(), String> {
    match &module.spec {
        Spec::Rope(spec) if !matches!(spec.config.scaling, RopeScaling::Yarn(_)) => Err(
            "it needs a model with YaRN scaling, and this file has none (`rope.scaling.type`); \
             ktransformers.operators.RoPE.RotaryEmbeddingV3 rotates as the file says"
                .to_owned(),
        ),
        _ => Ok(()),
    }
}

fn build_yarn(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    needs_yarn(args.module, args.store).map_err(|reason| args.error(reason))?;
    let rope = RotaryEmbedding::new(args, RotaryEmbedding::YARN)?;
    Ok(Operator::Rope(Box::new(rope)))
}

register_operator! {
    class: RotaryEmbedding::CLASS,
    aliases: [
        "ktx.rope.RotaryEmbedding",
        "RotaryEmbedding",
        "ktransformers.operators.RoPE.RotaryEmbeddingV2",
        "RotaryEmbeddingV2",
        "ktransformers.operators.RoPE.RotaryEmbeddingV3",
        "RotaryEmbeddingV3",
        "ktransformers.operators.RoPE.RotaryEmbeddingV4",
        "RotaryEmbeddingV4",
        "ktransformers.operators.RoPE.DynamicNTKScalingRotaryEmbedding",
        "DynamicNTKScalingRotaryEmbedding",
        "ktransformers.operators.RoPE.KQwen3MoeRotaryEmbedding",
        "KQwen3MoeRotaryEmbedding",
    ],
    role: Rope,
    summary: "rotary position embedding with the frequencies of the model's file",
    kwargs: NoKwargs,
    build: build,
}

register_operator! {
    class: RotaryEmbedding::YARN,
    aliases: [
        "ktx.rope.YarnRotaryEmbedding",
        "YarnRotaryEmbeddingV3",
        "ktransformers.operators.RoPE.YarnRotaryEmbedding",
        "YarnRotaryEmbedding",
    ],
    role: Rope,
    summary: "rotary position embedding with YaRN; refused on a model without it",
    kwargs: NoKwargs,
    validate: needs_yarn,
    build: build_yarn,
}
