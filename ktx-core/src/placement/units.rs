//! What is placed: the parts of a model that stay together on one device.
//!
//! A layer has up to three parts. Its *home* is attention with its cache, norms and router: the residual
//! stream is where the home is. Then the *ffn* that every token passes (dense, or the shared experts),
//! and the routed *experts*. Before the layers stands the embedding, behind them final norm and head.

use ktx_gguf::GgmlType;
use ktx_ops::sizes::{made_of, sizes_of};
use ktx_ops::spec::{LinearSource, Spec};
use ktx_ops::{Module, OpError, Role, WeightStore};

/// A tensor that a part reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Type of its elements.
    pub ty: GgmlType,
    /// Bytes.
    pub bytes: u64,
    /// Elements.
    pub elements: u64,
}

/// How many of a part's weights a token uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Use {
    /// All.
    All,
    /// One row of the table.
    OneRow {
        /// Rows.
        rows: u64,
    },
    /// `top_k` of `experts`.
    Chosen {
        /// Experts that one token uses.
        top_k: usize,
        /// Experts.
        experts: usize,
    },
}

/// What an attention computes and caches for each token of the context.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cache {
    /// Values of a token.
    pub width: u64,
    /// Multiplications and additions of a new token with a cached one.
    pub flops: u64,
}

/// A part of a model that is on one device.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// What it reads.
    pub matrices: Vec<Matrix>,
    /// Bytes that its operators make of the weights when they load.
    pub made: u64,
    /// How much of that a token uses.
    pub usage: Use,
    /// Its cache.
    pub cache: Cache,
    /// Parallel regions, or kernel launches, of a call.
    pub steps: usize,
    /// Values of activations that a token needs in it at most.
    pub width: u64,
}

impl Part {
    fn new(usage: Use, steps: usize) -> Self {
        Self {
            matrices: Vec::new(),
            made: 0,
            usage,
            cache: Cache::default(),
            steps,
            width: 0,
        }
    }

    /// Bytes of its weights, and of what is made of them.
    pub fn bytes(&self) -> u64 {
        self.made + self.matrices.iter().map(|m| m.bytes).sum::<u64>()
    }
}

/// A layer, the embedding, or the head.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// The module's path: `model.layers.3`.
    pub path: String,
    /// What is where the residual stream is.
    pub home: Part,
    /// What every token passes besides, with the paths of its modules.
    pub ffn: Option<(Part, Vec<String>)>,
    /// Routed experts, with the path of their module.
    pub experts: Option<(Part, String)>,
}

/// A model as stages in the order of computation.
#[derive(Debug, Clone, PartialEq)]
pub struct Stages {
    /// Embedding, layers, head.
    pub all: Vec<Stage>,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Rows of the head.
    pub vocab_size: u64,
    /// Bytes of the head that the embedding holds already, where both are on one device.
    pub tied_bytes: u64,
}

impl Stages {
    /// The stages of a model's tree; sizes come from `store`, which may know no more than shapes.
    ///
    /// # Errors
    /// [`OpError`] if a tensor is missing or has another shape than the metadata say.
    pub fn of(tree: &Module, store: &dyn WeightStore) -> Result<Self, OpError> {
        let unfit = |message: &str| OpError::Unfit {
            path: tree.path.clone(),
            message: format!("automatic placement knows models with {message}"),
            location: None,
        };
        let model = tree
            .children
            .iter()
            .find(|m| m.role() == Role::Model)
            .ok_or_else(|| unfit("a stack of layers"))?;
        let head = tree
            .children
            .iter()
            .find(|m| m.role() == Role::Linear)
            .ok_or_else(|| unfit("a head"))?;
        let Spec::Model(spec) = &model.spec else {
            return Err(unfit("a stack of layers"));
        };
        let reader = Reader { store };
        let mut last = reader.stage(head, Use::All, 2)?;
        let mut first = None;
        let mut layers = Vec::new();
        for module in model.walk() {
            match module.role() {
                Role::Embedding => {
                    let rows = spec.vocab_size as u64;
                    first = Some(reader.stage(module, Use::OneRow { rows }, 1)?);
                }
                Role::Layer => layers.push(reader.layer(module)?),
                _ => {}
            }
        }
        for norm in model.children.iter().filter(|m| m.role() == Role::Norm) {
            reader.add(&mut last.home, norm)?;
        }
        last.home.width = spec.vocab_size as u64;
        let first = first.ok_or_else(|| unfit("an embedding"))?;
        let tied_bytes = match &head.spec {
            Spec::Linear(linear) if matches!(linear.source, LinearSource::Tensor(_)) => {
                first.home.bytes()
            }
            _ => 0,
        };
        let mut all = vec![first];
        all.extend(layers);
        all.push(last);
        Ok(Self {
            all,
            hidden_size: spec.hidden_size as u64,
            vocab_size: spec.vocab_size as u64,
            tied_bytes,
        })
    }

