//! The progress of loading, on a terminal.

use std::time::{Duration, Instant};

use ktx_core::memory::Bytes;

use crate::terminal::{Paint, Show, StatusLine, Style};

/// Time between two drawings.
const INTERVAL: Duration = Duration::from_millis(100);
/// Characters of the bar.
const BAR: usize = 16;
/// Until then a rate is chance.
const SETTLED: Duration = Duration::from_millis(500);

/// A bar with bytes, their rate and the time that is left.
pub(crate) struct Progress {
    what: &'static str,
    total: u64,
    line: StatusLine,
    style: Style,
    begun: Instant,
    drawn: Instant,
}

impl Progress {
    /// Progress of `what` up to `total` bytes.
    pub(crate) fn new(what: &'static str, total: u64, show: Show) -> Self {
        let now = Instant::now();
        Self {
            what,
            total,
            line: StatusLine::new(show),
            style: Style::of_stderr(),
            begun: now,
            drawn: now,
        }
    }

    /// Draws it, unless that was done just now.
    pub(crate) fn at(&mut self, done: u64) {
        if !self.line.is_shown() || self.drawn.elapsed() < INTERVAL {
            return;
        }
        self.drawn = Instant::now();
        let elapsed = self.begun.elapsed();
        self.line
            .draw(&text(self.what, done, self.total, elapsed, self.style));
    }
}

/// One line, less than 80 characters long.
fn text(what: &str, done: u64, total: u64, elapsed: Duration, style: Style) -> String {
    let done = done.min(total);
    let part = done as f64 / total.max(1) as f64;
    let filled = (part * BAR as f64) as usize;
    let bar = style.paint(Paint::Cyan, &"━".repeat(filled))
        + &style.paint(Paint::Faint, &"─".repeat(BAR - filled));
    let mut text = format!(
        "{what} {bar} {:>3} %  {} of {}",
        (part * 100.0) as u64,
        Bytes(done),
        Bytes(total)
    );
    let rate = done as f64 / elapsed.as_secs_f64();
    if elapsed >= SETTLED && rate >= 1.0 {
        let left = (total - done) as f64 / rate;
        text += &format!("  {}/s  {} left", Bytes(rate as u64), clock(left));
    }
    text
}

/// A time as people read it: `42 s`, `3:05 min`.
fn clock(seconds: f64) -> String {
    let seconds = seconds.ceil() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        _ => format!("{}:{:02} min", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_line_has_a_bar_bytes_their_rate_and_the_time_left() {
        let line = text(
            "loading",
            10 * GIB,
            40 * GIB,
            Duration::from_secs(5),
            Style::Plain,
        );
        let bar = "━".repeat(4) + &"─".repeat(12);
        assert_eq!(
            line,
            format!("loading {bar}  25 %  10.0 GiB of 40.0 GiB  2.0 GiB/s  15 s left")
        );
        assert!(line.chars().count() < 80);
    }

    #[test]
    fn the_rate_comes_when_it_means_something() {
        let early = text("loading", GIB, 4 * GIB, Duration::ZERO, Style::Plain);
        assert!(early.ends_with("1.0 GiB of 4.0 GiB"), "{early}");
        let nothing = text("loading", 0, 0, Duration::from_secs(9), Style::Plain);
        assert!(nothing.ends_with("  0 %  0 B of 0 B"), "{nothing}");
        let slow = text("loading", 1, 200, Duration::from_secs(1), Style::Plain);
        assert!(slow.ends_with("1 B/s  3:19 min left"), "{slow}");
    }

    #[test]
    fn a_tensor_more_than_expected_is_no_more_than_all() {
        let line = text("loading", 9, 8, Duration::ZERO, Style::Coloured);
        assert!(line.contains(" 100 %  8 B of 8 B"), "{line}");
    }
}
