//! Per-thread scratch of the panel kernels, and the pointer through which tasks write results.

use std::cell::RefCell;

use super::isa::{CodePanel, MIN_SUB, STEP, Step};
use super::{CHUNK_COLS, PANEL_ROWS};

/// Tokens whose results fit the scratch tile that incomplete panels are written to.
pub(crate) const TAIL_TOKENS: usize = 256;
/// Columns of an `f32` panel: 16 rows of them are 16 KiB.
pub(crate) const FLOAT_CHUNK_COLS: usize = STEP;

/// Working memory of one thread, about 100 KiB; allocated when the thread first needs it.
#[repr(C, align(64))]
pub(crate) struct Scratch {
    pub(crate) panel: CodePanel,
    pub(crate) steps: [Step; PANEL_ROWS],
    pub(crate) float_panel: [f32; PANEL_ROWS * FLOAT_CHUNK_COLS],
    pub(crate) float_rows: [[f32; STEP]; PANEL_ROWS],
    /// `[token, row]` results of an incomplete panel.
    pub(crate) tail: [f32; TAIL_TOKENS * PANEL_ROWS],
}

impl Scratch {
    const ZERO: Self = Self {
        panel: CodePanel {
            codes: [0; PANEL_ROWS * CHUNK_COLS],
            scales: [0.0; PANEL_ROWS * CHUNK_COLS / MIN_SUB],
            offsets: [0.0; PANEL_ROWS * CHUNK_COLS / MIN_SUB],
        },
        steps: [Step::ZERO; PANEL_ROWS],
        float_panel: [0.0; PANEL_ROWS * FLOAT_CHUNK_COLS],
        float_rows: [[0.0; STEP]; PANEL_ROWS],
        tail: [0.0; TAIL_TOKENS * PANEL_ROWS],
    };
}

/// Calls `f` with this thread's scratch. Not to be nested.
pub(crate) fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    thread_local! {
        static SCRATCH: RefCell<Box<Scratch>> = RefCell::new(Box::new(Scratch::ZERO));
    }
    SCRATCH.with_borrow_mut(|scratch| f(scratch))
}

/// The output of a product, written by tasks with elements of their own.
#[derive(Clone, Copy)]
pub(crate) struct OutputPointer(*mut f32);

// SAFETY: whoever writes through the pointer promises that no other task writes the element.
unsafe impl Send for OutputPointer {}
// SAFETY: as above.
unsafe impl Sync for OutputPointer {}

impl OutputPointer {
    pub(crate) fn new(out: &mut [f32]) -> Self {
        Self(out.as_mut_ptr())
    }

    /// The address of element `index`.
    ///
    /// # Safety
    /// `index` lies in the slice that the pointer was made from, which is still borrowed.
    pub(crate) unsafe fn add(self, index: usize) -> *mut f32 {
        // SAFETY: by the caller's promise.
        unsafe { self.0.add(index) }
    }
}
