//! A session: one text or conversation, with its tokens in the engine's cache.

mod generation;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ktx_kernels::kv::PageId;
use ktx_ops::lora::{ActiveAdapter, AdapterId};
use ktx_ops::{Batch, Observer, Phase};

pub use generation::{FinishReason, Generation, Piece, Statistics};

use crate::chat::{Message, RenderOptions};
use crate::engine::{Inner, Runtime, pages_for};
use crate::error::EngineError;
use crate::sampling::SamplingParams;
use crate::tokenizer::{AddBos, EncodeOptions, ParseSpecial, SpecialText, TokenId};

/// What a generation is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Whether the model thinks before it answers, in chats.
    pub thinking: Thinking,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            sampling: SamplingParams::default(),
            max_new_tokens: 1000,
            thinking: Thinking::default(),
        }
    }
}

/// Whether a model that can think before it answers does so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Thinking {
    /// As its template and it decide.
    #[default]
    AsModel,
    /// The answer begins with `<think>`.
    Forced,
    /// The template is told that it shall not.
    Off,
}

/// Stops a generation from another thread or a signal handler.
#[derive(Debug, Clone, Default)]
pub struct CancelHandle(Arc<AtomicBool>);

impl CancelHandle {
    /// Stops the running generation after its current step; the session stays usable.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Which positions' logits a call hands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outputs {
    /// None.
    None,
    /// The last one.
    Last,
    /// All from this index of the new tokens on.
    From(usize),
}

impl Outputs {
    /// The wanted rows of the chunk that begins at `start` of `all` new tokens.
    fn of_chunk(self, start: usize, tokens: usize, all: usize) -> std::ops::Range<usize> {
        let first = match self {
            Self::None => tokens,
            Self::Last if start + tokens == all => tokens - 1,
            Self::Last => tokens,
            Self::From(first) => first.saturating_sub(start).min(tokens),
        };
        first..tokens
    }
}

/// One text or conversation. What is in the cache stays there: the next turn reads only new tokens.
pub struct Session {
    engine: Arc<Inner>,
    /// Tokens in the cache.
    tokens: Vec<TokenId>,
    pages: Vec<PageId>,
    messages: Vec<Message>,
    /// What the cached tokens are in a rendered chat.
    text: String,
    cancel: CancelHandle,
    batch: Batch,
    adapters: Arc<[ActiveAdapter]>,
    /// Whether the cache was computed with other adapters than those that are chosen now.
    stale: bool,
}

impl Session {
    pub(crate) fn new(engine: Arc<Inner>) -> Self {
        Self {
            adapters: Arc::clone(&engine.default_adapters),
            stale: false,
            engine,
            tokens: Vec::new(),
            pages: Vec::new(),
            messages: Vec::new(),
            text: String::new(),
            cancel: CancelHandle::default(),
            batch: Batch::default(),
        }
    }

    /// Tokens in the cache, in order.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// The conversation so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Sets what the conversation begins with; a system message that is there is replaced.
    pub fn set_system(&mut self, text: &str) {
        self.messages.retain(|m| m.role != "system");
        self.messages.insert(0, Message::system(text));
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.messages.clear();
        self.truncate(0);
    }

    /// The adapters that apply, with their factors.
    pub fn adapters(&self) -> &[ActiveAdapter] {
        &self.adapters
    }

