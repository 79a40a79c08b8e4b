//! Configuration values as they were written, each with the place it was
//! written at, so that whoever refuses one can name file and line, variable or
//! flag. Knows no key and no type.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use crate::config::ConfigError;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    File {
        path: PathBuf,
        line: usize,
    },
    Environment(String),
    /// `--set`, or a flag of its own such as `--http`.
    Flag(String),
    /// Nobody wrote it: it follows from other settings.
    Derived,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment(variable) => write!(f, "environment variable {variable}"),
            Self::Flag(flag) => f.write_str(flag),
            Self::Derived => f.write_str("derived setting"),
        }
    }
}

/// A value before it has a type: TOML from a file, text from everywhere else.
#[derive(Clone, Debug, PartialEq)]
pub enum Raw {
    Toml(Value),
    Text(String),
}

/// The values given for one section, by key. Later ones replace earlier ones.
#[derive(Clone, Debug, Default)]
pub struct Given(BTreeMap<String, (Raw, Origin)>);

impl Given {
    pub fn put(&mut self, key: impl Into<String>, raw: Raw, origin: Origin) {
        self.0.insert(key.into(), (raw, origin));
    }

    /// A value that follows from other settings.
    pub fn derive(&mut self, key: &str, value: impl Into<Value>) {
        self.put(key, Raw::Toml(value.into()), Origin::Derived);
    }

    pub fn get(&self, key: &str) -> Option<&(Raw, Origin)> {
        self.0.get(key)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Raw, &Origin)> {
        self.0.iter().map(|(key, (raw, origin))| (key.as_str(), raw, origin))
    }

    /// Takes over all of `other`'s values.
    pub fn extend(&mut self, other: Given) {
        self.0.extend(other.0);
    }

    /// Adds the variables that start with `prefix`, such as `MOEMESH_ROUTER_`.
    ///
    /// Kubernetes sets variables of this shape itself for a service called
    /// `moemesh-router` (`…_SERVICE_HOST`, `…_PORT_7000_TCP`); those are no keys.
    pub fn add_environment(
        &mut self,
        prefix: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) {
        for (variable, value) in variables {
            let Some(key) = variable.strip_prefix(prefix) else { continue };
            if key == "PORT" || key.starts_with("PORT_") || key.starts_with("SERVICE_") {
                continue;
            }
            let key = key.to_ascii_lowercase();
            self.put(key, Raw::Text(value), Origin::Environment(variable));
        }
    }

    /// Adds `--set key=value` pairs.
    pub fn add_pairs(&mut self, pairs: &[String]) -> Result<(), ConfigError> {
        for pair in pairs {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| ConfigError::Set(pair.clone()))?;
            self.put(key.trim(), Raw::Text(value.trim().to_owned()), Origin::Flag("--set".into()));
        }
        Ok(())
    }
}

/// A configuration file: keys at the top, and one level of `[section]`s.
#[derive(Debug, Default)]
pub struct File {
    pub top: Given,
    /// Section name → where it starts and what it holds.
    pub sections: BTreeMap<String, (Origin, Given)>,
}

impl File {
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// `path` only serves messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let at = |start: usize| Origin::File { path: path.to_owned(), line: line(text, start) };
        let refused = |error: toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            line: line(text, error.span().map_or(0, |span| span.start)),
            problem: error.message().replace('\n', " "),
        };
        // Parsed twice: once for the values, once for where their keys are.
        let values: Table = toml::from_str(text).map_err(refused)?;
        let places = DeTable::parse(text).map_err(refused)?;
        let mut file = Self::default();
        for (key, value) in values {
            let (start, inner) = place(places.get_ref(), &key);
            match (value, inner) {
                (Value::Table(values), Some(inner)) => {
                    let mut section = Given::default();
                    for (key, value) in values {
                        let start = place(inner, &key).0;
                        section.put(key, Raw::Toml(value), at(start));
                    }
                    file.sections.insert(key, (at(start), section));
                }
                (value, _) => file.top.put(key, Raw::Toml(value), at(start)),
            }
        }
        Ok(file)
    }
}

/// This process's environment. What is not UTF-8 is no setting of ours.
pub fn variables() -> Vec<(String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// Byte offset of `key` in the table, and the table it holds if it holds one.
fn place<'t, 'i>(table: &'t DeTable<'i>, key: &str) -> (usize, Option<&'t DeTable<'i>>) {
    let found = table.iter().find(|(name, _)| name.get_ref() == key);
    found.map_or((0, None), |(name, value): (_, &Spanned<DeValue<'_>>)| {
        let inner = match value.get_ref() {
            DeValue::Table(inner) => Some(inner),
            _ => None,
        };
        (name.span().start, inner)
    })
}

/// The line, counted from 1, that byte `offset` of `text` is on.
fn line(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
}
