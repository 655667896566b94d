//! Batches whose sequences have different adapters.

use std::path::PathBuf;
use std::sync::Arc;

use ktx_kernels::linear::Precision;
use ktx_ops::lora::ActiveAdapter;
use ktx_ops::{Batch, Phase};

use super::{Engine, Runtime, pages_for};
use crate::session::Outputs;
use crate::tokenizer::TokenId;

const PROMPTS: [&[u32]; 4] = [
    &[0, 75, 104, 111, 111, 114, 35],
    &[0, 258, 7, 7, 99],
    &[0, 9, 30],
    &[0, 75, 104, 111, 111, 114, 35],
];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name)
}

/// Logits of the last row of each sequence: prompts without their last token, then that token.
fn together(runtime: &mut Runtime, adapters: &[Arc<[ActiveAdapter]>; 4]) -> [Vec<Vec<f32>>; 2] {
    let pages: Vec<_> = PROMPTS
        .iter()
        .map(|p| {
            (0..pages_for(p.len()))
                .map(|_| runtime.take_page().unwrap())
                .collect::<Vec<_>>()
        })
        .collect();
    let phases = [Phase::Prefill, Phase::Generate];
    let logits = phases.map(|phase| {
        let mut batch = Batch::default();
        for ((prompt, adapters), pages) in PROMPTS.iter().zip(adapters).zip(&pages) {
            let (last, before) = prompt.split_last().unwrap();
            match phase {
                Phase::Prefill => batch.push(before.iter().copied(), 0, pages),
                Phase::Generate => batch.push([*last], before.len(), pages),
            }
            batch.set_adapters(adapters);
            batch.outputs.push(batch.rows() - 1);
        }
        let mut rows = Vec::new();
        runtime
            .step(&batch, phase, None, &mut |row| rows.push(row.to_vec()))
            .unwrap();
        rows
    });
    runtime.give_pages(pages.into_iter().flatten());
    logits
}

/// The same of each sequence alone.
fn apart(engine: &Engine, adapters: &[Arc<[ActiveAdapter]>; 4]) -> [Vec<Vec<f32>>; 2] {
    let mut logits = [Vec::new(), Vec::new()];
    for (prompt, adapters) in PROMPTS.iter().zip(adapters) {
        let mut session = engine.session();
        let chosen: Vec<_> = adapters.iter().map(|a| (a.id, a.scale)).collect();
        session.set_adapters(&chosen).unwrap();
        let ids: Vec<TokenId> = prompt.iter().copied().map(TokenId).collect();
        let (last, before) = ids.split_last().unwrap();
        session
            .read(before, Outputs::Last, &mut |row| {
                logits[0].push(row.to_vec())
            })
            .unwrap();
        session
            .force(*last, &mut |row| logits[1].push(row.to_vec()))
            .unwrap();
    }
    logits
}

fn error(found: &[f32], expected: &[f32]) -> f64 {
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        let pairs = found.iter().zip(expected);
        pairs.map(|(a, b)| f(f64::from(*a), f64::from(*b))).sum()
    };
    sum(&|a, b| (a - b).powi(2)) / sum(&|_, b| b.powi(2))
}

fn check(base: &str, [first, second]: [&str; 2]) {
    let engine = Engine::builder()
        .model(fixture(&format!("transformers/{base}.gguf")))
        .precision(Precision::F32)
        .threads(2)
        .load()
        .unwrap();
    let [a, b] = [first, second].map(|name| {
        let loaded = engine
            .load_adapter(fixture(&format!("adapters/{name}.gguf")))
            .unwrap();
        loaded.id()
    });
    let of = |chosen: &[(_, f32)]| -> Arc<[ActiveAdapter]> {
        chosen
            .iter()
            .map(|&(id, scale)| ActiveAdapter { id, scale })
            .collect()
    };
    let adapters = [
        of(&[(a, 1.0)]),
        of(&[]),
        of(&[(a, 0.5), (b, -1.5)]),
        of(&[(b, 1.0)]),
    ];
    let alone = apart(&engine, &adapters);
    let found = together(&mut engine.inner.runtime().unwrap(), &adapters);
    for (found, alone) in found.iter().flatten().zip(alone.iter().flatten()) {
        let error = error(found, alone);
        assert!(error < 1e-9, "{base}: NMSE {error:.2e}");
    }
    assert!(
        error(&found[1][3], &found[1][0]) > 1e-3,
        "one prompt, two adapters"
    );
}

#[test]
fn sequences_of_one_batch_have_their_own_adapters() {
    check("llama", ["llama_all", "llama_ends"]);
    check("qwen3moe", ["qwen3moe_all", "qwen3moe_experts"]);
}

#[test]
fn sequences_of_one_batch_have_their_own_adapters_in_latent_attention() {
    check("deepseek_v3", ["deepseek_v3_all", "deepseek_v3_kv"]);
}
