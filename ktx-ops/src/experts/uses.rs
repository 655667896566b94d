//! How often a layer's experts are chosen.

use std::sync::atomic::{AtomicU64, Ordering};

/// Choices of each expert of a layer since it was loaded. Counting takes an addition for each choice,
/// beside the products of a whole expert; reading never waits for a step.
#[derive(Debug)]
pub struct ExpertUses(Box<[AtomicU64]>);

impl ExpertUses {
    /// No choices yet, of so many experts.
    pub fn new(experts: usize) -> Self {
        Self((0..experts).map(|_| AtomicU64::new(0)).collect())
    }

    /// Counts the experts that tokens chose, `[tokens, top_k]`.
    pub fn count(&self, ids: &[u32]) {
        for id in ids {
            if let Some(expert) = self.0.get(*id as usize) {
                expert.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Choices so far, by expert.
    pub fn read(&self) -> Vec<u64> {
        self.0.iter().map(|n| n.load(Ordering::Relaxed)).collect()
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
        assert_eq!(uses.read(), [1, 0, 3]);
    }
}
