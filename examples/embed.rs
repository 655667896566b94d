//! The library in ten lines: `cargo run --release --example embed -- model.gguf 'What is 7 + 5?'`.

use ktx_core::{Engine, EngineError, GenerateOptions};

fn main() -> Result<(), EngineError> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments
        .next()
        .unwrap_or_else(|| "models/pip-17m.gguf".to_owned());
    let question = arguments
        .next()
        .unwrap_or_else(|| "What is 7 + 5?".to_owned());

    let engine = Engine::open(model)?;
    let mut session = engine.session();
    for piece in session.chat(&question, &GenerateOptions::default())? {
        print!("{}", piece?.text);
    }
    println!();
    Ok(())
}
