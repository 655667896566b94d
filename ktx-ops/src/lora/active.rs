//! Which adapters apply to which rows of a step.

use std::sync::Arc;

use crate::build::OpError;
use crate::linear::kernel_error;
use crate::module::Batch;

/// Number of an adapter in its engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u32);

/// An adapter that applies, and how strongly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActiveAdapter {
    /// Which one.
    pub id: AdapterId,
    /// Factor on its own scale; 1 is as it was trained.
    pub scale: f32,
}

/// Rows that stand together and have the same adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterSpan {
    /// The first of them.
    pub first_row: usize,
    /// How many there are.
    pub rows: usize,
    /// What applies to them; never empty.
    pub adapters: Arc<[ActiveAdapter]>,
}

impl AdapterSpan {
    /// The row behind the last.
    pub fn end(&self) -> usize {
        self.first_row + self.rows
    }
}

/// The adapters of all rows that an operator is given. Empty, without memory of its own, where none
/// applies.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RowAdapters {
    rows: usize,
    spans: Vec<AdapterSpan>,
}

impl RowAdapters {
    /// Those of a batch's rows.
    pub fn of_batch(batch: &Batch) -> Self {
        let mut all = Self {
            rows: batch.rows(),
            spans: Vec::new(),
        };
        for sequence in &batch.sequences {
            all.push(sequence.first_row, sequence.tokens, &sequence.adapters);
        }
        all
    }

    /// Those of some of these rows, in the order in which they are gathered.
    pub fn gathered(&self, rows: impl IntoIterator<Item = usize>) -> Self {
        let mut all = Self::default();
        for row in rows {
            if let Some(adapters) = self.of_row(row) {
                all.push(all.rows, 1, adapters);
            }
            all.rows += 1;
        }
        all
    }

    /// The same adapters for all of `rows` rows.
    pub fn uniform(rows: usize, adapters: &Arc<[ActiveAdapter]>) -> Self {
        let mut all = Self {
            rows,
            spans: Vec::new(),
        };
        all.push(0, rows, adapters);
        all
    }

    /// Whether no adapter applies to any row.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Rows with adapters, ascending.
    pub fn spans(&self) -> &[AdapterSpan] {
        &self.spans
    }

    /// What applies to a row, if anything does.
    pub fn of_row(&self, row: usize) -> Option<&Arc<[ActiveAdapter]>> {
        let after = self.spans.partition_point(|s| s.first_row <= row);
        let span = self.spans.get(after.checked_sub(1)?)?;
        (row < span.end()).then_some(&span.adapters)
    }

    /// Refuses to be used for another number of rows.
    ///
    /// # Errors
    /// [`OpError::Kernel`] if whoever gathered rows for the operator at `path` did not say which.
    pub fn require_rows(&self, path: &str, rows: usize) -> Result<(), OpError> {
        if self.rows == rows {
            return Ok(());
        }
        Err(kernel_error(
            path,
            format_args!(
                "it was given {rows} rows and adapters apply to {}: an operator that gathers rows has to call the \
                 next one through `Forward::with_adapters`",
                self.rows
            ),
        ))
    }

    fn push(&mut self, first_row: usize, rows: usize, adapters: &Arc<[ActiveAdapter]>) {
        if adapters.is_empty() || rows == 0 {
            return;
        }
        match self.spans.last_mut() {
            Some(last) if last.end() == first_row && last.adapters == *adapters => {
                last.rows += rows;
            }
            _ => self.spans.push(AdapterSpan {
                first_row,
                rows,
                adapters: Arc::clone(adapters),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(id: u32) -> Arc<[ActiveAdapter]> {
        Arc::new([ActiveAdapter {
            id: AdapterId(id),
            scale: 1.0,
        }])
    }

    #[test]
    fn rows_keep_the_adapters_of_their_sequence() {
        let mut batch = Batch::default();
        batch.push([1, 2, 3], 0, &[]);
        batch.push([4], 0, &[]);
        batch.set_adapters(&of(7));
        batch.push([5, 6], 0, &[]);
        batch.set_adapters(&of(8));
        let rows = RowAdapters::of_batch(&batch);
        let found: Vec<_> = (0..7).map(|r| rows.of_row(r).map(|a| a[0].id.0)).collect();
        assert_eq!(found, [None, None, None, Some(7), Some(8), Some(8), None]);
        let gathered = rows.gathered([5, 0, 4, 3]);
        let found: Vec<_> = (0..4)
            .map(|r| gathered.of_row(r).map(|a| a[0].id.0))
            .collect();
        assert_eq!(found, [Some(8), None, Some(8), Some(7)]);
        assert!(gathered.require_rows("x", 4).is_ok() && gathered.require_rows("x", 6).is_err());
    }

    #[test]
    fn sequences_without_adapters_take_no_memory() {
        let mut batch = Batch::default();
        batch.push([1, 2, 3], 0, &[]);
        assert!(RowAdapters::of_batch(&batch).is_empty());
    }
}
