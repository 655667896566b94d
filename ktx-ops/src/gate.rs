//! The router as an operator: scores of all experts in f32, and the choice.

use std::sync::Arc;

use bytemuck::cast_slice_mut;
use ktx_gguf::Tensor;
use ktx_kernels::cuda::DeviceBuffer;
use ktx_kernels::device::Device;
use ktx_kernels::gate::{self, GateConfig, route};
use ktx_kernels::linear::cuda::GpuMatrix;
use ktx_kernels::linear::{Precision, WeightRows};
use ktx_kernels::workspace::{Act, Workspace};

use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::gpu::{OnGpus, refused, upload};
use crate::kwargs::NoKwargs;
use crate::linear::{gpu_scratch, kernel_error, multiply, multiply_on_gpu};
use crate::lora::{AdapterId, Attached, Attachment};
use crate::module::{Capacity, Forward, Gate, Holding, HostMatrix, KModule, Loader, Phase};
use crate::register_operator;
use crate::spec::{GateSpec, Spec};
use crate::weights::{floats, required};

/// `softmax` or `sigmoid` of `x W^T`, with a bias where the model has one, then the model's choice of `top_k` experts.
///
/// Activations are never quantised here: choices are close, and the matrix is small.
pub struct KMoEGate {
    path: String,
    key: String,
    placement: Placement,
    spec: GateSpec,
    weight: Option<Tensor>,
    logit_bias: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    attached: Attached,
    on_gpus: OnGpus<GateOnGpu>,
}

/// The router on a GPU.
struct GateOnGpu {
    weight: Arc<GpuMatrix>,
    logit_bias: Option<DeviceBuffer>,
    bias: Option<DeviceBuffer>,
}

impl KMoEGate {
    const CLASS: &'static str = "ktransformers.operators.gate.KMoEGate";
}

impl KModule for KMoEGate {
    fn path(&self) -> &str {
        &self.path
    }

    fn class_path(&self) -> &'static str {
        Self::CLASS
    }

    fn device(&self, phase: Phase) -> Device {
        self.placement.device(phase)
    }

    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        let (store, spec) = (loader.store(), &self.spec);
        let shape = [spec.hidden_size, spec.config.experts];
        let weight = required(&self.path, store, &format!("{}.weight", self.key), &shape)?;
        loader.took(&[&weight])?;
        let mut values = |name: &Option<String>| {
            let Some(name) = name else { return Ok(None) };
            let tensor = required(&self.path, store, name, &[spec.config.experts])?;
            loader.took(&[&tensor])?;
            floats(&self.path, &tensor).map(Some)
        };
        let (logit_bias, bias) = (values(&spec.logit_bias)?, values(&spec.bias)?);
        self.on_gpus = OnGpus::load(&self.path, self.placement, |gpu| {
            let values = |values: &Option<Vec<f32>>| {
                let values = values.as_ref();
                values.map(|v| upload(&self.path, gpu, v)).transpose()
            };
            Ok(GateOnGpu {
                weight: loader.matrix_on(&self.path, gpu, &weight)?,
                logit_bias: values(&logit_bias)?,
                bias: values(&bias)?,
            })
        })?;
        self.weight = Some(weight);
        (self.logit_bias, self.bias) = (logit_bias, bias);
        Ok(())
    }

    fn holding(&self) -> Vec<Holding> {
        let biases = self.logit_bias.iter().chain(&self.bias);
        vec![Holding {
            device: self.placement.generate,
            bytes: biases.map(|b| size_of_val(b.as_slice()) as u64).sum(),
        }]
    }

    fn attach(&mut self, attachment: &mut Attachment<'_>) {
        self.attached.attach(&self.path, attachment);
    }

    fn detach(&mut self, id: AdapterId) {
        self.attached.detach(id);
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        choice_scratch(&self.spec.config, capacity)
            + gpu_scratch(self.placement, capacity, self.spec.hidden_size)
            + self.attached.scratch(capacity.tokens)
    }
}

