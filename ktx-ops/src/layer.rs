//! The decoder layer: attention and feed-forward, each behind a norm and added to the residual stream.

use ktx_kernels::device::Device;
use ktx_kernels::workspace::{Act, Workspace};

use crate::build::{BuildArgs, OpError, Operator};
use crate::kwargs::NoKwargs;
use crate::module::{
    Attention, Capacity, Ffn, Forward, KModule, KvLayout, KvSlot, Layer, Norm, Phase,
    largest_scratch,
};
use crate::register_operator;
use crate::spec::Spec;

/// `x += attention(norm(x)); x += ffn(norm(x))`.
pub struct DecoderLayer {
    path: String,
    hidden_size: usize,
    input_norm: Box<dyn Norm>,
    attention: Box<dyn Attention>,
    ffn_norm: Box<dyn Norm>,
    ffn: Box<dyn Ffn>,
}

impl DecoderLayer {
    const CLASS: &'static str = "ktx.layer.DecoderLayer";

    /// The layer of a module's norms, attention and feed-forward block.
    pub fn new(args: &mut BuildArgs<'_>) -> Result<Self, OpError> {
        let Spec::Layer(spec) = args.spec().clone() else {
            return Err(args.unfit("a decoder layer"));
        };
        Ok(Self {
            path: args.module.path.clone(),
            hidden_size: spec.hidden_size,
            input_norm: args.norm("input_layernorm")?,
            attention: args.attention("self_attn")?,
            ffn_norm: args.norm("post_attention_layernorm")?,
            ffn: args.ffn(spec.ffn)?,
        })
    }
}

impl KModule for DecoderLayer {
    fn path(&self) -> &str {
        &self.path
    }

    fn class_path(&self) -> &'static str {
        Self::CLASS
    }

    /// The residual stream is where the attention is, whatever the rules say of the layer itself.
    fn device(&self, phase: Phase) -> Device {
        self.attention.device(phase)
    }

    fn children(&self) -> Vec<&dyn KModule> {
        vec![
            self.input_norm.as_ref(),
            self.attention.as_ref(),
            self.ffn_norm.as_ref(),
            self.ffn.as_ref(),
        ]
    }

    fn children_mut(&mut self) -> Vec<&mut dyn KModule> {
        vec![
            self.input_norm.as_mut(),
            self.attention.as_mut(),
            self.ffn_norm.as_mut(),
            self.ffn.as_mut(),
        ]
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        2 * Workspace::values_for(capacity.tokens, self.hidden_size)
            + largest_scratch(self.children(), capacity)
    }
}

impl Layer for DecoderLayer {
    fn kv_layout(&self) -> KvLayout {
        self.attention.kv_layout()
    }

    fn forward(&self, cx: &mut Forward<'_>, slot: KvSlot, hidden: Act) -> Result<(), OpError> {
        cx.scoped(|cx| {
            let device = hidden.device();
            let normed = cx.alloc(device, hidden.rows(), hidden.cols())?;
            let out = cx.alloc(device, hidden.rows(), hidden.cols())?;
            self.input_norm.forward(cx, hidden, normed)?;
            self.attention.forward(cx, slot, normed, out)?;
            self.ffn_norm.add_forward(cx, hidden, out, normed)?;
            self.ffn.forward(cx, normed, out)?;
            cx.add(hidden, out)?;
            cx.observe(&self.path, "hidden", hidden);
            Ok(())
        })
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    Ok(Operator::Layer(Box::new(DecoderLayer::new(args)?)))
}

register_operator! {
    class: DecoderLayer::CLASS,
    aliases: ["DecoderLayer"],
    role: Layer,
    summary: "decoder layer: attention and feed-forward block with norms and residuals",
    kwargs: NoKwargs,
    build: build,
}
