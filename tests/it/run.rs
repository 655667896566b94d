//! Engines for tests, and what they compute as plain numbers.

use std::path::{Path, PathBuf};

use ktx_core::gguf::Gguf;
use ktx_core::kernels::linear::Precision;
use ktx_core::ops::Observer;
use ktx_core::{Engine, EngineBuilder, Outputs, Session, TokenId};

/// A file of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The built-in model's file.
pub fn pip() -> Gguf {
    Gguf::open(repository("models/pip-17m.gguf")).expect("the built-in model opens")
}

/// A JSON file of the repository.
pub fn json(path: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(repository(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// An engine on two threads.
pub fn engine(gguf: &Gguf, precision: Precision) -> Engine {
    load(
        Engine::builder()
            .gguf(gguf.clone())
            .precision(precision)
            .threads(2),
    )
}

/// A loaded engine.
pub fn load(builder: EngineBuilder) -> Engine {
    builder.load().unwrap_or_else(|e| panic!("{e}"))
}

/// Token ids of numbers.
pub fn tokens(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

/// Logits of all positions of a prompt `[position][vocab]`.
pub fn all_logits(session: &mut Session, ids: &[u32]) -> Vec<Vec<f64>> {
    let mut rows = Vec::new();
    session
        .read(&tokens(ids), Outputs::From(0), &mut |row| {
            rows.push(widened(row))
        })
        .unwrap_or_else(|e| panic!("{e}"));
    rows
}

/// Logits of a prompt's last position.
pub fn last_logits(session: &mut Session, ids: &[u32]) -> Vec<f64> {
    let mut last = Vec::new();
    session
        .read(&tokens(ids), Outputs::Last, &mut |row| last = widened(row))
        .unwrap_or_else(|e| panic!("{e}"));
    last
}

/// Logits behind one more token.
pub fn forced_logits(session: &mut Session, id: u32) -> Vec<f64> {
    let mut last = Vec::new();
    session
        .force(TokenId(id), &mut |row| last = widened(row))
        .unwrap_or_else(|e| panic!("{e}"));
    last
}

pub fn widened(row: &[f32]) -> Vec<f64> {
    row.iter().copied().map(f64::from).collect()
}

/// Keeps the last row of everything that modules show.
#[derive(Default)]
pub struct Recorder {
    seen: Vec<(String, String, Vec<f32>)>,
}

impl Recorder {
    /// The last row of what a module showed under a name.
    pub fn last(&self, path: &str, what: &str) -> &[f32] {
        let found = self.seen.iter().find(|(p, w, _)| p == path && w == what);
        &found
            .unwrap_or_else(|| panic!("`{path}` showed no `{what}`"))
            .2
    }
}

impl Observer for Recorder {
    fn observe(&mut self, path: &str, what: &str, values: &[f32], cols: usize) {
        self.seen.push((
            path.to_owned(),
            what.to_owned(),
            values[values.len() - cols..].to_vec(),
        ));
    }
}
