//! One tiny random model per architecture feature and tensor type, against the naive reference.

use ktx_core::gguf::Gguf;
use ktx_core::kernels::linear::Precision;

use crate::naive::Model;
use crate::naive::measure::nmse;
use crate::run::{all_logits, engine, forced_logits};
use crate::tiny::{PROMPT, all, build};

#[test]
fn every_feature_agrees_with_the_naive_reference() {
    for (name, spec) in all() {
        let gguf = Gguf::from_vec(build(&spec), name).unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected = Model::load(&gguf).forward(&PROMPT).logits;
        let engine = engine(&gguf, Precision::F32);
        let found = all_logits(&mut engine.session(), &PROMPT);
        let error = nmse(&found.concat(), &expected.concat());
        assert!(error < 1e-9, "{name}: NMSE {error:.2e}");

        let mut session = engine.session();
        let stepped: Vec<f64> = PROMPT
            .iter()
            .flat_map(|id| forced_logits(&mut session, *id))
            .collect();
        let error = nmse(&stepped, &expected.concat());
        assert!(error < 1e-9, "{name}, token by token: NMSE {error:.2e}");
    }
}

#[test]
fn eight_bit_activations_stay_near_the_reference_in_every_model_without_a_router() {
    for (name, spec) in all().into_iter().filter(|(_, spec)| spec.experts.is_none()) {
        let gguf = Gguf::from_vec(build(&spec), name).unwrap();
        let expected = Model::load(&gguf).forward(&PROMPT).logits;
        let found = all_logits(&mut engine(&gguf, Precision::Int8).session(), &PROMPT);
        let error = nmse(&found.concat(), &expected.concat());
        assert!(error < 5e-3, "{name}: NMSE {error:.2e}");
    }
}
