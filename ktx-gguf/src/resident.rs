//! Copies of tensors in memory of their own, in huge pages.

use std::io;
use std::sync::Arc;

use memmap2::{MmapMut, MmapRaw};

use crate::Tensor;
use crate::storage::Storage;

/// Size and alignment of the pages that are asked for: those of x86-64, and of ARM with base pages of 4 KiB.
pub const HUGE_PAGE: usize = 2 << 20;
/// Address space that is taken at a time; what of it is not written costs no memory.
const CHUNK: usize = 64 * HUGE_PAGE;
/// Tensors begin at whole cache lines.
const ALIGN: usize = 64;

/// Makes copies of tensors that lie in huge pages where the system has them.
///
/// Pages of a mapped file are of 4 KiB mostly. Reading weights once per token then waits for the translation of an
/// address in each of them, for longer than for the weights themselves on a virtual machine.
#[derive(Debug, Default)]
pub struct HugePages {
    chunk: Option<Chunk>,
}

/// Address space, the first `used` bytes of which belong to tensors.
#[derive(Debug)]
struct Chunk {
    memory: Arc<MmapRaw>,
    used: usize,
}

/// The part of a chunk that one tensor has.
#[derive(Debug)]
pub(crate) struct OwnBytes {
    memory: Arc<MmapRaw>,
    start: usize,
    len: usize,
}

impl OwnBytes {
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `HugePages::take` gave this part to this value alone, which keeps the memory alive; it was written
        // before there was anyone to read it.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(self.start), self.len) }
    }
}

impl HugePages {
    /// The same tensor in memory of its own, which `fill` copies: from the first slice to the second, which is as long.
    ///
    /// # Errors
    /// What the system says when it has no memory left.
    pub fn copy(
        &mut self,
        tensor: &Tensor,
        fill: impl FnOnce(&[u8], &mut [u8]),
    ) -> io::Result<Tensor> {
        let from = tensor.bytes();
        let own = self.take(from.len())?;
        // SAFETY: the part is inside the memory and nobody else's, as nobody has `own` yet; fresh memory is zero.
        let to = unsafe {
            std::slice::from_raw_parts_mut(own.memory.as_mut_ptr().add(own.start), own.len)
        };
        fill(from, to);
        Ok(tensor.moved_to(Arc::new(Storage::Own(own))))
    }

    fn take(&mut self, len: usize) -> io::Result<OwnBytes> {
        if let Some(chunk) = &mut self.chunk
            && let Some(part) = chunk.take(len)
        {
            return Ok(part);
        }
        let mut chunk = Chunk::new(len)?;
        let part = chunk.take(len);
        self.chunk = Some(chunk);
        part.ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
    }
}

impl Chunk {
    /// Room for `len` bytes at least.
    fn new(len: usize) -> io::Result<Self> {
        let pages = len.checked_next_multiple_of(HUGE_PAGE).unwrap_or(len);
        // One page more, because a map may begin anywhere.
        let size = pages.max(CHUNK).saturating_add(HUGE_PAGE);
        let memory = MmapMut::map_anon(size)?;
        // A system without huge pages refuses, and the copy lies in small ones.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        let memory = MmapRaw::from(memory);
        let used = memory.as_ptr().align_offset(HUGE_PAGE);
        Ok(Self {
            memory: Arc::new(memory),
            used: if used < size { used } else { 0 },
        })
    }

    fn take(&mut self, len: usize) -> Option<OwnBytes> {
        let start = self.used.next_multiple_of(ALIGN);
        let end = start.checked_add(len)?;
        if end > self.memory.len() {
            return None;
        }
        self.used = end;
        Some(OwnBytes {
            memory: Arc::clone(&self.memory),
            start,
            len,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GgmlType, random_blocks};

    #[test]
    fn copies_hold_the_same_bytes_apart_from_each_other_and_from_the_original() {
        let mut pages = HugePages::default();
        let lens = [1, 300, 40_000, HUGE_PAGE / 18, CHUNK / 18 + 7, 5];
        let originals: Vec<_> = lens
            .iter()
            .enumerate()
            .map(|(seed, blocks)| {
                let bytes = random_blocks(GgmlType::Q4_0, *blocks, seed as u64);
                Tensor::from_bytes("w", GgmlType::Q4_0, &[32, *blocks], bytes).unwrap()
            })
            .collect();
        let copies: Vec<_> = originals
            .iter()
            .map(|tensor| pages.copy(tensor, |from, to| to.copy_from_slice(from)))
            .collect::<io::Result<_>>()
            .unwrap();
        drop(pages);
        for (original, copy) in originals.iter().zip(&copies) {
            assert!(original.bytes() == copy.bytes());
            assert_eq!((original.shape(), original.ty()), (copy.shape(), copy.ty()));
            assert_ne!(original.bytes().as_ptr(), copy.bytes().as_ptr());
        }
    }

    #[test]
    fn a_large_copy_begins_at_a_huge_page() {
        let bytes = vec![7; HUGE_PAGE + 18];
        let tensor = Tensor::from_bytes("w", GgmlType::I8, &[HUGE_PAGE + 18], bytes).unwrap();
        let mut pages = HugePages::default();
        let copy = pages
            .copy(&tensor, |from, to| to.copy_from_slice(from))
            .unwrap();
        assert_eq!(copy.bytes().as_ptr().align_offset(HUGE_PAGE), 0);
    }
}
