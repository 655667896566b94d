//! An operator of one's own, placed by a rule: `cargo run --release --example custom_operator`.
//!
//! `ScaledLinear` multiplies as the built-in linear operator does, scales the product, and counts what it
//! computed. Nothing in ktx knows it: it registers itself below, a rule names it, and the engine puts it into the
//! model. All that is needed is `ktx-core`, and `serde` for the operator's arguments.

use std::sync::atomic::{AtomicUsize, Ordering};

use ktx_core::kernels::device::Device;
use ktx_core::kernels::workspace::Act;
use ktx_core::ops::kwargs::KwargSet;
use ktx_core::ops::module::Holding;
use ktx_core::ops::{
    BuildArgs, Capacity, Forward, KModule, KwargDoc, Linear, Loader, OpError, Operator, Phase,
    registry,
};
use ktx_core::{Engine, EngineError, GenerateOptions, Rules, SamplingParams, register_operator};

/// Products that were computed, by phase.
static PREFILL_ROWS: AtomicUsize = AtomicUsize::new(0);
static GENERATE_ROWS: AtomicUsize = AtomicUsize::new(0);

/// `y = scale * (x W^T + b)`.
struct ScaledLinear {
    inner: Box<dyn Linear>,
    scale: f32,
}

// 1. The arguments that a rule can give, with their defaults and a line on each. Names and types are checked when
//    rules are applied, and a wrong one is reported with its line in the rule file.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(default)]
struct ScaledLinearKwargs {
    scale: f32,
}

impl Default for ScaledLinearKwargs {
    fn default() -> Self {
        Self { scale: 1.0 }
    }
}

impl KwargSet for ScaledLinearKwargs {
    const DOCS: &'static [KwargDoc] = &[KwargDoc {
        name: "scale",
        doc: "what the product is multiplied by",
        ignored: None,
    }];
}

// 2. How it is made: from the module whose place it takes. Weights come later, in `load`.
fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let kwargs: ScaledLinearKwargs = args.kwargs()?;
    let default = registry()
        .get("torch.nn.Linear")
        .ok_or_else(|| args.error("there is no linear operator"))?;
    match (default.build)(args)? {
        Operator::Linear(inner) => Ok(Operator::Linear(Box::new(ScaledLinear {
            inner,
            scale: kwargs.scale,
        }))),
        _ => Err(args.unfit("a linear module")),
    }
}

// 3. Its entry in the registry: from here on `example.ScaledLinear` can stand in a rule file.
register_operator! {
    class: "example.ScaledLinear",
    aliases: ["ScaledLinear"],
    role: Linear,
    summary: "product on the file's blocks, scaled and counted",
    kwargs: ScaledLinearKwargs,
    build: build,
}

// 4. What every module has. This one leaves its weights and its memory to the operator inside.
impl KModule for ScaledLinear {
    fn path(&self) -> &str {
        self.inner.path()
    }

    fn class_path(&self) -> &'static str {
        "example.ScaledLinear"
    }

    fn device(&self, phase: Phase) -> Device {
        self.inner.device(phase)
    }

    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        self.inner.load(loader)
    }

    fn holding(&self) -> Vec<Holding> {
        self.inner.holding()
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        self.inner.scratch(capacity)
    }
}

// 5. What a linear module computes: `x` `[rows, in]` to `out` `[rows, out]`.
impl Linear for ScaledLinear {
    fn in_features(&self) -> usize {
        self.inner.in_features()
    }

    fn out_features(&self) -> usize {
        self.inner.out_features()
    }

    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        self.inner.forward(cx, x, out)?;
        cx.workspace
            .write(out)
            .iter_mut()
            .for_each(|y| *y *= self.scale);
        let count = match cx.phase {
            Phase::Prefill => &PREFILL_ROWS,
            Phase::Generate => &GENERATE_ROWS,
        };
        count.fetch_add(cx.batch.rows(), Ordering::Relaxed);
        Ok(())
    }
}

/// The output projections of all attentions are scaled; the rest of the model stays as it is.
fn rules(scale: f32) -> Rules {
    let text = format!(
        r"
- match:
    name: '^model\.layers\.\d+\.self_attn\.o_proj$'
  replace:
    class: example.ScaledLinear
    kwargs:
      generate_device: cpu
      prefill_device: cpu
      scale: {scale}
"
    );
    Rules::Text {
        text,
        name: "custom_operator.yaml".to_owned(),
    }
}

fn answer(scale: f32) -> Result<String, EngineError> {
    let engine = Engine::builder()
        .model("models/pip-17m.gguf")
        .rules(rules(scale))
        .load()?;
    for module in engine
        .report()
        .modules
        .iter()
        .filter(|m| m.class == "example.ScaledLinear")
    {
        println!(
            "  {} is {} on {}",
            module.path, module.class, module.placement.generate
        );
    }
    let options = GenerateOptions {
        sampling: SamplingParams::greedy(),
        max_new_tokens: 16,
        ..Default::default()
    };
    engine
        .session()
        .chat("What is the opposite of hot?", &options)?
        .text()
}

fn main() -> Result<(), EngineError> {
    // A scale of 1 changes nothing; without attention (a scale of 0) no token knows of the others.
    for scale in [1.0, 0.0] {
        println!("scale {scale}:");
        println!("  answer: {}", answer(scale)?);
        let rows = [&PREFILL_ROWS, &GENERATE_ROWS].map(|count| count.swap(0, Ordering::Relaxed));
        println!(
            "  example.ScaledLinear computed {} rows in prefill, {} in generation",
            rows[0], rows[1]
        );
    }
    Ok(())
}
