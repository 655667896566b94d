//! `ktx rules check`: mistakes in a rule file, found without running anything.

use std::fmt::Display;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use ktx_core::engine::available_devices;
use ktx_core::kernels::device::Device;
use ktx_core::ops::{Module, try_registry};
use ktx_core::plan::{CheckMode, CheckReport, DeviceError, Plan, check, fix, plan, tree_from_json};
use ktx_core::rules::{
    Rule, RuleError, RuleSet, lint, lint_device_names, lint_missing_devices, lint_plan,
};
use ktx_core::{Engine, EngineError, Rules};

use crate::error::CliError;
use crate::model_args::{Assignment, assignment, set_variables, variables};
use crate::text_file::read_text;

const EXAMPLE: &str = "\
Examples:
  ktx rules check my-rules.yaml
  ktx rules check my-rules.yaml --model model.gguf
  ktx rules check my-rules.yaml --tree tree.json";

/// What is checked, and against what.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct CheckArgs {
    /// The rule file
    file: PathBuf,

    /// Check the rules on this model too: which match, and whether the operators fit
    #[arg(short, long, value_name = "FILE", conflicts_with = "tree")]
    model: Option<PathBuf>,

    /// Check the rules on this module tree too, {path: class path} in JSON
    #[arg(long, value_name = "FILE")]
    tree: Option<PathBuf>,

    /// Give a variable of the file a value, as in --set gpu=cuda:1; may be given several times
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = assignment)]
    set: Vec<Assignment>,

    /// Device of modules that no rule matches
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    device: Device,
}

/// Counts what is printed.
struct Findings<'a> {
    out: &'a mut dyn Write,
    errors: usize,
    warnings: usize,
}

impl Findings<'_> {
    fn error(&mut self, text: impl Display) -> Result<(), CliError> {
        self.errors += 1;
        Ok(writeln!(self.out, "error: {text}")?)
    }

    fn warning(&mut self, text: impl Display) -> Result<(), CliError> {
        self.warnings += 1;
        Ok(writeln!(self.out, "warning: {text}")?)
    }
}

/// Runs the command. A file with errors is an error.
pub(crate) fn run(args: &CheckArgs, out: &mut dyn Write) -> Result<(), CliError> {
    let rules = RuleSet::from_path_with(&args.file, &variables(&args.set))?;
    let mut findings = Findings {
        out,
        errors: 0,
        warnings: 0,
    };
    for fault in rules.rules().iter().flat_map(faults) {
        findings.error(fault)?;
    }
    for advice in lint(&rules) {
        findings.warning(advice)?;
    }
    // With a model or a tree, the check of the plan finds these.
    if args.model.is_none() && args.tree.is_none() {
        for advice in lint_device_names(&rules) {
            findings.error(advice)?;
        }
    }
    for advice in lint_missing_devices(&rules, &available_devices()) {
        findings.warning(advice)?;
    }
    if findings.errors == 0 {
        on_a_tree(args, &rules, &mut findings)?;
    }
    let Findings {
        errors, warnings, ..
    } = findings;
    if errors > 0 {
        return Err(CliError::RulesAreWrong {
            file: args.file.clone(),
            errors,
        });
    }
    writeln!(out, "{}: {warnings} warnings", args.file.display())?;
    Ok(())
}

/// What is wrong with one rule, whether or not a module would reach it.
fn faults(rule: &Rule) -> Vec<&RuleError> {
    let mut all = Vec::new();
    match &rule.matches {
        Err(error) => all.push(error),
        Ok(matches) => {
            all.extend(matches.class.as_ref().and_then(|c| c.as_ref().err()));
            all.extend(matches.name.as_ref().and_then(|n| n.as_ref().err()));
            all.extend(matches.glob.as_ref().and_then(|g| g.as_ref().err()));
            all.extend(matches.layers.as_ref().and_then(|l| l.as_ref().err()));
            all.extend(matches.types.as_ref().and_then(|t| t.as_ref().err()));
        }
    }
    all.extend(rule.replace.as_ref().err());
    all
}

fn on_a_tree(
    args: &CheckArgs,
    rules: &RuleSet,
    findings: &mut Findings<'_>,
) -> Result<(), CliError> {
    if let Some(model) = &args.model {
        let builder = Engine::builder()
            .model(model)
            .rules(Rules::File(args.file.clone()));
        let builder = set_variables(builder, &args.set);
        let planned = builder.default_device(&args.device.to_string()).plan()?;
        let tree = &planned.description().tree;
        report(rules, tree, planned.plan(), planned.report(), findings)?;
        // What rules name is told already.
        if planned.report().is_ok()
            && let Err(EngineError::Device(error @ DeviceError::MissingDefault { .. })) =
                planned.require()
        {
            findings.warning(error)?;
        }
    } else if let Some(file) = &args.tree {
        let tree = tree_from_json(&read_text(file)?, &file.display().to_string())?;
        let plan = plan(&tree, rules, &args.device.to_string())?;
        let checked = check(&plan, &tree, try_registry()?, CheckMode::Tree);
        report(rules, &tree, &plan, &checked, findings)?;
    }
    Ok(())
}

fn report(
    rules: &RuleSet,
    tree: &Module,
    plan: &Plan,
    checked: &CheckReport,
    findings: &mut Findings<'_>,
) -> Result<(), CliError> {
    for problem in &checked.errors {
        findings.error(problem)?;
    }
    for problem in &checked.warnings {
        findings.warning(problem)?;
    }
    for warning in &plan.warnings {
        match fix(warning, tree, rules) {
            Some(fix) => findings.warning(format_args!("{warning}; {fix}"))?,
            None => findings.warning(warning)?,
        }
    }
    lint_plan(rules, plan)
        .iter()
        .try_for_each(|advice| findings.warning(advice))
}
