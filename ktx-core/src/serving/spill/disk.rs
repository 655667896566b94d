//! Pages in a directory, up to a size; the longest unused go first. Files are read and written by two
//! threads of their own: what a step does never waits for a disk.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use super::file::{self, HEADER_BYTES, PageFileError};
use super::key::{Fingerprint, PageKey};
use crate::error::EngineError;

/// Bytes that wait to be written at most: if pages come faster than the disk takes them, some are
/// forgotten instead.
const WAITING_BYTES: u64 = 128 << 20;
const LOCK: &str = "ktx.lock";
const SUFFIX: &str = ".page";
const UNFINISHED: &str = ".page.tmp";

/// What happens to a page for which the disk is too slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IfBusy {
    /// It is forgotten.
    Forget,
    /// The caller waits.
    Wait,
}

/// What was read, and for whom.
pub(super) struct Arrival {
    pub(super) ticket: u64,
    pub(super) key: PageKey,
    /// None if the file gave no page; it is removed then.
    pub(super) page: Option<Vec<u8>>,
}

/// The directory.
pub(super) struct DiskTier {
    files: Arc<Files>,
    limit: u64,
    bytes: u64,
    pages: HashMap<PageKey, Entry>,
    /// When each was last used; the longest ago first.
    ages: BTreeMap<u64, PageKey>,
    clock: u64,
    waiting_bytes: u64,
    rejected: u64,
    writes: Option<Sender<Order>>,
    reads: Option<Sender<(u64, PageKey)>>,
    done: Receiver<Done>,
    threads: Vec<JoinHandle<()>>,
    /// Held as long as this process uses the directory.
    _lock: File,
}

struct Entry {
    age: u64,
    /// Which of the orders to write this key is meant.
    order: u64,
    place: Place,
}

enum Place {
    /// Not in a file yet.
    Waiting(Arc<Vec<u8>>),
    Stored,
}

/// What a page in the directory is, for someone who wants it.
pub(super) enum Found {
    Here(Arc<Vec<u8>>),
    OnDisk,
    Nowhere,
}

enum Order {
    Write(PageKey, u64, Arc<Vec<u8>>),
    Remove(PageKey),
}

enum Done {
    Written(PageKey, u64, io::Result<()>),
    Read(u64, PageKey, Result<Vec<u8>, PageFileError>),
}

/// Where files are, and what is in them.
struct Files {
    folder: PathBuf,
    fingerprint: Fingerprint,
    page_bytes: usize,
}

impl Files {
    fn path(&self, key: PageKey, suffix: &str) -> PathBuf {
        let name = format!("{}-{key}{suffix}", self.fingerprint.short());
        self.folder.join(name)
    }

    /// The file has its name only once it is whole.
    fn write(&self, key: PageKey, bytes: &[u8]) -> io::Result<()> {
        let (unfinished, path) = (self.path(key, UNFINISHED), self.path(key, SUFFIX));
        let written = file::write(&unfinished, &self.fingerprint, key, bytes)
            .and_then(|()| fs::rename(&unfinished, path));
        if written.is_err() {
            let _ = fs::remove_file(unfinished);
        }
        written
    }

    fn read(&self, key: PageKey) -> Result<Vec<u8>, PageFileError> {
        let path = self.path(key, SUFFIX);
        let page = file::read(&path, &self.fingerprint, key, self.page_bytes)?;
        // So that the next process knows which were used last; one that cannot be set is merely older.
        let _ = File::options()
            .append(true)
            .open(path)
            .and_then(|file| file.set_modified(SystemTime::now()));
        Ok(page)
    }

    /// The pages of a directory with their last use, the longest unused first; removes files of other
    /// models and those that are not whole. Files with other names are somebody's, and stay.
    fn scan(&self) -> io::Result<(Vec<PageKey>, u64)> {
        let mut pages = Vec::new();
        let mut rejected = 0;
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some((owner, key, is_whole)) = name.to_str().and_then(parse_name) else {
                continue;
            };
            let data = entry.metadata()?;
            let wanted = (HEADER_BYTES + self.page_bytes) as u64;
            if is_whole
                && owner == self.fingerprint.short()
                && data.is_file()
                && data.len() == wanted
            {
                let used = data.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                pages.push((used, key));
            } else if fs::remove_file(entry.path()).is_ok() {
                rejected += 1;
            }
        }
        pages.sort();
        Ok((pages.into_iter().map(|(_, key)| key).collect(), rejected))
    }
}

