//! Memory of a GPU, and main memory that a GPU reads and writes.

use std::ffi::c_void;
use std::sync::Arc;

use bytemuck::{AnyBitPattern, NoUninit, Pod};
use cudarc::driver::sys::{self, CUresult};

use super::error::{CudaError, check, cu};
use super::gpu::Gpu;
use super::upload::copyable;

/// Memory of a GPU, given back when it is dropped.
pub struct DeviceBuffer {
    gpu: Gpu,
    address: u64,
    bytes: usize,
}

impl DeviceBuffer {
    /// So many bytes; their values are whatever was there.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] with what is free.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self, CudaError> {
        gpu.bind()?;
        let mut address = 0;
        let no_room = || {
            let (free, total) = gpu.memory().unwrap_or((0, 0));
            CudaError::OutOfMemory {
                index: gpu.index(),
                wanted: bytes,
                free,
                total,
            }
        };
        if !gpu.take(bytes) {
            return Err(no_room());
        }
        // SAFETY: writes one address. The driver refuses 0 bytes, so there is always one.
        let result = unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) };
        if result != CUresult::CUDA_SUCCESS {
            gpu.give(bytes);
        }
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(no_room());
        }
        check("cuMemAlloc", result)?;
        Ok(Self {
            gpu: gpu.clone(),
            address,
            bytes,
        })
    }

    /// So many bytes of zeros.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn zeroed(gpu: &Gpu, bytes: usize) -> Result<Self, CudaError> {
        let buffer = Self::new(gpu, bytes)?;
        buffer.fill(0)?;
        Ok(buffer)
    }

    /// A copy of `values`, complete when the call returns.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn upload<T: NoUninit>(gpu: &Gpu, values: &[T]) -> Result<Self, CudaError> {
        let mut buffer = Self::new(gpu, size_of_val(values))?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// Where it is on the GPU.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The GPU that it is on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Sets every byte, in the stream's order.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn fill(&self, byte: u8) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: the range is this buffer.
        unsafe {
            cu!(cuMemsetD8Async(
                self.address,
                byte,
                self.bytes,
                self.gpu.stream()
            ))
        }
    }

    /// Copies `values` to the bytes from `offset` on; complete when the call returns.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Panics
    /// If they reach beyond the end.
    pub fn write<T: NoUninit>(&mut self, offset: usize, values: &[T]) -> Result<(), CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(
            offset
                .checked_add(bytes.len())
                .is_some_and(|end| end <= self.bytes),
            "a write beyond the buffer's end"
        );
        if bytes.is_empty() {
            return Ok(());
        }
        self.gpu.bind()?;
        let mut to = self.address + offset as u64;
        for piece in copyable(bytes) {
            // SAFETY: source and destination hold that many bytes (checked above), and the copy is waited
            // for before the borrow ends.
            unsafe {
                cu!(cuMemcpyHtoDAsync_v2(
                    to,
                    piece.as_ptr().cast::<c_void>(),
                    piece.len(),
                    self.gpu.stream(),
                ))
            }?;
            to += piece.len() as u64;
        }
        self.gpu.synchronize()
    }

    /// Waits for the stream and reads `count` values from byte `offset` on.
    ///
    /// # Errors
    /// What the driver reports, and what a kernel before it did wrong.
    ///
    /// # Panics
    /// If they reach beyond the end.
    pub fn read<T: Pod>(&self, offset: usize, count: usize) -> Result<Vec<T>, CudaError> {
        let mut values = vec![T::zeroed(); count];
        self.read_into(offset, &mut values)?;
        Ok(values)
    }

    /// Waits for the stream and fills `values` from byte `offset` on.
    ///
    /// # Errors
    /// What the driver reports, and what a kernel before it did wrong.
    ///
    /// # Panics
    /// If they reach beyond the end.
    pub fn read_into<T: NoUninit + AnyBitPattern>(
        &self,
        offset: usize,
        values: &mut [T],
    ) -> Result<(), CudaError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        assert!(
            offset
                .checked_add(bytes.len())
                .is_some_and(|end| end <= self.bytes),
            "a read beyond the buffer's end"
        );
        self.gpu.bind()?;
        if !bytes.is_empty() {
            // SAFETY: source and destination hold that many bytes (checked above), and the copy is
            // waited for before the borrow ends.
            unsafe {
                cu!(cuMemcpyDtoHAsync_v2(
                    bytes.as_mut_ptr().cast::<c_void>(),
                    self.address + offset as u64,
                    bytes.len(),
                    self.gpu.stream(),
                ))
            }?;
        }
        self.gpu.synchronize()
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: the address is this buffer's alone. Freeing waits for kernels that still use it; an
        // error means that the context is gone, and the memory with it.
        unsafe {
            let _ = self.gpu.bind();
            sys::cuMemFree_v2(self.address);
        }
        self.gpu.give(self.bytes);
    }
}

