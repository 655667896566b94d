//! The stack of layers: embedding, layers in order, final norm of the rows that are wanted.

use std::collections::BTreeMap;

use ktx_kernels::device::Device;
use ktx_kernels::workspace::{Act, Workspace};
use serde::{Deserialize, Serialize};

use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::kwargs::{KwargDoc, KwargSet};
use crate::module::{
    Capacity, Embedding, Forward, KModule, KvLayout, KvSlot, Layer, Model, Norm, Phase,
    largest_scratch,
};
use crate::register_operator;
use crate::spec::Spec;

/// Keyword arguments of the model operators.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelKwargs {
    device: Option<String>,
    per_layer_prefill_intput_threshold: Option<u64>,
    transfer_map: Option<BTreeMap<usize, String>>,
}

impl KwargSet for ModelKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "device",
            doc: "device of the model; its hidden state starts where layer 0's attention is",
            ignored: None,
        },
        KwargDoc {
            name: "per_layer_prefill_intput_threshold",
            doc: "prompts longer than this are read layer by layer; 0 or null: never",
            ignored: Some("weights are read in place and never need to be moved layer by layer"),
        },
        KwargDoc {
            name: "transfer_map",
            doc: "{layer index: device}: before that layer the hidden state moves there",
            ignored: Some("the hidden state follows the devices of the layers' attentions"),
        },
    ];
}

/// Embedding, layers, final norm.
pub struct LayerStack {
    path: String,
    placement: Placement,
    hidden_size: usize,
    embedding: Box<dyn Embedding>,
    layers: Vec<Box<dyn Layer>>,
    norm: Box<dyn Norm>,
}

impl LayerStack {
    const CLASS: &'static str = "ktransformers.operators.models.KDeepseekV2Model";

    /// The stack of a module's embedding, layers and norm.
    pub fn new(args: &mut BuildArgs<'_>) -> Result<Self, OpError> {
        let Spec::Model(spec) = args.spec().clone() else {
            return Err(args.unfit("a model's stack of layers"));
        };
        args.kwargs::<ModelKwargs>()?;
        let Some(Operator::Container(mut list)) = args.children.take("layers") else {
            return Err(args.error("it has no list of layers"));
        };
        let mut layers = Vec::with_capacity(spec.num_layers);
        for (name, layer) in list.drain() {
            match layer {
                Operator::Layer(layer) => layers.push(layer),
                other => {
                    return Err(args.error(format!(
                        "`layers.{name}` is a {}, not a layer",
                        other.role()
                    )));
                }
            }
        }
        Ok(Self {
            path: args.module.path.clone(),
            placement: args.placement,
            hidden_size: spec.hidden_size,
            embedding: args.embedding("embed_tokens")?,
            layers,
            norm: args.norm("norm")?,
        })
    }

    /// Copies the wanted rows of `hidden` to `out`.
    fn gather(cx: &mut Forward<'_>, hidden: Act, out: Act) {
        let batch = cx.batch;
        for (i, row) in batch.outputs.iter().enumerate() {
            cx.workspace
                .copy(hidden.row_range(*row, 1), out.row_range(i, 1));
        }
    }
}

impl KModule for LayerStack {
    fn path(&self) -> &str {
        &self.path
    }

    fn class_path(&self) -> &'static str {
        Self::CLASS
    }

    fn device(&self, phase: Phase) -> Device {
        self.layers
            .first()
            .map_or(self.placement.device(phase), |layer| layer.device(phase))
    }

    fn children(&self) -> Vec<&dyn KModule> {
        let mut all: Vec<&dyn KModule> = vec![self.embedding.as_ref()];
        all.extend(self.layers.iter().map(|l| l.as_ref() as &dyn KModule));
        all.push(self.norm.as_ref());
        all
    }

    fn children_mut(&mut self) -> Vec<&mut dyn KModule> {
        let mut all: Vec<&mut dyn KModule> = vec![self.embedding.as_mut()];
        all.extend(
            self.layers
                .iter_mut()
                .map(|l| l.as_mut() as &mut dyn KModule),
        );
        all.push(self.norm.as_mut());
        all
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        2 * Workspace::values_for(capacity.tokens, self.hidden_size)
            + largest_scratch(self.children(), capacity)
    }
}

impl Model for LayerStack {
    fn kv_layouts(&self) -> Vec<KvLayout> {
        self.layers.iter().map(|l| l.kv_layout()).collect()
    }

    fn forward(&self, cx: &mut Forward<'_>, out: Act) -> Result<(), OpError> {
        cx.scoped(|cx| {
            let rows = cx.batch.rows();
            let embedded = cx.alloc(self.embedding.device(cx.phase), rows, self.hidden_size)?;
            self.embedding.forward(cx, embedded)?;
            let mut hidden = embedded;
            for (i, layer) in self.layers.iter().enumerate() {
                hidden = moved(cx, hidden, layer.device(cx.phase))?;
                layer.forward(cx, KvSlot(i), hidden)?;
            }
            let hidden = moved(cx, hidden, out.device())?;
            Self::gather(cx, hidden, out);
            self.norm.forward(cx, out, out)?;
            cx.observe(&self.path, "final_norm", out);
            Ok(())
        })
    }
}

/// The same rows on another device: a copy where it differs.
fn moved(cx: &mut Forward<'_>, x: Act, device: Device) -> Result<Act, OpError> {
    if x.device() == device {
        return Ok(x);
    }
    let there = cx.alloc(device, x.rows(), x.cols())?;
    cx.workspace.copy(x, there);
    Ok(there)
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    Ok(Operator::Model(Box::new(LayerStack::new(args)?)))
}

register_operator! {
    class: LayerStack::CLASS,
    aliases: [
        "ktx.model.LayerStack",
        "LayerStack",
        "KDeepseekV2Model",
        "ktransformers.operators.models.KQwen2MoeModel",
        "KQwen2MoeModel",
        "ktransformers.operators.models.KLlamaModel",
        "KLlamaModel",
    ],
    role: Model,
    summary: "embedding, layers in order, final norm",
    kwargs: ModelKwargs,
    build: build,
}