    /// Chooses which adapters of the engine apply from now on, and how strongly: 1 is as trained, 0 not
    /// at all; the factors of one that is named twice add up. What is in the session stays, but its keys
    /// and values were computed with other weights: the next call reads all of its tokens again.
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`] if the engine has none of these numbers, and
    /// [`EngineError::AdapterScale`] if a factor is no number.
    pub fn set_adapters(&mut self, adapters: &[(AdapterId, f32)]) -> Result<(), EngineError> {
        let chosen = self.engine.adapters()?.chosen(adapters)?;
        if chosen != self.adapters {
            self.adapters = chosen;
            self.stale = !self.tokens.is_empty();
        }
        Ok(())
    }

    /// A handle that stops generations of this session.
    pub fn cancel_handle(&self) -> CancelHandle {
        self.cancel.clone()
    }

    /// Forgets all tokens behind the first `length`.
    pub fn truncate(&mut self, length: usize) {
        if length >= self.tokens.len() {
            return;
        }
        self.tokens.truncate(length);
        self.text.clear();
        let keep = pages_for(length);
        let rest = self.pages.split_off(keep);
        // A poisoned engine runs no more; its pages need no return.
        if let Ok(mut runtime) = self.engine.runtime() {
            runtime.give_pages(rest);
        }
    }

    /// Says something in the conversation and streams the answer, which becomes part of it.
    ///
    /// # Errors
    /// [`EngineError`] if the model has no usable chat template, or the prompt does not fit.
    pub fn chat(
        &mut self,
        user: &str,
        options: &GenerateOptions,
    ) -> Result<Generation<'_>, EngineError> {
        self.messages.push(Message::user(user));
        let prepared = self.chat_prompt(options);
        match prepared {
            Ok((prompt, text)) => {
                let opening = match options.thinking {
                    Thinking::Forced => "<think>\n",
                    _ => "",
                };
                self.text = text;
                Generation::new(self, prompt, options, Some(opening.to_owned()))
            }
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    /// The tokens to read for the conversation as it is, after forgetting those that differ, and the
    /// whole text that they complete.
    fn chat_prompt(
        &mut self,
        options: &GenerateOptions,
    ) -> Result<(Vec<TokenId>, String), EngineError> {
        let rendered = self.render(options)?;
        let tokenizer = &self.engine.tokenizer;
        let prompt = match rendered.strip_prefix(self.text.as_str()) {
            // The text goes on where the cache ends: what was generated is not encoded again, since
            // other tokens could spell the same.
            Some(rest) if !self.tokens.is_empty() && !self.text.is_empty() => {
                let options = EncodeOptions {
                    add_bos: AddBos::Never,
                    parse_special: ParseSpecial::Yes,
                };
                tokenizer.encode(rest, &options)
            }
            _ => {
                let ids = tokenizer.encode(&rendered, &self.chat_encoding(&rendered));
                let same = ids
                    .iter()
                    .zip(&self.tokens)
                    .take_while(|(a, b)| a == b)
                    .count();
                // One token at least is read again: its logits choose the answer's first token.
                let same = same.min(ids.len().saturating_sub(1));
                self.truncate(same);
                ids[same..].to_vec()
            }
        };
        self.check_length(prompt.len())?;
        Ok((prompt, rendered))
    }

    fn render(&self, options: &GenerateOptions) -> Result<String, EngineError> {
        let template = match &self.engine.template {
            Ok(template) => template,
            Err(error) => {
                return Err(EngineError::NoTemplate {
                    reason: error.to_string(),
                });
            }
        };
        let mut render = RenderOptions::for_answer();
        if options.thinking == Thinking::Off {
            render.enable_thinking = Some(false);
        }
        let mut text = template.render(&self.messages, &render)?;
        if options.thinking == Thinking::Forced && !text.ends_with("<think>\n") {
            text.push_str("<think>\n");
        }
        Ok(text)
    }

    /// Templates write BOS themselves, or leave it to the tokenizer.
    fn chat_encoding(&self, rendered: &str) -> EncodeOptions {
        let tokenizer = &self.engine.tokenizer;
        let bos = tokenizer.bos().and_then(|id| tokenizer.token_text(id));
        match bos.is_some_and(|bos| rendered.starts_with(bos)) {
            true => EncodeOptions::rendered_chat(),
            false => EncodeOptions {
                add_bos: AddBos::FromModel,
                parse_special: ParseSpecial::Yes,
            },
        }
    }

    /// Continues a text, without the chat template, and streams what follows.
    ///
    /// # Errors
    /// [`EngineError`] if the prompt is empty or does not fit.
    pub fn complete(
        &mut self,
        prompt: &str,
        options: &GenerateOptions,
    ) -> Result<Generation<'_>, EngineError> {
        let add_bos = if self.tokens.is_empty() {
            AddBos::FromModel
        } else {
            AddBos::Never
        };
        let encoding = EncodeOptions {
            add_bos,
            parse_special: ParseSpecial::Yes,
        };
        let ids = self.engine.tokenizer.encode(prompt, &encoding);
        self.generate(&ids, options)
    }

    /// Reads tokens and streams what follows.
    ///
    /// # Errors
    /// [`EngineError`] if there are none or they do not fit.
    pub fn generate(
        &mut self,
        prompt: &[TokenId],
        options: &GenerateOptions,
    ) -> Result<Generation<'_>, EngineError> {
        if prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        self.check_length(prompt.len())?;
        self.text.clear();
        Generation::new(self, prompt.to_vec(), options, None)
    }

    fn check_length(&self, new: usize) -> Result<(), EngineError> {
        let (cached, context) = (self.tokens.len(), self.engine.settings.context);
        if cached + new > context {
            return Err(EngineError::ContextFull {
                prompt: new,
                cached,
                context,
            });
        }
        Ok(())
    }

    /// Reads tokens in chunks, as a prompt, and hands logits `[vocab]` of the wanted positions to
    /// `on_logits`, in order.
    ///
    /// # Errors
    /// [`EngineError`] if they do not fit.
    pub fn read(
        &mut self,
        tokens: &[TokenId],
        outputs: Outputs,
        on_logits: &mut dyn FnMut(&mut [f32]),
    ) -> Result<(), EngineError> {
        self.check_length(tokens.len())?;
        self.prefill(tokens, outputs, &|| false, on_logits)?;
        Ok(())
    }

    /// Reads a prompt; says whether it went to the end. `cancelled` is asked between two chunks; what
    /// was read by then stays in the cache.
    fn prefill(
        &mut self,
        tokens: &[TokenId],
        outputs: Outputs,
        cancelled: &dyn Fn() -> bool,
        on_logits: &mut dyn FnMut(&mut [f32]),
    ) -> Result<bool, EngineError> {
        self.read_again_if_stale()?;
        let above = self.engine.runtime()?.layerwise_above();
        if above.is_some_and(|above| tokens.len() > above) {
            return self.prefill_layerwise(tokens, outputs, cancelled, on_logits);
        }
        let chunk = self.engine.settings.chunk_size;
        for (i, part) in tokens.chunks(chunk).enumerate() {
            if cancelled() {
                return Ok(false);
            }
            let wanted = outputs.of_chunk(i * chunk, part.len(), tokens.len());
            self.step(part, Phase::Prefill, wanted, None, on_logits)?;
        }
        Ok(true)
    }

    /// Reads a prompt layer by layer; nothing of it is kept if it is cancelled.
    fn prefill_layerwise(
        &mut self,
        tokens: &[TokenId],
        outputs: Outputs,
        cancelled: &dyn Fn() -> bool,
        on_logits: &mut dyn FnMut(&mut [f32]),
    ) -> Result<bool, EngineError> {
        let engine = Arc::clone(&self.engine);
        let mut runtime = engine.runtime()?;
        let past = self.tokens.len();
        self.reserve(&mut runtime, past + tokens.len())?;
        let chunk = engine.settings.chunk_size;
        let mut chunks = Vec::new();
        for (i, part) in tokens.chunks(chunk).enumerate() {
            let start = i * chunk;
            let mut batch = Batch::default();
            batch.push(part.iter().map(|t| t.0), past + start, &self.pages);
            batch.set_adapters(&self.adapters);
            let wanted = outputs.of_chunk(start, part.len(), tokens.len());
            batch.outputs.extend(wanted);
            chunks.push(batch);
        }
        let whole = runtime.read_layerwise(&chunks, cancelled, on_logits)?;
        if whole {
            self.tokens.extend_from_slice(tokens);
        }
        Ok(whole)
    }

    /// Reads tokens as one prompt chunk while `observer` watches what the modules compute; hands the
    /// last position's logits to `on_logits`.
    ///
    /// # Errors
    /// [`EngineError`] if they do not fit into the context or into one chunk.
    pub fn observe(
        &mut self,
        tokens: &[TokenId],
        observer: &mut dyn Observer,
        on_logits: &mut dyn FnMut(&mut [f32]),
    ) -> Result<(), EngineError> {
        self.check_length(tokens.len())?;
        let chunk = self.engine.settings.chunk_size;
        if tokens.is_empty() || tokens.len() > chunk {
            let range = "1 to chunk_size tokens can be observed at once";
            return Err(EngineError::Setting {
                name: "tokens",
                value: tokens.len(),
                range,
            });
        }
        self.step(
            tokens,
            Phase::Prefill,
            tokens.len() - 1..tokens.len(),
            Some(observer),
            on_logits,
        )
    }

    /// Generates the logits behind one token that is given: a forced step.
    ///
    /// # Errors
    /// [`EngineError`] if the context is full.
    pub fn force(
        &mut self,
        token: TokenId,
        on_logits: &mut dyn FnMut(&mut [f32]),
    ) -> Result<(), EngineError> {
        self.check_length(1)?;
        self.step(&[token], Phase::Generate, 0..1, None, on_logits)
    }

    fn step(
        &mut self,
        tokens: &[TokenId],
        phase: Phase,
        outputs: std::ops::Range<usize>,
        observer: Option<&mut dyn Observer>,
        on_logits: &mut dyn FnMut(&mut [f32]),
    ) -> Result<(), EngineError> {
        self.read_again_if_stale()?;
        let engine = Arc::clone(&self.engine);
        let mut runtime = engine.runtime()?;
        self.reserve(&mut runtime, self.tokens.len() + tokens.len())?;
        self.batch.clear();
        self.batch
            .push(tokens.iter().map(|t| t.0), self.tokens.len(), &self.pages);
        self.batch.set_adapters(&self.adapters);
        self.batch.outputs.extend(outputs);
        runtime.step(&self.batch, phase, observer, on_logits)?;
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }

    /// Computes the cache of all tokens with the adapters that are chosen now, if others made it.
    fn read_again_if_stale(&mut self) -> Result<(), EngineError> {
        if !self.stale {
            return Ok(());
        }
        let tokens = std::mem::take(&mut self.tokens);
        self.stale = false;
        let result = self.read(&tokens, Outputs::None, &mut |_| {});
        if result.is_err() {
            self.tokens = tokens;
            self.stale = true;
        }
        result
    }

    fn reserve(&mut self, runtime: &mut Runtime, tokens: usize) -> Result<(), EngineError> {
        while self.pages.len() < pages_for(tokens) {
            self.pages
                .push(runtime.take_page().ok_or(EngineError::CacheFull)?);
        }
        Ok(())
    }

    /// The text of tokens, special ones included.
    fn spelled(&self, tokens: &[TokenId]) -> String {
        self.engine.tokenizer.decode(tokens, SpecialText::Keep)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Ok(mut runtime) = self.engine.runtime() {
            runtime.give_pages(self.pages.drain(..));
        }
    }
}
