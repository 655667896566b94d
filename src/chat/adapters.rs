//! `/lora`: which adapters there are, and which of them apply.

use ktx_core::memory::Bytes;
use ktx_core::{AdapterId, Engine, EngineError, LoadedAdapter, Session};

use crate::adapter_args::Scaled;
use crate::notes;

/// Carries out the command with what stands behind it.
///
/// # Errors
/// In words, if there is no such adapter, or it cannot be loaded.
pub(super) fn command(
    engine: &Engine,
    session: &mut Session,
    arguments: &str,
) -> Result<(), String> {
    let said = |e: EngineError| e.to_string();
    match arguments {
        "" => return list(engine, session).map_err(said),
        "off" => session.set_adapters(&[]).map_err(said)?,
        _ => {
            let chosen = match arguments.strip_prefix("load ") {
                Some(path) => loaded(engine, session, path.trim())?,
                None => named(engine, arguments)?,
            };
            session.set_adapters(&chosen).map_err(said)?;
        }
    }
    let known = engine.adapters().map_err(said)?;
    let active: Vec<String> = session
        .adapters()
        .iter()
        .filter_map(|a| Some((known.iter().find(|k| k.id() == a.id)?, a.scale)))
        .map(|(known, scale)| format!("{} x {scale}", known.name()))
        .collect();
    let again = match session.tokens().is_empty() {
        true => "",
        false => "; the conversation is read again before the next answer",
    };
    match active.is_empty() {
        true => notes::note(format_args!("(no adapter applies{again})")),
        false => notes::note(format_args!("(adapters: {}{again})", active.join(", "))),
    }
    Ok(())
}

/// All adapters of the engine, one a line.
fn list(engine: &Engine, session: &Session) -> Result<(), EngineError> {
    let known = engine.adapters()?;
    if known.is_empty() {
        notes::note("no adapter is loaded; /lora load PATH loads one");
    }
    for adapter in &known {
        let active = session.adapters().iter().find(|a| a.id == adapter.id());
        let state = active.map_or_else(|| "off".to_owned(), |a| format!("x {}", a.scale));
        notes::note(format_args!("{state:>8}  {}", describe(adapter)));
    }
    Ok(())
}

/// One line on an adapter.
pub(crate) fn describe(loaded: &LoadedAdapter) -> String {
    let adapter = loaded.adapter();
    let ranks = adapter.ranks();
    let rank = match ranks.start() == ranks.end() {
        true => ranks.start().to_string(),
        false => format!("{} to {}", ranks.start(), ranks.end()),
    };
    format!(
        "{}: rank {rank}, {} modules, {} ({})",
        loaded.name(),
        adapter.modules().len(),
        Bytes(adapter.bytes()),
        adapter.file()
    )
}

/// What is chosen already, and one more.
fn loaded(engine: &Engine, session: &Session, path: &str) -> Result<Vec<(AdapterId, f32)>, String> {
    let scaled: Scaled = path.parse()?;
    let loaded = engine
        .load_adapter(&scaled.name)
        .map_err(|e| e.to_string())?;
    let active = session.adapters().iter().map(|a| (a.id, a.scale));
    Ok(active.chain([(loaded.id(), scaled.scale)]).collect())
}

/// Adapters by their names, each with its scale.
fn named(engine: &Engine, names: &str) -> Result<Vec<(AdapterId, f32)>, String> {
    let one = |text: &str| {
        let scaled: Scaled = text.parse()?;
        let found = engine.adapter(&scaled.name).map_err(|e| e.to_string())?;
        Ok((found.id(), scaled.scale))
    };
    names.split_whitespace().map(one).collect()
}
