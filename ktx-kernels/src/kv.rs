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

use bytemuck::{cast_slice, cast_slice_mut};
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::cuda::{CudaError, DeviceBuffer, Gpu};
use crate::zeroed::{Refusal, zeroed};

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

/// Element type of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvType {
    /// IEEE half precision: 2 bytes an element.
    F16,
    /// Single precision: 4 bytes an element, nothing is rounded.
    F32,
}

impl KvType {
    /// Bytes of one element.
    pub fn element_bytes(self) -> usize {
        match self {
            KvType::F16 => size_of::<f16>(),
            KvType::F32 => size_of::<f32>(),
        }
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

/// Cache elements in one of the stored types, borrowed.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum KvSlice<'a> {
    /// Half precision.
    F16(&'a [f16]),
    /// Single precision.
    F32(&'a [f32]),
}

impl<'a> KvSlice<'a> {
    /// Elements in the slice.
    pub fn len(&self) -> usize {
        match self {
            KvSlice::F16(x) => x.len(),
            KvSlice::F32(x) => x.len(),
        }
    }

    /// Whether the slice is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements from `start` on.
    ///
    /// # Panics
    /// If `start` is beyond the end.
    pub fn skip(self, start: usize) -> KvSlice<'a> {
        match self {
            KvSlice::F16(x) => KvSlice::F16(&x[start..]),
            KvSlice::F32(x) => KvSlice::F32(&x[start..]),
        }
    }

    /// The first `count` elements.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn take(self, count: usize) -> KvSlice<'a> {
        match self {
            KvSlice::F16(x) => KvSlice::F16(&x[..count]),
            KvSlice::F32(x) => KvSlice::F32(&x[..count]),
        }
    }

    /// Converts to single precision.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn to_f32(self, out: &mut [f32]) {
        match self {
            KvSlice::F16(x) => x.convert_to_f32_slice(out),
            KvSlice::F32(x) => out.copy_from_slice(x),
        }
    }
}

enum Storage {
    F16(Vec<f16>),
    F32(Vec<f32>),
    Gpu(DeviceBuffer, KvType),
}

const ON_GPU: &str = "a KV cache on a GPU was to be used on the host";

fn elements(k_width: usize, v_width: usize, pages: usize) -> Result<usize, KvError> {
    k_width
        .checked_add(v_width)
        .and_then(|row| row.checked_mul(PAGE_TOKENS))
        .and_then(|page| page.checked_mul(pages))
        .ok_or(KvError::TooLarge {
            pages,
            k_width,
            v_width,
        })
}

/// Keys and values of one layer, for all pages of the pool.
pub struct LayerKv {
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
        let elements = elements(k_width, v_width, pages)?;
        let refused = |refusal| match refusal {
            Refusal::TooLarge => KvError::TooLarge {
                pages,
                k_width,
                v_width,
            },
            Refusal::OutOfMemory { bytes } => KvError::OutOfMemory { bytes },
        };
        let storage = match kv_type {
            KvType::F16 => Storage::F16(zeroed(elements).map_err(refused)?),
            KvType::F32 => Storage::F32(zeroed(elements).map_err(refused)?),
        };
        Ok(LayerKv {
            storage,
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
        let bytes = elements(k_width, v_width, pages)?
            .checked_mul(kv_type.element_bytes())
            .ok_or(KvError::TooLarge {
                pages,
                k_width,
                v_width,
            })?;
        Ok(LayerKv {
            storage: Storage::Gpu(DeviceBuffer::zeroed(gpu, bytes)?, kv_type),
            k_width,
            v_width,
            pages,
        })
    }

    /// The memory, if it is a GPU's.
    pub fn device(&self) -> Option<&DeviceBuffer> {
        match &self.storage {
            Storage::Gpu(buffer, _) => Some(buffer),
            _ => None,
        }
    }

    /// Element type.
    pub fn kv_type(&self) -> KvType {
        match self.storage {
            Storage::F16(_) => KvType::F16,
            Storage::F32(_) => KvType::F32,
            Storage::Gpu(_, kv_type) => kv_type,
        }
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
        self.page_elements() * self.pages * self.kv_type().element_bytes()
    }

    fn page_elements(&self) -> usize {
        (self.k_width + self.v_width) * PAGE_TOKENS
    }

    /// Start of page `page`, after checking that it exists.
    fn page_start(&self, page: PageId) -> usize {
        assert!(
            page.index() < self.pages,
            "page {} of a KV cache with {} pages",
            page.0,
            self.pages
        );
        page.index() * self.page_elements()
    }

    fn slice(&self, start: usize, len: usize) -> KvSlice<'_> {
        match &self.storage {
            Storage::F16(data) => KvSlice::F16(&data[start..start + len]),
            Storage::F32(data) => KvSlice::F32(&data[start..start + len]),
            Storage::Gpu(..) => panic!("{ON_GPU}"),
        }
    }

