//! A mutable slice that parallel tasks share, each taking a part of its own.

use std::marker::PhantomData;

/// A `&mut [T]` from which tasks on several threads take disjoint parts.
pub(crate) struct DisjointMut<'a, T> {
    data: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: the parts that threads take are disjoint (the contract of `part`), so sharing the
// whole is sending parts of a `&mut [T]`, which `T: Send` allows.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    /// Borrows the slice for the tasks.
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        DisjointMut {
            len: data.len(),
            data: data.as_mut_ptr(),
            borrow: PhantomData,
        }
    }

    /// The elements `start..start + len`.
    ///
    /// # Panics
    /// If they are out of range.
    ///
    /// # Safety
    /// While the part is alive no other part that overlaps it may be.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(
            start <= self.len && len <= self.len - start,
            "elements {start}..{start}+{len} of {}",
            self.len
        );
        // SAFETY: in range of the borrowed slice (checked), and nobody else has these elements.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}
