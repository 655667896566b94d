//! What the system says about this machine and about what this process may use of it.

use std::fs::read_to_string;

/// What could be found out; every field may be missing on other systems than Linux.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Host {
    /// Logical CPUs that the scheduler lets this process run on: `0-3,8`.
    pub(crate) affinity: Option<String>,
    /// CPUs' worth of time that the control group allows.
    pub(crate) quota: Option<f64>,
    /// Logical CPUs of each NUMA node.
    pub(crate) numa: Vec<String>,
    /// When the kernel backs memory with huge pages by itself: `madvise`.
    pub(crate) transparent_huge_pages: Option<String>,
    /// Huge pages that are set aside.
    pub(crate) huge_pages: Option<u64>,
    /// Main memory in bytes.
    pub(crate) total_memory: Option<u64>,
}

impl Host {
    /// Asks the system.
    pub(crate) fn read() -> Self {
        let text = |path: &str| read_to_string(path).unwrap_or_default();
        let meminfo = text("/proc/meminfo");
        Self {
            affinity: field(&text("/proc/self/status"), "Cpus_allowed_list"),
            quota: quota(&text("/sys/fs/cgroup/cpu.max")),
            numa: numa_nodes(),
            transparent_huge_pages: chosen(&text("/sys/kernel/mm/transparent_hugepage/enabled")),
            huge_pages: field(&meminfo, "HugePages_Total").and_then(|n| n.parse().ok()),
            total_memory: field(&meminfo, "MemTotal")
                .and_then(|n| n.strip_suffix("kB")?.trim().parse::<u64>().ok())
                .map(|kib| kib * 1024),
        }
    }
}

/// The value of `name: value`.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    Some(line.strip_prefix(':')?.trim().to_owned())
}

/// `200000 100000`: microseconds of each period; `max` is no limit.
fn quota(text: &str) -> Option<f64> {
    let (allowed, period) = text.trim().split_once(' ')?;
    let (allowed, period): (f64, f64) = (allowed.parse().ok()?, period.parse().ok()?);
    (period > 0.0).then(|| allowed / period)
}

/// The word in brackets: `always [madvise] never`.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

fn numa_nodes() -> Vec<String> {
    (0..1024)
        .map_while(|node| {
            read_to_string(format!("/sys/devices/system/node/node{node}/cpulist")).ok()
        })
        .map(|list| list.trim().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_texts_are_read() {
        assert_eq!(
            field("A:\t1\nCpus_allowed_list:\t0-3,8\n", "Cpus_allowed_list").as_deref(),
            Some("0-3,8")
        );
        assert_eq!(field("", "A"), None);
        assert_eq!(quota("150000 100000\n"), Some(1.5));
        assert_eq!(quota("max 100000\n"), None);
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(chosen(""), None);
    }
}
