//! How often a layer's experts are chosen.

use std::sync::atomic::{AtomicU64, Ordering};

use ktx_kernels::moe::ELSEWHERE;

/// Choices of each expert of a layer since it was loaded. Counting takes an addition for each choice,
/// beside the products of a whole expert; reading never waits for a step.
#[derive(Debug)]
pub struct ExpertUses {
    choices: Box<[AtomicU64]>,
    generated: AtomicU64,
    hits: AtomicU64,
}

impl ExpertUses {
    /// No choices yet, of so many experts.
    pub fn new(experts: usize) -> Self {
        Self {
            choices: (0..experts).map(|_| AtomicU64::new(0)).collect(),
            generated: AtomicU64::new(0),
            hits: AtomicU64::new(0),
        }
    }

    /// Counts the experts that tokens chose, `[tokens, top_k]`; those with [`ELSEWHERE`] set are a cache's hits.
    pub fn count(&self, ids: &[u32]) {
        let mut hits = 0;
        for id in ids {
            if let Some(expert) = self.choices.get((id & !ELSEWHERE) as usize) {
                expert.fetch_add(1, Ordering::Relaxed);
                hits += u64::from(id & ELSEWHERE != 0);
            }
        }
        if hits > 0 {
            self.hits.fetch_add(hits, Ordering::Relaxed);
        }
    }

    /// Choices so far, by expert.
    pub fn read(&self) -> Vec<u64> {
        self.iter().collect()
    }

    /// Counts the experts that generated tokens chose, which a cache is asked for.
    pub(crate) fn count_generated(&self, ids: &[u32]) {
        self.generated
            .fetch_add(ids.len() as u64, Ordering::Relaxed);
        self.count(ids);
    }

    /// Choices of generated tokens.
    pub(crate) fn generated(&self) -> u64 {
        self.generated.load(Ordering::Relaxed)
    }

    /// As [`read`](Self::read), one after the other.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> {
        self.choices.iter().map(|n| n.load(Ordering::Relaxed))
    }

    /// Choices that a GPU's cache of experts took from the CPU.
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_choice_counts_for_its_expert_alone() {
        let uses = ExpertUses::new(3);
        uses.count(&[2, 0, 2]);
        uses.count(&[2, 7]);
        uses.count(&[1 | ELSEWHERE, 7 | ELSEWHERE]);
        assert_eq!((uses.read(), uses.hits()), (vec![1, 1, 3], 1));
        uses.count_generated(&[0, 2 | ELSEWHERE]);
        assert_eq!((uses.read(), uses.hits()), (vec![2, 1, 4], 2));
        assert_eq!(uses.generated(), 2);
    }
}
