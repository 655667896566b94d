//! From an answer's text to what it means: thoughts, content, calls of functions.
//!
//! A model writes all of it as text, in the format of its chat template. The parser takes the text as
//! it comes and gives out what is certain.

mod calls;
mod splitter;

use ktx_core::Engine;
use ktx_core::tokenizer::SpecialText;
use serde_json::Value;

pub(crate) use calls::ToolCall;
use calls::{CallFormat, Markers};
use splitter::{Split, Splitter};

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";

/// How a model writes what is more than text.
#[derive(Debug, Clone)]
pub(crate) struct OutputFormat {
    calls: CallFormat,
    /// Whether the template describes functions to the model.
    pub(crate) template_knows_tools: bool,
    special_think: bool,
}

impl OutputFormat {
    /// The format of a model's chat template.
    pub(crate) fn of(engine: &Engine) -> Self {
        let template = engine.template().map_or("", |t| t.source());
        let tokenizer = engine.tokenizer();
        let think = tokenizer.token_named(THINK_END);
        Self {
            calls: CallFormat::of_template(template),
            template_knows_tools: template.contains("tools"),
            special_think: think.is_some_and(|id| tokenizer.is_special(id)),
        }
    }

    /// Whether special tokens are part of the text that the parser reads.
    pub(crate) fn special_text(&self, with_tools: bool) -> SpecialText {
        let needed = self.special_think
            || self.calls == CallFormat::Harmony
            || with_tools && self.calls.has_special_markers();
        match needed {
            true => SpecialText::Keep,
            false => SpecialText::Skip,
        }
    }
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Part {
    /// What the model thinks before it answers.
    Thought(String),
    /// The answer.
    Content(String),
    /// A function that it wants to be called.
    Call(ToolCall),
}

/// Where the parser is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing but space was there.
    Start,
    Thought,
    Content,
    Call,
    /// In the header of a message of the format Harmony.
    Header,
}

/// Reads one answer.
#[derive(Debug, Clone)]
pub(crate) struct OutputParser {
    calls: Option<CallFormat>,
    tools: Vec<Value>,
    harmony: bool,
    place: Place,
    splitter: Splitter,
    /// What a call's markers enclose, as far as it is there.
    call: String,
    /// A header of the format Harmony.
    header: String,
    /// Whether all before was space: space before the content is left out.
    at_start: bool,
}

impl OutputParser {
    /// For an answer that begins inside of a thought or not, with functions that it may call.
    pub(crate) fn new(format: &OutputFormat, opens_thought: bool, tools: Vec<Value>) -> Self {
        let harmony = format.calls == CallFormat::Harmony;
        Self {
            calls: (!tools.is_empty()).then_some(format.calls),
            tools,
            harmony,
            place: match opens_thought {
                true => Place::Thought,
                false => Place::Start,
            },
            splitter: Splitter::default(),
            call: String::new(),
            header: String::new(),
            at_start: true,
        }
    }

    /// For an answer that is a call of a function, as JSON, behind a thought maybe.
    pub(crate) fn forced(format: &OutputFormat, opens_thought: bool, tools: Vec<Value>) -> Self {
        let format = OutputFormat {
            calls: CallFormat::Llama,
            ..format.clone()
        };
        Self::new(&format, opens_thought, tools)
    }

    /// For an answer whose text is its content.
    pub(crate) fn plain() -> Self {
        Self {
            calls: None,
            tools: Vec::new(),
            harmony: false,
            place: Place::Content,
            splitter: Splitter::default(),
            call: String::new(),
            header: String::new(),
            at_start: false,
        }
    }

