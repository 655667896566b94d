//! Names of the devices that a module can be placed on.

use std::fmt;
use std::str::FromStr;

/// What kind of processor a [`Device`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeviceKind {
    /// The host's cores and main memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An Intel GPU. Rule files name it; no operator runs there.
    Xpu,
}

/// A device as rules name it: `cpu`, `cuda`, `cuda:1`.
///
/// An index that is left out means 0: `cuda` and `cuda:0` are the same device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device {
    kind: DeviceKind,
    index: u16,
}

impl Device {
    /// The host.
    pub const CPU: Self = Self::new(DeviceKind::Cpu, 0);

    /// The device of this kind with this index.
    pub const fn new(kind: DeviceKind, index: u16) -> Self {
        Self { kind, index }
    }

    /// What kind of processor it is.
    pub const fn kind(self) -> DeviceKind {
        self.kind
    }

    /// Which one of its kind, from 0.
    pub const fn index(self) -> u16 {
        self.index
    }

    /// Whether its memory is main memory.
    pub const fn is_cpu(self) -> bool {
        matches!(self.kind, DeviceKind::Cpu)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            DeviceKind::Cpu if self.index == 0 => write!(f, "cpu"),
            DeviceKind::Cpu => write!(f, "cpu:{}", self.index),
            DeviceKind::Cuda => write!(f, "cuda:{}", self.index),
            DeviceKind::Xpu => write!(f, "xpu:{}", self.index),
        }
    }
}

/// A text that names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a device; write `cpu`, `cuda` or `cuda:N` with N from 0 to 65535")]
pub struct ParseDeviceError {
    /// What was read.
    pub text: String,
}

impl FromStr for Device {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseDeviceError {
            text: text.to_owned(),
        };
        let (kind, index) = match text.split_once(':') {
            Some((kind, index)) => (kind, index.parse().map_err(|_| error())?),
            None => (text, 0),
        };
        let kind = match kind {
            "cpu" => DeviceKind::Cpu,
            "cuda" => DeviceKind::Cuda,
            "xpu" => DeviceKind::Xpu,
            _ => return Err(error()),
        };
        Ok(Self { kind, index })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for (text, printed) in [
            ("cpu", "cpu"),
            ("cpu:1", "cpu:1"),
            ("cuda", "cuda:0"),
            ("cuda:3", "cuda:3"),
        ] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), printed);
        }
    }

    #[test]
    fn text_that_names_no_device_is_refused() {
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:99999", "CPU"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }
}
