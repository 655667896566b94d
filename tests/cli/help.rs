//! Help and completions.

use super::ktx;

/// All commands, with those below them.
fn commands() -> Vec<Vec<String>> {
    fn collect(command: &clap::Command, path: &[String], found: &mut Vec<Vec<String>>) {
        found.push(path.to_vec());
        for below in command.get_subcommands() {
            collect(
                below,
                &[path, &[below.get_name().to_owned()]].concat(),
                found,
            );
        }
    }
    let mut found = Vec::new();
    collect(&ktx_cli::command(), &[], &mut found);
    found
}

#[test]
fn every_command_has_help_with_an_example() {
    let commands = commands();
    assert!(commands.len() >= 11, "{commands:?}");
    for path in commands {
        let arguments: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let help = ktx(&arguments).ok();
        assert!(
            help.contains(&format!("Usage: ktx {}", path.join(" "))),
            "{path:?}: {help}"
        );
        let (_, examples) = help
            .rsplit_once("Example")
            .unwrap_or_else(|| panic!("{path:?} has no example: {help}"));
        assert!(
            examples.contains(&format!("ktx {}", path.join(" "))),
            "{path:?}: {examples}"
        );
    }
}

#[test]
fn every_flag_is_explained() {
    fn check(command: &clap::Command) {
        for argument in command.get_arguments() {
            assert!(
                argument.get_help().is_some(),
                "{} {}",
                command.get_name(),
                argument.get_id()
            );
        }
        command.get_subcommands().for_each(check);
    }
    check(&ktx_cli::command());
}

#[test]
fn shells_get_completions_of_every_command() {
    for shell in ["bash", "zsh", "fish", "powershell"] {
        let script = ktx(&["completions", shell]).ok();
        for name in [
            "chat",
            "run",
            "inspect",
            "plan",
            "bench",
            "perplexity",
            "operators",
            "completions",
        ] {
            assert!(script.contains(name), "{shell}: {name}");
        }
        assert!(script.contains("max-new-tokens"), "{shell}");
    }
}

#[test]
fn the_long_version_holds_the_notice_of_the_built_in_model() {
    let short = ktx(&["-V"]).ok();
    assert_eq!(short.trim(), concat!("ktx ", env!("CARGO_PKG_VERSION")));
    let long = ktx(&["--version"]).ok();
    assert!(
        long.starts_with(short.trim()) && long.contains("WordNet"),
        "{long}"
    );
}
