//! `ktx devices`: where modules can be put on this machine, and how fast it is.

use std::io::{Write, stdout};

use clap::Args;
use ktx_core::EngineError;
use ktx_core::kernels::cpu::{CPU_VARIABLE, IsaLevel, detected, requested};
use ktx_core::kernels::cuda::check_choice;
use ktx_core::kernels::pool::ThreadPool;
use ktx_core::memory::{Bytes, available_host_memory};
use ktx_core::placement::CpuSpeed;
use ktx_core::placement::measure::{cpu_model, cpu_speed, remeasured};
use serde_json::json;

use super::device_cuda::Gpus;
use crate::error::CliError;
use crate::host::Host;

const EXAMPLE: &str = "\
The speed is measured once, in less than a second, and kept in the user's cache directory; predictions use it.

Examples:
  ktx devices
  ktx devices --measure
  KTX_CPU=portable ktx devices

KTX_GPUS chooses GPUs by the driver's numbers: with KTX_GPUS=2,0 the driver's GPU 2 is cuda:0. A number that is there
twice makes two of one GPU, with half of its memory each, to try rules for several GPUs:
  KTX_GPUS=0,0 ktx devices";

/// List the devices that rules can name, what they have, and how fast they are
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,

    /// Measure the speed anew
    #[arg(long)]
    measure: bool,
}

/// Runs the command.
pub(crate) fn run(args: &DevicesArgs) -> Result<(), CliError> {
    let used = requested().map_err(EngineError::from)?;
    check_choice().map_err(EngineError::Gpus)?;
    let threads = ThreadPool::default_threads();
    let speed = match args.measure {
        true => remeasured(threads),
        false => cpu_speed(threads),
    };
    let host = Host::read();
    let gpus = Gpus::find();
    match args.json {
        true => print_json(used, &host, &speed, &gpus),
        false => print_text(used, &host, &speed, &gpus),
    }
}

fn instruction_sets() -> Vec<&'static str> {
    IsaLevel::supported().map(IsaLevel::name).collect()
}

fn print_json(used: IsaLevel, host: &Host, speed: &CpuSpeed, gpus: &Gpus) -> Result<(), CliError> {
    let cpu = json!({
        "model": cpu_model(),
        "instruction_sets": instruction_sets(),
        "instruction_set": used.name(),
        "threads": ThreadPool::default_threads(),
        "affinity": host.affinity,
        "cgroup_cpus": host.quota,
        "numa_nodes": host.numa,
        "transparent_huge_pages": host.transparent_huge_pages,
        "huge_pages": host.huge_pages,
        "total_bytes": host.total_memory,
        "available_bytes": available_host_memory(),
        "speed": speed.to_json(),
    });
    writeln!(
        stdout().lock(),
        "{}",
        json!({ "cpu": cpu, "cuda": gpus.json(), "cuda_problem": gpus.problem() })
    )?;
    Ok(())
}

fn print_text(used: IsaLevel, host: &Host, speed: &CpuSpeed, gpus: &Gpus) -> Result<(), CliError> {
    let unknown = || "unknown on this system".to_owned();
    let bytes = |memory: Option<u64>| memory.map_or_else(unknown, |m| Bytes(m).to_string());
    let forced = match used == detected() {
        true => String::new(),
        false => format!(", as {CPU_VARIABLE} says"),
    };
    let quota = host.quota.map_or_else(String::new, |cpus| {
        format!(", the control group allows {cpus:.1}")
    });
    let nodes: Vec<String> = host
        .numa
        .iter()
        .enumerate()
        .map(|(node, cpus)| format!("{node}: CPUs {cpus}"))
        .collect();
    let rows = [
        ("model", cpu_model().unwrap_or_else(unknown)),
        (
            "instruction sets",
            format!(
                "{} (kernels use {used}{forced})",
                instruction_sets().join(", ")
            ),
        ),
        (
            "threads",
            format!(
                "{} (may run on CPUs {}{quota})",
                ThreadPool::default_threads(),
                host.affinity.clone().unwrap_or_else(unknown)
            ),
        ),
        (
            "NUMA nodes",
            match nodes.is_empty() {
                true => unknown(),
                false => nodes.join("; "),
            },
        ),
        (
            "huge pages",
            format!(
                "transparent: {}; set aside: {}",
                host.transparent_huge_pages.clone().unwrap_or_else(unknown),
                host.huge_pages.map_or_else(unknown, |n| n.to_string())
            ),
        ),
        (
            "memory",
            format!(
                "{}, {} of it available",
                bytes(host.total_memory),
                bytes(available_host_memory())
            ),
        ),
        ("memory speed", format!("{:.1} GB/s", speed.bandwidth / 1e9)),
    ];
    let mut out = stdout().lock();
    for (index, (name, value)) in rows.iter().enumerate() {
        let device = if index == 0 { "cpu" } else { "" };
        writeln!(out, "{device:<6} {name:<17} {value}")?;
    }
    for rate in &speed.rates {
        writeln!(
            out,
            "{:<6} {:<17} generate {:.1} GB/s, prompts {:.0} GFLOP/s",
            "",
            format!("{} products", rate.ty),
            rate.stream / 1e9,
            rate.flops / 1e9
        )?;
    }
    Ok(gpus.print(&mut out)?)
}
