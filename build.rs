//! Embeds the built-in model where its file is there: in the repository, and not in the package of the registry.

use std::path::Path;

const MODEL: &str = "models/pip-17m.gguf";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(ktx_builtin_model)");
    // Naming a file that is missing would run this script at every build; its folder would do so at every change.
    if Path::new(MODEL).is_file() {
        println!("cargo::rerun-if-changed={MODEL}");
        println!("cargo::rustc-cfg=ktx_builtin_model");
    }
}
