//! Lists all operators, puts one of its own into the model, and asks it a question.

use std::sync::atomic::{AtomicUsize, Ordering};

use ktx_core::kernels::device::Device;
use ktx_core::kernels::workspace::Act;
use ktx_core::ops::spec::{NormSpec, Spec};
use ktx_core::ops::weights::{floats, required};
use ktx_core::ops::{
    BuildArgs, Forward, KModule, Loader, NoKwargs, Norm, OpError, Operator, Phase, Placement,
    registry,
};
use ktx_core::{Engine, GenerateOptions, Rules, SamplingParams, register_operator};

static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Root mean square normalisation, a value at a time.
struct PlainNorm {
    path: String,
    key: String,
    placement: Placement,
    spec: NormSpec,
    weight: Vec<f32>,
}

impl KModule for PlainNorm {
    fn path(&self) -> &str {
        &self.path
    }

    fn class_path(&self) -> &'static str {
        "downstream.PlainNorm"
    }

    fn device(&self, phase: Phase) -> Device {
        self.placement.device(phase)
    }

    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        let name = format!("{}.weight", self.key);
        let tensor = required(&self.path, loader.store(), &name, &[self.spec.size])?;
        loader.took(&[&tensor])?;
        self.weight = floats(&self.path, &tensor)?;
        Ok(())
    }
}

impl Norm for PlainNorm {
    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        CALLS.fetch_add(1, Ordering::Relaxed);
        if x != out {
            cx.workspace.copy(x, out);
        }
        for row in cx.workspace.write(out).chunks_exact_mut(self.spec.size) {
            let mean = row.iter().map(|v| v * v).sum::<f32>() / row.len() as f32;
            let scale = (mean + self.spec.eps).sqrt().recip();
            row.iter_mut()
                .zip(&self.weight)
                .for_each(|(v, w)| *v *= scale * w);
        }
        Ok(())
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let Spec::Norm(spec) = args.spec().clone() else {
        return Err(args.unfit("a normalisation"));
    };
    Ok(Operator::Norm(Box::new(PlainNorm {
        path: args.module.path.clone(),
        key: args.module.key.clone(),
        placement: args.placement,
        spec,
        weight: Vec::new(),
    })))
}

register_operator! {
    class: "downstream.PlainNorm",
    aliases: ["PlainNorm"],
    role: Norm,
    summary: "root mean square normalisation, a value at a time",
    kwargs: NoKwargs,
    build: build,
}

const RULES: &str = "
- match:
    name: 'input_layernorm$'
  replace:
    class: downstream.PlainNorm
    kwargs:
      generate_device: cpu
      prefill_device: cpu
";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for entry in registry().entries() {
        println!("operator {}", entry.class);
    }
    let model = std::env::args().nth(1).ok_or("name a model")?;
    let rules = Rules::Text {
        text: RULES.to_owned(),
        name: "downstream".to_owned(),
    };
    let engine = Engine::builder()
        .model(model)
        .rules(rules)
        .context(256)
        .load()?;
    let mut session = engine.session();
    let options = GenerateOptions {
        sampling: SamplingParams::greedy(),
        ..GenerateOptions::default()
    };
    let mut answer = String::new();
    for piece in session.chat("What is 7 + 5?", &options)? {
        answer += &piece?.text;
    }
    println!("answer {answer}");
    println!("calls {}", CALLS.load(Ordering::Relaxed));
    Ok(())
}
