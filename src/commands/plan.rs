//! `ktx plan`: which operator goes where, and why, before anything is loaded.

use std::collections::{HashMap, HashSet};
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use ktx_core::kernels::device::Device;
use ktx_core::memory::{Bytes, ModuleWeights, module_weights};
use ktx_core::models::describe;
use ktx_core::ops::{Registry, try_registry};
use ktx_core::plan::{CheckMode, KeyStyle, Plan, PlanEntry, check, tree_from_json};
use ktx_core::rules::RuleSet;
use ktx_core::{EngineError, LoadedAdapter, PlannedModel, Rules};
use serde_json::Value;

use super::plan_source::ArchArgs;
use crate::chat;
use crate::error::CliError;
use crate::model_args::{EngineArgs, ModelSource, RuleArgs, variables};
use crate::notes;
use crate::table::{Align, Table};
use crate::terminal::{Paint, Style};
use crate::text_file::read_text;

const EXAMPLE: &str = "\
Examples:
  ktx plan                                                      the built-in model with its preset
  ktx plan --model model.gguf --rules my-rules.yaml --cpu
  ktx plan --model model.gguf --diff old-rules.yaml new-rules.yaml
  ktx plan --model model.gguf --lora adapter.gguf
  ktx plan --arch deepseek-v3-671b --quant Q4_K_M               a model that is not there
  ktx plan --model model.gguf --gpu-memory 14GiB                placed without rules, for this much memory
  ktx plan --arch mixtral-8x7b --gpu-memory 8GiB,8GiB --ram 32GiB --context 16384
  ktx plan --model model.gguf --gpu-memory 14GiB --emit-rules my-rules.yaml
  ktx plan --tree tree.json --rules my-rules.yaml --format json --keys hf";

const CANNOT: &str = "this machine cannot carry out the plan";

/// Print which operator the rules put in every module's place
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(super) source: ModelSource,

    #[command(flatten)]
    pub(super) arch: ArchArgs,

    /// JSON file of a module tree, {path: class path} with parents first, instead of a model; with --arch, sizes too
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "gguf_path", "safetensors"])]
    pub(super) tree: Option<PathBuf>,

    /// Print what changes from one rule file to another, in modules and in bytes on each device
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["rules", "format", "keys"])]
    diff: Option<Vec<PathBuf>>,

    #[command(flatten)]
    pub(super) rules: RuleArgs,

    /// Device of modules that no rule matches
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    pub(super) device: Device,

    /// Place modules without rules, and write the rules that come out to a file, or with - print them
    #[arg(long, value_name = "FILE|-", conflicts_with_all = ["rules", "tree", "diff"])]
    emit_rules: Option<PathBuf>,

    /// How the plan is printed
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,

    /// Names of weights in JSON: as in Hugging Face, which is the module's path, or as in GGUF files
    #[arg(long, value_name = "STYLE", default_value = "gguf")]
    keys: Keys,

    #[command(flatten)]
    pub(super) engine: EngineArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Keys {
    Hf,
    Gguf,
}

impl Keys {
    fn style(self) -> KeyStyle {
        match self {
            Self::Hf => KeyStyle::Hf,
            Self::Gguf => KeyStyle::Gguf,
        }
    }
}

/// Runs the command.
pub(crate) fn run(args: &PlanArgs) -> Result<(), CliError> {
    match (&args.diff, &args.tree) {
        (Some(files), _) => super::plan_diff::run(args, files),
        (None, Some(tree)) => of_tree(args, tree),
        (None, None) => of_model(args),
    }
}

fn of_tree(args: &PlanArgs, file: &Path) -> Result<(), CliError> {
    if !args.engine.adapters.adapters.is_empty() {
        return Err(CliError::Usage(
            "--lora needs a model: a tree does not say which tensors it has".to_owned(),
        ));
    }
    let registry = try_registry()?;
    let rules = read_rules(&args.rules)?;
    let tree = tree_from_json(&read_text(file)?, &file.display().to_string())?;
    let mut plan = ktx_core::plan::plan(&tree, &rules, &args.device.to_string())?;
    if args.rules.cpu {
        plan.map_devices_to_cpu(registry);
    }
    let report = check(&plan, &tree, registry, CheckMode::Tree);
    let weights = match args.arch.gguf()? {
        Some(gguf) => {
            let description = describe(&gguf).map_err(EngineError::from)?;
            module_weights(&description.tree, &plan, &gguf)?
        }
        None => Vec::new(),
    };
    match args.format {
        Format::Json => print_json(&plan.to_json(args.keys.style()))?,
        Format::Table => print(&plan, &weights, &[], registry)?,
    }
    plan.notes.iter().for_each(notes::note);
    plan.warnings.iter().for_each(notes::warning);
    report.warnings.iter().for_each(notes::warning);
    Ok(())
}

