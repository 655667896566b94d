//! The router as an operator: scores of all experts in f32, and the choice.

use bytemuck::cast_slice_mut;
use ktx_gguf::Tensor;
use ktx_kernels::device::Device;
use ktx_kernels::gate::{GateConfig, route};
use ktx_kernels::linear::{Precision, WeightRows};
use ktx_kernels::workspace::{Act, Workspace};

use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::kwargs::NoKwargs;
use crate::linear::{kernel_error, multiply};
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
        self.weight = Some(weight);
        let mut values = |name: &Option<String>| {
            let Some(name) = name else { return Ok(None) };
            let tensor = required(&self.path, store, name, &[spec.config.experts])?;
            loader.took(&[&tensor])?;
            floats(&self.path, &tensor).map(Some)
        };
        let (logit_bias, bias) = (values(&spec.logit_bias)?, values(&spec.bias)?);
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
        choice_scratch(&self.spec.config, capacity) + self.attached.scratch(capacity.tokens)
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