    /// Takes more text.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Part> {
        self.splitter.push(text);
        let mut parts = Vec::new();
        while self.advance(&mut parts, false) {}
        parts
    }

    /// The end of the text.
    pub(crate) fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        while self.advance(&mut parts, true) {}
        if self.place == Place::Call {
            self.end_call(&mut parts);
        }
        parts
    }

    /// One step; says whether there may be more to do.
    fn advance(&mut self, parts: &mut Vec<Part>, at_end: bool) -> bool {
        match self.place {
            Place::Start => self.start(parts, at_end),
            Place::Thought if self.harmony => self.harmony_body(parts, at_end),
            Place::Thought => {
                let split = self.splitter.until(&[THINK_END], at_end);
                self.thought(split.before(), parts);
                let found = split.marker().is_some();
                if found {
                    self.place = Place::Content;
                    self.at_start = true;
                }
                found
            }
            Place::Content if self.harmony => self.harmony_body(parts, at_end),
            Place::Content => self.content(parts, at_end),
            Place::Call if self.harmony => self.harmony_body(parts, at_end),
            Place::Call => self.call(parts, at_end),
            Place::Header => {
                let split = self.splitter.until(&["<|message|>"], at_end);
                self.header.push_str(split.before());
                let found = split.marker().is_some();
                if found {
                    self.open_message();
                }
                found
            }
        }
    }

    fn start(&mut self, parts: &mut Vec<Part>, at_end: bool) -> bool {
        let held = self.splitter.rest();
        let text = held.trim_start();
        if self.harmony && (text.starts_with("<|channel|>") || text.starts_with("<|start|>")) {
            self.splitter.skip_space();
            self.place = Place::Header;
            return true;
        }
        if text.starts_with(THINK) {
            self.splitter.skip_space();
            self.splitter.skip(THINK.len());
            self.place = Place::Thought;
            return true;
        }
        let may_be_marker = THINK.starts_with(text)
            || self.harmony && ("<|channel|>".starts_with(text) || "<|start|>".starts_with(text));
        if may_be_marker && !at_end {
            return false;
        }
        if self.starts_with_bare_call(text) {
            self.place = Place::Call;
            return true;
        }
        self.place = Place::Content;
        self.at_start = false;
        self.content(parts, at_end)
    }

    /// Llama writes a call as an answer that is a JSON object.
    fn starts_with_bare_call(&self, text: &str) -> bool {
        self.calls == Some(CallFormat::Llama)
            && (text.starts_with('{') || text.starts_with("<|python_tag|>"))
    }

    fn content(&mut self, parts: &mut Vec<Part>, at_end: bool) -> bool {
        if self.at_start {
            self.splitter.skip_space();
            if self.splitter.rest().is_empty() {
                return false;
            }
            self.at_start = false;
            if self.starts_with_bare_call(self.splitter.rest()) {
                self.place = Place::Call;
                return true;
            }
        }
        let markers = self.calls.map_or(Markers::NONE, CallFormat::markers);
        let split = self.splitter.until(markers.open, at_end);
        push_text(parts, Part::Content, split.before());
        match split.marker() {
            Some(marker) if markers.starts_call(marker) => {
                self.place = Place::Call;
                true
            }
            Some(_) => true,
            None => false,
        }
    }

    fn call(&mut self, parts: &mut Vec<Part>, at_end: bool) -> bool {
        let markers = self.calls.map_or(Markers::NONE, CallFormat::markers);
        let split = self.splitter.until(markers.close, at_end);
        self.call.push_str(split.before());
        if split.marker().is_none() {
            return false;
        }
        self.end_call(parts);
        self.at_start = true;
        true
    }

    fn end_call(&mut self, parts: &mut Vec<Part>) {
        let text = std::mem::take(&mut self.call);
        self.place = Place::Content;
        if text.trim().is_empty() {
            return;
        }
        let format = self.calls.unwrap_or(CallFormat::Hermes);
        match calls::parse(format, &self.header, &text, &self.tools) {
            Some(calls) => parts.extend(calls.into_iter().map(Part::Call)),
            // What cannot be read as a call is shown as it is.
            None => push_text(parts, Part::Content, &text),
        }
    }

    fn open_message(&mut self) {
        self.place = if self.header.contains("to=functions.") && self.calls.is_some() {
            Place::Call
        } else if self.header.contains("analysis") {
            Place::Thought
        } else {
            Place::Content
        };
    }

    /// The body of a message of the format Harmony.
    fn harmony_body(&mut self, parts: &mut Vec<Part>, at_end: bool) -> bool {
        let ends = [
            "<|end|>",
            "<|return|>",
            "<|call|>",
            "<|start|>",
            "<|channel|>",
        ];
        let split = self.splitter.until(&ends, at_end);
        match self.place {
            Place::Thought => self.thought(split.before(), parts),
            Place::Call => self.call.push_str(split.before()),
            _ => push_text(parts, Part::Content, split.before()),
        }
        if split.marker().is_none() {
            return false;
        }
        if self.place == Place::Call {
            self.end_call(parts);
        }
        self.header.clear();
        self.place = Place::Header;
        true
    }

    fn thought(&mut self, text: &str, parts: &mut Vec<Part>) {
        let text = match self.at_start {
            true => text.trim_start(),
            false => text,
        };
        self.at_start &= text.is_empty();
        push_text(parts, Part::Thought, text);
    }
}

fn push_text(parts: &mut Vec<Part>, kind: fn(String) -> Part, text: &str) {
    if !text.is_empty() {
        parts.push(kind(text.to_owned()));
    }
}

impl Split {
    fn before(&self) -> &str {
        &self.before
    }

    fn marker(&self) -> Option<&'static str> {
        self.marker
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn format(calls: CallFormat) -> OutputFormat {
        OutputFormat {
            calls,
            template_knows_tools: true,
            special_think: false,
        }
    }

