//! From a module of the tree to an operator: what an operator is given when it is made.

use std::collections::BTreeMap;

use ktx_gguf::{GgmlType, Tensor};
use ktx_kernels::device::Device;

use crate::kwargs::{KwargSet, Kwargs, Location, at};
use crate::lora::AdapterError;
use crate::module::{
    Attention, Embedding, Experts, Ffn, Gate, KModule, Layer, Linear, Model, Norm, Phase, Rope,
};
use crate::spec::Spec;
use crate::tree::{Module, Role};

/// Where a module runs in each phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// While a prompt is read.
    pub prefill: Device,
    /// While tokens are generated.
    pub generate: Device,
}

impl Placement {
    /// The same device in both phases.
    pub const fn both(device: Device) -> Self {
        Self {
            prefill: device,
            generate: device,
        }
    }

    /// Whether the host computes in a phase.
    pub fn is_on_host(&self) -> bool {
        self.prefill.is_cpu() || self.generate.is_cpu()
    }

    /// The device of a phase.
    pub const fn device(&self, phase: Phase) -> Device {
        match phase {
            Phase::Prefill => self.prefill,
            Phase::Generate => self.generate,
        }
    }
}

/// Weights by name.
pub trait WeightStore: Send + Sync {
    /// The tensor of this full name (`blk.0.attn_q.weight`), if there is one.
    fn tensor(&self, name: &str) -> Option<Tensor>;

    /// Type and shape of the tensor of this full name. A store that only describes a model knows
    /// these and has no bytes.
    fn size(&self, name: &str) -> Option<TensorSize> {
        self.tensor(name).map(|tensor| TensorSize::of(&tensor))
    }
}

/// What is known of a tensor without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSize {
    /// Its name; a part of a tensor has an index behind it: `blk.3.ffn_up_exps.weight[7]`.
    pub name: String,
    /// The type of its elements.
    pub ty: GgmlType,
    /// Its shape, row length first.
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub bytes: u64,
}

impl TensorSize {
    /// That of a tensor which is there.
    pub fn of(tensor: &Tensor) -> Self {
        Self {
            name: tensor.name().to_owned(),
            ty: tensor.ty(),
            shape: tensor.shape().to_vec(),
            bytes: tensor.size(),
        }
    }
}

impl WeightStore for ktx_gguf::Gguf {
    fn tensor(&self, name: &str) -> Option<Tensor> {
        ktx_gguf::Gguf::tensor(self, name)
    }

    fn size(&self, name: &str) -> Option<TensorSize> {
        self.tensor_info(name).map(|info| TensorSize {
            name: info.name.clone(),
            ty: info.ty,
            shape: info.shape.clone(),
            bytes: info.bytes,
        })
    }
}

impl WeightStore for BTreeMap<String, Tensor> {
    fn tensor(&self, name: &str) -> Option<Tensor> {
        self.get(name).cloned()
    }
}

/// An operator by role.
pub enum Operator {
    /// A matrix product.
    Linear(Box<dyn Linear>),
    /// A normalisation.
    Norm(Box<dyn Norm>),
    /// A rotary position embedding.
    Rope(Box<dyn Rope>),
    /// A token embedding.
    Embedding(Box<dyn Embedding>),
    /// An attention.
    Attention(Box<dyn Attention>),
    /// A router.
    Gate(Box<dyn Gate>),
    /// Routed experts.
    Experts(Box<dyn Experts>),
    /// A feed-forward block.
    Ffn(Box<dyn Ffn>),
    /// A decoder layer.
    Layer(Box<dyn Layer>),
    /// The stack of layers.
    Model(Box<dyn Model>),
    /// A container with its children's operators.
    Container(Children),
}

impl Operator {
    /// Its role.
    pub fn role(&self) -> Role {
        match self {
            Self::Linear(_) => Role::Linear,
            Self::Norm(_) => Role::Norm,
            Self::Rope(_) => Role::Rope,
            Self::Embedding(_) => Role::Embedding,
            Self::Attention(_) => Role::Attention,
            Self::Gate(_) => Role::Gate,
            Self::Experts(_) => Role::Experts,
            Self::Ffn(_) => Role::Ffn,
            Self::Layer(_) => Role::Layer,
            Self::Model(_) => Role::Model,
            Self::Container(_) => Role::Container,
        }
    }

    /// What every module has; a container is no module of its own.
    pub fn module(&self) -> Option<&dyn KModule> {
        Some(match self {
            Self::Linear(m) => m.as_ref(),
            Self::Norm(m) => m.as_ref(),
            Self::Rope(m) => m.as_ref(),
            Self::Embedding(m) => m.as_ref(),
            Self::Attention(m) => m.as_ref(),
            Self::Gate(m) => m.as_ref(),
            Self::Experts(m) => m.as_ref(),
            Self::Ffn(m) => m.as_ref(),
            Self::Layer(m) => m.as_ref(),
            Self::Model(m) => m.as_ref(),
            Self::Container(_) => return None,
        })
    }
}

/// The operators of a module's children, by name, in definition order.
#[derive(Default)]
pub struct Children(Vec<(String, Operator)>);

impl Children {
    /// Adds a child.
    pub fn push(&mut self, name: &str, operator: Operator) {
        self.0.push((name.to_owned(), operator));
    }

    /// Takes a child out.
    pub fn take(&mut self, name: &str) -> Option<Operator> {
        let at = self.0.iter().position(|(n, _)| n == name)?;
        Some(self.0.remove(at).1)
    }

    /// Takes all children out, in order.
    pub fn drain(&mut self) -> impl Iterator<Item = (String, Operator)> {
        self.0.drain(..)
    }
}

