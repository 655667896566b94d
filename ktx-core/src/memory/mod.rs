//! How much memory a plan takes, per device and before anything is loaded; and how much there is.

pub(crate) mod working;

use std::collections::BTreeMap;
use std::fmt;

use ktx_kernels::device::Device;
use ktx_ops::sizes::sizes_of;
use ktx_ops::{Module, OpError, Placement, WeightStore, registry};

use crate::inject::is_whole;
use crate::plan::Plan;

/// Memory on one device, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Weights, each counted once, and what operators make of them at load.
    pub weights: u64,
    /// Cache of keys and values for the whole context of one session.
    pub kv: u64,
    /// Activations, and what products and threads work in.
    pub scratch: u64,
    /// The program itself with what it holds of the file, or on a GPU its driver and kernels.
    pub process: u64,
}

/// What the program takes of main memory before it has a model: code, its threads' stacks, and what
/// the allocator keeps.
pub const PROCESS_BYTES: u64 = 8 << 20;

impl DeviceMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights
            .saturating_add(self.kv)
            .saturating_add(self.scratch)
            .saturating_add(self.process)
    }
}

/// Memory that a model takes, per device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// By device.
    pub devices: BTreeMap<Device, DeviceMemory>,
}

impl MemoryEstimate {
    /// What one device holds.
    pub fn device(&self, device: Device) -> DeviceMemory {
        self.devices.get(&device).copied().unwrap_or_default()
    }

    /// What all of main memory holds, whatever index rules give to parts of it.
    pub fn host(&self) -> DeviceMemory {
        self.devices.iter().filter(|(d, _)| d.is_cpu()).fold(
            DeviceMemory::default(),
            |sum, (_, m)| DeviceMemory {
                weights: sum.weights + m.weights,
                kv: sum.kv + m.kv,
                scratch: sum.scratch + m.scratch,
                process: sum.process + m.process,
            },
        )
    }
}

/// Weights of one module, as its operator takes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleWeights {
    /// The module's path.
    pub path: String,
    /// Where they are in the generate phase.
    pub device: Device,
    /// Their bytes in the file.
    pub bytes: u64,
    /// Their types, each once.
    pub types: Vec<&'static str>,
    /// The tensors, by name, with their bytes. Modules can share one: a tied output head.
    pub tensors: Vec<(String, u64)>,
}

/// The weights of every module that has some, in the tree's order; tensors are checked against the
/// shapes that the metadata promise.
///
/// # Errors
/// [`OpError`] if a tensor is missing or has another shape, or a device does not parse.
pub fn module_weights(
    tree: &Module,
    plan: &Plan,
    store: &dyn WeightStore,
) -> Result<Vec<ModuleWeights>, OpError> {
    let mut all = Vec::new();
    collect(tree, plan, store, &mut all)?;
    Ok(all)
}

/// Where a module is when tokens are generated.
fn generate_device(plan: &Plan, module: &Module) -> Result<Device, OpError> {
    placement(plan, module).map(|placement| placement.generate)
}

/// Where a module is in each phase.
fn placement(plan: &Plan, module: &Module) -> Result<Placement, OpError> {
    plan.placement_at(&module.path, registry())
        .map_err(|e| OpError::Unfit {
            path: module.path.clone(),
            message: e.to_string(),
            location: None,
        })
}

fn collect(
    module: &Module,
    plan: &Plan,
    store: &dyn WeightStore,
    all: &mut Vec<ModuleWeights>,
) -> Result<(), OpError> {
    let entry = plan.entry(&module.path);
    let whole = is_whole(module, entry);
    let tensors = sizes_of(module, whole, store)?;
    if !tensors.is_empty() {
        let mut types: Vec<&'static str> = tensors.iter().map(|t| t.ty.name()).collect();
        types.dedup();
        let tensors: Vec<(String, u64)> = tensors.into_iter().map(|t| (t.name, t.bytes)).collect();
        all.push(ModuleWeights {
            path: module.path.clone(),
            device: generate_device(plan, module)?,
            bytes: tensors.iter().map(|(_, bytes)| bytes).sum(),
            types,
            tensors,
        });
    }
    if whole {
        return Ok(());
    }
    module
        .children
        .iter()
        .try_for_each(|child| collect(child, plan, store, all))
}

/// Bytes as people read them: `1.5 GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let text = if unit == 0 {
            format!("{} B", self.0)
        } else {
            format!("{value:.1} {}", UNITS[unit])
        };
        f.pad(&text)
    }
}

/// Main memory that this process can still take, in bytes, where the system tells: what the kernel
/// calls available, or what is left of the control group's limit if that is less.
pub fn available_host_memory() -> Option<u64> {
    let system = meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let group = group_limit(
        read("memory.max"),
        read("memory.current"),
        read("memory.stat"),
    );
    Some(group.map_or(system, |left| left.min(system)))
}

fn meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Nothing if there is no limit. What the group uses for cached files is given back when it is needed.
fn group_limit(max: Option<String>, current: Option<String>, stat: Option<String>) -> Option<u64> {
    let number = |text: Option<String>| text?.trim().parse::<u64>().ok();
    let cached = stat.as_deref().and_then(|s| {
        s.lines()
            .find_map(|l| l.strip_prefix("file "))?
            .parse::<u64>()
            .ok()
    });
    let used = number(current)?.saturating_sub(cached.unwrap_or(0));
    Some(number(max)?.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_from_the_kernels_text() {
        assert_eq!(
            meminfo("MemTotal: 8 kB\nMemAvailable:   24103 kB\n"),
            Some(24103 * 1024)
        );
        assert_eq!(meminfo("MemTotal: 8 kB\n"), None);
        let text = |t: &str| Some(t.to_owned());
        assert_eq!(group_limit(text("max\n"), text("10\n"), None), None);
        assert_eq!(group_limit(text("100\n"), text("30\n"), None), Some(70));
        assert_eq!(
            group_limit(text("100\n"), text("30\n"), text("anon 1\nfile 20\n")),
            Some(90)
        );
    }

    #[test]
    fn bytes_read_well() {
        assert_eq!(Bytes(512).to_string(), "512 B");
        assert_eq!(Bytes(3 << 30).to_string(), "3.0 GiB");
    }
}
