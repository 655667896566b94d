//! One experts operator for prompts, one for generation.

use ktx_kernels::device::Device;
use ktx_kernels::workspace::Act;
use serde::{Deserialize, Serialize};

use super::streamed::streams_to;
use super::{HostExperts, PartHere};
use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::inner::{build_inner, build_inner_at, of_phase};
use crate::kwargs::{KwargDoc, KwargSet};
use crate::module::{Capacity, Experts, Forward, KModule, Phase, largest_scratch};
use crate::register_operator;

/// Arguments of `KTransformersExperts`; the rest go to the two operators.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
struct SwitchKwargs {
    generate_op: Option<String>,
    prefill_op: Option<String>,
}

impl Default for SwitchKwargs {
    fn default() -> Self {
        Self {
            generate_op: Some("KExpertsCPU".to_owned()),
            prefill_op: Some("KExpertsTorch".to_owned()),
        }
    }
}

impl KwargSet for SwitchKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "generate_op",
            doc: "experts operator of the generate phase",
            ignored: None,
        },
        KwargDoc {
            name: "prefill_op",
            doc: "experts operator of the prefill phase",
            ignored: None,
        },
    ];
}

/// Holds one experts operator for each phase; both read one copy of the weights.
pub struct KTransformersExperts {
    path: String,
    prefill: Option<Box<dyn Experts>>,
    generate: Box<dyn Experts>,
}

impl KTransformersExperts {
    const CLASS: &'static str = "ktransformers.operators.experts.KTransformersExperts";

    fn of(&self, phase: Phase) -> &dyn Experts {
        match (&self.prefill, phase) {
            (Some(op), Phase::Prefill) => op.as_ref(),
            _ => self.generate.as_ref(),
        }
    }
}

impl KModule for KTransformersExperts {
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

impl Experts for KTransformersExperts {
    fn submit(
        &self,
        cx: &mut Forward<'_>,
        x: Act,
        ids: Act,
        weights: Act,
        out: Act,
    ) -> Result<(), OpError> {
        self.of(cx.phase).submit(cx, x, ids, weights, out)
    }

    fn part_here(
        &self,
        cx: &mut Forward<'_>,
        ids: Act,
        weights: Act,
    ) -> Result<Option<PartHere>, OpError> {
        self.of(cx.phase).part_here(cx, ids, weights)
    }

    fn compute_here(
        &self,
        cx: &mut Forward<'_>,
        x: Act,
        part: PartHere,
        out: Act,
    ) -> Result<(), OpError> {
        self.of(cx.phase).compute_here(cx, x, part, out)
    }

    fn finish(&self, cx: &mut Forward<'_>, out: Act) -> Result<(), OpError> {
        self.of(cx.phase).finish(cx, out)
    }

    fn place(&self, cx: &Forward<'_>, rows: usize) -> Device {
        self.of(cx.phase).place(cx, rows)
    }

    fn out_device(&self, phase: Phase) -> Device {
        self.of(phase).out_device(phase)
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let kwargs = args.kwargs::<SwitchKwargs>()?;
    let experts = |op: Operator| match op {
        Operator::Experts(op) => Some(op),
        _ => None,
    };
    let (prefill, generate) = of_phase(&kwargs.prefill_op, &kwargs.generate_op);
    // Experts in main memory whose prompts go to a GPU: one operator, which streams them there.
    let streams = streams_to(args.placement).is_some();
    let is_host = |name: Option<&str>| name.is_some_and(HostExperts::is_named);
    let (prefill, placement) = match streams && is_host(prefill) && is_host(generate) {
        true => (None, args.placement),
        false => (prefill, Placement::both(args.placement.generate)),
    };
    let generate = build_inner_at(args, generate, placement, experts)?
        .ok_or_else(|| args.error("`generate_op` and `prefill_op` are both null: name one"))?;
    let prefill = build_inner(args, prefill, Phase::Prefill, experts)?;
    Ok(Operator::Experts(Box::new(KTransformersExperts {
        path: args.module.path.clone(),
        prefill,
        generate,
    })))
}

register_operator! {
    class: KTransformersExperts::CLASS,
    aliases: [
        "KTransformersExperts",
        "ktx.experts.KTransformersExperts",
        "ktransformers.operators.experts.KTransformersExpertsV2",
        "KTransformersExpertsV2",
    ],
    role: Experts,
    summary: "one experts operator for prompts and one for generation, on one copy of the weights",
    kwargs: open SwitchKwargs,
    build: build,
}
