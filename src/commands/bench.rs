//! `ktx bench`: tokens a second, of prompts and of generation.

use std::io::{Write, stdout};
use std::time::{Duration, Instant};

use clap::Args;
use ktx_core::{Engine, HotReport, Outputs, Session, StepTimes, TokenId};
use serde_json::{Map, Value};

use crate::error::CliError;
use crate::model_args::{EngineArgs, ModelSource, RuleArgs, load};
use crate::notes;
use crate::table::{Align, Table};
use crate::terminal::{Paint, Show, StatusLine, Style};

const EXAMPLE: &str = "\
As llama-bench does, prompts and generation are measured each from an empty context, with random tokens and after a
run that warms up; the median of the repetitions counts.

Examples:
  ktx bench -p 512 -n 128 -t 8
  ktx bench --model model.gguf -p 512 -n 64 -r 5 --json";

/// Measure the speed of a model
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    source: ModelSource,

    /// Tokens of the prompt; 0 leaves prompts out
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    prompt: usize,

    /// Tokens to generate; 0 leaves generation out
    #[arg(
        short = 'n',
        long = "gen",
        visible_alias = "generate",
        value_name = "N",
        default_value_t = 128
    )]
    generate: usize,

    /// Repetitions, of which the median counts
    #[arg(short, long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,

    /// Print one line of JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    rules: RuleArgs,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Tokens a second of each repetition.
#[derive(Default)]
struct Rates {
    prompt: Vec<f64>,
    generate: Vec<f64>,
    /// Of the tokens that a GPU and the CPU generated together, the warm-up's included.
    shared: Option<Shares>,
    /// Of all runs, the warm-up's included.
    hot: Option<HotReport>,
}

/// Milliseconds of one generated token.
struct Shares {
    total: f64,
    /// The CPU computed.
    computed: f64,
    /// The CPU waited for the GPU.
    awaited: f64,
    /// The CPU's turns.
    turns: u64,
}

impl Shares {
    fn of(times: StepTimes) -> Option<Self> {
        let ms = |time: Duration| time.as_secs_f64() * 1e3 / times.steps as f64;
        (times.turns > 0).then(|| Self {
            total: ms(times.total),
            computed: ms(times.computed),
            awaited: ms(times.awaited),
            turns: times.turns / times.steps,
        })
    }
}

/// Runs the command.
pub(crate) fn run(args: &BenchArgs) -> Result<(), CliError> {
    if args.prompt == 0 && args.generate == 0 {
        return Err(CliError::Usage(
            "there is nothing to measure: -p and -n are both 0".to_owned(),
        ));
    }
    let mut settings = args.engine.clone();
    let needed = args.prompt.max(args.generate);
    settings.context = Some(settings.context.unwrap_or(needed).max(needed));
    let planned = settings
        .apply(args.rules.apply(args.source.builder()?))
        .plan()?;
    notes::about_plan(&planned);
    let engine = load(planned, Show::unless(args.json))?;
    let rates = measure(args, &engine)?;
    match args.json {
        true => print_json(args, &engine, &rates),
        false => print_table(args, &engine, &rates),
    }
}

fn measure(args: &BenchArgs, engine: &Engine) -> Result<Rates, CliError> {
    let tokens = random_tokens(engine, args.prompt.max(args.generate));
    let mut session = engine.session();
    let mut rates = Rates::default();
    let mut status = StatusLine::new(Show::unless(args.json));
    // The first repetition maps the weights and warms the caches.
    for repetition in 0..=args.repetitions {
        status.draw(&match repetition {
            0 => "warming up".to_owned(),
            _ => format!("run {repetition} of {}", args.repetitions),
        });
        if args.prompt > 0 {
            let time = prompt(&mut session, &tokens[..args.prompt])?;
            rates
                .prompt
                .extend((repetition > 0).then(|| args.prompt as f64 / time.as_secs_f64()));
        }
        if args.generate > 0 {
            let time = generate(&mut session, &tokens[..args.generate])?;
            rates
                .generate
                .extend((repetition > 0).then(|| args.generate as f64 / time.as_secs_f64()));
        }
    }
    rates.shared = Shares::of(engine.step_times()?);
    rates.hot = engine.hot_experts()?;
    Ok(rates)
}

/// Time to read a prompt, the last token's logits included.
fn prompt(session: &mut Session, tokens: &[TokenId]) -> Result<Duration, CliError> {
    session.clear();
    let begin = Instant::now();
    session.read(tokens, Outputs::Last, &mut |_| {})?;
    Ok(begin.elapsed())
}

