//! `ktx rules check`: mistakes in a rule file, found without running anything.

use std::fmt::Display;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use ktx_core::kernels::device::Device;
use ktx_core::ops::try_registry;
use ktx_core::plan::{CheckMode, CheckReport, Plan, check, plan, tree_from_json};
use ktx_core::rules::{Rule, RuleError, RuleSet, lint, lint_plan};
use ktx_core::{Engine, Rules};

use crate::error::CliError;
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
    let rules = RuleSet::from_path(&args.file)?;
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
        let planned = builder.default_device(&args.device.to_string()).plan()?;
        report(rules, planned.plan(), planned.report(), findings)?;
        if planned.report().is_ok()
            && let Err(error) = planned.require()
        {
            findings.warning(error)?;
        }
    } else if let Some(file) = &args.tree {
        let tree = tree_from_json(&read_text(file)?, &file.display().to_string())?;
        let plan = plan(&tree, rules, &args.device.to_string())?;
        let checked = check(&plan, &tree, try_registry()?, CheckMode::Tree);
        report(rules, &plan, &checked, findings)?;
    }
    Ok(())
}

fn report(
    rules: &RuleSet,
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
        findings.warning(warning)?;
    }
    lint_plan(rules, plan)
        .iter()
        .try_for_each(|advice| findings.warning(advice))
}
