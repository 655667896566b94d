//! One GPU: its context, its stream, its kernels.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cudarc::driver::sys::{
    self, CUcontext, CUfunction, CUfunction_attribute_enum as FunctionAttribute, CUmodule, CUstream,
};

use super::artifacts;
use super::error::{CudaError, cu};
use super::probe::{self, GpuInfo};

/// A GPU with its context and one stream, on which everything runs in order. Clones are the same GPU.
#[derive(Clone)]
pub struct Gpu {
    inner: Arc<Inner>,
}

struct Inner {
    info: &'static GpuInfo,
    device: sys::CUdevice,
    context: CUcontext,
    stream: CUstream,
    modules: Mutex<HashMap<&'static str, Module>>,
    /// Whether the last that was started on the stream is to wait for another GPU's.
    waits: AtomicBool,
    /// Bytes that buffers have taken.
    taken: AtomicUsize,
}

/// A source file's kernels, those that were asked for by name.
struct Module {
    handle: CUmodule,
    functions: HashMap<String, Function>,
}

// SAFETY: handles of the driver may be used on any thread that makes the context current, which every
// method does first; the maps are behind a lock.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// Waits for the turn to start work on GPUs. A GPU has one stream, and what one thread starts while
/// another records would be recorded, too: whoever runs whole steps or loads takes turns.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A kernel on one GPU.
#[derive(Debug, Clone, Copy)]
pub struct Function {
    handle: CUfunction,
    index: u16,
}

// SAFETY: a handle of the driver, valid on any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// How many blocks, how many threads each, how much dynamic shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Whether it may start while the kernel before it ends.
    early: bool,
}

/// Blocks of a kernel that is started early, at most: some for each multiprocessor.
const MOST_EARLY_BLOCKS: u64 = 512;

impl Launch {
    /// A row of blocks without dynamic shared memory.
    pub fn linear(blocks: usize, threads: u32) -> Self {
        Self::grid([blocks, 1, 1], threads)
    }

    /// Blocks in three directions, threads in one.
    pub fn grid(blocks: [usize; 3], threads: u32) -> Self {
        Self {
            grid: blocks.map(|b| u32::try_from(b).expect("a grid fits u32")),
            block: [threads, 1, 1],
            shared: 0,
            early: false,
        }
    }

    /// The same with so many bytes of dynamic shared memory.
    pub fn with_shared(self, bytes: usize) -> Self {
        Self {
            shared: u32::try_from(bytes).expect("shared memory fits u32"),
            ..self
        }
    }

    /// The same, started while the kernel before it ends where GPU and driver can: for kernels that wait for
    /// that one themselves (`wait_for_previous_kernel`) before they read or write what it may. Large grids
    /// start as ever, since their waiting blocks would take room from the kernel before.
    pub fn early(self) -> Self {
        let blocks = self.grid.iter().map(|n| u64::from(*n)).product::<u64>();
        Self {
            early: blocks <= MOST_EARLY_BLOCKS,
            ..self
        }
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// An address on the GPU, or of pinned memory.
    Ptr(u64),
    /// `int`.
    I32(i32),
    /// `unsigned`.
    U32(u32),
    /// `unsigned long long`.
    U64(u64),
    /// `float`.
    F32(f32),
    /// A structure by value: the address of one that is laid out as the kernel's and lives until the launch
    /// returns.
    Struct(*const c_void),
}

impl Gpu {
    /// The GPU of this number; a process opens each once.
    ///
    /// # Errors
    /// What the probe finds missing, or what the driver refuses.
    pub fn open(index: u16) -> Result<Self, CudaError> {
        static OPEN: Mutex<Vec<(u16, Weak<Inner>)>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = open.iter().find(|(i, _)| *i == index);
        if let Some(inner) = known.and_then(|(_, weak)| weak.upgrade()) {
            return Ok(Self { inner });
        }
        let gpu = Self::connect(index)?;
        open.retain(|(i, _)| *i != index);
        open.push((index, Arc::downgrade(&gpu.inner)));
        Ok(gpu)
    }

    /// The GPU of this number with a stream of its own.
    fn connect(index: u16) -> Result<Self, CudaError> {
        Self::connect_to(probe::device(index)?)
    }

