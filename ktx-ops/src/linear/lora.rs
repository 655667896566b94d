//! A linear operator that carries adapters: any other one, and low-rank updates beside it.

use std::path::PathBuf;

use ktx_kernels::device::Device;
use ktx_kernels::workspace::Act;
use serde::{Deserialize, Serialize};

use crate::build::{BuildArgs, OpError, Operator};
use crate::inner::build_inner;
use crate::kwargs::{KwargDoc, KwargSet};
use crate::lora::{AdapterError, AdapterFile, AdapterId, Attached, Attachment, LowRank};
use crate::module::{Capacity, Forward, HostMatrix, KModule, Linear, Phase};
use crate::register_operator;

/// Arguments of `KLinearLora`; the rest go to the operator inside.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
struct LoraKwargs {
    op: String,
    path: Option<PathBuf>,
    scale: f32,
}

impl Default for LoraKwargs {
    fn default() -> Self {
        Self {
            op: "torch.nn.Linear".to_owned(),
            path: None,
            scale: 1.0,
        }
    }
}

impl KwargSet for LoraKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "op",
            doc: "the linear operator that it wraps",
            ignored: None,
        },
        KwargDoc {
            name: "path",
            doc: "an adapter that always applies: a GGUF file, or the directory of a PEFT adapter",
            ignored: None,
        },
        KwargDoc {
            name: "scale",
            doc: "factor on the adapter of `path`",
            ignored: None,
        },
    ];
}

/// `y = op(x) + sum scale * x A^T B^T`: any linear operator, and the updates of the adapters that apply.
///
/// The engine puts one around every linear operator that it injects, and gives it parts as adapters
/// are loaded; without any it is the operator inside. One that a rule puts somewhere with a `path`
/// applies that adapter to every row.
pub struct KLinearLora {
    inner: Box<dyn Linear>,
    /// What always applies, with its factor.
    own: Option<(LowRank, f32)>,
    attached: Attached,
    /// Whether the engine's adapters are given to it.
    takes_adapters: bool,
}

impl KLinearLora {
    /// Class path of this operator.
    pub const CLASS: &'static str = "ktx.linear.KLinearLora";

    /// Carries the engine's adapters around an operator.
    pub fn around(inner: Box<dyn Linear>) -> Self {
        Self {
            inner,
            own: None,
            attached: Attached::default(),
            takes_adapters: true,
        }
    }

    fn is_active(&self) -> bool {
        self.own.is_some() || !self.attached.is_empty()
    }
}

impl KModule for KLinearLora {
    fn path(&self) -> &str {
        self.inner.path()
    }

    fn class_path(&self) -> &'static str {
        match self.takes_adapters && !self.is_active() {
            true => self.inner.class_path(),
            false => Self::CLASS,
        }
    }

    fn device(&self, phase: Phase) -> Device {
        self.inner.device(phase)
    }

    fn children(&self) -> Vec<&dyn KModule> {
        vec![self.inner.as_ref()]
    }

    fn children_mut(&mut self) -> Vec<&mut dyn KModule> {
        vec![self.inner.as_mut()]
    }

    fn attach(&mut self, attachment: &mut Attachment<'_>) {
        if self.takes_adapters {
            self.attached.attach(self.inner.path(), attachment);
        }
    }

    fn detach(&mut self, id: AdapterId) {
        self.attached.detach(id);
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        let own = self.own.as_ref();
        self.inner
            .scratch(capacity)
            .max(self.attached.scratch(capacity.tokens))
            .max(own.map_or(0, |(part, _)| part.scratch(capacity.tokens)))
    }
}

impl Linear for KLinearLora {
    fn in_features(&self) -> usize {
        self.inner.in_features()
    }

    fn out_features(&self) -> usize {
        self.inner.out_features()
    }

    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        self.inner.forward(cx, x, out)?;
        self.add_own(cx, x, out)
    }

    fn host_matrix(&self, phase: Phase) -> Option<HostMatrix<'_>> {
        self.inner.host_matrix(phase)
    }

    fn add_low_rank(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        self.inner.add_low_rank(cx, x, out)?;
        self.add_own(cx, x, out)
    }
}

impl KLinearLora {
    fn add_own(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        if let Some((part, factor)) = &self.own {
            part.add(cx, self.inner.path(), x, out, *factor)?;
        }
        self.attached.add(cx, self.inner.path(), x, out)
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    args.require_host(KLinearLora::CLASS)?;
    let kwargs = args.kwargs::<LoraKwargs>()?;
    let linear = |op: Operator| match op {
        Operator::Linear(op) => Some(op),
        _ => None,
    };
    if !kwargs.scale.is_finite() {
        return Err(args.error(format!("`scale` is {}; a number is expected", kwargs.scale)));
    }
    let inner = build_inner(args, Some(&kwargs.op), Phase::Generate, linear)?
        .ok_or_else(|| args.error("`op` is null: name the linear operator to wrap"))?;
    let own = match &kwargs.path {
        None => None,
        Some(path) => {
            let part = AdapterFile::open(path)
                .and_then(|file| file.part(args.module))
                .map_err(|e| broken(args, e))?;
            let part = part.ok_or_else(|| {
                args.error(format!(
                    "{}: the adapter has no part for this module; match the modules that it adapts",
                    path.display()
                ))
            })?;
            Some((part, kwargs.scale))
        }
    };
    Ok(Operator::Linear(Box::new(KLinearLora {
        inner,
        own,
        attached: Attached::default(),
        takes_adapters: false,
    })))
}

fn broken(args: &BuildArgs<'_>, source: AdapterError) -> OpError {
    OpError::Adapter {
        path: args.module.path.clone(),
        source: Box::new(source),
        location: args.location.clone(),
    }
}

register_operator! {
    class: KLinearLora::CLASS,
    aliases: ["KLinearLora", "ktransformers.operators.linear.KLinearLora"],
    role: Linear,
    summary: "any linear operator, and the low-rank update of an adapter beside it",
    kwargs: open LoraKwargs,
    build: build,
}
