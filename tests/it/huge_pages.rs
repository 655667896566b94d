//! Weights copied into huge pages.

use ktx_core::gguf::Gguf;
use ktx_core::{Engine, HostWeights};

use crate::run::{forced_logits, last_logits, repository};

const PROMPT: [u32; 5] = [3, 17, 40, 8, 21];

/// Every family's operators compute with the copies what they compute in the mapped file, to the last bit.
#[test]
fn copies_in_huge_pages_change_no_bit() {
    let mut compared = 0;
    for entry in std::fs::read_dir(repository("tests/fixtures/transformers")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "gguf") {
            continue;
        }
        let [mapped, copied] = [HostWeights::Mapped, HostWeights::HugePages].map(|place| {
            let engine = Engine::builder()
                .gguf(Gguf::open(&path).unwrap())
                .threads(2)
                .host_weights(place);
            let engine = engine.plan().unwrap().load(&mut |_| true).unwrap();
            let mut session = engine.session();
            let prompt = last_logits(&mut session, &PROMPT);
            [prompt, forced_logits(&mut session, 7)]
        });
        assert!(mapped == copied, "{}", path.display());
        compared += 1;
    }
    assert!(compared > 5, "the fixtures are there");
}
