//! The paged key/value cache of one attention layer.
//!
//! Keys and values live in pages of [`PAGE_TOKENS`] positions. A page belongs to a pool that the
//! engine manages; a sequence holds a list of [`PageId`]s, and position `p` of the sequence is
//! slot `p % 64` of `pages[p / 64]`. All layers use the same ids, each in its own [`LayerKv`].
//!
//! A page stores its key rows `[64, k_width]` and behind them its value rows `[64, v_width]`.
//! MLA keeps one row per position, the compressed `[kv_lora_rank | rope]`, as a key row with
//! `v_width` 0. The memory is requested zeroed from the system, so pages that were never
//! written cost address space only.

mod element;

use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};

use crate::cuda::{CudaError, DeviceBuffer, Gpu};
use crate::zeroed::{Refusal, zeroed};

use element::write_row;
pub use element::{KvSlice, KvType, Q8_BLOCK};

/// Positions in one page.
pub const PAGE_TOKENS: usize = 64;

/// Number of a page in the pool, the same for every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

impl PageId {
    fn index(self) -> usize {
        self.0 as usize
    }
}

/// Why a cache could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    /// The size does not fit the address space.
    #[error(
        "KV cache of {pages} pages with rows of {k_width} + {v_width} elements exceeds the address space; use a smaller context"
    )]
    TooLarge {
        /// Pages asked for.
        pages: usize,
        /// Elements of a key row.
        k_width: usize,
        /// Elements of a value row.
        v_width: usize,
    },
    /// Rows that are not whole blocks of the type.
    #[error("a KV cache of type {} stores {} values together, and rows have {width}; use f16", kv_type.name(), kv_type.block())]
    NotBlocks {
        /// Type of the cache.
        kv_type: KvType,
        /// Elements of a key or value row.
        width: usize,
    },
    /// The system refused the memory.
    #[error(
        "no memory for a KV cache of {bytes} bytes; use a smaller context or a smaller KV type"
    )]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// A GPU refused the memory.
    #[error("KV cache: {0}")]
    Cuda(#[from] CudaError),
}

/// One sequence of a batch: where its positions live and which of them this call computes.
#[derive(Debug, Clone, Copy)]
pub struct SequenceKv<'a> {
    /// Pages of the sequence in order; position `p` is in `pages[p / PAGE_TOKENS]`.
    pub pages: &'a [PageId],
    /// Positions that were there before this call.
    pub past: usize,
    /// New positions `past..past + tokens` of this call.
    pub tokens: usize,
}

impl SequenceKv<'_> {
    /// Positions after this call: `past + tokens`.
    pub fn len(&self) -> usize {
        self.past + self.tokens
    }

    /// Whether the sequence holds no position, neither old nor new.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

enum Storage {
    /// Bytes, allocated in words so that every type is aligned in them.
    Host(Vec<u32>),
    Gpu(DeviceBuffer),
}

const ON_GPU: &str = "a KV cache on a GPU was to be used on the host";

impl Storage {
    fn host(&self) -> &[u8] {
        match self {
            Storage::Host(words) => cast_slice(words),
            Storage::Gpu(_) => panic!("{ON_GPU}"),
        }
    }

    fn host_mut(&mut self) -> &mut [u8] {
        match self {
            Storage::Host(words) => cast_slice_mut(words),
            Storage::Gpu(_) => panic!("{ON_GPU}"),
        }
    }
}

/// Bytes of a cache, after checking that its rows are whole blocks.
fn bytes_of(
    kv_type: KvType,
    k_width: usize,
    v_width: usize,
    pages: usize,
) -> Result<usize, KvError> {
    for width in [k_width, v_width] {
        if !width.is_multiple_of(kv_type.block()) {
            return Err(KvError::NotBlocks { kv_type, width });
        }
    }
    k_width
        .checked_add(v_width)
        .and_then(|row| row.checked_mul(PAGE_TOKENS))
        .and_then(|page| page.checked_mul(pages))
        .and_then(|elements| kv_type.checked_bytes(elements))
        .ok_or(KvError::TooLarge {
            pages,
            k_width,
            v_width,
        })
}

/// Keys and values of one layer, for all pages of the pool.
pub struct LayerKv {
    kv_type: KvType,
    storage: Storage,
    k_width: usize,
    v_width: usize,
    pages: usize,
}

