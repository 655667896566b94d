//! The mixture-of-experts block: router, routed experts, shared experts, in one place and in order.

use ktx_kernels::device::Device;
use ktx_kernels::gate::GateConfig;
use ktx_kernels::workspace::{Act, Workspace};

use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::experts::PartHere;
use crate::gate::{choice_scratch, choose, choose_on_gpu};
use crate::kwargs::NoKwargs;
use crate::module::{
    Capacity, Experts, Ffn, Forward, Gate, KModule, Linear, Phase, largest_scratch,
};
use crate::register_operator;
use crate::spec::Spec;

/// What chooses the experts.
enum Router {
    /// An operator that scores and chooses.
    Gate(Box<dyn Gate>),
    /// A matrix of scores, chosen from by the block.
    Matrix(Box<dyn Linear>, GateConfig),
}

/// `sum_k w_k expert_k(x) + shared(x)`, the shared part scaled by a sigmoid where the model has one.
pub struct MoeBlock {
    path: String,
    placement: Placement,
    hidden_size: usize,
    top_k: usize,
    router: Router,
    experts: Box<dyn Experts>,
    shared: Option<Box<dyn Ffn>>,
    shared_gate: Option<Box<dyn Linear>>,
}

impl MoeBlock {
    const CLASS: &'static str = "ktransformers.operators.experts.KDeepseekV3MoE";

    /// The block of a module's router and experts.
    pub fn new(args: &mut BuildArgs<'_>) -> Result<Self, OpError> {
        let Spec::Moe(spec) = args.spec().clone() else {
            return Err(args.unfit("a mixture-of-experts block"));
        };
        let router = match spec.router {
            Some(router) => Router::Matrix(args.linear(spec.gate)?, router),
            None => Router::Gate(args.gate(spec.gate)?),
        };
        Ok(Self {
            path: args.module.path.clone(),
            placement: args.placement,
            hidden_size: spec.hidden_size,
            top_k: spec.top_k,
            router,
            experts: args.experts("experts")?,
            shared: spec.shared.map(|name| args.ffn(name)).transpose()?,
            shared_gate: spec.shared_gate.map(|name| args.linear(name)).transpose()?,
        })
    }

    /// Copies of the block's rows that lie on the experts' devices or on the way back, at most.
    fn rows_elsewhere(&self) -> usize {
        let at_home = |phase| {
            let home = self.device(phase);
            self.experts.device(phase) == home && self.experts.out_device(phase) == home
        };
        match at_home(Phase::Prefill) && at_home(Phase::Generate) {
            true => 0,
            false => 3,
        }
    }

    /// Ids and weights of the experts of each row.
    fn route(&self, cx: &mut Forward<'_>, x: Act, ids: Act, weights: Act) -> Result<(), OpError> {
        match &self.router {
            Router::Gate(gate) => gate.forward(cx, x, ids, weights),
            Router::Matrix(matrix, router) => cx.scoped(|cx| {
                let logits = cx.alloc(self.device(cx.phase), x.rows(), router.experts)?;
                matrix.forward(cx, x, logits)?;
                match cx.gpu(logits) {
                    Some(_) => choose_on_gpu(cx, router, logits, None, [ids, weights]),
                    None => choose(cx, &self.path, router, logits, None, [ids, weights]),
                }
            }),
        }
    }
}

impl KModule for MoeBlock {
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
        let router: &dyn KModule = match &self.router {
            Router::Gate(gate) => gate.as_ref(),
            Router::Matrix(matrix, _) => matrix.as_ref(),
        };
        let mut all = vec![router, self.experts.as_ref()];
        all.extend(self.shared.iter().map(|m| m.as_ref() as &dyn KModule));
        all.extend(self.shared_gate.iter().map(|m| m.as_ref() as &dyn KModule));
        all
    }

    fn children_mut(&mut self) -> Vec<&mut dyn KModule> {
        let router: &mut dyn KModule = match &mut self.router {
            Router::Gate(gate) => gate.as_mut(),
            Router::Matrix(matrix, _) => matrix.as_mut(),
        };
        let mut all = vec![router, self.experts.as_mut()];
        all.extend(
            self.shared
                .iter_mut()
                .map(|m| m.as_mut() as &mut dyn KModule),
        );
        all.extend(
            self.shared_gate
                .iter_mut()
                .map(|m| m.as_mut() as &mut dyn KModule),
        );
        all
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        let experts = match &self.router {
            Router::Gate(_) => 0,
            Router::Matrix(_, router) => choice_scratch(router, capacity),
        };
        6 * Workspace::values_for(capacity.tokens, self.top_k)
            + self.rows_elsewhere() * Workspace::values_for(capacity.tokens, self.hidden_size)
            + Workspace::values_for(capacity.tokens, self.hidden_size)
            + Workspace::values_for(capacity.tokens, 1)
            + PartHere::scratch(capacity, self.hidden_size, self.top_k)
            + experts
            + largest_scratch(self.children(), capacity)
    }
}