    /// Values of the cache for one token of context.
    pub fn cache_width(&self) -> u64 {
        self.all.iter().map(|s| s.home.cache.width).sum()
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> u64 {
        let stage = |s: &Stage| {
            s.home.bytes()
                + s.ffn.as_ref().map_or(0, |(p, _)| p.bytes())
                + s.experts.as_ref().map_or(0, |(p, _)| p.bytes())
        };
        self.all.iter().map(stage).sum::<u64>() - self.tied_bytes
    }

    /// Values of activations that a token needs at most besides the residual stream.
    pub fn widest(&self) -> u64 {
        let stage = |s: &Stage| {
            let ffn = s.ffn.as_ref().map_or(0, |(p, _)| p.width);
            let experts = s.experts.as_ref().map_or(0, |(p, _)| p.width);
            s.home.width.max(ffn + experts)
        };
        let last = self.all.len() - 1;
        self.all[..last].iter().map(stage).max().unwrap_or(0)
    }
}

struct Reader<'a> {
    store: &'a dyn WeightStore,
}

impl Reader<'_> {
    fn stage(&self, module: &Module, usage: Use, steps: usize) -> Result<Stage, OpError> {
        let mut home = Part::new(usage, steps);
        self.add(&mut home, module)?;
        Ok(Stage {
            path: module.path.clone(),
            home,
            ffn: None,
            experts: None,
        })
    }

    fn layer(&self, layer: &Module) -> Result<Stage, OpError> {
        let mut stage = Stage {
            path: layer.path.clone(),
            home: Part::new(Use::All, 4),
            ffn: None,
            experts: None,
        };
        for module in &layer.children {
            match &module.spec {
                Spec::Mlp(_) => {
                    let mut part = Part::new(Use::All, 3);
                    self.add(&mut part, module)?;
                    stage.ffn = Some((part, vec![module.path.clone()]));
                }
                Spec::Moe(_) => self.moe(&mut stage, module)?,
                Spec::Attention(_) | Spec::Mla(_) => {
                    self.add(&mut stage.home, module)?;
                    stage.home.steps += 5;
                }
                _ => self.add(&mut stage.home, module)?,
            }
        }
        Ok(stage)
    }

    fn moe(&self, stage: &mut Stage, block: &Module) -> Result<(), OpError> {
        let Spec::Moe(spec) = &block.spec else {
            return Ok(());
        };
        let shared = [spec.shared, spec.shared_gate];
        for module in &block.children {
            match &module.spec {
                Spec::Experts(experts) => {
                    let usage = Use::Chosen {
                        top_k: experts.top_k,
                        experts: experts.num_experts,
                    };
                    let mut part = Part::new(usage, 3);
                    self.add(&mut part, module)?;
                    part.width = (2 * experts.top_k * experts.moe_intermediate_size
                        + experts.hidden_size) as u64;
                    stage.experts = Some((part, module.path.clone()));
                }
                _ if shared.contains(&Some(module.name.as_str())) => {
                    let (part, paths) = stage
                        .ffn
                        .get_or_insert_with(|| (Part::new(Use::All, 3), Vec::new()));
                    self.add(part, module)?;
                    paths.push(module.path.clone());
                }
                _ => {
                    self.add(&mut stage.home, module)?;
                    stage.home.steps += 1;
                }
            }
        }
        Ok(())
    }

    /// Adds what a module and all below it read. Routed experts are one operator.
    fn add(&self, part: &mut Part, module: &Module) -> Result<(), OpError> {
        let whole = module.role() == Role::Experts;
        part.made += made_of(module, self.store);
        for size in sizes_of(module, whole, self.store)? {
            part.matrices.push(Matrix {
                ty: size.ty,
                bytes: size.bytes,
                elements: size.shape.iter().map(|n| *n as u64).product(),
            });
        }
        match &module.spec {
            Spec::Attention(a) => {
                let (heads, kv) = (a.num_attention_heads, a.num_key_value_heads);
                part.cache.width = (2 * kv * a.head_dim) as u64;
                part.cache.flops = (4 * heads * a.head_dim) as u64;
                part.width = (2 * (heads + kv) * a.head_dim) as u64;
            }
            Spec::Mla(a) => {
                let heads = a.num_attention_heads;
                part.cache.width = a.cache_width() as u64;
                part.cache.flops = (2 * heads * (a.cache_width() + a.kv_lora_rank)) as u64;
                part.width = (heads * (a.q_head_dim() + a.v_head_dim)) as u64;
            }
            Spec::Mlp(mlp) => part.width = part.width.max(2 * mlp.intermediate_size as u64),
            _ => {}
        }
        if whole {
            return Ok(());
        }
        module
            .children
            .iter()
            .try_for_each(|child| self.add(part, child))
    }
}
