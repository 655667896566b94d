//! The gated feed-forward block: `down(silu(gate(x)) * up(x))`.

use ktx_kernels::device::Device;
use ktx_kernels::workspace::{Act, Workspace};

use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::kwargs::NoKwargs;
use crate::linear::forward_joined;
use crate::module::{Capacity, Ffn, Forward, KModule, Linear, Phase, largest_scratch};
use crate::register_operator;
use crate::spec::Spec;

/// `down(silu(gate(x)) * up(x))`.
pub struct Mlp {
    path: String,
    placement: Placement,
    gate: Box<dyn Linear>,
    up: Box<dyn Linear>,
    down: Box<dyn Linear>,
}

impl Mlp {
    const CLASS: &'static str = "ktx.ffn.Mlp";

    /// The block of a module's three projections.
    pub fn new(args: &mut BuildArgs<'_>) -> Result<Self, OpError> {
        let Spec::Mlp(spec) = args.spec() else {
            return Err(args.unfit("a dense feed-forward block"));
        };
        let [gate, up, down] = spec.projections;
        let (gate, up, down) = (args.linear(gate)?, args.linear(up)?, args.linear(down)?);
        Ok(Self {
            path: args.module.path.clone(),
            placement: args.placement,
            gate,
            up,
            down,
        })
    }

    fn width(&self) -> usize {
        self.gate.out_features()
    }
}

impl KModule for Mlp {
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
        vec![self.gate.as_ref(), self.up.as_ref(), self.down.as_ref()]
    }

    fn children_mut(&mut self) -> Vec<&mut dyn KModule> {
        vec![self.gate.as_mut(), self.up.as_mut(), self.down.as_mut()]
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        2 * Workspace::values_for(capacity.tokens, self.width())
            + largest_scratch(self.children(), capacity)
    }
}

impl Ffn for Mlp {
    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        cx.scoped(|cx| {
            let device = self.device(cx.phase);
            let gate = cx.alloc(device, x.rows(), self.width())?;
            let up = cx.alloc(device, x.rows(), self.width())?;
            forward_joined(cx, [self.gate.as_ref(), self.up.as_ref()], x, [gate, up])?;
            cx.silu_mul(gate, up)?;
            self.down.forward(cx, gate, out)
        })
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    Ok(Operator::Ffn(Box::new(Mlp::new(args)?)))
}

register_operator! {
    class: Mlp::CLASS,
    aliases: [
        "Mlp",
        "ktransformers.operators.mlp.kDeepseekV3MLP",
        "ktransformers.operators.mlp.KQwen2MoeMLP",
        "kDeepseekV3MLP",
        "KQwen2MoeMLP",
    ],
    role: Ffn,
    summary: "dense feed-forward block: down(silu(gate(x)) * up(x))",
    kwargs: NoKwargs,
    build: build,
}