impl Ffn for MoeBlock {
    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        cx.scoped(|cx| {
            let device = self.device(cx.phase);
            let ids = cx.alloc(device, x.rows(), self.top_k)?;
            let weights = cx.alloc(device, x.rows(), self.top_k)?;
            self.route(cx, x, ids, weights)?;
            cx.observe(&self.path, "expert_ids", ids);
            cx.observe(&self.path, "expert_weights", weights);

            // Submit, shared, wait, add: experts on another device work while this one does the shared part,
            // and what it holds of the experts itself.
            let experts = self.experts.place(cx, x.rows());
            let here = match experts == device {
                true => None,
                false => self.experts.part_here(cx, ids, weights)?,
            };
            let elsewhere = here.map_or(ids, |part| part.elsewhere);
            let [routed_x, routed_ids, routed_weights] =
                cx.hand_over([x, elsewhere, weights], experts)?;
            let routed = if experts == out.device() {
                out
            } else {
                cx.alloc(experts, out.rows(), out.cols())?
            };
            let defers = cx.defers(experts, self.top_k);
            let inputs = [routed_x, routed_ids, routed_weights];
            match defers {
                true => cx.submit_deferring(self.experts.as_ref(), inputs, routed)?,
                false => {
                    let [x, ids, weights] = inputs;
                    self.experts.submit(cx, x, ids, weights, routed)?;
                }
            }
            let here = match here {
                None => None,
                Some(part) => {
                    let y = cx.alloc(device, x.rows(), self.hidden_size)?;
                    self.experts.compute_here(cx, x, part, y)?;
                    Some(y)
                }
            };
            let shared = match &self.shared {
                None => None,
                Some(shared) => {
                    let y = cx.alloc(device, x.rows(), self.hidden_size)?;
                    shared.forward(cx, x, y)?;
                    let scale = match &self.shared_gate {
                        None => None,
                        Some(gate) => {
                            let scale = cx.alloc(device, x.rows(), 1)?;
                            gate.forward(cx, x, scale)?;
                            Some(scale)
                        }
                    };
                    Some((y, scale))
                }
            };
            self.experts.finish(cx, routed)?;
            let landing = self.experts.out_device(cx.phase);
            let landed = match landing == routed.device() || landing == out.device() {
                true => routed,
                false => {
                    let there = cx.alloc(landing, routed.rows(), routed.cols())?;
                    cx.take_back(routed, there)?;
                    there
                }
            };
            cx.take_back(landed, out)?;
            if defers {
                cx.exchange_deferred(out)?;
            }
            if let Some(y) = here {
                cx.add(out, y)?;
            }
            if let Some((y, scale)) = shared {
                match scale {
                    None => cx.add(out, y)?,
                    Some(scale) => cx.add_gated_rows(out, y, scale)?,
                }
            }
            Ok(())
        })
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    Ok(Operator::Ffn(Box::new(MoeBlock::new(args)?)))
}

register_operator! {
    class: MoeBlock::CLASS,
    aliases: [
        "ktx.ffn.MoeBlock",
        "MoeBlock",
        "KDeepseekV3MoE",
        "ktransformers.operators.experts.KDeepseekV2MoE",
        "KDeepseekV2MoE",
        "ktransformers.operators.experts.KDeepseekV3MoEV2",
        "KDeepseekV3MoEV2",
        "ktransformers.operators.experts.KQwen2MoeSparseMoeBlock",
        "KQwen2MoeSparseMoeBlock",
        "ktransformers.operators.experts.KQwen2MoeSparseMoeBlockV2",
        "KQwen2MoeSparseMoeBlockV2",
        "ktransformers.operators.experts.KQwen3MoeSparseMoeBlockV2",
        "KQwen3MoeSparseMoeBlockV2",
        "ktransformers.operators.experts.KMistralSparseMoEBlock",
        "KMistralSparseMoEBlock",
    ],
    role: Ffn,
    summary: "mixture-of-experts block: router, routed experts and shared experts, overlapped",
    kwargs: NoKwargs,
    build: build,
}
