//! What the tiny models promise, measured with the naive reference.

use ktx_gguf::Gguf;

use super::{PROMPT, TinySpec, all, build};
use crate::naive::{Model, Trace};

/// Of scores between 0 and 1. Computing with 8-bit activations moves them by about a fifth of this.
const SMALLEST_MARGIN: f64 = 0.005;

fn trace(name: &str, spec: &TinySpec) -> Trace {
    let file = Gguf::from_vec(build(spec), name).unwrap();
    Model::load(&file).forward(&PROMPT)
}

fn root_mean_square(x: &[f64]) -> f64 {
    (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64).sqrt()
}

#[test]
fn same_seed_gives_the_same_file() {
    let (_, spec) = all().pop().unwrap();
    assert_eq!(build(&spec), build(&spec));
    let other = TinySpec {
        seed: spec.seed + 1,
        ..spec.clone()
    };
    assert_ne!(build(&spec), build(&other));
}

#[test]
fn names_are_unique() {
    let mut names: Vec<&str> = all().into_iter().map(|(name, _)| name).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn activations_stay_near_unit_size_and_no_router_decision_is_close() {
    for (name, spec) in all() {
        let trace = trace(name, &spec);
        let embedding = if spec.tied { 0.1 } else { 0.3 };
        for (layer, states) in trace.hidden.iter().enumerate() {
            let size = root_mean_square(&states.concat());
            assert!(
                (embedding..8.0).contains(&size),
                "{name}: {size} after layer {layer}"
            );
        }
        let logits = root_mean_square(&trace.logits.concat());
        assert!((1.0..8.0).contains(&logits), "{name}: logits of {logits}");
        let margin = trace.smallest_margin();
        assert!(
            margin >= SMALLEST_MARGIN,
            "{name}: a router margin of {margin}"
        );
    }
}
