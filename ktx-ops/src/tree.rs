//! The module tree: names, classes and shapes of a model's modules, before any weight is read.

use std::fmt;

use crate::key::gguf_key;
use crate::spec::Spec;

/// What a module is to its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// `[tokens, in] -> [tokens, out]`.
    Linear,
    /// `[tokens, width] -> [tokens, width]`.
    Norm,
    /// Rotary position embedding, applied in place to query and key rows.
    Rope,
    /// Token ids -> `[tokens, hidden]`.
    Embedding,
    /// `[tokens, hidden]` and the batch's KV -> `[tokens, hidden]`.
    Attention,
    /// `[tokens, hidden]` -> ids and weights `[tokens, top_k]`.
    Gate,
    /// `[tokens, hidden]`, ids and weights -> `[tokens, hidden]`.
    Experts,
    /// `[tokens, hidden] -> [tokens, hidden]`: a dense feed-forward block or a mixture of experts.
    Ffn,
    /// The residual stream `[tokens, hidden]`, in place.
    Layer,
    /// Token ids -> normalised hidden states.
    Model,
    /// A module that computes nothing of its own (a list, an activation function, the root).
    Container,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One module of the tree.
#[derive(Debug, Clone)]
pub struct Module {
    /// Its name in the parent: `q_proj`.
    pub name: String,
    /// Its dotted path as in Hugging Face: `model.layers.0.self_attn.q_proj`; empty for the root.
    pub path: String,
    /// Its class path as rules name it: `torch.nn.Linear`.
    pub class: String,
    /// The name of its weights in a GGUF file, without `.weight`: `blk.0.attn_q`.
    pub key: String,
    /// What it computes, with its sizes.
    pub spec: Spec,
    /// Its children, in definition order.
    pub children: Vec<Module>,
}

impl Module {
    /// A root: no name, no path.
    pub fn root(class: &str, spec: Spec) -> Self {
        Self::at("", "", class, spec)
    }

    fn at(path: &str, name: &str, class: &str, spec: Spec) -> Self {
        Self {
            name: name.to_owned(),
            path: path.to_owned(),
            class: class.to_owned(),
            key: gguf_key(path),
            spec,
            children: Vec::new(),
        }
    }

    /// Adds a child and returns it.
    pub fn add(&mut self, name: &str, class: &str, spec: Spec) -> &mut Module {
        let path = if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        };
        self.children.push(Self::at(&path, name, class, spec));
        self.children.last_mut().expect("one was pushed")
    }

    /// The child of this name.
    pub fn child(&self, name: &str) -> Option<&Module> {
        self.children.iter().find(|c| c.name == name)
    }

    /// This module and all below it, parents before children, in definition order.
    pub fn walk(&self) -> Walk<'_> {
        Walk { stack: vec![self] }
    }

    /// Its role.
    pub fn role(&self) -> Role {
        self.spec.role()
    }
}

/// Iterator of [`Module::walk`].
pub struct Walk<'a> {
    stack: Vec<&'a Module>,
}

impl<'a> Iterator for Walk<'a> {
    type Item = &'a Module;

    fn next(&mut self) -> Option<&'a Module> {
        let module = self.stack.pop()?;
        self.stack.extend(module.children.iter().rev());
        Some(module)
    }
}
