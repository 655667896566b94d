//! What only a terminal is shown: colours, and lines that are drawn over.

use std::process::Command;

use super::{folder, ktx};

const ESCAPE: char = '\x1b';
const BENCH: [&str; 7] = ["bench", "-p", "8", "-n", "4", "-r", "2"];

/// All that a terminal gets of a call, standard error too; nothing where `script` of util-linux is missing.
fn on_terminal(arguments: &[&str], variables: &[(&str, &str)]) -> Option<String> {
    let call = [&["exec", env!("CARGO_BIN_EXE_ktx")], arguments].concat();
    let mut script = Command::new("script");
    script
        .args(["-qefc", &call.join(" "), "/dev/null"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("TERM", "xterm")
        .env_remove("NO_COLOR")
        .env("XDG_CACHE_HOME", folder().join("cache"))
        .envs(variables.iter().copied());
    let Ok(output) = script.output() else {
        eprintln!("skipped: there is no `script` (util-linux)");
        return None;
    };
    assert!(output.status.success(), "{output:?}");
    Some(String::from_utf8(output.stdout).expect("the output is UTF-8"))
}

#[test]
fn pipes_get_neither_colours_nor_progress() {
    for arguments in [&["plan"][..], &BENCH, &[&BENCH[..], &["--json"]].concat()] {
        let call = ktx(arguments);
        assert!(!call.stderr.contains(ESCAPE), "{}", call.stderr);
        assert!(!call.stderr.contains("run 1"), "{}", call.stderr);
        assert!(!call.ok().contains(ESCAPE));
    }
}

#[test]
fn a_terminal_gets_devices_in_their_colours_unless_it_asks_for_none() {
    let Some(coloured) = on_terminal(&["plan"], &[]) else {
        return;
    };
    assert!(coloured.contains("\x1b[1mmodule\x1b[0m"), "{coloured}");
    assert!(coloured.contains("\x1b[32mcpu\x1b[0m"), "{coloured}");
    for variables in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let plain = on_terminal(&["plan"], &[variables]).expect("there was one before");
        assert!(!plain.contains(ESCAPE), "{plain}");
        assert!(plain.contains("module "), "{plain}");
    }
    let json = on_terminal(&["plan", "--format", "json"], &[]).expect("there was one before");
    assert!(!json.contains(ESCAPE), "{json}");
}

#[test]
fn a_terminal_sees_how_far_a_benchmark_is_unless_the_result_is_for_a_program() {
    let Some(shown) = on_terminal(&BENCH, &[]) else {
        return;
    };
    for text in ["\rwarming up\x1b[K", "\rrun 2 of 2\x1b[K", "\r\x1b[K"] {
        assert!(shown.contains(text), "{shown:?}");
    }
    let json = [&BENCH[..], &["--json"]].concat();
    let no_color = [("NO_COLOR", "1")];
    for (arguments, variables) in [(&json[..], &[][..]), (&BENCH, &no_color)] {
        let quiet = on_terminal(arguments, variables).expect("as before");
        assert!(!quiet.contains(ESCAPE), "{quiet:?}");
        assert!(!quiet.contains("run 1"), "{quiet:?}");
    }
}
