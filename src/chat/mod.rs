//! The chat: input, answer, statistics, and so on to the end of the input.

pub(crate) mod adapters;
mod input;
mod line_reader;
pub(crate) mod statistics;

use std::io::{Write, stdout};

use ktx_core::{Engine, EngineError, FinishReason, GenerateOptions, Session, Statistics};

pub(crate) use input::{Entry, Input};

use crate::error::CliError;
use crate::interrupt::Interrupt;
use crate::notes;

const HELP: &str = "\
\"\"\"      begins an input of several lines, which ends with a line that ends with \"\"\"
/clear   forgets the conversation
/lora    lists the adapters; /lora NAME[:SCALE] ... uses these and no others, /lora off none,
         /lora load PATH[:SCALE] loads one more
/stats   tells how much of the context is used, and of the last answer
/help    prints this
/quit    leaves, as Ctrl-D does
The path of a text file sends the file's text. Ctrl-C stops an answer.";

/// A conversation.
pub(crate) struct Chat {
    engine: Engine,
    session: Session,
    options: GenerateOptions,
    interrupt: Interrupt,
    context: usize,
    system: Option<String>,
    last: Option<Statistics>,
    failed: usize,
}

impl Chat {
    /// A conversation in a session that may have a system message already.
    pub(crate) fn new(
        engine: Engine,
        session: Session,
        options: GenerateOptions,
        interrupt: Interrupt,
    ) -> Self {
        let context = engine.settings().context;
        let system = session
            .messages()
            .iter()
            .find(|m| m.role == "system")
            .map(|m| m.content.clone());
        Self {
            engine,
            session,
            options,
            interrupt,
            context,
            system,
            last: None,
            failed: 0,
        }
    }

    /// Answers all inputs.
    pub(crate) fn run(mut self, input: &mut Input) -> Result<(), CliError> {
        if input.is_terminal() {
            notes::note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.");
        }
        loop {
            match input.next() {
                Ok(Entry::End) => break,
                Ok(Entry::Nothing) => {}
                Ok(Entry::Prompt(prompt)) => self.answer(&prompt)?,
                Ok(Entry::Help) => notes::note(HELP),
                Ok(Entry::Clear) => self.clear(),
                Ok(Entry::Stats) => self.tell(),
                Ok(Entry::Lora(arguments)) => {
                    let done = adapters::command(&self.engine, &mut self.session, &arguments);
                    if let Err(error) = done {
                        self.fail(error);
                    }
                }
                Ok(Entry::Unknown(word)) => {
                    self.fail(format_args!(
                        "there is no file and no command `{word}`; /help lists the commands"
                    ));
                }
                Err(error @ CliError::Io(_)) => return Err(error),
                Err(error) => self.fail(error),
            }
        }
        match self.failed {
            // Who typed them was told at once; a script's caller is told by the exit code.
            failed if failed > 0 && !input.is_terminal() => Err(CliError::Turns { failed }),
            _ => Ok(()),
        }
    }

    /// Answers on standard output. What only this answer fails with is told, and the chat goes on.
    fn answer(&mut self, prompt: &str) -> Result<(), CliError> {
        match self.stream(prompt) {
            Ok((reason, statistics)) => {
                self.tell_end(reason);
                self.last = Some(statistics);
                Ok(writeln!(
                    stdout().lock(),
                    "\n{}",
                    statistics::report(&statistics)
                )?)
            }
            Err(CliError::Engine(error)) => {
                self.fail(hint(&error));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Prints the answer as it comes, and the end of its line.
    fn stream(&mut self, prompt: &str) -> Result<(Option<FinishReason>, Statistics), CliError> {
        let _running = self.interrupt.stops(self.session.cancel_handle());
        let mut answer = self.session.chat(prompt, &self.options)?;
        let mut out = stdout().lock();
        for piece in &mut answer {
            write!(out, "{}", piece?.text)?;
            out.flush()?;
        }
        writeln!(out)?;
        Ok((answer.finish_reason(), answer.statistics()))
    }

    /// Why an answer ended, where the model did not end it.
    fn tell_end(&self, reason: Option<FinishReason>) {
        match reason {
            Some(FinishReason::Length) => notes::note(format_args!(
                "(stopped after {} tokens; --max-new-tokens allows more)",
                self.options.max_new_tokens
            )),
            Some(FinishReason::Context) => notes::note(format_args!(
                "(stopped: the context of {} tokens is full; /clear starts a new conversation, --context makes \
                 room for a longer one)",
                self.context
            )),
            Some(FinishReason::Cancelled) => notes::note("(stopped)"),
            Some(FinishReason::Stop) | None => {}
        }
    }

    fn clear(&mut self) {
        self.session.clear();
        if let Some(system) = &self.system {
            self.session.set_system(system);
        }
        notes::note("(the conversation is forgotten)");
    }

    fn tell(&self) {
        notes::note(format_args!(
            "{} of {} tokens of context are used",
            self.session.tokens().len(),
            self.context
        ));
        if let Some(last) = &self.last {
            notes::note(format_args!(
                "last answer: {} tokens read, {} known before, {} generated",
                last.prompt_tokens, last.cached_tokens, last.generated_tokens
            ));
        }
    }

    fn fail(&mut self, error: impl std::fmt::Display) {
        self.failed += 1;
        eprintln!("error: {error}");
    }
}

/// The error, and how the chat can go on.
fn hint(error: &EngineError) -> String {
    match error {
        EngineError::ContextFull { .. } => {
            format!("{error}. /clear starts a new conversation here")
        }
        _ => error.to_string(),
    }
}
