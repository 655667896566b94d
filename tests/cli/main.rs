//! The program `ktx`, from outside: what it prints, where, and with which exit code.

mod answers;
mod bad_input;
mod chat;
#[cfg(unix)]
mod colours;
mod help;
mod lora;
mod placement;
mod plan;
mod reports;
mod rules_check;
#[cfg(target_os = "linux")]
mod serve;
#[cfg(unix)]
mod terminal;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A finished call.
struct Call {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Call {
    /// Standard output of a call that must have gone well.
    fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    /// Standard error of a call that must have failed with one message and nothing on standard output.
    fn error(self) -> String {
        assert_eq!(
            (self.code, self.stdout.as_str()),
            (Some(1), ""),
            "{}",
            self.stderr
        );
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        let messages = self
            .stderr
            .lines()
            .filter(|line| line.starts_with("error: "))
            .count();
        assert_eq!(messages, 1, "{}", self.stderr);
        self.stderr
    }
}

/// Calls the program.
fn ktx(arguments: &[&str]) -> Call {
    ktx_reading("", arguments)
}

/// Calls the program with something on its standard input.
fn ktx_reading(input: &str, arguments: &[&str]) -> Call {
    finished(command(arguments), input)
}

/// Lets a call run to its end with something on its standard input.
fn finished(mut command: Command, input: &str) -> Call {
    let mut child = command
        .stdin(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut stdin = child.stdin.take().expect("it is piped");
    // A program that fails early reads nothing.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().expect("the program ends");
    let text = |bytes| String::from_utf8(bytes).expect("the output is UTF-8");
    Call {
        code: status.code(),
        stdout: text(stdout),
        stderr: text(stderr),
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ktx"));
    command
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("KTX_CPU")
        .env_remove("KTX_GPUS")
        // What `ktx devices` measures is not the user's business while tests run.
        .env("XDG_CACHE_HOME", folder().join("cache"));
    command
}

/// A file of this test run.
fn file(name: &str, content: impl AsRef<[u8]>) -> String {
    let path = folder().join(name);
    std::fs::write(&path, content).expect("the file can be written");
    path.display().to_string()
}

/// A folder for the files of this test run.
fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli");
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    folder
}