fn read_rules(args: &RuleArgs) -> Result<RuleSet, CliError> {
    let variables = variables(&args.set);
    Ok(match args.rules() {
        Rules::File(path) => RuleSet::from_path_with(path, &variables)?,
        Rules::Named(name) => RuleSet::from_preset_with(super::rules::preset(&name)?, &variables)?,
        Rules::Text { text, name } => RuleSet::parse_with(&text, &name, &variables)?,
        Rules::Preset | Rules::Auto(_) => {
            return Err(CliError::Usage(
                "a tree names no architecture: name --rules".to_owned(),
            ));
        }
    })
}

fn of_model(args: &PlanArgs) -> Result<(), CliError> {
    let builder = args.arch.builder(&args.source)?;
    let mut builder = args.engine.apply(args.rules.apply(builder));
    if args.emit_rules.is_some() {
        builder = builder.rules(Rules::Auto(args.rules.automatic()));
    }
    let planned = builder.default_device(&args.device.to_string()).plan()?;
    if !planned.report().is_ok() {
        return Err(EngineError::Check(planned.report().clone()).into());
    }
    let weights = planned.module_weights()?;
    let adapters = planned.adapters();
    let printed = emit_rules(args, &planned)?;
    if !printed {
        match args.format {
            Format::Json => print_json(&planned.to_json(args.keys.style()))?,
            Format::Table => print(planned.plan(), &weights, adapters, try_registry()?)?,
        }
    }
    match planned.placement() {
        Some(placement) => {
            notes::note(placement.to_string().trim_end());
            if let Err(error) = planned.require() {
                notes::warning(format_args!("{CANNOT}: {error}"));
            }
        }
        None => {
            notes::note(notes::rules(&planned));
            tell_memory(&planned, &weights);
        }
    }
    if let Some(line) = notes::streaming(&planned) {
        notes::note(line);
    }
    for loaded in adapters {
        let line = chat::adapters::describe(loaded);
        notes::note(format_args!("adapter {line}, scale {}", loaded.scale()));
    }
    tell_files(&planned, &weights);
    notes::about_plan(&planned);
    Ok(())
}

/// Writes the rules of an automatic placement where they are wanted; whether that is standard output.
fn emit_rules(args: &PlanArgs, planned: &PlannedModel) -> Result<bool, CliError> {
    let (Some(file), Some(placement)) = (&args.emit_rules, planned.placement()) else {
        return Ok(false);
    };
    let rules = placement
        .rules(planned.description())
        .map_err(EngineError::from)?;
    if file.as_os_str() == "-" {
        stdout().lock().write_all(rules.as_bytes())?;
        return Ok(true);
    }
    std::fs::write(file, rules).map_err(|source| CliError::Unwritable {
        path: file.clone(),
        source,
    })?;
    notes::note(format_args!("rules written to {}", file.display()));
    Ok(false)
}

/// How much comes from which files, where there are several kinds.
fn tell_files(planned: &PlannedModel, weights: &[ModuleWeights]) {
    let files = planned.weights();
    if files.beside().is_empty() {
        return;
    }
    let mut seen = HashSet::new();
    let (mut beside, mut gguf) = ((0, 0), (0, 0));
    for (name, bytes) in weights.iter().flat_map(|module| &module.tensors) {
        if seen.insert(name.as_str()) {
            let sum = if files.is_beside(name) {
                &mut beside
            } else {
                &mut gguf
            };
            *sum = (sum.0 + 1, sum.1 + bytes);
        }
    }
    let names: Vec<&str> = files.beside().iter().map(|set| set.name()).collect();
    for ((tensors, bytes), from) in [
        (beside, names.join(", ")),
        (gguf, files.gguf().name().to_owned()),
    ] {
        notes::note(format_args!(
            "{tensors} tensors, {} of weights, from {from}",
            Bytes(bytes)
        ));
    }
}

/// Memory for each device; without the parts that only a machine with all devices can tell, if this is none.
fn tell_memory(planned: &PlannedModel, weights: &[ModuleWeights]) {
    match planned.estimate() {
        Ok(estimate) => {
            for (device, memory) in &estimate.devices {
                notes::note(format_args!(
                    "{device}: {} of memory, {} of them weights, {} cache for a context of {}, {} activations, {} program",
                    Bytes(memory.total()),
                    Bytes(memory.weights),
                    Bytes(memory.kv),
                    planned.settings().context,
                    Bytes(memory.scratch),
                    Bytes(memory.process),
                ));
            }
        }
        Err(error) => {
            let mut devices: Vec<(Device, u64)> = Vec::new();
            for module in weights {
                match devices
                    .iter_mut()
                    .find(|(device, _)| *device == module.device)
                {
                    Some((_, bytes)) => *bytes += module.bytes,
                    None => devices.push((module.device, module.bytes)),
                }
            }
            devices.sort();
            for (device, bytes) in devices {
                notes::note(format_args!("{device}: {} of weights", Bytes(bytes)));
            }
            notes::warning(format_args!("{CANNOT}: {error}"));
        }
    }
}

