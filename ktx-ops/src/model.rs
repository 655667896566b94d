//! The stack of layers: embedding, layers in order, final norm of the rows that are wanted.

use std::collections::BTreeMap;

use ktx_kernels::device::Device;
use ktx_kernels::workspace::{Act, Workspace};
use serde::{Deserialize, Serialize};

use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::deferral::Deferral;
use crate::kwargs::{KwargDoc, KwargSet};
use crate::module::{
    Capacity, Embedding, Forward, KModule, KvLayout, KvSlot, Layer, Layerwise, LoadScope, Loader,
    Model, Norm, Phase, largest_scratch, load_all, unload_prompt_operators,
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
            doc: "prompts of more tokens are read layer by layer, with the weights of `prefill_op`s loaded \
                  for one layer at a time, and shorter ones by `generate_op`s; 0 or null: every prompt \
                  is read by `prefill_op`s, which stay loaded",
            ignored: None,
        },
        KwargDoc {
            name: "transfer_map",
            doc: "{layer index: device}: before that layer the hidden state moves there",
            ignored: None,
        },
    ];
}

/// Embedding, layers, final norm.
pub struct LayerStack {
    path: String,
    placement: Placement,
    hidden_size: usize,
    /// Prompts of more tokens are read layer by layer.
    layerwise_above: Option<usize>,
    /// Where the hidden state moves before a layer.
    transfer_map: BTreeMap<usize, Device>,
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
        let kwargs = args.kwargs::<ModelKwargs>()?;
        let transfer_map = transfers(args, kwargs.transfer_map.unwrap_or_default())?;
        let threshold = kwargs.per_layer_prefill_intput_threshold.unwrap_or(0);
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
            layerwise_above: (threshold > 0).then(|| threshold.try_into().unwrap_or(usize::MAX)),
            transfer_map,
            embedding: args.embedding("embed_tokens")?,
            layers,
            norm: args.norm("norm")?,
        })
    }

    /// The hidden state where a layer wants it.
    fn arrive(&self, cx: &mut Forward<'_>, layer: usize, hidden: Act) -> Result<Act, OpError> {
        let hidden = match self.transfer_map.get(&layer) {
            Some(device) => cx.moved(hidden, *device)?,
            None => hidden,
        };
        cx.moved(hidden, self.layers[layer].device(cx.phase))
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
        4 * Workspace::values_for(capacity.tokens, self.hidden_size)
            + Deferral::scratch(capacity, self.hidden_size)
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
            cx.begin_deferral(self.hidden_size)?;
            for (i, layer) in self.layers.iter().enumerate() {
                hidden = self.arrive(cx, i, hidden)?;
                layer.forward(cx, KvSlot(i), hidden)?;
            }
            cx.end_deferral(hidden)?;
            self.norm(cx, hidden, out)
        })
    }

    fn layerwise(&self) -> Option<&dyn Layerwise> {
        self.layerwise_above.map(|_| self as &dyn Layerwise)
    }

    fn layerwise_mut(&mut self) -> Option<&mut dyn Layerwise> {
        self.layerwise_above.map(|_| self as &mut dyn Layerwise)
    }
}

impl Layerwise for LayerStack {
    fn threshold(&self) -> usize {
        self.layerwise_above.unwrap_or(usize::MAX)
    }

    fn layers(&self) -> usize {
        self.layers.len()
    }

    fn enter(&mut self, layer: usize, loader: &mut Loader<'_>) -> Result<(), OpError> {
        load_all(self.layers[layer].as_mut(), LoadScope::Prompt, loader)
    }

    fn leave(&mut self, layer: usize) {
        unload_prompt_operators(self.layers[layer].as_mut());
    }

    fn embed(&self, cx: &mut Forward<'_>, hidden: Act) -> Result<(), OpError> {
        cx.scoped(|cx| {
            let device = self.embedding.device(cx.phase);
            let embedded = cx.alloc(device, hidden.rows(), hidden.cols())?;
            self.embedding.forward(cx, embedded)?;
            cx.workspace.copy(embedded, hidden);
            Ok(())
        })
    }

    fn layer(&self, cx: &mut Forward<'_>, layer: usize, hidden: Act) -> Result<(), OpError> {
        cx.scoped(|cx| {
            let there = self.arrive(cx, layer, hidden)?;
            self.layers[layer].forward(cx, KvSlot(layer), there)?;
            cx.workspace.copy(there, hidden);
            Ok(())
        })
    }

    fn norm(&self, cx: &mut Forward<'_>, hidden: Act, out: Act) -> Result<(), OpError> {
        cx.scoped(|cx| {
            // Main memory has every weight, a GPU those that were placed there: the head can be on another.
            let there = match out.device().is_cpu() {
                true => out.device(),
                false => self.norm.device(cx.phase),
            };
            let hidden = cx.moved(hidden, there)?;
            let rows = match there == out.device() {
                true => out,
                false => cx.alloc(there, out.rows(), out.cols())?,
            };
            Self::gather(cx, hidden, rows);
            self.norm.forward(cx, rows, rows)?;
            cx.workspace.copy(rows, out);
            cx.observe(&self.path, "final_norm", out);
            Ok(())
        })
    }
}

/// The devices of a transfer map.
fn transfers(
    args: &BuildArgs<'_>,
    map: BTreeMap<usize, String>,
) -> Result<BTreeMap<usize, Device>, OpError> {
    map.into_iter()
        .map(|(layer, name)| match name.parse() {
            Ok(device) => Ok((layer, device)),
            Err(e) => Err(args.error(format!("`transfer_map`, layer {layer}: {e}"))),
        })
        .collect()
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
