//! Operators of ktx: the module traits, the operator roles, the registry, and the built-in operators.
//!
//! A model is a tree of [`Module`]s with sizes and class names, and no weights. A plan names an
//! operator for each; the [registry](registry()) finds it by class path and builds it from
//! [`BuildArgs`]. Every operator is a [`KModule`] and has one role: [`Linear`], [`Norm`], [`Rope`],
//! [`Embedding`], [`Attention`], [`Gate`], [`Experts`], [`Ffn`], [`Layer`] or [`Model`].
//!
//! The operators of this crate register themselves exactly as one of another crate does, with
//! [`register_operator!`].

#![forbid(unsafe_code)]

pub mod attention;
pub mod build;
pub mod defaults;
pub mod deferral;
mod elsewhere;
pub mod embedding;
pub mod experts;
pub mod ffn;
pub mod gate;
mod gpu;
mod inner;
pub mod key;
pub mod kwargs;
pub mod layer;
pub mod linear;
mod loader;
pub mod lora;
pub mod model;
pub mod module;
pub mod nearest;
pub mod norm;
pub mod recording;
pub mod registry;
pub mod rope;
pub mod sizes;
pub mod spec;
pub mod tree;
pub mod weights;

#[doc(hidden)]
pub use inventory;

pub use build::{BuildArgs, Children, OpError, Operator, Placement, TensorSize, WeightStore};
pub use defaults::default_class;
pub use kwargs::{KwargDoc, KwargError, KwargInfo, KwargSet, Kwargs, Location, NoKwargs};
pub use module::{
    Attention, Batch, Capacity, Embedding, Experts, Ffn, Forward, Gate, KModule, Layer, Layerwise,
    Linear, LoadProgress, LoadScope, Loader, Model, Norm, Observer, Phase, Rope, Streaming,
    load_all,
};
pub use registry::{DuplicateOperator, Needs, OperatorEntry, Registry, registry, try_registry};
pub use spec::Spec;
pub use tree::{Module, Role};
