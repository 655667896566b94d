//! Routed experts as a list of feed-forward blocks, each with operators of its own: what the module
//! list is when no rule puts an experts operator there.

use ktx_kernels::activation::GatedActivation;
use ktx_kernels::device::Device;
use ktx_kernels::workspace::{Act, Workspace};

use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::kwargs::NoKwargs;
use crate::module::{Capacity, Experts, Ffn, Forward, KModule, Phase, largest_scratch};
use crate::register_operator;
use crate::spec::{ExpertsSpec, Spec};

/// One feed-forward block for each expert, run one after the other on the rows that chose it.
pub struct ExpertList {
    path: String,
    placement: Placement,
    spec: ExpertsSpec,
    experts: Vec<Box<dyn Ffn>>,
}

impl ExpertList {
    const CLASS: &'static str = "torch.nn.ModuleList";
}

impl KModule for ExpertList {
    fn path(&self) -> &str {
        &self.path
    }

    fn class_path(&self) -> &'static str {
        Self::CLASS
    }

    fn device(&self, phase: Phase) -> Device {
        self.placement.device(phase)
    }

    fn children(&self) -> Vec<&dyn KModule> {
        self.experts
            .iter()
            .map(|e| e.as_ref() as &dyn KModule)
            .collect()
    }

    fn children_mut(&mut self) -> Vec<&mut dyn KModule> {
        self.experts
            .iter_mut()
            .map(|e| e.as_mut() as &mut dyn KModule)
            .collect()
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        2 * Workspace::values_for(capacity.tokens, self.spec.hidden_size)
            + largest_scratch(self.children(), capacity)
    }
}

impl Experts for ExpertList {
    fn submit(
        &self,
        cx: &mut Forward<'_>,
        x: Act,
        ids: Act,
        weights: Act,
        out: Act,
    ) -> Result<(), OpError> {
        cx.workspace.write(out).fill(0.0);
        for (index, expert) in self.experts.iter().enumerate() {
            let chosen = rows_of(cx, ids, weights, index as u32);
            if chosen.is_empty() {
                continue;
            }
            cx.scoped(|cx| {
                let input = cx.alloc(x.device(), chosen.len(), x.cols())?;
                let output = cx.alloc(x.device(), chosen.len(), x.cols())?;
                for (i, (row, _)) in chosen.iter().enumerate() {
                    cx.workspace
                        .copy(x.row_range(*row, 1), input.row_range(i, 1));
                }
                let adapters = cx.adapters.gathered(chosen.iter().map(|(row, _)| *row));
                cx.with_adapters(adapters, |cx| expert.forward(cx, input, output))?;
                for (i, (row, weight)) in chosen.iter().enumerate() {
                    let ([y], [sum]) = cx
                        .workspace
                        .views([output.row_range(i, 1)], [out.row_range(*row, 1)]);
                    sum.iter_mut().zip(y).for_each(|(s, y)| *s += weight * y);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn finish(&self, _cx: &mut Forward<'_>, _out: Act) -> Result<(), OpError> {
        Ok(())
    }
}

/// Rows that chose an expert, with its weight there.
fn rows_of(cx: &Forward<'_>, ids: Act, weights: Act, expert: u32) -> Vec<(usize, f32)> {
    let top_k = ids.cols();
    let chosen: &[u32] = bytemuck::cast_slice(cx.workspace.read(ids));
    let weights = cx.workspace.read(weights);
    let all = chosen.iter().zip(weights).enumerate();
    all.filter(|(_, (id, _))| **id == expert)
        .map(|(i, (_, w))| (i / top_k, *w))
        .collect()
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    args.require_host(ExpertList::CLASS)?;
    let Spec::Experts(spec) = args.spec().clone() else {
        return Err(args.unfit("a list of routed experts"));
    };
    if spec.biases || spec.activation != GatedActivation::SwiGlu {
        return Err(args.error(
            "experts with biases or another activation than SwiGLU run as one operator; use KExpertsCPU",
        ));
    }
    let experts = (0..spec.num_experts)
        .map(|i| args.ffn(&i.to_string()))
        .collect::<Result<_, _>>()?;
    let (path, placement) = (args.module.path.clone(), args.placement);
    Ok(Operator::Experts(Box::new(ExpertList {
        path,
        placement,
        spec,
        experts,
    })))
}

register_operator! {
    class: ExpertList::CLASS,
    aliases: ["ktx.experts.ExpertList", "ExpertList"],
    role: Experts,
    summary: "routed experts one by one, each with its own operators; the default of expert lists",
    kwargs: NoKwargs,
    build: build,
}
