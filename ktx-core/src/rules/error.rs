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
    /// The extensions are asked for in a version that is not known.
    #[error(
        "{location}: `ktx: {found}` asks for another version of the extensions; this program knows {known}"
    )]
    Version {
        /// Where it is written.
        location: Location,
        /// What is written, as JSON.
        found: String,
        /// The version that is known.
        known: u64,
    },
    /// A key that the extensions do not know.
    #[error(
        "{location}: `{key}` means nothing in {within}{}; it takes: {known}",
        did_you_mean(nearest)
    )]
    UnknownKey {
        /// Where it is.
        location: Location,
        /// The key.
        key: String,
        /// The mapping it stands in, in words.
        within: &'static str,
        /// The keys that mean something there.
        known: &'static str,
        /// The key that was meant, perhaps.
        nearest: Option<String>,
    },
    /// A name that no variable can have.
    #[error(
        "{location}: `{name}` cannot name a variable: names are letters, digits, `_` and `-`, a letter first"
    )]
    BadVariableName {
        /// Where it is.
        location: Location,
        /// The name.
        name: String,
    },
    /// A value is given for a variable that no file declares.
    #[error(
        "`{file}` declares no variable `{name}`{}; a rule file starts with `- ktx: 1` and `variables:` to have some",
        did_you_mean(nearest)
    )]
    UnknownVariable {
        /// The rule file.
        file: String,
        /// The name.
        name: String,
        /// The variable that was meant, perhaps.
        nearest: Option<String>,
    },
    /// An included file cannot be read.
    #[error(
        "{location}: cannot read `{file}`: {source}; names are relative to the file that includes"
    )]
    MissingInclude {
        /// Where it is included.
        location: Location,
        /// The file.
        file: String,
        /// What the operating system said.
        source: Arc<std::io::Error>,
    },
    /// No preset has the name that is included.
    #[error("{location}: there is no preset `{name}`; there are {known}")]
    UnknownPreset {
        /// Where it is included.
        location: Location,
        /// The name.
        name: String,
        /// The presets.
        known: String,
    },
    /// A file includes itself, directly or through others.
    #[error("{location}: `{file}` is included inside of itself")]
    IncludeCycle {
        /// Where it is included again.
        location: Location,
        /// The file.
        file: String,
    },
    /// Files include each other without end, or nearly so.
    #[error(
        "{location}: includes are nested deeper than {depth}, or there are more than {files} of them"
    )]
    TooManyIncludes {
        /// The include that is one too many.
        location: Location,
        /// The greatest depth.
        depth: usize,
        /// The greatest number.
        files: usize,
    },
    /// Something is wrong with an included file.
    #[error("{source} (included at {})", chain_of(chain))]
    Included {
        /// What is wrong.
        source: Box<RuleError>,
        /// Where the file is included, and where the file that does so is, and so on.
        chain: Vec<Location>,
    },
    /// A rule has no `match`.
    #[error(
        "{location}: this rule has no `match`: add `match:` with a `name`, a `class`, or both{}",
        switch(extension)
    )]
    NoMatch {
        /// Where the rule starts.
        location: Location,
        /// An extension that it uses without the switch.
        extension: Option<&'static str>,
    },
    /// `match` names neither `name` nor `class`.
    #[error(
        "{location}: `match` needs a `name` (a regular expression), a `class` (a class path), or both{}",
        switch(extension)
    )]
    NoCriterion {
        /// Where `match` is.
        location: Location,
        /// An extension that it uses without the switch.
        extension: Option<&'static str>,
    },
    /// `match.glob` is no glob.
    #[error("{location}: the glob `{glob}` is wrong at character {character}: {reason}")]
    BadGlob {
        /// Where in the file the glob goes wrong.
        location: Location,
        /// The glob.
        glob: String,
        /// The character of the glob, from 1.
        character: usize,
        /// What is wrong.
        reason: String,
    },
    /// `match.layers` is no list of layers.
    #[error("{location}: `layers` takes numbers and ranges, as in `0-9,12,30-`: {reason}")]
    BadLayers {
        /// Where it is written.
        location: Location,
        /// What is wrong.
        reason: String,
    },
    /// `match.type` names no type of tensors.
    #[error(
        "{location}: there is no tensor type `{name}`{}; `ktx inspect` lists those of a file",
        did_you_mean(nearest)
    )]
    UnknownType {
        /// Where it is written.
        location: Location,
        /// The name.
        name: String,
        /// The type that was meant, perhaps.
        nearest: Option<String>,
    },
    /// `match.type` is asked where no tensors are known.
    #[error(
        "{location}: `type` asks for the types of tensors, and a module tree tells only names and classes; \
         name the model's file instead"
    )]
    NoTensors {
        /// Where it is written.
        location: Location,
    },
    /// `${` without `}`.
    #[error(
        "{location}: in `{text}` a `${{` is never closed; `$${{` stands for the characters themselves"
    )]
    OpenVariable {
        /// Where it is written.
        location: Location,
        /// The text.
        text: String,
    },
    /// A variable is used that neither the file nor one that includes it declares.
    #[error(
        "{location}: no variable `{name}` is declared{}; declare it under `variables:` in the first item",
        did_you_mean(nearest)
    )]
    UndeclaredVariable {
        /// Where it is used.
        location: Location,
        /// The name.
        name: String,
        /// The variable that was meant, perhaps.
        nearest: Option<String>,
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

/// `a.yaml:3:3, b.yaml:2:3`
fn chain_of(chain: &[Location]) -> String {
    let places: Vec<String> = chain.iter().map(Location::to_string).collect();
    places.join(", from ")
}

fn switch(extension: &Option<&'static str>) -> String {
    match extension {
        Some(key) => format!(
            "; `{key}` is an extension of ktx, which `- ktx: 1` as the file's first item switches on"
        ),
        None => String::new(),
    }
}
