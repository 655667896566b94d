//! Large zeroed vectors: committed by the system only where they are touched, and refused rather
//! than aborting.

use std::alloc::{Layout, alloc_zeroed};

use bytemuck::Zeroable;

/// Why there is no such vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Its size is beyond what can be addressed.
    TooLarge,
    /// The system has not so much.
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
}

/// `len` zeroed elements.
pub(crate) fn zeroed<T: Zeroable>(len: usize) -> Result<Vec<T>, Refusal> {
    let layout = Layout::array::<T>(len).map_err(|_| Refusal::TooLarge)?;
    if layout.size() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the layout's size is not zero.
    let data = unsafe { alloc_zeroed(layout) }.cast::<T>();
    if data.is_null() {
        return Err(Refusal::OutOfMemory {
            bytes: layout.size(),
        });
    }
    // SAFETY: `data` comes from the global allocator with the layout of an array of `len` `T`s,
    // and zero bytes are a valid `T` (`Zeroable`).
    Ok(unsafe { Vec::from_raw_parts(data, len, len) })
}
