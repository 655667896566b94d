//! Text that comes in pieces, split at markers.

/// Holds text back while it may be the beginning of a marker.
#[derive(Debug, Clone, Default)]
pub(super) struct Splitter {
    held: String,
}

/// Text, and the marker that was found behind it.
#[derive(Debug, Clone)]
pub(super) struct Split {
    pub(super) before: String,
    pub(super) marker: Option<&'static str>,
}

impl Splitter {
    pub(super) fn push(&mut self, text: &str) {
        self.held.push_str(text);
    }

    /// What is not given out yet.
    pub(super) fn rest(&self) -> &str {
        &self.held
    }

    pub(super) fn skip(&mut self, bytes: usize) {
        self.held.drain(..bytes.min(self.held.len()));
    }

    pub(super) fn skip_space(&mut self) {
        let space = self.held.len() - self.held.trim_start().len();
        self.held.drain(..space);
    }

    /// Takes the text up to the first of the markers, and that marker; or, if there is none, the text
    /// that is certainly before one.
    pub(super) fn until(&mut self, markers: &[&'static str], at_end: bool) -> Split {
        let first = markers
            .iter()
            .filter_map(|marker| Some((self.held.find(marker)?, *marker)))
            .min_by_key(|(at, marker)| (*at, std::cmp::Reverse(marker.len())));
        if let Some((at, marker)) = first {
            let before = self.held[..at].to_owned();
            self.held.drain(..at + marker.len());
            return Split {
                before,
                marker: Some(marker),
            };
        }
        let keep = match at_end {
            true => 0,
            false => markers
                .iter()
                .map(|m| overlap(&self.held, m))
                .max()
                .unwrap_or(0),
        };
        let rest = self.held.split_off(self.held.len() - keep);
        Split {
            before: std::mem::replace(&mut self.held, rest),
            marker: None,
        }
    }
}

/// Bytes at the end of `text` that are the beginning of `marker`.
fn overlap(text: &str, marker: &str) -> usize {
    let longest = marker.len().min(text.len());
    let is_beginning = |n: &usize| text.as_bytes().ends_with(&marker.as_bytes()[..*n]);
    (1..=longest).rev().find(is_beginning).unwrap_or(0)
}
