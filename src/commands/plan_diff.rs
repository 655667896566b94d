//! `ktx plan --diff`: what changes from one rule file to another.

use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use ktx_core::Rules;
use ktx_core::kernels::device::Device;
use ktx_core::memory::Bytes;
use ktx_core::ops::try_registry;
use ktx_core::plan::{Plan, PlanSide, plan, plan_diff, tree_from_json};
use ktx_core::rules::RuleSet;

use super::plan::PlanArgs;
use crate::error::CliError;
use crate::model_args::variables;
use crate::table::{Align, Table};
use crate::text_file::read_text;

/// Bytes of weights on each device.
type Weights = BTreeMap<Device, u64>;

/// Runs the command on two rule files.
pub(super) fn run(args: &PlanArgs, files: &[PathBuf]) -> Result<(), CliError> {
    let [first, second] = files else {
        return Err(CliError::Usage("`--diff` takes two rule files".to_owned()));
    };
    let ((before, weights_before), (after, weights_after)) =
        (planned(args, first)?, planned(args, second)?);
    let changes = plan_diff(&before, &after);
    let mut table = Table::new([
        ("module", Align::Left),
        ("before", Align::Left),
        ("after", Align::Left),
    ]);
    for change in &changes {
        let (old, new) = (change.before.as_ref(), change.after.as_ref());
        table.push([change.path.clone(), told(old, new), told(new, old)]);
    }
    let mut out = stdout().lock();
    if !changes.is_empty() {
        table.write(&mut out)?;
    }
    writeln!(
        out,
        "{} of {} modules change",
        changes.len(),
        before.entries().len()
    )?;
    for device in weights_before.keys().chain(
        weights_after
            .keys()
            .filter(|d| !weights_before.contains_key(d)),
    ) {
        let bytes = |weights: &Weights| Bytes(weights.get(device).copied().unwrap_or(0));
        let (old, new) = (bytes(&weights_before), bytes(&weights_after));
        writeln!(out, "{device}: {old} of weights before, {new} after")?;
    }
    Ok(())
}

/// The plan that a rule file makes, and the weights of its devices where the model is known.
fn planned(args: &PlanArgs, file: &Path) -> Result<(Plan, Weights), CliError> {
    let device = args.device.to_string();
    if let Some(tree) = &args.tree {
        let tree = tree_from_json(&read_text(tree)?, &tree.display().to_string())?;
        let rules = RuleSet::from_path_with(file, &variables(&args.rules.set))?;
        let mut plan = plan(&tree, &rules, &device)?;
        if args.rules.cpu {
            plan.map_devices_to_cpu(try_registry()?);
        }
        return Ok((plan, Weights::new()));
    }
    let builder = args.arch.builder(&args.source)?;
    let builder = args.engine.apply(args.rules.apply(builder));
    let planned = builder
        .rules(Rules::File(file.to_owned()))
        .default_device(&device)
        .plan()?;
    let mut weights = Weights::new();
    for module in planned.module_weights()? {
        *weights.entry(module.device).or_default() += module.bytes;
    }
    Ok((planned.plan().clone(), weights))
}

/// One side of a change in words: the class, and the arguments that differ.
fn told(side: Option<&PlanSide>, other: Option<&PlanSide>) -> String {
    let Some(side) = side else {
        return "(below a module that keeps its own)".to_owned();
    };
    let class = side.class.as_deref().unwrap_or("null");
    let leaf = class.rsplit('.').next().unwrap_or(class);
    match side.differing(other) {
        kwargs if kwargs.is_empty() => leaf.to_owned(),
        kwargs => format!("{leaf} {{{}}}", kwargs.join(", ")),
    }
}