    fn connect_to(info: &'static GpuInfo) -> Result<Self, CudaError> {
        let mut device = 0;
        // SAFETY: the probe initialised the driver; writes one handle.
        unsafe { cu!(cuDeviceGet(&mut device, c_int::from(info.ordinal))) }?;
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one handle, released when the last clone goes.
        unsafe { cu!(cuDevicePrimaryCtxRetain(&mut context, device)) }?;
        // SAFETY: the context was just retained.
        unsafe { cu!(cuCtxSetCurrent(context)) }?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle; 1 is CU_STREAM_NON_BLOCKING.
        unsafe { cu!(cuStreamCreate(&mut stream, 1)) }?;
        Ok(Self {
            inner: Arc::new(Inner {
                info,
                device,
                context,
                stream,
                modules: Mutex::default(),
                waits: AtomicBool::new(false),
                taken: AtomicUsize::new(0),
            }),
        })
    }

    /// What is known of it.
    pub fn info(&self) -> &'static GpuInfo {
        self.inner.info
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.inner.info.index
    }

    /// The driver's number of it.
    pub fn ordinal(&self) -> u16 {
        self.inner.info.ordinal
    }

    /// Compute capability as one number: 90 is 9.0.
    pub fn compute(&self) -> u32 {
        (self.inner.info.compute.0 * 10 + self.inner.info.compute.1) as u32
    }