/// What went wrong with a module.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// A weight is not in the file.
    #[error("module `{path}` needs the tensor `{tensor}`, and the file has none of that name")]
    MissingTensor {
        /// The module.
        path: String,
        /// The tensor.
        tensor: String,
    },
    /// A weight has another shape than the model's metadata say.
    #[error(
        "module `{path}`: tensor `{tensor}` is {found:?} and should be {expected:?} (row length first)"
    )]
    Shape {
        /// The module.
        path: String,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape from the metadata.
        expected: Vec<usize>,
    },
    /// A module misses a child, or has one of another role.
    #[error("module `{path}` needs a child `{child}` of role {role}")]
    Child {
        /// The module.
        path: String,
        /// The child.
        child: String,
        /// What it should be.
        role: Role,
    },
    /// An operator cannot take this module's place.
    #[error("{}module `{path}`: {message}", at(.location))]
    Unfit {
        /// The module.
        path: String,
        /// Why, and what to do.
        message: String,
        /// The rule that chose the operator.
        location: Option<Location>,
    },
    /// The workspace is too small.
    #[error(transparent)]
    Workspace(#[from] ktx_kernels::workspace::WorkspaceError),
    /// A kernel refused its arguments.
    #[error("module `{path}`: {message}")]
    Kernel {
        /// The module.
        path: String,
        /// What it said.
        message: String,
    },
    /// The adapter that a rule names.
    #[error("{}module `{path}`: {source}", at(.location))]
    Adapter {
        /// The module.
        path: String,
        /// What is wrong with it.
        source: Box<AdapterError>,
        /// The rule that named it.
        location: Option<Location>,
    },
    /// The call was cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// What an operator is given when it is made: its module, its arguments, its children's operators.
/// Weights come later, in [`KModule::load`].
pub struct BuildArgs<'a> {
    /// The module whose place it takes.
    pub module: &'a Module,
    /// The keyword arguments of the rule, without the devices.
    pub kwargs: &'a Kwargs,
    /// The devices of the two phases.
    pub placement: Placement,
    /// The rule that chose it.
    pub location: Option<Location>,
    /// The operators of its children.
    pub children: Children,
    /// The weights, to see what the file holds; an operator keeps none before it is loaded.
    pub store: &'a dyn WeightStore,
}

impl BuildArgs<'_> {
    /// The typed keyword arguments. Those that `T` does not know are left to whom they belong.
    pub fn kwargs<T: KwargSet>(&self) -> Result<T, OpError> {
        let known = self
            .kwargs
            .filtered(|name| T::DOCS.iter().any(|d| d.name == name));
        serde_json::from_value(serde_json::Value::Object(known.to_json()))
            .map_err(|e| self.error(e.to_string()))
    }

    /// An error of this module, with the rule's place.
    pub fn error(&self, message: impl Into<String>) -> OpError {
        OpError::Unfit {
            path: self.module.path.clone(),
            message: message.into(),
            location: self.location.clone(),
        }
    }

    /// The error of a spec that is not the one an operator can serve.
    pub fn unfit(&self, wanted: &str) -> OpError {
        self.error(format!(
            "this operator takes the place of {wanted}, and the module is a {}",
            self.module.class
        ))
    }

    /// Refuses a GPU, for operators that compute in main memory alone.
    ///
    /// # Errors
    /// [`OpError::Unfit`] with the rule's place.
    pub fn require_host(&self, class: &str) -> Result<(), OpError> {
        match crate::gpu::gpus(self.placement).next() {
            None => Ok(()),
            Some(device) => Err(self.error(format!(
                "{class} computes in main memory, and the rule puts it on {device}; write `cpu` there, or \
                 name an operator that runs on GPUs (`ktx operators` lists them)"
            ))),
        }
    }

    /// The module's spec.
    pub fn spec(&self) -> &Spec {
        &self.module.spec
    }

    fn wrong_child(&self, child: &str, role: Role) -> OpError {
        OpError::Child {
            path: self.module.path.clone(),
            child: child.to_owned(),
            role,
        }
    }
}

macro_rules! child {
    ($($(#[$doc:meta])* $take:ident $optional:ident $role:ident;)*) => {
        impl BuildArgs<'_> {
            $(
                $(#[$doc])*
                pub fn $take(&mut self, name: &str) -> Result<Box<dyn $role>, OpError> {
                    self.$optional(name)?.ok_or_else(|| self.wrong_child(name, Role::$role))
                }

                /// The same, if there is such a child.
                pub fn $optional(&mut self, name: &str) -> Result<Option<Box<dyn $role>>, OpError> {
                    match self.children.take(name) {
                        None => Ok(None),
                        Some(Operator::$role(op)) => Ok(Some(op)),
                        Some(_) => Err(self.wrong_child(name, Role::$role)),
                    }
                }
            )*
        }
    };
}

child! {
    /// Takes the child of this name, a matrix product.
    linear linear_if_any Linear;
    /// Takes the child of this name, a normalisation.
    norm norm_if_any Norm;
    /// Takes the child of this name, a rotary embedding.
    rope rope_if_any Rope;
    /// Takes the child of this name, a token embedding.
    embedding embedding_if_any Embedding;
    /// Takes the child of this name, an attention.
    attention attention_if_any Attention;
    /// Takes the child of this name, a router.
    gate gate_if_any Gate;
    /// Takes the child of this name, routed experts.
    experts experts_if_any Experts;
    /// Takes the child of this name, a feed-forward block.
    ffn ffn_if_any Ffn;
    /// Takes the child of this name, a layer.
    layer layer_if_any Layer;
    /// Takes the child of this name, a stack of layers.
    model model_if_any Model;
}
