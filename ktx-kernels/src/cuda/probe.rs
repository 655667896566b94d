//! Which GPUs there are, found out without a panic on any machine.

use std::ffi::c_int;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute_enum as Attribute};

use super::chosen;
use super::error::{CudaError, OLDEST_COMPUTE, OLDEST_DRIVER, cu};

/// What is known of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuInfo {
    /// Its number: `cuda:index`.
    pub index: u16,
    /// The driver's number of it.
    pub ordinal: u16,
    /// How many GPUs are made of it ([`GPUS_VARIABLE`](super::GPUS_VARIABLE)): 1, if nobody asks for more.
    pub shares: usize,
    /// Its name, as the driver has it.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of its memory; of its share, where there are several.
    pub memory: usize,
    /// Nominal bandwidth of its memory, bytes a second; 0 if the driver does not say.
    pub nominal_bandwidth: u64,
    /// Shared memory that one block can have, bytes.
    pub shared_per_block: usize,
    /// Whether it shares main memory with the CPU.
    pub integrated: bool,
}

/// The driver, initialised.
#[derive(Debug, Clone)]
pub struct Driver {
    /// CUDA version that it supports: 12040 is 12.4.
    pub version: i32,
    /// GPUs that are used, those that are too old too.
    pub devices: Vec<GpuInfo>,
}

/// The driver and its GPUs; asked once for a process.
///
/// # Errors
/// What is missing: the driver, a newer one, or a GPU.
pub fn driver() -> Result<&'static Driver, CudaError> {
    static DRIVER: OnceLock<Result<Driver, CudaError>> = OnceLock::new();
    DRIVER.get_or_init(probe).as_ref().map_err(Clone::clone)
}

/// Whether the GPUs that [`GPUS_VARIABLE`](super::GPUS_VARIABLE) asks for are there; a machine without a driver
/// has nothing to choose from.
///
/// # Errors
/// [`CudaError::BadGpuList`] and [`CudaError::UnknownGpu`].
pub fn check_choice() -> Result<(), CudaError> {
    match driver() {
        Err(error) if error.is_wrong_choice() => Err(error),
        _ => Ok(()),
    }
}

/// The GPU of that number, if there are kernels for it.
///
/// # Errors
/// As [`driver`], and if there is no such GPU or it is too old.
pub fn device(index: u16) -> Result<&'static GpuInfo, CudaError> {
    let driver = driver()?;
    let info = driver
        .devices
        .get(usize::from(index))
        .ok_or(CudaError::NoSuchDevice {
            index,
            count: driver.devices.len(),
        })?;
    if info.compute < OLDEST_COMPUTE {
        return Err(CudaError::DeviceTooOld {
            name: info.name.clone(),
            compute: info.compute,
        });
    }
    Ok(info)
}

/// Functions whose presence tells that the driver is new enough; the newest that is called is among them.
const SYMBOLS: [&str; 3] = [
    "cuDriverGetVersion",
    "cuDevicePrimaryCtxRetain",
    "cuGraphInstantiateWithFlags",
];

fn probe() -> Result<Driver, CudaError> {
    let wanted = chosen::wanted()?;
    // SAFETY: loads the driver's library, if there is one; its initialisers are trusted as the driver is.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    for symbol in SYMBOLS {
        // SAFETY: the library was found a moment ago; the symbol is only looked up.
        let found =
            unsafe { sys::culib().get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_ok();
        if !found {
            return Err(CudaError::MissingSymbol { symbol });
        }
    }
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { cu!(cuDriverGetVersion(&mut version)) }?;
    if version < OLDEST_DRIVER {
        return Err(CudaError::DriverTooOld { version });
    }
    // SAFETY: no pointers.
    let started = unsafe { sys::cuInit(0) };
    if started == sys::CUresult::CUDA_ERROR_NO_DEVICE {
        return Err(CudaError::NoDevice);
    }
    super::error::check("cuInit", started)?;
    let mut count = 0;
    // SAFETY: writes one integer.
    unsafe { cu!(cuDeviceGetCount(&mut count)) }?;
    let count = u16::try_from(count).unwrap_or(0);
    if count == 0 {
        return Err(CudaError::NoDevice);
    }
    let chosen = chosen::chosen(wanted, count)?;
    let devices = (0..)
        .zip(&chosen)
        .map(|(index, ordinal)| {
            let shares = chosen.iter().filter(|other| *other == ordinal).count();
            info(index, *ordinal, shares)
        })
        .collect::<Result<_, _>>()?;
    Ok(Driver { version, devices })
}

/// What the driver says of its GPU `ordinal`.
pub(super) fn info(index: u16, ordinal: u16, shares: usize) -> Result<GpuInfo, CudaError> {
    let mut device: CUdevice = 0;
    // SAFETY: writes one handle; the driver is initialised.
    unsafe { cu!(cuDeviceGet(&mut device, c_int::from(ordinal))) }?;
    let mut name = [0; 256];
    // SAFETY: writes at most 256 bytes with their terminating zero.
    unsafe { cu!(cuDeviceGetName(name.as_mut_ptr(), 256, device)) }?;
    let name: Vec<u8> = name
        .iter()
        .take_while(|c| **c != 0)
        .map(|c| *c as u8)
        .collect();
    let mut memory = 0;
    // SAFETY: writes one integer.
    unsafe { cu!(cuDeviceTotalMem_v2(&mut memory, device)) }?;
    let get = |attribute| {
        let mut value = 0;
        // SAFETY: writes one integer.
        unsafe { cu!(cuDeviceGetAttribute(&mut value, attribute, device)) }.map(|()| value)
    };
    let size = |attribute| get(attribute).map(|v| usize::try_from(v).unwrap_or(0));
    let clock_khz = size(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).unwrap_or(0) as u64;
    let bus_bits = size(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH).unwrap_or(0) as u64;
    Ok(GpuInfo {
        index,
        ordinal,
        shares,
        name: String::from_utf8_lossy(&name).into_owned(),
        compute: (
            get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: size(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory: memory / shares,
        // Two transfers a clock.
        nominal_bandwidth: 2 * clock_khz * 1000 * bus_bits / 8,
        shared_per_block: size(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        integrated: get(Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0,
    })
}
