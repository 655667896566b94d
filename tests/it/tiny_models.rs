//! One tiny random model per architecture feature and tensor type, against the naive reference.

use ktx_core::Engine;
use ktx_core::gguf::Gguf;
use ktx_core::kernels::kv::KvType;
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

#[test]
fn an_eight_bit_cache_takes_heads_of_whole_blocks_and_refuses_others() {
    let (mut taken, mut refused) = (0, 0);
    for (name, spec) in all() {
        let gguf = Gguf::from_vec(build(&spec), name).unwrap();
        let expected = Model::load(&gguf).forward(&PROMPT).logits;
        let builder = Engine::builder().gguf(gguf).precision(Precision::F32);
        match builder.kv_type(KvType::Q8_0).load() {
            Ok(engine) => {
                let found = all_logits(&mut engine.session(), &PROMPT);
                let error = nmse(&found.concat(), &expected.concat());
                // Measured: 2e-5 to 1.2e-4.
                assert!(error < 1e-3, "{name}: NMSE {error:.2e}");
                taken += 1;
            }
            Err(error) => {
                let said = error.to_string();
                assert!(said.contains("32 values together"), "{name}: {said}");
                assert!(said.contains("self_attn has heads of"), "{name}: {said}");
                refused += 1;
            }
        }
    }
    assert!(taken > 0 && refused > 0, "{taken} taken, {refused} refused");
}
