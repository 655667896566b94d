//! Pages in main memory, up to a budget; the longest unused go first.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::PageKey;

/// A page's bytes, and whether they may outlive the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) bytes: Arc<Vec<u8>>,
    /// Whether its key means the same to the next process.
    pub(super) is_lasting: bool,
}

/// The pages.
#[derive(Debug, Default)]
pub(super) struct MemoryTier {
    budget: u64,
    bytes: u64,
    pages: HashMap<PageKey, (u64, Page)>,
    /// When each was put there; the longest ago first.
    ages: BTreeMap<u64, PageKey>,
    clock: u64,
}

impl MemoryTier {
    pub(super) fn new(budget: u64) -> Self {
        Self {
            budget,
            ..Self::default()
        }
    }

    /// Keeps a page, and gives back those that have no place any more: the page itself if it is larger
    /// than the budget.
    pub(super) fn put(&mut self, key: PageKey, page: Page) -> Vec<(PageKey, Page)> {
        self.take(key);
        self.clock += 1;
        self.bytes += page.bytes.len() as u64;
        self.ages.insert(self.clock, key);
        self.pages.insert(key, (self.clock, page));
        let mut gone = Vec::new();
        while self.bytes > self.budget {
            gone.extend(self.oldest());
        }
        gone
    }

    /// Takes a page out.
    pub(super) fn take(&mut self, key: PageKey) -> Option<Page> {
        let (age, page) = self.pages.remove(&key)?;
        self.ages.remove(&age);
        self.bytes -= page.bytes.len() as u64;
        Some(page)
    }

    /// Takes the page out that was put there before all others.
    pub(super) fn oldest(&mut self) -> Option<(PageKey, Page)> {
        let key = *self.ages.first_key_value()?.1;
        Some((key, self.take(key)?))
    }

    pub(super) fn has(&self, key: PageKey) -> bool {
        self.pages.contains_key(&key)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> PageKey {
        PageKey([n; 32])
    }

    fn page(bytes: usize) -> Page {
        Page {
            bytes: Arc::new(vec![7; bytes]),
            is_lasting: true,
        }
    }

    fn keys(gone: Vec<(PageKey, Page)>) -> Vec<PageKey> {
        gone.into_iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn the_longest_unused_go_and_the_budget_is_kept() {
        let mut tier = MemoryTier::new(100);
        assert_eq!(keys(tier.put(key(1), page(40))), []);
        assert_eq!(keys(tier.put(key(2), page(40))), []);
        assert_eq!(keys(tier.put(key(1), page(40))), [], "it is there already");
        assert_eq!(tier.bytes(), 80);
        assert_eq!(keys(tier.put(key(3), page(90))), [key(2), key(1)]);
        assert_eq!(tier.bytes(), 90);
        assert_eq!(keys(tier.put(key(4), page(101))), [key(3), key(4)]);
        assert_eq!(tier.bytes(), 0);
        assert_eq!(tier.take(key(4)), None);
    }
}
