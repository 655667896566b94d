//! Flags that say how an answer is generated.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::str::FromStr;

use clap::{ArgAction, Args};
use ktx_core::{GenerateOptions, SamplingParams, Thinking};

/// How tokens are chosen, and how many.
#[derive(Debug, Clone, Args)]
pub(crate) struct SamplingArgs {
    /// Tokens of an answer at most
    #[arg(
        short = 'n',
        long,
        alias = "max_new_tokens",
        value_name = "N",
        default_value_t = 1000
    )]
    pub(crate) max_new_tokens: usize,

    /// Spread of the choice; 0 takes the best token always
    #[arg(long, value_name = "T", default_value_t = 0.6)]
    temperature: f32,

    /// Choose among this many of the best tokens; 0 switches it off
    #[arg(long, alias = "top_k", value_name = "K", default_value_t = 0)]
    top_k: usize,

    /// Choose among the best tokens whose probabilities reach this sum; 1 switches it off
    #[arg(long, alias = "top_p", value_name = "P", default_value_t = 0.95)]
    top_p: f32,

    /// Choose among tokens of at least this fraction of the best one's probability; 0 switches it off
    #[arg(long, alias = "min_p", value_name = "P", default_value_t = 0.0)]
    min_p: f32,

    /// Make the last 64 tokens less likely by this factor; 1 switches it off
    #[arg(
        long,
        alias = "repeat_penalty",
        value_name = "F",
        default_value_t = 1.0
    )]
    repeat_penalty: f32,

    /// The same number gives the same answer, on any number of threads; `random` takes a new one
    #[arg(long, value_name = "N|random", default_value = "0")]
    seed: Seed,
}

/// Where the random numbers come from.
#[derive(Debug, Clone, Copy)]
enum Seed {
    Number(u64),
    Random,
}

impl FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "random" => Ok(Self::Random),
            _ => text
                .parse()
                .map(Self::Number)
                .map_err(|_| "write a whole number from 0, or `random`".to_owned()),
        }
    }
}

impl Seed {
    fn value(self) -> u64 {
        match self {
            Self::Number(n) => n,
            // The standard library seeds its hashers from the system's random numbers.
            Self::Random => RandomState::new().build_hasher().finish(),
        }
    }
}

/// Whether a model that can think before it answers does so.
#[derive(Debug, Clone, Args)]
pub(crate) struct ThinkingArgs {
    /// Tell the chat template that the model shall answer without thinking first
    #[arg(long, alias = "no_think", conflicts_with = "force_think")]
    no_think: bool,

    /// Begin each answer with `<think>`
    #[arg(
        long, alias = "force_think", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
        default_value = "false", hide_default_value = true, action = ArgAction::Set, value_parser = boolean,
        hide_possible_values = true
    )]
    force_think: bool,
}

/// A truth value as Python and shells write it.
pub(crate) fn boolean(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err("write True or False".to_owned()),
    }
}

impl SamplingArgs {
    /// The library's options.
    pub(crate) fn options(&self, thinking: &ThinkingArgs) -> GenerateOptions {
        GenerateOptions {
            sampling: SamplingParams {
                repeat_penalty: self.repeat_penalty,
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                seed: self.seed.value(),
                ..SamplingParams::default()
            },
            max_new_tokens: self.max_new_tokens,
            thinking: match (thinking.force_think, thinking.no_think) {
                (true, _) => Thinking::Forced,
                (_, true) => Thinking::Off,
                _ => Thinking::AsModel,
            },
        }
    }
}
