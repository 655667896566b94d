//! What rules do to a model, before any weight is read: `cargo run --example plan -- [model.gguf [rules.yaml]]`.

use ktx_core::memory::Bytes;
use ktx_core::ops::registry;
use ktx_core::{DeviceMapping, Engine, EngineError, Rules};

fn main() -> Result<(), EngineError> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments
        .next()
        .unwrap_or_else(|| "models/pip-17m.gguf".to_owned());
    let rules = arguments
        .next()
        .map_or(Rules::Preset, |file| Rules::File(file.into()));

    // Rules written for a machine with GPUs are planned too: every device is mapped to the CPU.
    let planned = Engine::builder()
        .model(model)
        .rules(rules)
        .devices(DeviceMapping::AllOnCpu)
        .plan()?;

    println!("{}", planned.rules_name());
    for entry in planned.plan().entries() {
        let class = entry.class.as_deref().unwrap_or("null");
        let why = entry
            .rule
            .as_ref()
            .map_or_else(|| "no rule".to_owned(), ToString::to_string);
        let device = planned.plan().placement(entry, registry())?.generate;
        println!("{:<45} {device:<5} {class:<60} {why}", entry.path);
    }
    for warning in &planned.plan().warnings {
        println!("warning: {warning}");
    }
    for (device, memory) in planned.estimate()?.devices {
        println!("{device} needs {}", Bytes(memory.total()));
    }
    Ok(())
}
