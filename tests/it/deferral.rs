//! Expert deferral against the naive reference.

use ktx_core::gguf::Gguf;
use ktx_core::kernels::linear::Precision;
use ktx_core::{Engine, EngineError};

use crate::naive::measure::nmse;
use crate::naive::{Deferral, Model};
use crate::run::{forced_logits, last_logits, load, repository};

const PROMPT: [u32; 5] = [3, 17, 40, 8, 21];
const GENERATED: [u32; 4] = [5, 30, 12, 9];

/// Prompts are read as always; of generated tokens the experts with the smallest weights come a layer later.
#[test]
fn deferred_experts_are_added_one_layer_later() {
    let folder = repository("tests/fixtures/transformers");
    let mut compared = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "gguf") {
            continue;
        }
        let gguf = Gguf::open(&path).unwrap();
        let model = Model::load(&gguf);
        let plain = model.forward(&[&PROMPT[..], &GENERATED].concat());
        for experts in [1, 2] {
            let engine = Engine::builder()
                .gguf(gguf.clone())
                .precision(Precision::F32)
                .threads(2)
                .deferred_experts(experts);
            let planned = match engine.plan() {
                Ok(planned) => planned,
                // A dense model, or one whose tokens have too few experts.
                Err(EngineError::Setting { name, .. }) => {
                    assert_eq!(name, "deferred_experts");
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            let engine = planned.load(&mut |_| true).unwrap();
            let mut session = engine.session();
            last_logits(&mut session, &PROMPT);
            let mut ids = PROMPT.to_vec();
            for id in GENERATED {
                ids.push(id);
                let found = forced_logits(&mut session, id);
                let from = PROMPT.len();
                let wanted = model.forward_deferring(&ids, Deferral { experts, from });
                let wanted = wanted.logits.last().unwrap();
                let error = nmse(&found, wanted);
                assert!(error < 1e-9, "{}: NMSE {error:.2e}", path.display());
                let undeferred = &plain.logits[ids.len() - 1];
                let effect = nmse(undeferred, wanted);
                assert!(effect > 1e-7, "{}: nothing was put off", path.display());
            }
            compared += 1;
        }
    }
    assert!(compared >= 4, "only {compared} models were compared");
}

#[test]
fn a_model_without_enough_experts_is_refused_by_name() {
    let builder = Engine::builder().gguf(crate::run::pip());
    let error = builder.deferred_experts(1000).plan().err().unwrap();
    assert!(
        error.to_string().starts_with("deferred_experts is 1000"),
        "{error}"
    );
    load(
        Engine::builder()
            .gguf(crate::run::pip())
            .deferred_experts(1),
    );
}
