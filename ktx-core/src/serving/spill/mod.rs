//! Where pages of the prefix cache go when others need their place: main memory first, and from there a
//! directory, if one is given.

mod disk;
mod file;
mod key;
mod memory;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use disk::{Arrival, DiskTier, Found, IfBusy};
pub(super) use key::{Fingerprint, PageKey};
use memory::{MemoryTier, Page};

use super::Batching;
use crate::engine::Inner;
use crate::error::EngineError;

/// Pages that are being read at once: so much memory do they take beside the budget.
const READS_AT_ONCE: usize = 8;

/// How much is kept of what the cache of keys and values has no place for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpillSettings {
    /// Bytes of main memory at most; 0 keeps nothing there.
    pub memory_bytes: u64,
    /// A directory that keeps pages beyond the end of the process. One server uses it at a time, for one
    /// model: pages of others are removed.
    pub directory: Option<PathBuf>,
    /// Bytes of its files at most.
    pub directory_bytes: u64,
}

/// What became of pages that the cache had no place for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpillCounts {
    /// Bytes in main memory now.
    pub memory_bytes: u64,
    /// Bytes in the directory now.
    pub directory_bytes: u64,
    /// Prompt tokens that came back from main memory.
    pub memory_tokens: u64,
    /// Prompt tokens that came back from the directory.
    pub directory_tokens: u64,
    /// Pages that were forgotten because the disk was too slow for them.
    pub forgotten_pages: u64,
    /// Files that were damaged, unfinished, or of another model.
    pub rejected_files: u64,
}

/// Where a page came back from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tier {
    Memory,
    Directory,
}

/// What comes of asking for a page.
pub(super) enum Fetched {
    Page(Arc<Vec<u8>>, Tier),
    /// It is being read.
    Later,
    Missing,
}

/// A page that is read for someone.
enum Reading {
    Asked,
    Here(Option<Arc<Vec<u8>>>),
}

/// The pages outside of the cache.
pub(super) struct Spill {
    memory: MemoryTier,
    disk: Option<DiskTier>,
    /// What is read, by the ticket of the one who wants it.
    readings: HashMap<u64, HashMap<PageKey, Reading>>,
    reads: usize,
    next_ticket: u64,
    forgotten: u64,
}

impl Spill {
    /// None if nothing is to be kept.
    ///
    /// # Errors
    /// If the directory cannot be used.
    pub(super) fn open(
        settings: &SpillSettings,
        engine: &Inner,
        batching: Batching,
    ) -> Result<Option<Self>, EngineError> {
        let disk = match &settings.directory {
            Some(directory) => Some(DiskTier::open(
                directory,
                Fingerprint::of(engine, batching)?,
                engine.runtime()?.page_bytes(),
                settings.directory_bytes,
            )?),
            None if settings.memory_bytes == 0 => return Ok(None),
            None => None,
        };
        Ok(Some(Self {
            memory: MemoryTier::new(settings.memory_bytes),
            disk,
            readings: HashMap::new(),
            reads: 0,
            next_ticket: 0,
            forgotten: 0,
        }))
    }

    /// Keeps a page that the cache gives up.
    pub(super) fn put(&mut self, key: PageKey, bytes: Vec<u8>, is_lasting: bool) {
        let page = Page {
            bytes: Arc::new(bytes),
            is_lasting,
        };
        let gone = self.memory.put(key, page);
        for (key, page) in gone {
            self.put_on_disk(key, page, IfBusy::Forget);
        }
    }

    fn put_on_disk(&mut self, key: PageKey, page: Page, if_busy: IfBusy) {
        let Some(disk) = self.disk.as_mut().filter(|_| page.is_lasting) else {
            return;
        };
        if !disk.put(key, page.bytes, if_busy) {
            self.forgotten += 1;
        }
    }

    /// Whether pages outlive the process.
    pub(super) fn is_lasting(&self) -> bool {
        self.disk.is_some()
    }

    /// Puts all that is in memory into the directory, and waits until it is there.
    pub(super) fn save(mut self) {
        while let Some((key, page)) = self.memory.oldest() {
            self.put_on_disk(key, page, IfBusy::Wait);
        }
    }

    /// Whether a page is kept.
    pub(super) fn has(&self, key: PageKey) -> bool {
        self.memory.has(key) || self.disk.as_ref().is_some_and(|disk| disk.has(key))
    }

    /// What someone is known by who wants pages.
    pub(super) fn new_ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    /// Begins to read those of the pages that are on disk.
    pub(super) fn prefetch<'a>(&mut self, ticket: u64, keys: impl Iterator<Item = &'a PageKey>) {
        let Some(disk) = &mut self.disk else { return };
        for key in keys {
            if self.reads == READS_AT_ONCE {
                return;
            }
            let mine = self.readings.entry(ticket).or_default();
            let is_wanted = !self.memory.has(*key) && !mine.contains_key(key);
            if is_wanted && matches!(disk.find(*key), Found::OnDisk) {
                disk.read(ticket, *key);
                self.reads += 1;
                mine.insert(*key, Reading::Asked);
            }
        }
    }

    /// Takes a page, which is in the cache from now on.
    pub(super) fn fetch(&mut self, ticket: u64, key: PageKey) -> Fetched {
        if let Some(page) = self.memory.take(key) {
            return Fetched::Page(page.bytes, Tier::Memory);
        }
        let mine = self.readings.entry(ticket).or_default();
        match mine.remove(&key) {
            Some(Reading::Here(Some(page))) => return Fetched::Page(page, Tier::Directory),
            Some(Reading::Here(None)) => return Fetched::Missing,
            Some(Reading::Asked) => {
                mine.insert(key, Reading::Asked);
                return Fetched::Later;
            }
            None => {}
        }
        match self.disk.as_mut().map(|disk| disk.find(key)) {
            Some(Found::Here(page)) => Fetched::Page(page, Tier::Memory),
            // Others' pages are read first.
            Some(Found::OnDisk) => Fetched::Later,
            Some(Found::Nowhere) | None => Fetched::Missing,
        }
    }

    /// Someone wants no more pages.
    pub(super) fn forget(&mut self, ticket: u64) {
        self.readings.remove(&ticket);
    }

    /// Takes note of what was read.
    pub(super) fn collect(&mut self) {
        while let Some(arrival) = self.disk.as_mut().and_then(DiskTier::arrival) {
            self.note(arrival);
        }
    }

    /// Waits until something is read, for so long at most.
    pub(super) fn wait(&mut self, time: Duration) {
        let arrival = self.disk.as_mut().and_then(|disk| disk.await_arrival(time));
        if let Some(arrival) = arrival {
            self.note(arrival);
        }
    }

    fn note(&mut self, arrival: Arrival) {
        self.reads -= 1;
        let wanted = self.readings.get_mut(&arrival.ticket);
        if let Some(reading) = wanted.and_then(|mine| mine.get_mut(&arrival.key)) {
            *reading = Reading::Here(arrival.page.map(Arc::new));
        }
    }

    /// Adds what is kept now to the counts.
    pub(super) fn count(&self, counts: &mut SpillCounts) {
        counts.memory_bytes = self.memory.bytes();
        counts.forgotten_pages = self.forgotten;
        if let Some(disk) = &self.disk {
            counts.directory_bytes = disk.bytes();
            counts.rejected_files = disk.rejected();
        }
    }
}
