//! `PATH[:SCALE]`: an adapter and how strongly it applies.

use std::str::FromStr;

use clap::Args;
use ktx_core::EngineBuilder;

/// Which adapters.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct AdapterArgs {
    /// LoRA adapter beside the model: a GGUF file or a PEFT directory, and how strongly it applies
    /// [default scale: 1]; may be given several times
    #[arg(long = "lora", value_name = "PATH[:SCALE]")]
    pub(crate) adapters: Vec<Scaled>,
}

/// A path or a name, and a factor behind a colon if it is not 1.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scaled {
    pub(crate) name: String,
    pub(crate) scale: f32,
}

impl AdapterArgs {
    /// Puts these settings into those of an engine.
    pub(crate) fn apply(&self, builder: EngineBuilder) -> EngineBuilder {
        self.adapters
            .iter()
            .fold(builder, |builder, a| builder.lora(&a.name, a.scale))
    }
}

impl FromStr for Scaled {
    type Err = String;

    /// What stands behind the last colon is the scale, unless it looks like the rest of a path: the
    /// colon of `C:\x.gguf` is a drive's.
    fn from_str(text: &str) -> Result<Self, String> {
        let whole = || Self {
            name: text.to_owned(),
            scale: 1.0,
        };
        if text.is_empty() {
            return Err("name an adapter's file".to_owned());
        }
        let Some((name, scale)) = text.rsplit_once(':') else {
            return Ok(whole());
        };
        let is_path = scale.contains(['/', '\\']);
        let is_drive = name.len() == 1 && name.chars().all(|c| c.is_ascii_alphabetic());
        if is_path || (is_drive && scale.parse::<f32>().is_err()) {
            return Ok(whole());
        }
        if name.is_empty() {
            return Err("name an adapter's file in front of the scale".to_owned());
        }
        match scale.parse::<f32>() {
            Ok(scale) if scale.is_finite() => Ok(Self {
                name: name.to_owned(),
                scale,
            }),
            _ => Err(format!(
                "the scale `{scale}` is no number; 1 is as the adapter was trained"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, f32) {
        let scaled: Scaled = text.parse().unwrap();
        (scaled.name, scaled.scale)
    }

    #[test]
    fn a_number_behind_the_last_colon_is_the_scale() {
        for (text, name, scale) in [
            ("a.gguf", "a.gguf", 1.0),
            ("a.gguf:0.5", "a.gguf", 0.5),
            ("dir/a:-1", "dir/a", -1.0),
            ("a:b.gguf:2", "a:b.gguf", 2.0),
            ("a:b/c.gguf", "a:b/c.gguf", 1.0),
        ] {
            assert_eq!(parsed(text), (name.to_owned(), scale), "{text}");
        }
    }

    #[test]
    fn the_colon_of_a_drive_is_part_of_the_path() {
        for (text, name, scale) in [
            (r"C:\x.gguf", r"C:\x.gguf", 1.0),
            (r"C:\x.gguf:0.25", r"C:\x.gguf", 0.25),
            ("C:x.gguf", "C:x.gguf", 1.0),
            ("C:/models/x:2", "C:/models/x", 2.0),
        ] {
            assert_eq!(parsed(text), (name.to_owned(), scale), "{text}");
        }
    }

    #[test]
    fn a_scale_that_is_no_number_is_refused() {
        for text in [
            "a.gguf:",
            "a.gguf:much",
            "a.gguf:nan",
            "a.gguf:inf",
            ":0.5",
            "",
        ] {
            assert!(text.parse::<Scaled>().is_err(), "{text}");
        }
    }
}