impl LayerKv {
    /// A cache of `pages` pages whose rows hold `k_width` key and `v_width` value elements.
    ///
    /// # Errors
    /// [`KvError::TooLarge`] if the size overflows, [`KvError::OutOfMemory`] if the system
    /// refuses it.
    pub fn new(
        kv_type: KvType,
        k_width: usize,
        v_width: usize,
        pages: usize,
    ) -> Result<LayerKv, KvError> {
        let bytes = bytes_of(kv_type, k_width, v_width, pages)?;
        let refused = |refusal| match refusal {
            Refusal::TooLarge => KvError::TooLarge {
                pages,
                k_width,
                v_width,
            },
            Refusal::OutOfMemory { bytes } => KvError::OutOfMemory { bytes },
        };
        // A page of any type is whole words.
        let words = zeroed(bytes / size_of::<u32>()).map_err(refused)?;
        Ok(LayerKv {
            kv_type,
            storage: Storage::Host(words),
            k_width,
            v_width,
            pages,
        })
    }

    /// The same in a GPU's memory, for its kernels alone.
    ///
    /// # Errors
    /// [`KvError::TooLarge`] if the size overflows, [`KvError::Cuda`] if the GPU refuses it.
    pub fn on_gpu(
        gpu: &Gpu,
        kv_type: KvType,
        k_width: usize,
        v_width: usize,
        pages: usize,
    ) -> Result<LayerKv, KvError> {
        let bytes = bytes_of(kv_type, k_width, v_width, pages)?;
        Ok(LayerKv {
            kv_type,
            storage: Storage::Gpu(DeviceBuffer::zeroed(gpu, bytes)?),
            k_width,
            v_width,
            pages,
        })
    }

    /// The memory, if it is a GPU's.
    pub fn device(&self) -> Option<&DeviceBuffer> {
        match &self.storage {
            Storage::Gpu(buffer) => Some(buffer),
            Storage::Host(_) => None,
        }
    }

    /// Element type.
    pub fn kv_type(&self) -> KvType {
        self.kv_type
    }

    /// Elements of a key row.
    pub fn k_width(&self) -> usize {
        self.k_width
    }

    /// Elements of a value row; 0 for MLA.
    pub fn v_width(&self) -> usize {
        self.v_width
    }

    /// Pages in the pool.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Bytes of address space that the cache takes; committed page by page as it is written.
    pub fn bytes(&self) -> usize {
        self.page_bytes() * self.pages
    }

    /// Bytes of one page: its key rows and behind them its value rows.
    pub fn page_bytes(&self) -> usize {
        let elements = (self.k_width + self.v_width) * PAGE_TOKENS;
        self.kv_type.bytes(elements)
    }

    /// The bytes of a page, after checking that it exists.
    fn page_range(&self, page: PageId) -> Range<usize> {
        assert!(
            page.index() < self.pages,
            "page {} of a KV cache with {} pages",
            page.0,
            self.pages
        );
        let start = page.index() * self.page_bytes();
        start..start + self.page_bytes()
    }

    /// Where the value rows begin in a page.
    fn key_bytes(&self) -> usize {
        self.kv_type.bytes(PAGE_TOKENS * self.k_width)
    }

