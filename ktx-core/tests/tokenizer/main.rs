//! Tokenizer and chat templates against golden cases, the `tokenizers` crate, SentencePiece and Jinja2.

mod chat;
mod golden;
mod hostile;
mod sentencepiece;
mod strings;
mod tokenizers_crate;
mod vocabularies;
