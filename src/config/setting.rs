//! How a setting of each type is read, from TOML and from plain text, and how it
//! is written back as TOML. Messages say what was expected and what was found.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use kernels::Isa;
use mesh::telemetry::LogFormat;
use mesh::transport::Endpoint;
use model::Numerics;
use toml::Value;

/// A type that a key can have.
pub trait Setting: Sized {
    /// From a variable or a flag. Errors say what is wrong with the text.
    fn from_text(text: &str) -> Result<Self, String>;

    /// From a file. Most types are written there as strings.
    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Self::from_text(text),
            other => Err(format!("expected a string, found {}", found(other))),
        }
    }

    fn to_toml(&self) -> String;
}

fn found(value: &Value) -> String {
    let text: String = value.to_string().chars().take(40).collect();
    let kind = match value {
        Value::String(_) => "the string",
        Value::Integer(_) | Value::Float(_) => "the number",
        Value::Boolean(_) => "the boolean",
        Value::Datetime(_) => "the date",
        Value::Array(_) => "the list",
        Value::Table(_) => "the table",
    };
    format!("{kind} {text}")
}

fn quoted(text: impl Into<String>) -> String {
    Value::String(text.into()).to_string()
}

impl Setting for String {
    fn from_text(text: &str) -> Result<Self, String> {
        if text.is_empty() { Err("must not be empty".to_owned()) } else { Ok(text.to_owned()) }
    }

    fn to_toml(&self) -> String {
        quoted(self)
    }
}

impl Setting for PathBuf {
    fn from_text(text: &str) -> Result<Self, String> {
        String::from_text(text).map(PathBuf::from)
    }

    fn to_toml(&self) -> String {
        quoted(self.display().to_string())
    }
}

impl Setting for usize {
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("expected a whole number, found `{text}`"))
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        value
            .as_integer()
            .and_then(|number| usize::try_from(number).ok())
            .ok_or_else(|| format!("expected a whole number, found {}", found(value)))
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl Setting for bool {
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("expected true or false, found `{text}`"))
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        let wrong = || format!("expected true or false, found {}", found(value));
        value.as_bool().ok_or_else(wrong)
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl Setting for f64 {
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("expected a number, found `{text}`"))
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Float(number) => Ok(*number),
            Value::Integer(number) => Ok(*number as f64),
            other => Err(format!("expected a number, found {}", found(other))),
        }
    }

    fn to_toml(&self) -> String {
        Value::Float(*self).to_string()
    }
}

impl Setting for Duration {
    fn from_text(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected a duration such as \"30s\" or \"500ms\", found `{text}`");
        let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, unit) = text.split_at(split);
        let scale: u64 = match unit.trim() {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(scale).map(Duration::from_millis).ok_or_else(wrong)
    }

    fn to_toml(&self) -> String {
        match self.as_millis() {
            ms if ms % 1000 == 0 => quoted(format!("{}s", ms / 1000)),
            ms => quoted(format!("{ms}ms")),
        }
    }
}

impl Setting for Endpoint {
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|error: mesh::transport::TransportError| error.to_string())
    }

    fn to_toml(&self) -> String {
        quoted(self.to_string())
    }
}

/// A list of where others are.
impl<T: Setting> Setting for Vec<T> {
    /// As text, entries are separated by commas.
    fn from_text(text: &str) -> Result<Self, String> {
        let entries = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        entries.map(T::from_text).collect()
    }

    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Array(entries) => entries.iter().map(T::from_value).collect(),
            other => Err(format!("expected a list of endpoints, found {}", found(other))),
        }
    }

    fn to_toml(&self) -> String {
        let entries: Vec<String> = self.iter().map(Setting::to_toml).collect();
        format!("[{}]", entries.join(", "))
    }
}

/// Types that are written as they are shown.
macro_rules! as_shown {
    ($($kind:ty),*) => {$(
        impl Setting for $kind {
            fn from_text(text: &str) -> Result<Self, String> {
                text.parse()
            }

            fn to_toml(&self) -> String {
                quoted(self.to_string())
            }
        }
    )*};
}

as_shown!(router::Splitting, router::Wire, router::Combine);
as_shown!(mesh::near::Shortcut, mesh::registry::Server);
as_shown!(expert_node::device::Device, model::ExpertDevice);

/// What the weights of a local mesh are stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weights {
    /// As the checkpoint has them.
    #[default]
    Stored,
    /// Projections as block-scaled e4m3, made from bf16 or f32.
    Fp8,
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stored => "stored",
            Self::Fp8 => "fp8",
        })
    }
}

impl FromStr for Weights {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "stored" => Ok(Self::Stored),
            "fp8" => Ok(Self::Fp8),
            _ => Err(format!("`{text}` is neither stored nor fp8")),
        }
    }
}

impl Setting for Weights {
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse()
    }

    fn to_toml(&self) -> String {
        quoted(self.to_string())
    }
}

impl Setting for Numerics {
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|error: model::UnknownNumerics| error.to_string())
    }

    fn to_toml(&self) -> String {
        quoted(self.to_string())
    }
}

impl Setting for Isa {
    fn from_text(text: &str) -> Result<Self, String> {
        let available = Self::available();
        available.iter().copied().find(|isa| isa.to_string() == text).ok_or_else(|| {
            let names: Vec<String> = available.iter().map(Self::to_string).collect();
            format!("this CPU has no `{text}`; it has {}", names.join(", "))
        })
    }

    fn to_toml(&self) -> String {
        quoted(self.to_string())
    }
}

impl Setting for LogFormat {
    fn from_text(text: &str) -> Result<Self, String> {
        text.parse()
    }

    fn to_toml(&self) -> String {
        quoted(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}