fn print_json(plan: &Value) -> Result<(), CliError> {
    writeln!(stdout().lock(), "{plan:#}")?;
    Ok(())
}

fn print(
    plan: &Plan,
    weights: &[ModuleWeights],
    adapters: &[LoadedAdapter],
    registry: &Registry,
) -> Result<(), CliError> {
    let mut out = stdout().lock();
    let weights: HashMap<&str, &ModuleWeights> =
        weights.iter().map(|w| (w.path.as_str(), w)).collect();
    let mut table = Table::new([
        ("module", Align::Left),
        ("class", Align::Left),
        ("device", Align::Left),
        ("type", Align::Left),
        ("size", Align::Right),
        ("rule", Align::Left),
    ]);
    for entry in plan.entries() {
        let weights = weights.get(entry.path.as_str());
        table.push([
            if entry.path.is_empty() {
                "(root)".to_owned()
            } else {
                entry.path.clone()
            },
            adapted(entry, adapters),
            device(plan, entry, registry),
            weights.map_or_else(|| "-".to_owned(), |w| w.types.join(", ")),
            weights.map_or_else(
                || "-".to_owned(),
                |w| Bytes(w.bytes + adapter_bytes(&entry.path, adapters)).to_string(),
            ),
            entry.rule.as_ref().map_or_else(
                || "-".to_owned(),
                |rule| match rule.is_included {
                    true => format!("{}:{}", rule.location.file, rule.location.line),
                    false => format!("line {}", rule.location.line),
                },
            ),
        ]);
    }
    Ok(table.write_painted(&mut out, Style::of_stdout(), &paint)?)
}

/// Devices in their colours, and what says little faint.
fn paint(column: usize, cell: &str) -> Paint {
    const GPUS: [Paint; 3] = [Paint::Yellow, Paint::Magenta, Paint::Blue];
    match (column, cell) {
        (_, "-") | (5, _) => Paint::Faint,
        (2, "cpu") => Paint::Green,
        // One for each phase.
        (2, both) if both.contains(' ') => Paint::Cyan,
        (2, device) => {
            let index = device
                .rsplit_once(':')
                .and_then(|(_, index)| index.parse::<usize>().ok());
            index.map_or(Paint::Plain, |index| GPUS[index % GPUS.len()])
        }
        _ => Paint::Plain,
    }
}

/// The class, and `KLinearLora` around it where an adapter adapts the module.
fn adapted(entry: &PlanEntry, adapters: &[LoadedAdapter]) -> String {
    match adapter_bytes(&entry.path, adapters) {
        0 => class(entry),
        _ => format!("KLinearLora({})", class(entry)),
    }
}

/// Bytes of all adapters' matrices for the module at a path.
fn adapter_bytes(path: &str, adapters: &[LoadedAdapter]) -> u64 {
    let parts = adapters.iter().filter_map(|a| a.adapter().part(path));
    parts.map(|part| part.bytes()).sum()
}

/// The last part of the class path, with the operators of the two phases where a rule names them.
fn class(entry: &PlanEntry) -> String {
    let Some(class) = &entry.class else {
        return "null".to_owned();
    };
    let leaf = class.rsplit('.').next().unwrap_or(class);
    let op = |name: &str| entry.kwarg(name).and_then(|v| v.as_str());
    match (op("prefill_op"), op("generate_op")) {
        (None, None) => leaf.to_owned(),
        (Some(prefill), Some(generate)) if prefill == generate => format!("{leaf}({generate})"),
        (prefill, generate) => {
            let named = |phase: &str, op: Option<&str>| op.map(|op| format!("{phase} {op}"));
            let phases: Vec<String> = [named("prefill", prefill), named("generate", generate)]
                .into_iter()
                .flatten()
                .collect();
            format!("{leaf}({})", phases.join(", "))
        }
    }
}

/// One device, or one for each phase.
fn device(plan: &Plan, entry: &PlanEntry, registry: &Registry) -> String {
    match plan.placement(entry, registry) {
        Ok(placement) if placement.prefill == placement.generate => placement.generate.to_string(),
        Ok(placement) => format!(
            "prefill {}, generate {}",
            placement.prefill, placement.generate
        ),
        Err(_) => "?".to_owned(),
    }
}
