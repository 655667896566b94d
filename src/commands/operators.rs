//! `ktx operators`: what rules can put in a module's place.

use std::io::{self, Write, stdout};

use clap::Args;
use ktx_core::ops::kwargs::PLACEMENT;
use ktx_core::ops::{KwargDoc, Needs, OperatorEntry, try_registry};
use serde_json::{Value, json};

use crate::error::CliError;

const EXAMPLE: &str = "\
Examples:
  ktx operators
  ktx operators KTransformersLinear
  ktx operators --json | jq -r '.[].class'";

/// List the operators with their roles, names, arguments and needs
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct OperatorsArgs {
    /// Only operators with this text in a name or as their role
    #[arg(value_name = "TEXT")]
    filter: Option<String>,

    /// Print a JSON list
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &OperatorsArgs) -> Result<(), CliError> {
    let entries: Vec<&OperatorEntry> = try_registry()?
        .entries()
        .filter(|e| args.filter.as_deref().is_none_or(|text| is_meant(e, text)))
        .collect();
    let mut out = stdout().lock();
    if args.json {
        let list: Vec<Value> = entries.iter().map(|e| to_json(e)).collect();
        writeln!(out, "{:#}", Value::Array(list))?;
        return Ok(());
    }
    if entries.is_empty() {
        let text = args.filter.as_deref().unwrap_or_default();
        return Err(CliError::Usage(format!(
            "no operator has `{text}` in a name; `ktx operators` lists all"
        )));
    }
    for entry in entries {
        write_entry(entry, &mut out)?;
    }
    Ok(())
}

fn is_meant(entry: &OperatorEntry, text: &str) -> bool {
    let text = text.to_lowercase();
    let names = std::iter::once(&entry.class).chain(entry.aliases);
    entry.role.to_string().to_lowercase() == text
        || names.into_iter().any(|n| n.to_lowercase().contains(&text))
}

/// All arguments: those that every operator takes, then its own.
fn arguments(entry: &OperatorEntry) -> impl Iterator<Item = &'static KwargDoc> {
    PLACEMENT.iter().chain(entry.kwargs.docs())
}

fn write_entry(entry: &OperatorEntry, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{}", entry.class)?;
    writeln!(out, "  {}", entry.summary)?;
    writeln!(out, "  role     {}", entry.role)?;
    for (i, alias) in entry.aliases.iter().enumerate() {
        writeln!(out, "  {:<8} {alias}", if i == 0 { "aliases" } else { "" })?;
    }
    writeln!(out, "  needs    {}", entry.needs)?;
    if let Some(how) = entry.lossy {
        writeln!(out, "  lossy    {how}")?;
    }
    let defaults = entry.kwargs.defaults();
    for (i, argument) in arguments(entry).enumerate() {
        let default = defaults
            .get(argument.name)
            .map(|v| format!(" = {v}"))
            .unwrap_or_default();
        let ignored = argument
            .ignored
            .map(|why| format!("; ignored: {why}"))
            .unwrap_or_default();
        let title = if i == 0 { "kwargs" } else { "" };
        writeln!(
            out,
            "  {title:<8} {}{default}: {}{ignored}",
            argument.name, argument.doc
        )?;
    }
    if entry.kwargs.is_open() {
        writeln!(out, "  {:<8} and those of its inner operators", "")?;
    }
    writeln!(out)
}

fn to_json(entry: &OperatorEntry) -> Value {
    let defaults = entry.kwargs.defaults();
    let kwargs: Vec<Value> = arguments(entry)
        .map(|a| json!({ "name": a.name, "default": defaults.get(a.name), "doc": a.doc, "ignored": a.ignored }))
        .collect();
    json!({
        "class": entry.class,
        "role": entry.role.to_string(),
        "aliases": entry.aliases,
        "summary": entry.summary,
        "kwargs": kwargs,
        "takes_inner_kwargs": entry.kwargs.is_open(),
        "needs": match entry.needs {
            Needs::Host => Value::Null,
            Needs::Missing(what) => what.into(),
        },
        "lossy": entry.lossy,
        "registered_at": format!("{}:{}", entry.file, entry.line),
    })
}