    /// Key rows of a page, `[PAGE_TOKENS, k_width]`.
    ///
    /// # Panics
    /// If the page does not exist.
    pub fn k_page(&self, page: PageId) -> KvSlice<'_> {
        let bytes = &self.storage.host()[self.page_range(page)][..self.key_bytes()];
        KvSlice::of_bytes(self.kv_type, bytes, PAGE_TOKENS * self.k_width)
    }

    /// Value rows of a page, `[PAGE_TOKENS, v_width]`.
    ///
    /// # Panics
    /// If the page does not exist.
    pub fn v_page(&self, page: PageId) -> KvSlice<'_> {
        let bytes = &self.storage.host()[self.page_range(page)][self.key_bytes()..];
        KvSlice::of_bytes(self.kv_type, bytes, PAGE_TOKENS * self.v_width)
    }

    /// Stores one position: `k` `[k_width]` and `v` `[v_width]`, rounded to the cache's type.
    ///
    /// # Panics
    /// If the page or slot does not exist or a row has another width.
    pub fn write(&mut self, page: PageId, slot: usize, k: &[f32], v: &[f32]) {
        assert!(slot < PAGE_TOKENS, "slot {slot} of a page of {PAGE_TOKENS}");
        assert_eq!(k.len(), self.k_width, "width of the key row");
        assert_eq!(v.len(), self.v_width, "width of the value row");
        let (kv_type, key_bytes, page) = (self.kv_type, self.key_bytes(), self.page_range(page));
        let (keys, values) = self.storage.host_mut()[page].split_at_mut(key_bytes);
        for (rows, x) in [(keys, k), (values, v)] {
            write_row(kv_type, rows, PAGE_TOKENS * x.len(), slot * x.len(), x);
        }
    }

    /// Stores the new positions of a sequence: `k` `[tokens, k_width]`, `v` `[tokens, v_width]`.
    ///
    /// # Panics
    /// If the sequence has too few pages or the slices other lengths.
    pub fn write_sequence(&mut self, sequence: &SequenceKv<'_>, k: &[f32], v: &[f32]) {
        let (k_width, v_width) = (self.k_width, self.v_width);
        assert_eq!(k.len(), sequence.tokens * k_width, "key rows");
        assert_eq!(v.len(), sequence.tokens * v_width, "value rows");
        for t in 0..sequence.tokens {
            let position = sequence.past + t;
            let page = sequence.pages[position / PAGE_TOKENS];
            self.write(
                page,
                position % PAGE_TOKENS,
                &k[t * k_width..][..k_width],
                &v[t * v_width..][..v_width],
            );
        }
    }

    /// Reads one key row in single precision into `out` `[k_width]`.
    ///
    /// # Panics
    /// If the page or slot does not exist or `out` has another width.
    pub fn read_k(&self, page: PageId, slot: usize, out: &mut [f32]) {
        read_row(self.k_page(page), slot, self.k_width, out);
    }

    /// Reads one value row in single precision into `out` `[v_width]`.
    ///
    /// # Panics
    /// If the page or slot does not exist or `out` has another width.
    pub fn read_v(&self, page: PageId, slot: usize, out: &mut [f32]) {
        read_row(self.v_page(page), slot, self.v_width, out);
    }

    /// Copies a page's rows, as they are in memory, to `out` `[page_bytes]`.
    ///
    /// # Errors
    /// [`KvError::Cuda`] if they are a GPU's and it does not give them.
    ///
    /// # Panics
    /// If the page does not exist or `out` has another length.
    pub fn read_page(&self, page: PageId, out: &mut [u8]) -> Result<(), KvError> {
        let range = self.page_range(page);
        assert_eq!(out.len(), range.len(), "bytes of a page");
        match &self.storage {
            Storage::Host(_) => out.copy_from_slice(&self.storage.host()[range]),
            Storage::Gpu(buffer) => buffer.read_into(range.start, out)?,
        }
        Ok(())
    }

    /// Sets a page's rows to what [`read_page`](Self::read_page) gave, of a cache with the same layout.
    ///
    /// # Errors
    /// [`KvError::Cuda`] if they are a GPU's and it does not take them.
    ///
    /// # Panics
    /// If the page does not exist or `bytes` has another length.
    pub fn write_page(&mut self, page: PageId, bytes: &[u8]) -> Result<(), KvError> {
        let range = self.page_range(page);
        assert_eq!(bytes.len(), range.len(), "bytes of a page");
        match &mut self.storage {
            Storage::Host(words) => cast_slice_mut(words)[range].copy_from_slice(bytes),
            Storage::Gpu(buffer) => buffer.write(range.start, bytes)?,
        }
        Ok(())
    }

    /// Copies all rows of page `from` to page `to`, for a sequence that diverges from a shared
    /// prefix.
    ///
    /// # Panics
    /// If a page does not exist.
    pub fn copy_page(&mut self, from: PageId, to: PageId) {
        let (from, to) = (self.page_range(from), self.page_range(to));
        self.storage.host_mut().copy_within(from, to.start);
    }
}

fn read_row(rows: KvSlice<'_>, slot: usize, width: usize, out: &mut [f32]) {
    assert!(slot < PAGE_TOKENS, "slot {slot} of a page of {PAGE_TOKENS}");
    assert_eq!(out.len(), width, "width of the row to read");
    rows.skip(slot * width).take(width).to_f32(out);
}

