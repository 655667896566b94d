//! One linear operator for prompts, one for generation.

use ktx_kernels::device::Device;
use ktx_kernels::workspace::Act;
use serde::{Deserialize, Serialize};

use crate::build::{BuildArgs, OpError, Operator};
use crate::inner::{build_inner, of_phase};
use crate::kwargs::{KwargDoc, KwargSet};
use crate::module::{
    Capacity, DeviceWeights, Forward, HostMatrix, KModule, Linear, Phase, largest_scratch,
};
use crate::register_operator;

/// Arguments of `KTransformersLinear`; the rest go to the two operators.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
struct SwitchKwargs {
    generate_op: Option<String>,
    prefill_op: Option<String>,
}

impl Default for SwitchKwargs {
    fn default() -> Self {
        Self {
            generate_op: Some("KLinearMarlin".to_owned()),
            prefill_op: Some("KLinearTorch".to_owned()),
        }
    }
}

impl KwargSet for SwitchKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "generate_op",
            doc: "linear operator of the generate phase",
            ignored: None,
        },
        KwargDoc {
            name: "prefill_op",
            doc: "linear operator of the prefill phase",
            ignored: None,
        },
    ];
}

/// Holds one linear operator for each phase; both read one copy of the weights.
pub struct KTransformersLinear {
    path: String,
    prefill: Option<Box<dyn Linear>>,
    generate: Box<dyn Linear>,
}

impl KTransformersLinear {
    const CLASS: &'static str = "ktransformers.operators.linear.KTransformersLinear";

    fn of(&self, phase: Phase) -> &dyn Linear {
        match (&self.prefill, phase) {
            (Some(op), Phase::Prefill) => op.as_ref(),
            _ => self.generate.as_ref(),
        }
    }
}

impl KModule for KTransformersLinear {
    fn path(&self) -> &str {
        &self.path
    }

    fn class_path(&self) -> &'static str {
        Self::CLASS
    }

    fn device(&self, phase: Phase) -> Device {
        self.of(phase).device(phase)
    }

    fn children(&self) -> Vec<&dyn KModule> {
        let mut all: Vec<&dyn KModule> = vec![self.generate.as_ref()];
        all.extend(self.prefill.iter().map(|op| op.as_ref() as &dyn KModule));
        all
    }

    fn children_mut(&mut self) -> Vec<&mut dyn KModule> {
        vec![self.generate.as_mut()]
    }

    fn prompt_operators(&mut self) -> Vec<&mut dyn KModule> {
        self.prefill
            .iter_mut()
            .map(|op| op.as_mut() as &mut dyn KModule)
            .collect()
    }

    fn same_in_both_phases(&self) -> bool {
        let generate = &self.generate;
        let same = self.prefill.as_ref().is_none_or(|prefill| {
            prefill.class_path() == generate.class_path()
                && prefill.device(Phase::Prefill) == generate.device(Phase::Generate)
        });
        same && generate.same_in_both_phases()
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        largest_scratch(self.children(), capacity)
    }
}

impl Linear for KTransformersLinear {
    fn in_features(&self) -> usize {
        self.generate.in_features()
    }

    fn out_features(&self) -> usize {
        self.generate.out_features()
    }

    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        self.of(cx.phase).forward(cx, x, out)
    }

    fn host_matrix(&self, phase: Phase) -> Option<HostMatrix<'_>> {
        self.of(phase).host_matrix(phase)
    }

    fn gpu_matrix(&self, device: Device, phase: Phase) -> Option<DeviceWeights<'_>> {
        self.of(phase).gpu_matrix(device, phase)
    }

    fn add_low_rank(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        self.of(cx.phase).add_low_rank(cx, x, out)
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let kwargs = args.kwargs::<SwitchKwargs>()?;
    let linear = |op: Operator| match op {
        Operator::Linear(op) => Some(op),
        _ => None,
    };
    let (prefill, generate) = of_phase(&kwargs.prefill_op, &kwargs.generate_op);
    let generate = build_inner(args, generate, Phase::Generate, linear)?
        .ok_or_else(|| args.error("`generate_op` and `prefill_op` are both null: name one"))?;
    let prefill = build_inner(args, prefill, Phase::Prefill, linear)?;
    Ok(Operator::Linear(Box::new(KTransformersLinear {
        path: args.module.path.clone(),
        prefill,
        generate,
    })))
}

register_operator! {
    class: KTransformersLinear::CLASS,
    aliases: ["KTransformersLinear", "ktx.linear.KTransformersLinear"],
    role: Linear,
    summary: "one linear operator for prompts and one for generation, on one copy of the weights",
    kwargs: open SwitchKwargs,
    build: build,
}
