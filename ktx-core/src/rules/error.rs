//! What can be wrong with a rule file.

use std::sync::Arc;

use ktx_ops::Location;
use ktx_ops::kwargs::did_you_mean;

/// What is wrong with a rule file or one of its rules.
///
/// The variants from [`NoMatch`](Self::NoMatch) on are about one rule, and count only once a module
/// reaches that rule: a rule behind one that takes every module does no harm.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RuleError {
    /// The file cannot be read.
    #[error("cannot read the rule file `{file}`: {source}; name a YAML file with `--rules`")]
    Unreadable {
        /// The file's name.
        file: String,
        /// What the operating system said.
        source: Arc<std::io::Error>,
    },
    /// The path is a directory.
    #[error("`{file}` is a directory, not a rule file; name a YAML file in it")]
    Directory {
        /// The path.
        file: String,
    },
    /// The file is larger than any rule file.
    #[error("`{file}` is larger than {limit} bytes: this is no rule file")]
    TooLarge {
        /// The file's name.
        file: String,
        /// The greatest size that is read, in bytes.
        limit: usize,
    },
    /// The file is no text.
    #[error(
        "`{file}` is not UTF-8 text: byte {offset} belongs to no character; a rule file is YAML text"
    )]
    NotText {
        /// The file's name.
        file: String,
        /// Where the first wrong byte is, from 0.
        offset: usize,
    },
    /// The text is no YAML.
    #[error("{location}: this is no valid YAML: {reason}")]
    Syntax {
        /// Where it ends to be YAML.
        location: Location,
        /// What the reader stumbled over.
        reason: String,
    },
    /// The file holds nothing.
    #[error(
        "`{file}` is empty: a rule file is a list of rules, `- match: ...`; `[]` is the list of none"
    )]
    Empty {
        /// The file's name.
        file: String,
    },
    /// The file holds something else than a list.
    #[error(
        "{location}: a rule file is a list of rules, each starting with `- match:`, and this is {found}"
    )]
    NotAList {
        /// Where it starts.
        location: Location,
        /// What it is.
        found: &'static str,
    },
    /// A rule has no `match`.
    #[error("{location}: this rule has no `match`: add `match:` with a `name`, a `class`, or both")]
    NoMatch {
        /// Where the rule starts.
        location: Location,
    },
    /// `match` names neither `name` nor `class`.
    #[error(
        "{location}: `match` needs a `name` (a regular expression), a `class` (a class path), or both"
    )]
    NoCriterion {
        /// Where `match` is.
        location: Location,
    },
    /// A value has the wrong type.
    #[error("{location}: `{what}` must be {expected}, not {found}")]
    WrongType {
        /// Where the value is.
        location: Location,
        /// The key, or `rule`.
        what: &'static str,
        /// What belongs there.
        expected: &'static str,
        /// What is there.
        found: &'static str,
    },
    /// A matching rule says nothing about the replacement.
    #[error(
        "{location}: this rule matches and has no `replace`: add `replace:` with a `class`, `kwargs`, or both"
    )]
    NoReplace {
        /// Where the rule starts.
        location: Location,
    },
    /// `match.class` has no module in front.
    #[error(
        "{location}: `{class}` is no class path: write it with its module, as in `torch.nn.Linear`{}",
        did_you_mean(nearest)
    )]
    ClassWithoutModule {
        /// Where it is written.
        location: Location,
        /// What is written.
        class: String,
        /// The known class path that looks most like it.
        nearest: Option<String>,
    },
    /// The Python module of `match.class` is not known.
    #[error(
        "{location}: there is no module `{module}` with a class `{class}`{}",
        did_you_mean(nearest)
    )]
    UnknownModule {
        /// Where it is written.
        location: Location,
        /// The module.
        module: String,
        /// The class path as written.
        class: String,
        /// The known class path that looks most like it.
        nearest: Option<String>,
    },
    /// The Python module of `match.class` has no such class.
    #[error(
        "{location}: the module `{module}` has no class `{name}`{}",
        did_you_mean(nearest)
    )]
    UnknownClass {
        /// Where it is written.
        location: Location,
        /// The module.
        module: String,
        /// The class's name in it.
        name: String,
        /// The known class path that looks most like it.
        nearest: Option<String>,
    },
    /// `match.name` is no regular expression.
    #[error(
        "{location}: the regular expression `{pattern}` is wrong at character {character}: {reason}"
    )]
    BadPattern {
        /// Where in the file the pattern goes wrong.
        location: Location,
        /// The pattern.
        pattern: String,
        /// The character of the pattern, from 1.
        character: usize,
        /// What is wrong.
        reason: String,
    },
    /// `match.name` takes too long to try.
    #[error(
        "{location}: the regular expression `{pattern}` takes too long to try on `{path}`: \
         nested repetitions such as `(a+)+` cause this; make it simpler"
    )]
    SlowPattern {
        /// Where the pattern is.
        location: Location,
        /// The pattern.
        pattern: String,
        /// The module on which it gave up.
        path: String,
    },
}