impl std::fmt::Debug for LayerKv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerKv")
            .field("kv_type", &self.kv_type())
            .field("k_width", &self.k_width)
            .field("v_width", &self.v_width)
            .field("pages", &self.pages)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row that every type holds without rounding: small whole numbers, 127 in each block.
    fn row(width: usize, seed: usize) -> Vec<f32> {
        let mut row: Vec<f32> = (0..width)
            .map(|i| ((i * 31 + seed) % 255) as f32 - 127.0)
            .collect();
        row.iter_mut().step_by(Q8_BLOCK).for_each(|x| *x = 127.0);
        row
    }

    #[test]
    fn rows_come_back_from_their_slots() {
        for kv_type in [KvType::F16, KvType::F32, KvType::Q8_0] {
            let mut kv = LayerKv::new(kv_type, 64, 32, 2).unwrap();
            for slot in 0..PAGE_TOKENS {
                kv.write(PageId(1), slot, &row(64, slot), &row(32, 100 + slot));
            }
            let (mut k, mut v) = ([0.0; 64], [0.0; 32]);
            for slot in [0, 17, 63] {
                kv.read_k(PageId(1), slot, &mut k);
                kv.read_v(PageId(1), slot, &mut v);
                assert_eq!(k[..], row(64, slot));
                assert_eq!(v[..], row(32, 100 + slot));
            }
            kv.read_k(PageId(0), 62, &mut k);
            assert_eq!(k, [0.0; 64]);
        }
    }

    #[test]
    fn half_precision_rounds_as_ieee_and_takes_any_width() {
        let mut kv = LayerKv::new(KvType::F16, 5, 3, 1).unwrap();
        let (k, v) = ([1.0, -2.5, 0.1, 70000.0, -0.0], [0.333_333_34, 4.0, 5e-8]);
        kv.write(PageId(0), 63, &k, &v);
        let (mut k_read, mut v_read) = ([0.0; 5], [0.0; 3]);
        kv.read_k(PageId(0), 63, &mut k_read);
        kv.read_v(PageId(0), 63, &mut v_read);
        let round = |x: f32| half::f16::from_f32(x).to_f32();
        assert_eq!(k_read, k.map(round));
        assert_eq!(v_read, v.map(round));
    }

    #[test]
    fn rows_of_part_blocks_are_refused() {
        let refused = LayerKv::new(KvType::Q8_0, 64, 80, 1).map(|_| ());
        let (kv_type, width) = (KvType::Q8_0, 80);
        assert_eq!(refused, Err(KvError::NotBlocks { kv_type, width }));
    }

    #[test]
    fn a_sequence_is_written_across_its_pages() {
        let mut kv = LayerKv::new(KvType::F32, 2, 0, 3).unwrap();
        let sequence = SequenceKv {
            pages: &[PageId(2), PageId(0)],
            past: 60,
            tokens: 10,
        };
        let rows: Vec<f32> = (0..20).map(|i| i as f32).collect();
        kv.write_sequence(&sequence, &rows, &[]);
        let mut row = [0.0; 2];
        kv.read_k(PageId(2), 63, &mut row);
        assert_eq!(row, [6.0, 7.0]);
        kv.read_k(PageId(0), 0, &mut row);
        assert_eq!(row, [8.0, 9.0]);
        kv.read_k(PageId(0), 5, &mut row);
        assert_eq!(row, [18.0, 19.0]);
    }

    #[test]
    fn copied_page_equals_its_source_and_leaves_others() {
        let mut kv = LayerKv::new(KvType::F16, 4, 4, 3).unwrap();
        kv.write(PageId(0), 7, &[1.0; 4], &[2.0; 4]);
        kv.copy_page(PageId(0), PageId(2));
        let mut row = [0.0; 4];
        kv.read_v(PageId(2), 7, &mut row);
        assert_eq!(row, [2.0; 4]);
        kv.read_v(PageId(1), 7, &mut row);
        assert_eq!(row, [0.0; 4]);
    }

    #[test]
    fn a_page_that_is_read_and_written_elsewhere_is_the_same() {
        for kv_type in [KvType::F16, KvType::F32, KvType::Q8_0] {
            let mut kv = LayerKv::new(kv_type, 32, 64, 3).unwrap();
            for slot in [7, 63] {
                kv.write(PageId(0), slot, &row(32, slot), &row(64, slot));
            }
            let mut bytes = vec![0; kv.page_bytes()];
            kv.read_page(PageId(0), &mut bytes).unwrap();
            kv.write_page(PageId(2), &bytes).unwrap();
            let (mut k, mut v) = ([0.0; 32], [0.0; 64]);
            for slot in [7, 63] {
                kv.read_k(PageId(2), slot, &mut k);
                kv.read_v(PageId(2), slot, &mut v);
                assert_eq!((&k[..], &v[..]), (&row(32, slot)[..], &row(64, slot)[..]));
            }
            kv.read_v(PageId(1), 63, &mut v);
            assert_eq!(v, [0.0; 64]);
        }
    }

    #[test]
    fn bytes_count_every_page_and_untouched_memory_is_cheap() {
        let kv = LayerKv::new(KvType::F16, 576, 0, 100_000).unwrap();
        assert_eq!(kv.bytes(), 576 * 64 * 2 * 100_000);
        let kv = LayerKv::new(KvType::Q8_0, 576, 0, 100_000).unwrap();
        assert_eq!(kv.bytes(), 576 / 32 * 34 * 64 * 100_000);
    }

    #[test]
    fn sizes_that_overflow_are_errors() {
        assert!(matches!(
            LayerKv::new(KvType::F32, usize::MAX, 1, 1),
            Err(KvError::TooLarge { .. })
        ));
        assert!(matches!(
            LayerKv::new(KvType::F32, 1 << 30, 0, 1 << 26),
            Err(KvError::TooLarge { .. })
        ));
        assert!(matches!(
            LayerKv::new(KvType::F16, 1 << 20, 0, 1 << 34),
            Err(KvError::OutOfMemory { .. })
        ));
    }
}