/// Time of one step for each token. What is generated is given, so that no text ends it early.
fn generate(session: &mut Session, tokens: &[TokenId]) -> Result<Duration, CliError> {
    session.clear();
    let begin = Instant::now();
    for token in tokens {
        session.force(*token, &mut |_| {})?;
    }
    Ok(begin.elapsed())
}

/// Tokens all over the vocabulary, the same in every run: neighbours in it would choose the same experts.
fn random_tokens(engine: &Engine, count: usize) -> Vec<TokenId> {
    let vocabulary = engine
        .description()
        .vocab_size
        .min(engine.tokenizer().vocab_size())
        .max(1) as u64;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        // Knuth's linear congruential generator (MMIX); the upper bits are the random ones.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        TokenId(((state >> 33) % vocabulary) as u32)
    };
    (0..count).map(|_| next()).collect()
}

/// Part of the choices that found their expert in the cache.
fn hit_rate(hot: &HotReport) -> f64 {
    hot.hits as f64 / hot.choices.max(1) as f64
}

fn median(rates: &[f64]) -> f64 {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
        _ => sorted[middle],
    }
}

fn print_json(args: &BenchArgs, engine: &Engine, rates: &Rates) -> Result<(), CliError> {
    let mut line = Map::new();
    let mut put = |name: &str, value: Value| line.insert(name.to_owned(), value);
    put("model", args.source.name().into());
    if !rates.prompt.is_empty() {
        put("prompt_tps", median(&rates.prompt).into());
    }
    if !rates.generate.is_empty() {
        put("generate_tps", median(&rates.generate).into());
    }
    if let Some(shares) = &rates.shared {
        put("token_ms", shares.total.into());
        put("token_cpu_ms", shares.computed.into());
        put("token_gpu_wait_ms", shares.awaited.into());
        put("token_turns", shares.turns.into());
    }
    if let Some(hot) = &rates.hot {
        put("hot_slots", hot.slots.into());
        put("hot_rate", hit_rate(hot).into());
        put("hot_uploads", hot.uploads.into());
    }
    put("threads", engine.settings().threads.into());
    put("prompt_tokens", args.prompt.into());
    put("generate_tokens", args.generate.into());
    put("repetitions", args.repetitions.into());
    writeln!(stdout().lock(), "{}", Value::Object(line))?;
    Ok(())
}

fn print_table(args: &BenchArgs, engine: &Engine, rates: &Rates) -> Result<(), CliError> {
    let mut table = Table::new([
        ("test", Align::Left),
        ("tokens", Align::Right),
        ("median tokens/s", Align::Right),
        ("lowest", Align::Right),
        ("highest", Align::Right),
    ]);
    for (name, tokens, rates) in [
        ("prompt", args.prompt, &rates.prompt),
        ("generate", args.generate, &rates.generate),
    ] {
        if rates.is_empty() {
            continue;
        }
        let lowest = rates.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = rates.iter().copied().fold(0.0, f64::max);
        let shown = [median(rates), lowest, highest].map(|rate| format!("{rate:.2}"));
        let [median, lowest, highest] = shown;
        table.push([name.to_owned(), tokens.to_string(), median, lowest, highest]);
    }
    let mut out = stdout().lock();
    writeln!(
        out,
        "{}, {} threads, {} runs",
        args.source.name(),
        engine.settings().threads,
        args.repetitions
    )?;
    // The median is what counts.
    let paint = |column: usize, _: &str| match column {
        2 => Paint::Bold,
        3 | 4 => Paint::Faint,
        _ => Paint::Plain,
    };
    table.write_painted(&mut out, Style::of_stdout(), &paint)?;
    if let Some(shares) = &rates.shared {
        let Shares {
            total,
            computed,
            awaited,
            turns,
        } = shares;
        writeln!(
            out,
            "a generated token takes {total:.2} ms: the CPU computes for {computed:.2} ms in {turns} turns and waits \
             for the GPU for {awaited:.2} ms"
        )?;
    }
    if let Some(hot) = &rates.hot {
        writeln!(
            out,
            "hot experts: {:.1} % of the choices were computed on the GPU, which has room for {} of {} experts; {} \
             were uploaded",
            100.0 * hit_rate(hot),
            hot.slots,
            hot.experts,
            hot.uploads
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_two_middle_ones() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
