//! Maintainers' commands. `cargo run -p xtask -- kernels` compiles the CUDA kernels of `ktx-kernels`.

mod kernels;
mod nvrtc;

use std::process::ExitCode;

const USAGE: &str = "\
cargo run -p xtask -- kernels [--arch ARCH] [--only MODULE] [--check] [--verbose]

Compiles ktx-kernels/src/**/*.cu for every generation of GPUs and writes the results, deflated, to
ktx-kernels/src/cuda/kernels. Needs no GPU and no CUDA toolkit: NVRTC comes from its PyPI wheel, by
`python3 -m pip download`, into target/nvrtc (or from the folder that NVRTC_WHEELS names).

  --arch ARCH    one generation only: 70, 75, 80, 86, 89, 90a, 100, 120 or ptx
  --only MODULE  one source only, as linear/gemv
  --check        write nothing; fail if what is committed differs or a kernel spills registers
  --verbose      print every kernel's registers, shared memory and spills";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let result = match args.next().as_deref() {
        Some("kernels") => kernels::Options::parse(args).and_then(|options| kernels::run(&options)),
        Some("--help" | "-h") => {
            println!("{USAGE}");
            Ok(())
        }
        _ => Err(USAGE.to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
