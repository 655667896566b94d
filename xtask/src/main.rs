//! Maintainers' commands. `cargo run -p xtask -- kernels` compiles the CUDA kernels of `ktx-kernels`.

mod kernels;
mod nvrtc;

use std::process::ExitCode;

/// Why a command failed.
pub enum Failure {
    /// Something is wrong with what was asked for or with the sources.
    Wrong(String),
    /// The compiler is not here and could not be fetched.
    NoCompiler(String),
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Wrong(text)
    }
}

const USAGE: &str = "\
cargo run -p xtask -- kernels [--arch ARCH] [--only MODULE] [--check] [--verbose]

Compiles ktx-kernels/src/**/*.cu for every generation of GPUs and writes the results, deflated, to
ktx-kernels/src/cuda/kernels. Needs no GPU and no CUDA toolkit: NVRTC comes from its PyPI wheel, by
`python3 -m pip download`, into target/nvrtc (or from the folder that NVRTC_WHEELS names).

  --arch ARCH    one generation only: 70, 75, 80, 86, 89, 90a, 100, 120 or ptx
  --only MODULE  one source only, as linear/gemv
  --check        write nothing; fail if what is committed differs or a kernel spills registers
  --verbose      print every kernel's registers, shared memory and spills

Ends with 1 if something is wrong, with 2 if the compiler is not here and could not be fetched.";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let result = match args.next().as_deref() {
        Some("kernels") => kernels::Options::parse(args)
            .map_err(Failure::from)
            .and_then(|options| kernels::run(&options)),
        Some("--help" | "-h") => {
            println!("{USAGE}");
            Ok(())
        }
        _ => Err(Failure::Wrong(USAGE.to_owned())),
    };
    let (error, code) = match result {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Wrong(error)) => (error, 1),
        Err(Failure::NoCompiler(error)) => (error, 2),
    };
    eprintln!("{error}");
    ExitCode::from(code)
}