    /// Key rows of a page, `[PAGE_TOKENS, k_width]`.
    ///
    /// # Panics
    /// If the page does not exist.
    pub fn k_page(&self, page: PageId) -> KvSlice<'_> {
        self.slice(self.page_start(page), PAGE_TOKENS * self.k_width)
    }

    /// Value rows of a page, `[PAGE_TOKENS, v_width]`.
    ///
    /// # Panics
    /// If the page does not exist.
    pub fn v_page(&self, page: PageId) -> KvSlice<'_> {
        let start = self.page_start(page) + PAGE_TOKENS * self.k_width;
        self.slice(start, PAGE_TOKENS * self.v_width)
    }

    /// Stores one position: `k` `[k_width]` and `v` `[v_width]`, rounded to the cache's type.
    ///
    /// # Panics
    /// If the page or slot does not exist or a row has another width.
    pub fn write(&mut self, page: PageId, slot: usize, k: &[f32], v: &[f32]) {
        assert!(slot < PAGE_TOKENS, "slot {slot} of a page of {PAGE_TOKENS}");
        assert_eq!(k.len(), self.k_width, "width of the key row");
        assert_eq!(v.len(), self.v_width, "width of the value row");
        let page = self.page_start(page);
        let k_start = page + slot * self.k_width;
        let v_start = page + PAGE_TOKENS * self.k_width + slot * self.v_width;
        match &mut self.storage {
            Storage::F16(data) => {
                data[k_start..k_start + k.len()].convert_from_f32_slice(k);
                data[v_start..v_start + v.len()].convert_from_f32_slice(v);
            }
            Storage::F32(data) => {
                data[k_start..k_start + k.len()].copy_from_slice(k);
                data[v_start..v_start + v.len()].copy_from_slice(v);
            }
            Storage::Gpu(..) => panic!("{ON_GPU}"),
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
        self.read_row(self.page_start(page), slot, self.k_width, out);
    }

    /// Reads one value row in single precision into `out` `[v_width]`.
    ///
    /// # Panics
    /// If the page or slot does not exist or `out` has another width.
    pub fn read_v(&self, page: PageId, slot: usize, out: &mut [f32]) {
        let start = self.page_start(page) + PAGE_TOKENS * self.k_width;
        self.read_row(start, slot, self.v_width, out);
    }

    fn read_row(&self, start: usize, slot: usize, width: usize, out: &mut [f32]) {
        assert!(slot < PAGE_TOKENS, "slot {slot} of a page of {PAGE_TOKENS}");
        assert_eq!(out.len(), width, "width of the row to read");
        self.slice(start + slot * width, width).to_f32(out);
    }

    /// Bytes of one page: its key rows and behind them its value rows.
    pub fn page_bytes(&self) -> usize {
        self.page_elements() * self.kv_type().element_bytes()
    }

    /// Copies a page's rows, as they are in memory, to `out` `[page_bytes]`.
    ///
    /// # Errors
    /// [`KvError::Cuda`] if they are a GPU's and it does not give them.
    ///
    /// # Panics
    /// If the page does not exist or `out` has another length.
    pub fn read_page(&self, page: PageId, out: &mut [u8]) -> Result<(), KvError> {
        let (start, len) = (self.page_start(page), self.page_elements());
        match &self.storage {
            Storage::F16(data) => out.copy_from_slice(cast_slice(&data[start..start + len])),
            Storage::F32(data) => out.copy_from_slice(cast_slice(&data[start..start + len])),
            Storage::Gpu(buffer, kv_type) => {
                assert_eq!(out.len(), self.page_bytes(), "bytes of a page");
                buffer.read_into(start * kv_type.element_bytes(), out)?;
            }
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
        let (start, len) = (self.page_start(page), self.page_elements());
        assert_eq!(bytes.len(), self.page_bytes(), "bytes of a page");
        match &mut self.storage {
            Storage::F16(data) => {
                cast_slice_mut(&mut data[start..start + len]).copy_from_slice(bytes);
            }
            Storage::F32(data) => {
                cast_slice_mut(&mut data[start..start + len]).copy_from_slice(bytes);
            }
            Storage::Gpu(buffer, kv_type) => {
                buffer.write(start * kv_type.element_bytes(), bytes)?;
            }
        }
        Ok(())
    }

    /// Copies all rows of page `from` to page `to`, for a sequence that diverges from a shared
    /// prefix.
    ///
    /// # Panics
    /// If a page does not exist.
    pub fn copy_page(&mut self, from: PageId, to: PageId) {
        let len = self.page_elements();
        let (from, to) = (self.page_start(from), self.page_start(to));
        match &mut self.storage {
            Storage::F16(data) => data.copy_within(from..from + len, to),
            Storage::F32(data) => data.copy_within(from..from + len, to),
            Storage::Gpu(..) => panic!("{ON_GPU}"),
        }
    }
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

    #[test]
    fn rows_come_back_rounded_to_the_cache_type() {
        for kv_type in [KvType::F16, KvType::F32] {
            let mut kv = LayerKv::new(kv_type, 5, 3, 2).unwrap();
            let k = [1.0, -2.5, 0.1, 70000.0, -0.0];
            let v = [0.333_333_34, 4.0, 5e-8];
            kv.write(PageId(1), 63, &k, &v);
            let (mut k_read, mut v_read) = ([0.0; 5], [0.0; 3]);
            kv.read_k(PageId(1), 63, &mut k_read);
            kv.read_v(PageId(1), 63, &mut v_read);
            let round = |x: f32| match kv_type {
                KvType::F16 => f16::from_f32(x).to_f32(),
                KvType::F32 => x,
            };
            assert_eq!(k_read, k.map(round));
            assert_eq!(v_read, v.map(round));
            kv.read_k(PageId(1), 62, &mut k_read);
            assert_eq!(k_read, [0.0; 5]);
        }
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
        for kv_type in [KvType::F16, KvType::F32] {
            let mut kv = LayerKv::new(kv_type, 3, 2, 3).unwrap();
            kv.write(PageId(0), 7, &[1.5, -2.0, 0.25], &[4.0, 8.0]);
            kv.write(PageId(0), 63, &[3.0; 3], &[5.0; 2]);
            let mut bytes = vec![0; kv.page_bytes()];
            kv.read_page(PageId(0), &mut bytes).unwrap();
            kv.write_page(PageId(2), &bytes).unwrap();
            for slot in [0, 7, 63] {
                let mut rows = [[0.0; 3]; 2];
                kv.read_k(PageId(0), slot, &mut rows[0]);
                kv.read_k(PageId(2), slot, &mut rows[1]);
                assert_eq!(rows[0], rows[1]);
            }
            let mut row = [0.0; 2];
            kv.read_v(PageId(2), 63, &mut row);
            assert_eq!(row, [5.0; 2]);
            kv.read_v(PageId(1), 63, &mut row);
            assert_eq!(row, [0.0; 2]);
        }
    }

    #[test]
    fn bytes_count_every_page_and_untouched_memory_is_cheap() {
        let kv = LayerKv::new(KvType::F16, 576, 0, 100_000).unwrap();
        assert_eq!(kv.bytes(), 576 * 64 * 2 * 100_000);
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
