//! Why the GPU did not do what was asked.

use cudarc::driver::sys::{self, CUresult};

/// Oldest driver, as CUDA counts versions: 12.0, which driver 525 and all later ones have.
pub const OLDEST_DRIVER: i32 = 12_000;
/// Oldest compute capability that there are kernels for.
pub const OLDEST_COMPUTE: (i32, i32) = (7, 0);

/// What went wrong with a GPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The driver's library is not installed.
    #[error(
        "no NVIDIA driver was found (libcuda.so.1, nvcuda.dll); install the driver, nothing else of CUDA is needed"
    )]
    NoDriver,
    /// The library lacks a function that every driver that is new enough has.
    #[error("the NVIDIA driver lacks {symbol}; install driver 525 or newer")]
    MissingSymbol {
        /// Its name.
        symbol: &'static str,
    },
    /// The driver is older than the kernels.
    #[error(
        "the NVIDIA driver supports CUDA {}.{}, needed is 12.0 or newer: install driver 525 or newer",
        version / 1000, version % 1000 / 10
    )]
    DriverTooOld {
        /// What it supports: 11040 is 11.4.
        version: i32,
    },
    /// The driver is there and no GPU is.
    #[error("the NVIDIA driver found no GPU; look at `nvidia-smi` and CUDA_VISIBLE_DEVICES")]
    NoDevice,
    /// `KTX_GPUS` is no list of numbers.
    #[error(
        "KTX_GPUS={value} is no list of GPUs; write the driver's numbers with commas, such as KTX_GPUS=0,1, or unset it"
    )]
    BadGpuList {
        /// The variable's value.
        value: String,
    },
    /// `KTX_GPUS` names a GPU that the driver lacks.
    #[error(
        "KTX_GPUS names GPU {number}, and the driver's are 0 to {}; `nvidia-smi` lists them", count - 1
    )]
    UnknownGpu {
        /// The driver's number.
        number: u16,
        /// How many there are.
        count: usize,
    },
    /// `KTX_GPUS` names none.
    #[error("KTX_GPUS is empty, so that no GPU is used; unset it to use all")]
    NoGpuWanted,
    /// The driver has no GPU of that number.
    #[error("there is no cuda:{index}; the driver shows {count} GPU(s)")]
    NoSuchDevice {
        /// What was asked for.
        index: u16,
        /// How many there are.
        count: usize,
    },
    /// There are no kernels for the GPU.
    #[error("{name} has compute capability {}.{}; needed is 7.0 (Volta) or newer", compute.0, compute.1)]
    DeviceTooOld {
        /// Its name.
        name: String,
        /// Major and minor.
        compute: (i32, i32),
    },
    /// The GPU's memory is full.
    #[error(
        "cuda:{index} has no room for {wanted} bytes: {free} of {total} bytes are free; \
         use a smaller context, or move modules to the CPU"
    )]
    OutOfMemory {
        /// Which GPU.
        index: u16,
        /// Bytes asked for.
        wanted: usize,
        /// Bytes free.
        free: usize,
        /// Bytes that it has.
        total: usize,
    },
    /// The system refused memory that the GPU can read.
    #[error(
        "the system refused {wanted} bytes of pinned memory; use a smaller context or chunk size, or raise `ulimit -l`"
    )]
    OutOfPinned {
        /// Bytes asked for.
        wanted: usize,
    },
    /// A kernel waited for the CPU longer than it may.
    #[error("the GPU waited more than {seconds} s for the CPU's part of a step and gave up")]
    HandoverTimeout {
        /// How long.
        seconds: u32,
    },
    /// The GPU failed in a way that leaves nothing usable on it in this process.
    #[error(
        "the GPU is lost to this process: {call}: {name}: {text}; start the program again, and if it comes back look \
         for `Xid` in the system's log"
    )]
    Lost {
        /// The driver's function that told so.
        call: &'static str,
        /// The error's name.
        name: String,
        /// The driver's explanation.
        text: String,
    },
    /// The driver reports an error.
    #[error("CUDA: {call}: {name}: {text}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// The error's name.
        name: String,
        /// The driver's explanation.
        text: String,
    },
    /// The kernels that were compiled ahead of time lack one.
    #[error("the built-in kernels have no `{function}` in `{module}` for this GPU")]
    NoKernel {
        /// The source file, without its ending.
        module: &'static str,
        /// The kernel.
        function: String,
    },
}

impl CudaError {
    /// Whether the environment variable `KTX_GPUS` asks for what cannot be.
    pub(super) fn is_wrong_choice(&self) -> bool {
        matches!(self, Self::BadGpuList { .. } | Self::UnknownGpu { .. })
    }
}

/// Turns the driver's answer into an error.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the driver writes a pointer to a static string, or null for an unknown code.
        unsafe {
            match get(result, &mut text) {
                CUresult::CUDA_SUCCESS if !text.is_null() => std::ffi::CStr::from_ptr(text)
                    .to_string_lossy()
                    .into_owned(),
                _ => format!("{result:?}"),
            }
        }
    };
    let (name, text) = (text(sys::cuGetErrorName), text(sys::cuGetErrorString));
    Err(match is_sticky(result) {
        true => CudaError::Lost { call, name, text },
        false => CudaError::Driver { call, name, text },
    })
}

/// Whether every later call gives the same answer: the context is corrupted or gone.
fn is_sticky(result: CUresult) -> bool {
    use CUresult::*;
    matches!(
        result,
        CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_DEVICE_UNAVAILABLE
    )
}

/// Calls a function of the driver and checks its answer.
macro_rules! cu {
    ($function:ident($($arg:expr),* $(,)?)) => {
        $crate::cuda::error::check(
            stringify!($function),
            cudarc::driver::sys::$function($($arg),*),
        )
    };
}
pub(super) use cu;