    /// Bytes free and bytes in all, of its share where several GPUs are made of one.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two integers; the context is current.
        unsafe { cu!(cuMemGetInfo_v2(&mut free, &mut total)) }?;
        if self.inner.info.shares > 1 {
            total = self.inner.info.memory;
            free = free.min(total.saturating_sub(self.inner.taken.load(Ordering::Relaxed)));
        }
        Ok((free, total))
    }

    /// Counts bytes that a buffer is about to take; false if they are more than its share.
    pub(super) fn take(&self, bytes: usize) -> bool {
        let before = self.inner.taken.fetch_add(bytes, Ordering::Relaxed);
        let fits =
            self.inner.info.shares == 1 || before.saturating_add(bytes) <= self.inner.info.memory;
        if !fits {
            self.give(bytes);
        }
        fits
    }

    /// Counts bytes that a buffer has given back.
    pub(super) fn give(&self, bytes: usize) {
        self.inner.taken.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Makes its context current on this thread.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context lives as long as `inner`.
        unsafe { cu!(cuCtxSetCurrent(self.inner.context)) }
    }

    pub(super) fn stream(&self) -> CUstream {
        self.inner.stream
    }

    pub(super) fn context(&self) -> CUcontext {
        self.inner.context
    }

    pub(super) fn device(&self) -> sys::CUdevice {
        self.inner.device
    }

    /// The next kernel waits for another GPU's, too, and not just for the one before it.
    pub(super) fn waits(&self) {
        self.inner.waits.store(true, Ordering::Relaxed);
    }

    /// Waits until everything that was started is done.
    ///
    /// # Errors
    /// What a kernel did wrong.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the stream lives as long as `inner`.
        unsafe { cu!(cuStreamSynchronize(self.inner.stream)) }
    }

    /// A kernel by its source file (`"linear/gemv"`) and name, loaded when it is first asked for.
    ///
    /// # Errors
    /// [`CudaError::NoKernel`], or what the driver says of the file.
    pub fn function(&self, module: &'static str, name: &str) -> Result<Function, CudaError> {
        let mut modules = self
            .inner
            .modules
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let known = modules.get(module);
        if let Some(function) = known.and_then(|m| m.functions.get(name)) {
            return Ok(*function);
        }
        let missing = || CudaError::NoKernel {
            module,
            function: name.to_owned(),
        };
        self.bind()?;
        let loaded = match modules.entry(module) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let image =
                    artifacts::image(module, self.inner.info.compute).ok_or_else(missing)?;
                let mut handle = std::ptr::null_mut();
                // SAFETY: a whole cubin, or PTX that ends with a zero; the driver copies it.
                unsafe { cu!(cuModuleLoadData(&mut handle, image.as_ptr().cast())) }?;
                place.insert(Module {
                    handle,
                    functions: HashMap::new(),
                })
            }
        };
        let symbol = CString::new(name).map_err(|_| missing())?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded in this context; the name ends with a zero.
        unsafe {
            cu!(cuModuleGetFunction(
                &mut function,
                loaded.handle,
                symbol.as_ptr()
            ))
        }
        .map_err(|_| missing())?;
        let mut fixed = 0;
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: reads an attribute of a function of this context.
        unsafe { cu!(cuFuncGetAttribute(&mut fixed, attribute, function)) }?;
        let most = c_int::try_from(self.inner.info.shared_per_block).unwrap_or(0);
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // A launch that needs more than there is says so.
        // SAFETY: sets an attribute of a function of this context.
        let _ = unsafe { sys::cuFuncSetAttribute(function, attribute, most - fixed) };
        let function = Function {
            handle: function,
            index: self.index(),
        };
        loaded.functions.insert(name.to_owned(), function);
        Ok(function)
    }

    /// Starts a kernel on the stream. The call returns at once.
    ///
    /// # Errors
    /// What the driver refuses. What the kernel does wrong shows at the next
    /// [`synchronize`](Self::synchronize).
    ///
    /// # Safety
    /// The arguments must be the kernel's, in number and types, and every address it follows must be
    /// valid on this GPU for as long as the kernel runs.
    ///
    /// # Panics
    /// If the function is another GPU's.
    pub unsafe fn launch(
        &self,
        function: Function,
        launch: Launch,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        assert_eq!(function.index, self.index(), "a kernel of another GPU");
        self.bind()?;
        let mut pointers = [std::ptr::null_mut::<c_void>(); 32];
        assert!(args.len() <= pointers.len(), "at most 32 arguments");
        for (pointer, arg) in pointers.iter_mut().zip(args) {
            let value: *const c_void = match arg {
                Arg::Ptr(v) | Arg::U64(v) => std::ptr::from_ref(v).cast(),
                Arg::I32(v) => std::ptr::from_ref(v).cast(),
                Arg::U32(v) => std::ptr::from_ref(v).cast(),
                Arg::F32(v) => std::ptr::from_ref(v).cast(),
                Arg::Struct(v) => *v,
            };
            *pointer = value.cast_mut();
        }
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        let waits = self.inner.waits.swap(false, Ordering::Relaxed);
        if launch.early && !waits && self.starts_early() {
            return self.launch_early(function, launch, &mut pointers);
        }
        // SAFETY: the caller vouches for the arguments; the driver copies their values before it returns.
        unsafe {
            cu!(cuLaunchKernel(
                function.handle,
                gx,
                gy,
                gz,
                bx,
                by,
                bz,
                launch.shared,
                self.inner.stream,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            ))
        }
    }

    /// Whether kernels can start while the one before ends, in recorded graphs too: Hopper and later, CUDA 12.3.
    fn starts_early(&self) -> bool {
        self.compute() >= 90 && probe::driver().is_ok_and(|driver| driver.version >= 12_030)
    }

    /// Starts a kernel that waits for the one before it by itself.
    fn launch_early(
        &self,
        function: Function,
        launch: Launch,
        pointers: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: launch.block[2],
            sharedMemBytes: launch.shared,
            hStream: self.inner.stream,
            attrs: &mut attribute,
            numAttrs: 1,
        };
        // SAFETY: the configuration and its attribute live through the call; the arguments are vouched for by
        // the caller of `launch`, and the driver copies their values before it returns.
        unsafe {
            cu!(cuLaunchKernelEx(
                &config,
                function.handle,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            ))
        }
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu(cuda:{}, {})", self.index(), self.inner.info.name)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let modules = self
            .modules
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the last clone is gone, so nothing uses these handles any more. An error here has
        // nobody to hear it: the context may have died before.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            for module in modules.values() {
                sys::cuModuleUnload(module.handle);
            }
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

#[cfg(test)]
impl Gpu {
    /// One more GPU where [`for_tests`](Self::for_tests) gives one: the driver's last, which may be the same.
    pub(crate) fn second_for_tests() -> Self {
        let driver = probe::driver().unwrap();
        let last = driver.devices.last().unwrap();
        let index = driver.devices.len() as u16;
        let info = probe::info(index, last.ordinal, 1).unwrap();
        Self::connect_to(Box::leak(Box::new(info))).unwrap()
    }

    /// The first GPU with a stream of its own, for a test; without one says so on standard error and gives none.
    pub(crate) fn for_tests() -> Option<Self> {
        match Self::connect(0) {
            Ok(gpu) => Some(gpu),
            Err(error) => {
                let test = std::thread::current().name().unwrap_or("test").to_owned();
                // The raw handle, because the harness hides what a passing test prints.
                let line = format!("{test} ... skipped, no GPU: {error}\n");
                std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).ok();
                None
            }
        }
    }
}
