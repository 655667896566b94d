//! Handles into a workspace.

use crate::device::Device;

/// Activations `[rows, cols]` of f32 in a [`Workspace`](super::Workspace): which device, where, which shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Act {
    pub(super) device: Device,
    pub(super) offset: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Act {
    /// The device that holds it.
    pub fn device(self) -> Device {
        self.device
    }

    /// Number of rows (tokens, mostly).
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Number of values in a row.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// Number of values.
    pub fn len(self) -> usize {
        self.rows * self.cols
    }

    /// Whether it holds no value.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The rows `start .. start + rows` of it.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn row_range(self, start: usize, rows: usize) -> Act {
        assert!(
            start + rows <= self.rows,
            "rows {start}..{} of {}",
            start + rows,
            self.rows
        );
        Act {
            offset: self.offset + start * self.cols,
            rows,
            ..self
        }
    }

    /// The same values as `[rows, cols]`.
    ///
    /// # Panics
    /// If the number of values differs.
    pub fn reshape(self, rows: usize, cols: usize) -> Act {
        assert_eq!(
            rows * cols,
            self.len(),
            "reshape keeps the number of values"
        );
        Act { rows, cols, ..self }
    }

    pub(super) fn end(self) -> usize {
        self.offset + self.len()
    }

    pub(super) fn overlaps(self, other: Act) -> bool {
        self.device == other.device && self.offset < other.end() && other.offset < self.end()
    }
}
