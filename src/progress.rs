//! The progress of long work, on a terminal.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

use ktx_core::memory::Bytes;

/// Time between two drawings.
const INTERVAL: Duration = Duration::from_millis(100);

/// A line on standard error that is drawn over until the work is done; nothing if that is no terminal.
pub(crate) struct Progress {
    what: &'static str,
    total: u64,
    drawn: Option<Instant>,
    begun: Instant,
    is_terminal: bool,
}

impl Progress {
    /// Progress of `what` up to `total` bytes.
    pub(crate) fn new(what: &'static str, total: u64) -> Self {
        Self {
            what,
            total,
            drawn: None,
            begun: Instant::now(),
            is_terminal: stderr().is_terminal(),
        }
    }

    /// Draws it, unless that was done just now.
    pub(crate) fn at(&mut self, done: u64) {
        let last = self.drawn.unwrap_or(self.begun);
        if !self.is_terminal || last.elapsed() < INTERVAL {
            return;
        }
        self.drawn = Some(Instant::now());
        let percent = done.min(self.total) * 100 / self.total.max(1);
        // Nothing is lost if a drawing is.
        let _ = write!(
            stderr(),
            "\r{} {percent:>3} % of {}\x1b[K",
            self.what,
            Bytes(self.total)
        );
    }
}

impl Drop for Progress {
    /// Wipes the line.
    fn drop(&mut self) {
        if self.drawn.is_some() {
            let _ = write!(stderr(), "\r\x1b[K");
        }
    }
}
