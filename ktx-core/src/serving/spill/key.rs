//! What distinguishes pages: by their tokens within one server, and by the model from one server to the next.

use std::fmt;

use ktx_kernels::cpu;
use ktx_kernels::cuda::Gpu;
use ktx_kernels::kv::PAGE_TOKENS;
use ktx_ops::lora::ActiveAdapter;

use crate::engine::{Inner, Settings};
use crate::error::EngineError;
use crate::plan::KeyStyle;
use crate::serving::Batching;
use crate::tokenizer::TokenId;

/// Bytes of a tensor that are looked at in each of three places.
const SAMPLE_BYTES: usize = 4096;

/// A page's name: a hash of its tokens, of all tokens before them, and of the adapters. Two pages with
/// one name hold the same values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::serving) struct PageKey(pub(super) [u8; 32]);

impl PageKey {
    /// What stands before the first page. Numbers of adapters mean something to one process only.
    pub(in crate::serving) fn root(adapters: &[ActiveAdapter]) -> Self {
        let mut hash = blake3::Hasher::new();
        for adapter in adapters {
            hash.update(&adapter.id.0.to_le_bytes());
            hash.update(&adapter.scale.to_bits().to_le_bytes());
        }
        Self(*hash.finalize().as_bytes())
    }

    /// The page with these tokens behind this one.
    pub(in crate::serving) fn next(self, block: &[TokenId]) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(&self.0);
        for token in block {
            hash.update(&token.0.to_le_bytes());
        }
        Self(*hash.finalize().as_bytes())
    }

    /// Reads what [`Display`](fmt::Display) wrote.
    pub(super) fn parse(text: &str) -> Option<Self> {
        Some(Self(*blake3::Hash::from_hex(text).ok()?.as_bytes()))
    }
}

impl fmt::Display for PageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for PageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageKey({self})")
    }
}

/// What a page's values follow from besides tokens: the weights, the plan, the cache's layout, and the
/// program and the processors that computed them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::serving) struct Fingerprint(pub(super) [u8; 32]);

impl Fingerprint {
    /// That of an engine. Weights are told apart by the names, types and sizes of all tensors and by
    /// bytes from three places of each: models can be too large to be read as a whole.
    ///
    /// # Errors
    /// [`EngineError::Poisoned`] after a panic in a step.
    pub(in crate::serving) fn of(engine: &Inner, batching: Batching) -> Result<Self, EngineError> {
        let Settings {
            context,
            precision,
            kv_type,
            deferred_experts,
            ..
        } = &engine.settings;
        let mut hash = blake3::Hasher::new();
        let mut add = |part: &[u8]| {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part);
        };
        let program = env!("CARGO_PKG_VERSION");
        let endian = cfg!(target_endian = "big");
        let machine = (std::env::consts::ARCH, cpu::level(), endian, PAGE_TOKENS);
        add(
            format!("{program} {machine:?} {batching:?} {context} {precision:?} {kv_type:?} {deferred_experts}")
                .as_bytes(),
        );
        add(engine.plan.to_json(KeyStyle::Gguf).to_string().as_bytes());
        let runtime = engine.runtime()?;
        for device in runtime.gpus() {
            if let Ok(gpu) = Gpu::open(device.index()) {
                add(format!("{device} {:?}", gpu.info()).as_bytes());
            }
        }
        add(&(runtime.page_bytes() as u64).to_le_bytes());
        runtime.weights().each(&mut |name, kind, bytes| {
            add(format!("{name} {kind} {}", bytes.len()).as_bytes());
            let last = bytes.len().saturating_sub(SAMPLE_BYTES);
            for start in [0, last / 2, last] {
                add(&bytes[start..bytes.len().min(start + SAMPLE_BYTES)]);
            }
        });
        Ok(Self(*hash.finalize().as_bytes()))
    }

    /// Its beginning, for names of files.
    pub(super) fn short(&self) -> String {
        let hex = blake3::Hash::from_bytes(self.0).to_hex();
        hex.as_str()[..16].to_owned()
    }
}

#[cfg(test)]
mod tests {
    use ktx_ops::lora::AdapterId;

    use super::*;

    #[test]
    fn keys_follow_from_all_tokens_and_adapters_before() {
        let tokens = |n: u32| [TokenId(n), TokenId(n + 1)];
        let root = PageKey::root(&[]);
        let first = root.next(&tokens(1));
        assert_eq!(first, PageKey::root(&[]).next(&tokens(1)));
        assert_ne!(first, root.next(&tokens(2)));
        assert_ne!(
            first.next(&tokens(5)),
            root.next(&tokens(2)).next(&tokens(5))
        );
        let adapter = ActiveAdapter {
            id: AdapterId(0),
            scale: 1.0,
        };
        assert_ne!(first, PageKey::root(&[adapter]).next(&tokens(1)));
        assert_eq!(PageKey::parse(&first.to_string()), Some(first));
        assert_eq!(PageKey::parse("../../etc/passwd"), None);
    }
}