impl std::fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceBuffer({:?}, {} bytes)", self.gpu, self.bytes)
    }
}

/// Part of a GPU's memory, which other parts may overlap.
#[derive(Debug, Clone)]
pub struct DeviceSlice {
    buffer: Arc<DeviceBuffer>,
    offset: usize,
    bytes: usize,
}

impl DeviceSlice {
    /// `bytes` bytes from `offset` on.
    ///
    /// # Panics
    /// If they reach beyond the end.
    pub fn of(buffer: &Arc<DeviceBuffer>, offset: usize, bytes: usize) -> Self {
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= buffer.bytes()),
            "a slice beyond the buffer's end"
        );
        Self {
            buffer: Arc::clone(buffer),
            offset,
            bytes,
        }
    }

    /// The part of it from `offset` on.
    ///
    /// # Panics
    /// If it ends before.
    pub fn starting_at(&self, offset: usize) -> Self {
        assert!(offset <= self.bytes, "a slice beyond the slice's end");
        Self {
            buffer: Arc::clone(&self.buffer),
            offset: self.offset + offset,
            bytes: self.bytes - offset,
        }
    }

    /// Where it is on the GPU.
    pub fn address(&self) -> u64 {
        self.buffer.address() + self.offset as u64
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The GPU that it is on.
    pub fn gpu(&self) -> &Gpu {
        self.buffer.gpu()
    }
}

impl From<DeviceBuffer> for DeviceSlice {
    fn from(buffer: DeviceBuffer) -> Self {
        let bytes = buffer.bytes();
        Self::of(&Arc::new(buffer), 0, bytes)
    }
}

/// Main memory that GPUs read and write at the same address, zeroed.
pub struct PinnedBuffer {
    gpu: Gpu,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the memory is owned by the buffer and reachable from any thread.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// So many bytes of zeros.
    ///
    /// # Errors
    /// [`CudaError::OutOfPinned`] if the system refuses them.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self, CudaError> {
        gpu.bind()?;
        let mut start = std::ptr::null_mut();
        // SAFETY: writes one address; 3 is PORTABLE | DEVICEMAP.
        let result = unsafe { sys::cuMemHostAlloc(&mut start, bytes.max(1), 3) };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(CudaError::OutOfPinned { wanted: bytes });
        }
        check("cuMemHostAlloc", result)?;
        // SAFETY: the driver gave that many bytes.
        unsafe { std::ptr::write_bytes(start.cast::<u8>(), 0, bytes) };
        Ok(Self {
            gpu: gpu.clone(),
            start: start.cast(),
            bytes,
        })
    }

    /// Its address, for the CPU and for the GPU.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its values. Whoever lets a GPU write there waits for it before looking.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        // SAFETY: pinned memory is aligned to pages, lives as long as `self`, and holds bytes that are
        // valid for a `Pod`.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.bytes / size_of::<T>()) }
    }

    /// Its values, to write. Whoever lets a GPU read there waits for it before writing.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.bytes / size_of::<T>()) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by the driver and this buffer's alone; kernels that use it are waited for.
        unsafe {
            let _ = self.gpu.synchronize();
            sys::cuMemFreeHost(self.start.cast());
        }
    }
}

impl std::fmt::Debug for PinnedBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PinnedBuffer({} bytes)", self.bytes)
    }
}

/// Copies bytes in the stream's order, within a GPU, between GPUs, or from and to pinned memory.
///
/// # Errors
/// What the driver refuses.
///
/// # Safety
/// Both ranges must be valid memory of this GPU or pinned, and stay so until the stream has passed.
pub unsafe fn copy_async(gpu: &Gpu, to: u64, from: u64, bytes: usize) -> Result<(), CudaError> {
    gpu.bind()?;
    // SAFETY: the caller vouches for the ranges; unified addressing tells the driver what they are.
    unsafe { cu!(cuMemcpyAsync(to, from, bytes, gpu.stream())) }
}