impl Gate for KMoEGate {
    fn top_k(&self) -> usize {
        self.spec.config.top_k
    }

    fn forward(&self, cx: &mut Forward<'_>, x: Act, ids: Act, weights: Act) -> Result<(), OpError> {
        let error = |message: String| kernel_error(&self.path, message);
        let config = self.spec.config;
        let Some(weight) = &self.weight else {
            return Err(error("its weights are not loaded".into()));
        };
        let matrix = WeightRows::of(weight).map_err(|e| error(e.to_string()))?;
        cx.scoped(|cx| {
            let logits = cx.alloc(x.device(), x.rows(), config.experts)?;
            if cx.gpu(x).is_some() {
                let gate = self.on_gpus.get(&self.path, x.device())?;
                let bias = gate.logit_bias.as_ref();
                multiply_on_gpu(cx, &gate.weight, bias, Precision::F32, x, logits)?;
                let bias = gate.bias.as_ref();
                return choose_on_gpu(cx, &config, logits, bias, [ids, weights]);
            }
            let engine = std::mem::replace(&mut cx.precision, Precision::F32);
            let result = multiply(
                cx,
                &self.path,
                &[HostMatrix {
                    weights: matrix,
                    bias: self.logit_bias.as_deref(),
                }],
                x,
                [logits],
            );
            cx.precision = engine;
            result?;
            self.attached.add(cx, &self.path, x, logits)?;
            choose(
                cx,
                &self.path,
                &config,
                logits,
                self.bias.as_deref(),
                [ids, weights],
            )
        })
    }
}

/// Ids and weights of the experts that `logits` `[rows, experts]` choose.
pub(crate) fn choose(
    cx: &mut Forward<'_>,
    path: &str,
    config: &GateConfig,
    logits: Act,
    bias: Option<&[f32]>,
    [ids, weights]: [Act; 2],
) -> Result<(), OpError> {
    cx.scoped(|cx| {
        let scratch = cx.alloc(logits.device(), 1, config.scratch_floats(cx.pool.threads()))?;
        let ([logits], [ids, weights, scratch]) =
            cx.workspace.views([logits], [ids, weights, scratch]);
        route(
            cx.pool,
            config,
            logits,
            bias,
            cast_slice_mut(ids),
            weights,
            scratch,
        )
        .map_err(|e| kernel_error(path, e))
    })
}

/// The same on a GPU.
pub(crate) fn choose_on_gpu(
    cx: &mut Forward<'_>,
    config: &GateConfig,
    logits: Act,
    bias: Option<&DeviceBuffer>,
    chosen: [Act; 2],
) -> Result<(), OpError> {
    let Some(gpu) = cx.gpu(logits) else {
        return Ok(());
    };
    let [ids, weights] = chosen.map(|act| cx.workspace.matrix(act));
    let logits = cx.workspace.matrix(logits);
    gate::cuda::route(&gpu, config, logits, bias, ids, weights).map_err(refused)
}

/// Workspace that [`choose`] and the logits take.
pub(crate) fn choice_scratch(config: &GateConfig, capacity: Capacity) -> usize {
    Workspace::values_for(capacity.tokens, config.experts)
        + Workspace::values_for(1, config.scratch_floats(capacity.threads))
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let Spec::Gate(spec) = args.spec().clone() else {
        return Err(args.unfit("a router"));
    };
    spec.config.check().map_err(|e| args.error(e.to_string()))?;
    Ok(Operator::Gate(Box::new(KMoEGate {
        path: args.module.path.clone(),
        key: args.module.key.clone(),
        placement: args.placement,
        spec,
        weight: None,
        logit_bias: None,
        bias: None,
        attached: Attached::default(),
        on_gpus: OnGpus::default(),
    })))
}

register_operator! {
    class: KMoEGate::CLASS,
    aliases: ["KMoEGate", "ktx.gate.KMoEGate"],
    role: Gate,
    summary: "router: scores in f32, group-limited and bias-corrected choice",
    kwargs: NoKwargs,
    build: build,
}
