//! The command line `ktx`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ktx_cli::run()
}
