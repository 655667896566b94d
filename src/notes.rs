//! What is said on standard error beside a command's result, and how the libraries' events get there.

use std::fmt::Display;

use ktx_core::PlannedModel;
use ktx_core::memory::Bytes;
use ktx_core::plan::Problem;
use tracing_subscriber::filter::LevelFilter;

/// Sends the libraries' events to standard error: warnings, with `-v` information, with `-vv` all.
pub(crate) fn watch_libraries(verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .without_time();
    // A program that embeds the command line may have set its own.
    let _ = subscriber.try_init();
}

/// A line that is no warning.
pub(crate) fn note(text: impl Display) {
    eprintln!("{text}");
}

/// A line that deserves a look.
pub(crate) fn warning(text: impl Display) {
    eprintln!("warning: {text}");
}

/// What the plan says beside itself: what was changed after the rules, and what is probably not meant.
pub(crate) fn about_plan(planned: &PlannedModel) {
    planned.plan().notes.iter().for_each(note);
    planned.plan().warnings.iter().for_each(warning);
    // Presets, and what is made of them, keep to KTransformers' format, arguments included that mean nothing here.
    let of_preset = is_preset(planned) || planned.placement().is_some();
    let meant =
        |problem: &&Problem| !(of_preset && matches!(problem, Problem::IgnoredKwarg { .. }));
    planned
        .report()
        .warnings
        .iter()
        .filter(meant)
        .for_each(warning);
}

/// From where on prompts are computed on a GPU with experts that live in main memory; nothing where none are.
pub(crate) fn streaming(planned: &PlannedModel) -> Option<String> {
    const ROWS: usize = 512;
    let streaming = planned.settings().streaming?;
    let percent = 100.0 * streaming.share(ROWS);
    Some(format!(
        "prompts: chunks of {} tokens and more go to the GPU, with experts streamed from main memory; \
         of {ROWS} tokens it takes {percent:.0} % of the experts, the CPU the others",
        streaming.from
    ))
}

fn is_preset(planned: &PlannedModel) -> bool {
    planned.rules_name().starts_with("preset ")
}

/// One line on the model, its rules and the settings.
pub(crate) fn about_model(planned: &PlannedModel) {
    let description = planned.description();
    let settings = planned.settings();
    note(format_args!(
        "{} ({}, {}); {}; {} threads, context {}",
        description
            .name
            .as_deref()
            .unwrap_or_else(|| planned.gguf().name()),
        description.architecture,
        Bytes(planned.weights().file_size()),
        rules(planned),
        settings.threads,
        settings.context,
    ));
    if settings.context > description.context_length {
        warning(format_args!(
            "the model was made for a context of {}; beyond it, its answers get worse",
            description.context_length
        ));
    }
}

/// Which rules a plan was made with.
pub(crate) fn rules(planned: &PlannedModel) -> String {
    let name = planned.rules_name();
    if let Some(placement) = planned.placement() {
        format!(
            "{name}, {:.1} tokens/s predicted",
            placement.prediction.generate
        )
    } else if name.starts_with("no rules") {
        name.to_owned()
    } else if is_preset(planned) {
        format!("rules: {name}")
    } else {
        format!("rules: file {name}")
    }
}
