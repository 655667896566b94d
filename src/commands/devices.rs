//! `ktx devices`: where modules can be put on this machine.

use std::io::{Write, stdout};

use clap::Args;
use ktx_core::EngineError;
use ktx_core::kernels::cpu::{CPU_VARIABLE, IsaLevel, detected, requested};
use ktx_core::kernels::pool::ThreadPool;
use ktx_core::memory::{Bytes, available_host_memory};
use serde_json::json;

use crate::error::CliError;

const EXAMPLE: &str = "\
Examples:
  ktx devices
  KTX_CPU=portable ktx devices";

/// List the devices that rules can name, and what they have
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const NO_GPU: &str = "this build has no CUDA operators; `--cpu` runs rules for GPUs on the CPU";

/// Runs the command.
pub(crate) fn run(args: &DevicesArgs) -> Result<(), CliError> {
    let used = requested().map_err(EngineError::from)?;
    let levels: Vec<&str> = IsaLevel::supported().map(IsaLevel::name).collect();
    let threads = ThreadPool::default_threads();
    let memory = available_host_memory();
    let mut out = stdout().lock();
    if args.json {
        let cpu = json!({
            "instruction_sets": levels,
            "instruction_set": used.name(),
            "threads": threads,
            "available_bytes": memory,
        });
        writeln!(out, "{}", json!({ "cpu": cpu, "cuda": [] }))?;
        return Ok(());
    }
    let forced = match used == detected() {
        true => String::new(),
        false => format!(", as {CPU_VARIABLE} says"),
    };
    writeln!(
        out,
        "cpu    instruction sets  {} (kernels use {used}{forced})",
        levels.join(", ")
    )?;
    writeln!(out, "       threads           {threads}")?;
    let memory = memory.map_or_else(
        || "unknown on this system".to_owned(),
        |m| Bytes(m).to_string(),
    );
    writeln!(out, "       available memory  {memory}")?;
    Ok(writeln!(out, "cuda   {NO_GPU}")?)
}