    fn tools() -> Vec<Value> {
        let parameters = json!({"type": "object", "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}}});
        vec![json!({"type": "function", "function": {"name": "weather", "parameters": parameters}})]
    }

    /// The parts of a text that comes in pieces of `size` bytes or so, joined.
    fn read(mut parser: OutputParser, text: &str, size: usize) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let mut pieces: Vec<String> = Vec::new();
        for c in text.chars() {
            match pieces.last_mut() {
                Some(last) if last.len() < size => last.push(c),
                _ => pieces.push(c.to_string()),
            }
        }
        let mut all: Vec<Part> = pieces.iter().flat_map(|p| parser.push(p)).collect();
        all.extend(parser.finish());
        for part in all {
            match (parts.last_mut(), part) {
                (Some(Part::Content(text)), Part::Content(more))
                | (Some(Part::Thought(text)), Part::Thought(more)) => text.push_str(&more),
                (_, part) => parts.push(part),
            }
        }
        parts
    }

    fn check(calls: CallFormat, opens_thought: bool, text: &str, wanted: &[Part]) {
        for size in [1, 3, 1000] {
            let parser = OutputParser::new(&format(calls), opens_thought, tools());
            assert_eq!(read(parser, text, size), wanted, "pieces of {size}");
        }
    }

    fn call(arguments: Value) -> Part {
        Part::Call(ToolCall {
            name: "weather".to_owned(),
            arguments: arguments.to_string(),
        })
    }

    fn content(text: &str) -> Part {
        Part::Content(text.to_owned())
    }

    fn thought(text: &str) -> Part {
        Part::Thought(text.to_owned())
    }

    #[test]
    fn thoughts_are_told_from_the_answer() {
        let wanted = [thought("a < b\n"), content("Yes </think>.")];
        let text = "\n<think>\na < b\n</think>\n\nYes </think>.";
        check(CallFormat::Hermes, false, text, &wanted);
        let text = "a < b\n</think>\n\nYes </think>.";
        check(CallFormat::Hermes, true, text, &wanted);
        check(
            CallFormat::Hermes,
            false,
            "  <thin ice",
            &[content("  <thin ice")],
        );
        check(CallFormat::Hermes, false, "", &[]);
    }

    #[test]
    fn calls_between_tags_are_found() {
        let text = "I ask.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Ulm\"}}\n</tool_call>\n\
                    <tool_call>\n{\"name\": \"weather\", \"arguments\": {\"days\": 2}}\n</tool_call>";
        let wanted = [
            content("I ask.\n"),
            call(json!({"city": "Ulm"})),
            call(json!({"days": 2})),
        ];
        check(CallFormat::Hermes, false, text, &wanted);
        let wanted = [content("not json")];
        check(
            CallFormat::Hermes,
            false,
            "<tool_call>not json</tool_call>",
            &wanted,
        );
    }

    #[test]
    fn calls_as_parameters_in_tags_are_found() {
        let text = "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n\
                    </parameter>\n</function>\n</tool_call>";
        let wanted = [call(json!({"city": "12", "days": 3}))];
        check(CallFormat::QwenXml, false, text, &wanted);
    }

    #[test]
    fn calls_of_deepseek_are_found_in_both_spellings() {
        let text = "Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n\
                    {\"city\": \"Ulm\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"days\": 1}\
                    <｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        let wanted = [
            content("Sure."),
            call(json!({"city": "Ulm"})),
            call(json!({"days": 1})),
        ];
        check(CallFormat::DeepSeek, false, text, &wanted);
    }

    #[test]
    fn an_answer_that_is_a_call_is_one() {
        let text = "{\"name\": \"weather\", \"parameters\": {\"city\": \"Ulm\"}}";
        let wanted = [call(json!({"city": "Ulm"}))];
        check(CallFormat::Llama, false, text, &wanted);
        let text = "<|python_tag|>{\"name\": \"weather\", \"parameters\": {\"city\": \"Ulm\"}}";
        check(CallFormat::Llama, false, text, &wanted);
        check(CallFormat::Llama, false, "{x}", &[content("{x}")]);
        let text = "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Ulm\"}}]";
        check(CallFormat::Mistral, false, text, &wanted);
        let text = "[TOOL_CALLS]weather[ARGS]{\"city\": \"Ulm\"}";
        check(CallFormat::Mistral, false, text, &wanted);
    }

    #[test]
    fn channels_are_told_apart() {
        let text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi.";
        let wanted = [thought("Hm."), content("Hi.")];
        check(CallFormat::Harmony, false, text, &wanted);
        let text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary \
                    to=functions.weather <|constrain|>json<|message|>{\"city\":\"Ulm\"}";
        let wanted = [thought("Hm."), call(json!({"city": "Ulm"}))];
        check(CallFormat::Harmony, false, text, &wanted);
    }

    #[test]
    fn without_functions_markers_are_text() {
        let text = "<tool_call>{}</tool_call>";
        let parser = OutputParser::new(&format(CallFormat::Hermes), false, Vec::new());
        assert_eq!(read(parser, text, 4), [content(text)]);
        assert_eq!(
            read(OutputParser::plain(), "<think>", 2),
            [content("<think>")]
        );
    }
}