/// Whose page a file is, which one, and whether it is whole; none if its name is not one of ours.
fn parse_name(name: &str) -> Option<(&str, PageKey, bool)> {
    let (stem, is_whole) = match name.strip_suffix(UNFINISHED) {
        Some(stem) => (stem, false),
        None => (name.strip_suffix(SUFFIX)?, true),
    };
    let (owner, key) = stem.split_once('-')?;
    let is_owner = owner.len() == 16 && owner.bytes().all(|b| b.is_ascii_hexdigit());
    Some((owner, PageKey::parse(key)?, is_whole)).filter(|_| is_owner)
}

fn create(folder: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

impl DiskTier {
    /// Opens a directory, or makes it.
    ///
    /// # Errors
    /// [`EngineError::Io`] if it cannot be used, [`EngineError::PrefixCache`] if another process uses it
    /// or not even one page fits, [`EngineError::Thread`] if the system refuses a thread.
    pub(super) fn open(
        folder: &Path,
        fingerprint: Fingerprint,
        page_bytes: usize,
        limit: u64,
    ) -> Result<Self, EngineError> {
        let io = |source| EngineError::Io {
            path: folder.to_owned(),
            source,
        };
        let refuse = |reason: String| EngineError::PrefixCache {
            directory: folder.to_owned(),
            reason,
        };
        let one = (HEADER_BYTES + page_bytes) as u64;
        if limit < one {
            return Err(refuse(format!(
                "its limit of {limit} bytes is less than one page, which takes {one}"
            )));
        }
        create(folder).map_err(io)?;
        let lock = File::create(folder.join(LOCK)).map_err(io)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::Error(source)) => return Err(io(source)),
            Err(TryLockError::WouldBlock) => {
                return Err(refuse(
                    "another server uses it; name another one".to_owned(),
                ));
            }
        }
        let files = Arc::new(Files {
            folder: folder.to_owned(),
            fingerprint,
            page_bytes,
        });
        let (stored, rejected) = files.scan().map_err(io)?;
        let (writes, orders) = mpsc::channel();
        let (reads, wanted) = mpsc::channel();
        let (sender, done) = mpsc::channel();
        let writer = {
            let (files, done) = (Arc::clone(&files), sender.clone());
            spawn("ktx-cache-write", move || write_all(&files, orders, done))?
        };
        let reader = {
            let files = Arc::clone(&files);
            spawn("ktx-cache-read", move || read_all(&files, wanted, sender))?
        };
        let mut tier = Self {
            files,
            limit,
            bytes: 0,
            pages: HashMap::new(),
            ages: BTreeMap::new(),
            clock: 0,
            waiting_bytes: 0,
            rejected,
            writes: Some(writes),
            reads: Some(reads),
            done,
            threads: vec![writer, reader],
            _lock: lock,
        };
        for key in stored {
            tier.add(key, Place::Stored);
        }
        tier.make_room(0);
        Ok(tier)
    }

    fn file_bytes(&self) -> u64 {
        (HEADER_BYTES + self.files.page_bytes) as u64
    }

    fn add(&mut self, key: PageKey, place: Place) -> u64 {
        self.clock += 1;
        let age = self.clock;
        self.bytes += self.file_bytes();
        self.ages.insert(age, key);
        let order = age;
        self.pages.insert(key, Entry { age, order, place });
        order
    }

    fn remove(&mut self, key: PageKey) {
        if let Some(entry) = self.pages.remove(&key) {
            self.ages.remove(&entry.age);
            self.bytes -= self.file_bytes();
            self.order(Order::Remove(key));
        }
    }

    fn touch(&mut self, key: PageKey) {
        if let Some(entry) = self.pages.get_mut(&key) {
            self.clock += 1;
            self.ages.remove(&entry.age);
            self.ages.insert(self.clock, key);
            entry.age = self.clock;
        }
    }

    /// Removes pages until so many bytes more fit.
    fn make_room(&mut self, bytes: u64) {
        while self.bytes + bytes > self.limit {
            let Some(oldest) = self.ages.first_key_value().map(|(_, key)| *key) else {
                return;
            };
            self.remove(oldest);
        }
    }

    fn order(&self, order: Order) {
        if let Some(writes) = &self.writes {
            // The thread lives as long as its sender.
            let _ = writes.send(order);
        }
    }

    /// Keeps a page. Says whether it does.
    pub(super) fn put(&mut self, key: PageKey, bytes: Arc<Vec<u8>>, if_busy: IfBusy) -> bool {
        if self.pages.contains_key(&key) {
            self.touch(key);
            return true;
        }
        let size = bytes.len() as u64;
        while self.waiting_bytes > 0 && self.waiting_bytes + size > WAITING_BYTES {
            if if_busy == IfBusy::Forget {
                return false;
            }
            // Who waits here reads nothing any more.
            match self.done.recv() {
                Ok(done) => drop(self.note(done)),
                Err(_) => return false,
            }
        }
        self.make_room(self.file_bytes());
        self.waiting_bytes += size;
        let order = self.add(key, Place::Waiting(Arc::clone(&bytes)));
        self.order(Order::Write(key, order, bytes));
        true
    }

    pub(super) fn has(&self, key: PageKey) -> bool {
        self.pages.contains_key(&key)
    }

    /// Where a page is.
    pub(super) fn find(&mut self, key: PageKey) -> Found {
        self.touch(key);
        match self.pages.get(&key).map(|entry| &entry.place) {
            Some(Place::Waiting(bytes)) => Found::Here(Arc::clone(bytes)),
            Some(Place::Stored) => Found::OnDisk,
            None => Found::Nowhere,
        }
    }

    /// Begins to read a page.
    pub(super) fn read(&self, ticket: u64, key: PageKey) {
        if let Some(reads) = &self.reads {
            // The thread lives as long as its sender.
            let _ = reads.send((ticket, key));
        }
    }

    /// The next page that was read, if there is one now.
    pub(super) fn arrival(&mut self) -> Option<Arrival> {
        while let Ok(done) = self.done.try_recv() {
            if let Some(arrival) = self.note(done) {
                return Some(arrival);
            }
        }
        None
    }

    /// Waits for the next page that is read, for so long at most.
    pub(super) fn await_arrival(&mut self, time: Duration) -> Option<Arrival> {
        match self.done.recv_timeout(time) {
            Ok(done) => self.note(done),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => None,
        }
    }

    fn note(&mut self, done: Done) -> Option<Arrival> {
        match done {
            Done::Written(key, order, result) => {
                self.waiting_bytes -= self.files.page_bytes as u64;
                let entry = self.pages.get_mut(&key).filter(|e| e.order == order)?;
                match result {
                    Ok(()) => entry.place = Place::Stored,
                    Err(error) => {
                        let folder = self.files.folder.display();
                        tracing::warn!("{folder}: a cache page could not be written: {error}");
                        self.remove(key);
                    }
                }
                None
            }
            Done::Read(ticket, key, Ok(page)) => Some(Arrival {
                ticket,
                key,
                page: Some(page),
            }),
            Done::Read(ticket, key, Err(error)) => {
                let path = self.files.path(key, SUFFIX);
                tracing::warn!("{}: not used: {error}", path.display());
                self.rejected += 1;
                self.remove(key);
                Some(Arrival {
                    ticket,
                    key,
                    page: None,
                })
            }
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Files that gave no page.
    pub(super) fn rejected(&self) -> u64 {
        self.rejected
    }
}

impl Drop for DiskTier {
    /// Writes what waits.
    fn drop(&mut self) {
        (self.writes, self.reads) = (None, None);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, EngineError> {
    let builder = thread::Builder::new().name(name.to_owned());
    builder.spawn(body).map_err(EngineError::Thread)
}

fn write_all(files: &Files, orders: Receiver<Order>, done: Sender<Done>) {
    for order in orders {
        match order {
            Order::Write(key, order, bytes) => {
                let result = files.write(key, &bytes);
                // Nobody listens any more once the server ends.
                let _ = done.send(Done::Written(key, order, result));
            }
            Order::Remove(key) => {
                // One that is gone already is as good as removed.
                let _ = fs::remove_file(files.path(key, SUFFIX));
            }
        }
    }
}

fn read_all(files: &Files, wanted: Receiver<(u64, PageKey)>, done: Sender<Done>) {
    for (ticket, key) in wanted {
        if done.send(Done::Read(ticket, key, files.read(key))).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 1000;
    const FILE: u64 = (PAGE + HEADER_BYTES) as u64;

    fn key(n: u8) -> PageKey {
        PageKey([n; 32])
    }

    fn open(folder: &Path, model: u8, limit: u64) -> DiskTier {
        DiskTier::open(folder, Fingerprint([model; 32]), PAGE, limit).unwrap()
    }

    fn put(tier: &mut DiskTier, n: u8) {
        assert!(tier.put(key(n), Arc::new(vec![n; PAGE]), IfBusy::Wait));
    }

    fn get(tier: &mut DiskTier, n: u8) -> Option<Vec<u8>> {
        match tier.find(key(n)) {
            Found::Here(page) => return Some(page.to_vec()),
            Found::Nowhere => return None,
            Found::OnDisk => tier.read(9, key(n)),
        }
        for _ in 0..100 {
            if let Some(arrival) = tier.await_arrival(Duration::from_secs(1)) {
                assert_eq!((arrival.ticket, arrival.key), (9, key(n)));
                return arrival.page;
            }
        }
        panic!("the page does not come");
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
        let mut files: Vec<PathBuf> = entries.filter(|p| !p.ends_with(LOCK)).collect();
        files.sort();
        files
    }

    #[test]
    fn the_next_process_finds_the_pages_and_the_longest_unused_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let mut tier = open(path, 1, 3 * FILE);
        for n in 1..=4 {
            put(&mut tier, n);
        }
        assert!(!tier.has(key(1)), "only three fit");
        assert_eq!(tier.bytes(), 3 * FILE);
        drop(tier);
        assert_eq!(files(path).len(), 3);
        let mut tier = open(path, 1, 3 * FILE);
        assert_eq!(get(&mut tier, 1), None);
        assert_eq!(get(&mut tier, 2), Some(vec![2; PAGE]));
        put(&mut tier, 5);
        assert!(tier.has(key(2)), "it was just used");
        assert!(!tier.has(key(3)));
        drop(tier);
        let tier = open(path, 1, FILE);
        assert_eq!(tier.bytes(), FILE, "a smaller limit holds from the start");
        drop(tier);
        assert_eq!(files(path).len(), 1);
    }

    #[test]
    fn damaged_and_foreign_files_are_removed_and_those_of_others_are_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let mut tier = open(path, 1, 100 * FILE);
        for n in 1..=4 {
            put(&mut tier, n);
        }
        drop(tier);
        let all = files(path);
        let mut damaged = fs::read(&all[0]).unwrap();
        damaged[500] ^= 1;
        fs::write(&all[0], &damaged).unwrap();
        fs::write(&all[1], &damaged[..700]).unwrap();
        fs::write(all[2].with_extension("page.tmp"), b"half").unwrap();
        fs::copy(&all[3], &all[2]).unwrap();
        fs::write(path.join("letter.txt"), b"mine").unwrap();
        let mut tier = open(path, 1, 100 * FILE);
        assert_eq!(tier.rejected(), 2, "the short one and the unfinished one");
        let found: Vec<bool> = (1..=4).map(|n| get(&mut tier, n).is_some()).collect();
        assert_eq!(found, [false, false, false, true]);
        assert_eq!(tier.rejected(), 4);
        drop(tier);
        assert_eq!(files(path), [all[3].clone(), path.join("letter.txt")]);
        drop(open(path, 2, 100 * FILE));
        assert_eq!(files(path), [path.join("letter.txt")], "another model's");
    }

    #[test]
    fn one_process_uses_a_directory_and_a_page_must_fit() {
        let folder = tempfile::tempdir().unwrap();
        let _tier = open(folder.path(), 1, FILE);
        let refused = |limit| DiskTier::open(folder.path(), Fingerprint([1; 32]), PAGE, limit);
        let message = |limit| refused(limit).err().unwrap().to_string();
        assert!(message(FILE).contains("another server"));
        assert!(message(FILE - 1).contains("less than one page"));
    }

    #[test]
    fn a_directory_that_takes_nothing_loses_pages_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pages");
        let mut tier = open(&path, 1, 100 * FILE);
        fs::remove_dir_all(&path).unwrap();
        put(&mut tier, 1);
        while tier.has(key(1)) {
            tier.await_arrival(Duration::from_secs(1));
        }
        assert_eq!(tier.bytes(), 0);
    }
}
