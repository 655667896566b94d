//! What `ktx devices` says of GPUs.

use std::io::{self, Write};

use ktx_core::kernels::cuda::{self, CudaError, Gpu, GpuInfo};
use ktx_core::memory::Bytes;
use serde_json::{Value, json};

/// One GPU with what was measured of it.
struct Found {
    info: &'static GpuInfo,
    state: Result<Measured, CudaError>,
}

struct Measured {
    free: usize,
    bandwidth: f64,
}

/// All GPUs of the driver.
pub(crate) struct Gpus(Result<(i32, Vec<Found>), CudaError>);

impl Gpus {
    /// Asks the driver, and measures.
    pub(crate) fn find() -> Self {
        let found = |driver: &'static cuda::Driver| {
            let each = driver.devices.iter().map(|info| Found {
                info,
                state: measure(info),
            });
            (driver.version, each.collect())
        };
        Self(cuda::driver().map(found))
    }

    /// As a list for JSON.
    pub(crate) fn json(&self) -> Value {
        let Ok((_, gpus)) = &self.0 else {
            return json!([]);
        };
        let each = gpus.iter().map(|gpu| {
            let (state, error) = (gpu.state.as_ref().ok(), gpu.state.as_ref().err());
            json!({
                "device": format!("cuda:{}", gpu.info.index),
                "model": gpu.info.name,
                "driver_index": gpu.info.ordinal,
                "compute_capability": format!("{}.{}", gpu.info.compute.0, gpu.info.compute.1),
                "total_bytes": gpu.info.memory,
                "available_bytes": state.map(|s| s.free),
                "nominal_bandwidth": gpu.info.nominal_bandwidth,
                "bandwidth": state.map(|s| s.bandwidth),
                "error": error.map(ToString::to_string),
            })
        });
        Value::Array(each.collect())
    }

    /// Why there are none, if so.
    pub(crate) fn problem(&self) -> Option<String> {
        self.0.as_ref().err().map(ToString::to_string)
    }

    /// As lines of the table.
    pub(crate) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let (version, gpus) = match &self.0 {
            Ok(found) => found,
            Err(error) => {
                writeln!(out, "{:<6} {error}", "cuda")?;
                return writeln!(out, "{:<6} `--cpu` runs rules for GPUs on the CPU", "");
            }
        };
        for gpu in gpus {
            let info = gpu.info;
            let (major, minor) = info.compute;
            let mut rows = vec![
                ("model", model(info)),
                (
                    "generation",
                    format!(
                        "compute capability {major}.{minor}, {} multiprocessors; driver with CUDA {}.{}",
                        info.multiprocessors,
                        version / 1000,
                        version % 1000 / 10
                    ),
                ),
            ];
            match &gpu.state {
                Ok(state) => rows.extend([
                    (
                        "memory",
                        format!(
                            "{}, {} of it free",
                            Bytes(info.memory as u64),
                            Bytes(state.free as u64)
                        ),
                    ),
                    ("memory speed", format!("{:.0} GB/s", state.bandwidth / 1e9)),
                    ("kernels", enabled(info.compute).to_owned()),
                ]),
                Err(error) => rows.push(("not usable", error.to_string())),
            }
            for (index, (name, value)) in rows.iter().enumerate() {
                let device = match index {
                    0 => format!("cuda:{}", info.index),
                    _ => String::new(),
                };
                writeln!(out, "{device:<6} {name:<17} {value}")?;
            }
        }
        Ok(())
    }
}

/// The name, and which of the driver's GPUs it is where that is not what its number says.
fn model(info: &GpuInfo) -> String {
    let GpuInfo { name, ordinal, .. } = info;
    match (info.shares, info.index == *ordinal) {
        (1, true) => name.clone(),
        (1, false) => format!("{name}, the driver's GPU {ordinal}"),
        (shares, _) => format!("{name}, the driver's GPU {ordinal}, one of {shares} shares of it"),
    }
}

fn measure(info: &GpuInfo) -> Result<Measured, CudaError> {
    cuda::device(info.index)?;
    let gpu = Gpu::open(info.index)?;
    let bandwidth = gpu.measured_bandwidth()?;
    Ok(Measured {
        free: gpu.memory()?.0,
        bandwidth,
    })
}

/// What a generation's kernels use.
fn enabled(compute: (i32, i32)) -> &'static str {
    match compute {
        (7, _) => "tensor cores with f16",
        _ => "tensor cores with f16 and bf16, asynchronous copies",
    }
}
